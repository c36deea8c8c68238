"""Programs to compare with: those that `deploy/prepare bench` unpacked beside the project, else this host's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / ".cache/peers/root"
LIBRARIES = [str(path) for path in ROOT.glob("usr/lib/*-linux-gnu")]


class Missing(Exception):
    """A peer that this host cannot show; the text says why."""


def program(name: str) -> str:
    """Its absolute path. Raises Missing."""
    for directory in ("usr/bin", "usr/sbin"):
        if (ROOT / directory / name).exists():
            return str(ROOT / directory / name)
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if not found:
        raise Missing(f"{name} is not there: `deploy/prepare bench` fetches it from Debian")
    return found


def environment() -> dict[str, str]:
    """What such a program needs to find its libraries."""
    return {"LD_LIBRARY_PATH": ":".join(LIBRARIES)} if LIBRARIES else {}
