"""Huge pages of a process that is to be forked: the same contents, and what it shares with nobody."""

from __future__ import annotations

import mmap
import re
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
