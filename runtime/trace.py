"""Where a launch's time goes: `pocket run --trace`.

Each process on its way adds what it has just done and when (CLOCK_MONOTONIC, which they have in common), and the worker
prints it before the first line of its program, if its caller asked.
"""

from __future__ import annotations

import os
import time
from typing import Any, List, Tuple


class Trace:
    """Marks so far, as (what was done, seconds)."""

    def __init__(self, marks: Any = ()):
        self.marks: List[Tuple[str, float]] = []
        self.take(marks)

    def take(self, marks: Any) -> None:
        """Those of the processes before, as they came in a message."""
        for mark in marks if isinstance(marks, (list, tuple)) else ():
            if isinstance(mark, (list, tuple)) and len(mark) == 2 and isinstance(mark[1], float):
                self.marks.append((str(mark[0])[:60], mark[1]))

    def mark(self, done: str) -> None:
        self.marks.append((done, time.monotonic()))

    def print(self, asked: Any) -> None:
        """`asked`: when the caller made its request; anything but a number: it wants no trace."""
        if not isinstance(asked, float):
            return
        marks = sorted((mark for mark in self.marks if mark[1] >= asked), key=lambda mark: mark[1])
        lines, before = ["pocket: milliseconds since the request, and since the line before\n"], asked
        for done, when in marks:
            lines.append(f"pocket: {(when - asked) * 1e3:8.3f} {(when - before) * 1e3:8.3f}  {done}\n")
            before = when
        try:
            os.write(2, "".join(lines).encode())
        except OSError:
            pass
