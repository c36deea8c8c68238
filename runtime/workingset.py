"""The pages that a run makes its own, noted in one run and made ahead of time in the slots of later ones.

Most of a first result goes into copying pages that a child has in common with its template, one fault for each. Which
they are /proc/self/pagemap tells: those of private memory that are mapped by this process alone. Linux 5.14 makes them
all at once by MADV_POPULATE_WRITE, and maps a file's pages by MADV_POPULATE_READ.
linux/Documentation/admin-guide/mm/pagemap.rst, madvise(2). (Ustiugov and others, REAP, ASPLOS 2021, did so for the
snapshots of virtual machines.)
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from typing import Iterable, Iterator, List, Tuple

from nsutil.syscalls import libc

_PAGE = mmap.PAGESIZE
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # asm-generic/mman-common.h
_PRESENT, _FILE, _ALONE = 1 << 63, 1 << 61, 1 << 56
_LARGEST = 1 << 34  # bytes of a mapping that is looked at: more is reserved, not used
_MOST = 1 << 16  # ranges

Range = Tuple[int, int]  # addresses, in bytes


class WorkingSet:
    """Ranges to write to, and ranges of files to map; each in the order of addresses."""

    def __init__(self, own: Iterable[Range] = (), mapped: Iterable[Range] = ()):
        self.own = list(own)[:_MOST]
        self.mapped = list(mapped)[:_MOST]

    @property
    def size(self) -> int:
        """Bytes that a process has of its own once they are made."""
        return sum(end - start for start, end in self.own)

    def pack(self) -> bytes:
        numbers = array.array("Q", [len(self.own)])
        for start, end in (*self.own, *self.mapped):
            numbers.extend((start, end))
        return numbers.tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> WorkingSet:
        numbers = array.array("Q")
        numbers.frombytes(data[: len(data) // 8 * 8])
        if not numbers:
            return cls()
        pairs = list(zip(numbers[1::2], numbers[2::2]))
        return cls(pairs[: numbers[0]], pairs[numbers[0] :])

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

    def make(self) -> int:
        """Make them this process's. Returns how many ranges could not be: memory is short, or the kernel is older."""
        failed = 0
        for ranges, advice in ((self.own, _POPULATE_WRITE), (self.mapped, _POPULATE_READ)):
            for start, end in ranges:
                failed += libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice) != 0
        return failed


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


def measure() -> WorkingSet:
    """What this process, a child of a template, has made its own so far."""
    own: List[Range] = []
    mapped: List[Range] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for start, end, rights, name in _maps():
            if end - start > _LARGEST or rights[3] != "p" or rights[:2] == "--":
                continue
            pages = array.array("Q")
            pages.frombytes(os.pread(pagemap.fileno(), (end - start) // _PAGE * 8, start // _PAGE * 8))
            if rights[1] == "w":
                wanted = (n for n, page in enumerate(pages) if page & _ALONE and page & _PRESENT and not page & _FILE)
                own += _ranges(start, wanted, 0)
            elif name.startswith("/"):
                mapped += _ranges(start, (n for n, page in enumerate(pages) if page & _PRESENT), 8)
    return WorkingSet(own, mapped)


def _maps() -> Iterator[Tuple[int, int, str, str]]:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, rights, _, _, _, *name = line.split(None, 5)
            start, _, end = addresses.partition("-")
            if name and name[0].startswith("[v"):
                continue  # the kernel's own: vdso, vvar, vsyscall
            yield int(start, 16), int(end, 16), rights, name[0] if name else ""


def _ranges(start: int, pages: Iterable[int], gap: int) -> Iterator[Range]:
    """Neighbouring pages as one range, with gaps of up to `gap` pages in it."""
    first = last = -1
    for page in pages:
        if first >= 0 and page - last <= gap + 1:
            last = page
            continue
        if first >= 0:
            yield start + first * _PAGE, start + (last + 1) * _PAGE
        first = last = page
    if first >= 0:
        yield start + first * _PAGE, start + (last + 1) * _PAGE
