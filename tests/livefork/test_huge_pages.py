"""Huge pages of a process that is to be forked: the same contents, and what it shares with nobody."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nsutil import pages

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
        pages.collapse()
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


WORKING_SET = """
import ctypes, mmap, os, resource
from runtime import workingset
PAGE, HUGE = mmap.PAGESIZE, 2 << 20
area = mmap.mmap(-1, 10 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[::PAGE] = b"1" * (10 * HUGE // PAGE)
begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
    area[: 6 * HUGE : 2 * PAGE] = b"2" * (3 * HUGE // PAGE)  # every second page of 6, one in 64 of the others
    area[6 * HUGE :: 64 * PAGE] = b"2" * (HUGE // 16 // PAGE)
def first():
    run()
    workingset.note(report)
    area[9 * HUGE :: PAGE] = b"3" * (HUGE // PAGE)  # its end
    workingset.note(report)
report = os.memfd_create("pages")
child_says(first, clone.fork)
found = workingset.WorkingSet.read(report).here().on_huge_pages()
here = [place for place, _ in found.huge if begin <= place[0] < begin + 10 * HUGE]
assert len(here) in (5, 6, 7), here  # the first and the last of each part may not be whole
assert all(start % HUGE == 0 and end - start == HUGE for start, end in here)
"""


def test_pages_that_a_run_makes_its_own_are_made_ahead(python: Callable[..., str]) -> None:
    """Those of its end too; on huge pages where it needs many of one, and with the same contents."""
    python(
        WORKING_SET
        + """
def second():
    failed = found.make()
    had = faults()
    run()
    area[9 * HUGE :: PAGE] = b"3" * (HUGE // PAGE)
    took = faults() - had
    expected = [b"2" if n % 2 == 0 else b"1" for n in range(6 * HUGE // PAGE)]
    expected += [b"2" if n % 64 == 0 else b"1" for n in range(3 * HUGE // PAGE)] + [b"3"] * (HUGE // PAGE)
    return failed, took, area[::PAGE] == b"".join(expected)
failed, took, same = child_says(second, clone.fork)
assert (failed, same) == (0, True)
assert took < 50, took
"""
    )


def test_of_a_huge_page_no_small_ones_are_made_first(python: Callable[..., str]) -> None:
    python(
        """
import ctypes, mmap, os, resource
from runtime import workingset
PAGE, HUGE = mmap.PAGESIZE, 2 << 20
area = mmap.mmap(-1, 4 * HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[:] = b"1" * len(area)
report = os.memfd_create("pages")
def first():
    area[:] = b"2" * len(area)
    workingset.note(report)
child_says(first, clone.fork)
found = workingset.WorkingSet.read(report).here().on_huge_pages()
begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
found.own, found.mapped = [], []
found.huge = [huge for huge in found.huge if begin <= huge[0][0] < begin + len(area)]
assert len(found.huge) >= 3
def second():
    had = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    failed = found.make()
    return failed, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - had, area[:] == b"1" * len(area)
failed, made, same = child_says(second, clone.fork)
assert (failed, same) == (0, True) and made < 2 * HUGE // PAGE, (failed, made)  # where one could not be, too
"""
    )


def test_small_ones_are_made_where_no_huge_one_can_be(python: Callable[..., str]) -> None:
    """Here, as this process is to have none (prctl(2))."""
    python(
        WORKING_SET
        + """
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
def second():
    had = faults()
    failed = found.make()
    made = faults() - had
    had = faults()
    run()
    return failed, made, faults() - had
failed, made, took = child_says(second, clone.fork)
assert failed == 0 and made > 1500 and took < 50, (failed, made, took)
"""
    )
