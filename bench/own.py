"""What the examples have and the benchmarks use too: a daemon of one's own, memory by the kernel's word, YOLOv3."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path += [str(EXAMPLES / "faces"), str(EXAMPLES / "yolov3")]

from measure import Memory, distributions_size, memory  # noqa: E402
from own_pocketd import BIN, OwnPocketd, Trouble, cgroup2  # noqa: E402

__all__ = ["BIN", "EXAMPLES", "Memory", "OwnPocketd", "Trouble", "cgroup2", "distributions_size", "memory"]
