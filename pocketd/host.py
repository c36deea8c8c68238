"""This host as services need it: its cgroup2, where their scopes are made, where sockets and state lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cgroup.hierarchy import Hierarchy
from pocketd.scopes import Scopes


@dataclass(frozen=True)
class Host:
    hierarchy: Hierarchy
    scopes: Scopes
    runtime_dir: Path
    state_dir: Path

    @property
    def models(self) -> Path:
        """Where private copies of model files lie."""
        return self.state_dir / "models"
