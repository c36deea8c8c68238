"""Huge pages of a process that is to be forked: the same contents, and what it shares with nobody."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nsutil import memory

SIZE = 32 << 20
HUGE = 2 << 20


def huge() -> int:
    """Bytes of this process's anonymous huge pages (proc_pid_smaps(5))."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(r"^AnonHugePages: +(\d+) kB$", text, re.MULTILINE)[0]) << 10


def test_small_pages_become_huge_ones_and_hold_the_same() -> None:
    with mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        for at in range(0, SIZE, mmap.PAGESIZE):  # one by one, so that they are small
            area[at : at + 8] = at.to_bytes(8, "little")
        memory.collapse()
        if not Path("/sys/kernel/mm/transparent_hugepage").exists():
            pytest.skip("this kernel has no transparent huge pages")
        assert huge() >= SIZE - 2 * HUGE  # its ends are not whole ones
        for at in range(0, SIZE, mmap.PAGESIZE):
            assert area[at : at + 9] == at.to_bytes(8, "little") + b"\0"


OBJECTS = """
import gc, os, re, sys
from pathlib import Path
from nsutil import arenas
def shown(field):
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.findall(rf"^{field}: +(\\d+) kB$", text, re.MULTILINE)[0]) >> 10
def some():
    return [(i, str(i)) for i in range(400_000)]
"""


def test_objects_of_python_lie_on_huge_pages(python: Callable[..., str]) -> None:
    """Those that were there before stay where they are, and can be given back; children have their own."""
    if "never" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().partition("[")[2].partition("]")[0]:
        pytest.skip("this kernel has transparent huge pages switched off")
    python(
        OBJECTS
        + """
before = some()
arenas.on_huge_pages()
had = shown("AnonHugePages")
later = [some(), some()]
assert shown("AnonHugePages") - had >= 64, shown("AnonHugePages")
del before
gc.collect()
assert later[0] == later[1] == some()
def act():
    mine = some()
    return mine == later[0] == later[1]
assert child_says(act, clone.fork)
held = shown("Anonymous")
later.clear()
gc.collect()
assert shown("Anonymous") < held - 50
def addresses():
    return int(Path("/proc/self/statm").read_text().split()[0])
had = addresses()
for _ in range(8):
    some()
assert addresses() - had < 64 << 20 >> 12  # what was given back is used again
"""
    )


def test_memory_of_other_sizes_is_given_back(python: Callable[..., str]) -> None:
    """Python takes parts of its stack of frames from the same place (pystate.c), of another size, again and again."""
    python(
        OBJECTS
        + """
arenas.on_huge_pages()
def deep(n):
    return n and deep(n - 1)
sys.setrecursionlimit(5000)
deep(3000)
had = shown("Anonymous")
for _ in range(3000):
    deep(3000)
assert shown("Anonymous") - had < 10, shown("Anonymous") - had
"""
    )
