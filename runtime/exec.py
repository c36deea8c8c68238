"""The `exec` runtime: any program of the service's root file system, executed in a worker by a small launcher.

The launcher is an ordinary template with nothing loaded; its worker executes the program (runtime.cold), so these
workers are init's children like all others.
"""

from __future__ import annotations

from typing import Dict, List, Tuple

VARIABLES: Tuple[str, ...] = ()


def defaults() -> Dict[str, str]:
    return {}


ENVIRONMENT: Dict[str, str] = {}


def preload(names: List[str]) -> None:
    """Nothing is loaded."""
