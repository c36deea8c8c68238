"""The pages that a run makes its own, noted in one run and made ahead of time in the slots of later ones.

Most of a first result goes into copying pages that a child has in common with its template, one fault for each. Which
they are /proc/self/pagemap tells (nsutil/pages.c): those of private memory that are mapped by this process alone.
Linux 5.14 makes them all at once by MADV_POPULATE_WRITE, and maps a file's pages by MADV_POPULATE_READ; where many of 2
MiB are wanted, as beneath tensors, Linux 6.1 makes one huge page of them by MADV_COLLAPSE.
linux/Documentation/admin-guide/mm/pagemap.rst, .../transhuge.rst, madvise(2). (Ustiugov and others, REAP, ASPLOS 2021,
made working sets ahead for the snapshots of virtual machines.)
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from typing import Dict, Iterable, Iterator, List, Tuple

from nsutil.library import load
from nsutil.syscalls import libc

_HUGE = mmap.PAGESIZE**2 // 8  # bytes of a huge page: a table, one page of entries of 8 bytes, in one
_USED = _HUGE * 3 // 8  # bytes of one that a run has to use: of 2 MiB all take 0.4 ms, one page by itself 3 us
_POPULATE_READ, _POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25  # asm-generic/mman-common.h
_MOST = 1 << 16  # ranges

Range = Tuple[int, int]  # addresses, in bytes


class WorkingSet:
    """Ranges to write to, ranges of files to map, and huge pages with the ranges in them that are written to; each in
    the order of addresses."""

    def __init__(self, own: Iterable[Range] = (), mapped: Iterable[Range] = ()):
        self.own = list(own)[:_MOST]
        self.mapped = list(mapped)[:_MOST]
        self.huge: List[Tuple[Range, List[Range]]] = []

    @property
    def size(self) -> int:
        """Bytes that a process has of its own once they are made."""
        return sum(end - start for start, end in self.own) + len(self.huge) * _HUGE

    @classmethod
    def read(cls, report: int) -> WorkingSet:
        """All that has been noted there."""
        numbers = array.array("Q")
        data = os.pread(report, os.fstat(report).st_size, 0)
        numbers.frombytes(data[: len(data) // 8 * 8])
        own: List[Range] = []
        mapped: List[Range] = []
        at = 0
        while at < len(numbers):
            first, last = at + 2, at + 2 + 2 * (numbers[at] + numbers[at + 1])
            pairs = list(zip(numbers[first:last:2], numbers[first + 1 : last : 2]))
            own += pairs[: numbers[at]]
            mapped += pairs[numbers[at] :]
            at = last
        return cls(_together(own), _together(mapped))

    def here(self) -> WorkingSet:
        """What of it, of a run that has ended, this process, its template, has mapped in the same way. What a run maps
        for itself, and where its threads' heaps grow, is another place each time."""
        writable: List[Range] = []
        readable: List[Range] = []
        for start, end, rights, _ in _maps():
            if rights[1] == "w":
                writable.append((start, end))
            elif rights[0] == "r":
                readable.append((start, end))
        return WorkingSet(_common(self.own, writable), _common(self.mapped, readable))

    def on_huge_pages(self) -> WorkingSet:
        """The same, with a huge page where this process, its template, has mapped all of one and a run uses enough of
        it."""
        used: Dict[int, int] = {}
        for start, end in self.own:
            for first in range(start // _HUGE * _HUGE, end, _HUGE):
                used[first] = used.get(first, 0) + min(end, first + _HUGE) - max(start, first)
        whole = [(first, first + _HUGE) for first, size in used.items() if size >= _USED]
        private = [(start, end) for start, end, rights, name in _maps() if rights == "rw-p" and name in ("", "[heap]")]
        huge = [(start, end) for start, end in _common(whole, private) if end - start == _HUGE]
        edges = [0, *(edge for place in huge for edge in place), 1 << 64]
        found = WorkingSet(_common(self.own, list(zip(edges[::2], edges[1::2]))), self.mapped)
        found.huge = [(place, list(_common(self.own, [place]))) for place in huge]
        return found

    def make(self) -> int:
        """Make them this process's. Returns how many ranges could not be: memory is short, or the kernel is older."""
        own = list(self.own)
        for place, parts in self.huge:
            first = parts[0][0], parts[0][0] + mmap.PAGESIZE  # it takes no pages of which none is written to
            if not (_advise(first, _POPULATE_WRITE) and _advise(place, _MADV_COLLAPSE)):
                own += parts
        made = ((own, _POPULATE_WRITE), (self.mapped, _POPULATE_READ))
        return sum(not _advise(place, advice) for ranges, advice in made for place in ranges)


def _advise(place: Range, advice: int) -> bool:
    start, end = place
    return bool(libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) == 0)


def _together(ranges: List[Range]) -> Iterator[Range]:
    """What lies in any of them, in the order of addresses."""
    first = last = 0
    for start, end in sorted(ranges):
        if start > last:
            if last:
                yield first, last
            first = start
        last = max(last, end)
    if last:
        yield first, last


def _common(ranges: List[Range], others: List[Range]) -> Iterator[Range]:
    """What both have in common."""
    n = 0
    for start, end in ranges:
        while n < len(others) and others[n][1] <= start:
            n += 1
        for first, last in others[n:]:
            if first >= end:
                break
            yield max(start, first), min(end, last)


def note(report: int) -> None:
    """Append to a file, which stays the caller's, what this process, a child of a template, has made its own so far."""
    load().pages_note(report)


def _maps() -> Iterator[Tuple[int, int, str, str]]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, rights, _, _, _, *name = line.split(None, 5)
            start, _, end = addresses.partition("-")
            if name and name[0].startswith("[v"):
                continue  # the kernel's own: vdso, vvar, vsyscall
            yield int(start, 16), int(end, 16), rights, name[0].rstrip("\n") if name else ""
