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
import errno
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
    """Ranges to write to, and ranges of files to map."""

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

    def within(self, mappings: List[Range]) -> WorkingSet:
        """Only what is mapped here too: a run's later mappings are not its template's."""

        def inside(pair: Range) -> bool:
            return any(start <= pair[0] and pair[1] <= end for start, end in mappings)

        return WorkingSet(filter(inside, self.own), filter(inside, self.mapped))

    def make(self) -> int:
        """Make them this process's. Returns how many ranges could not be: the kernel is older, or memory is short."""
        failed = 0
        for ranges, advice in ((self.own, _POPULATE_WRITE), (self.mapped, _POPULATE_READ)):
            for start, end in ranges:
                if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice):
                    if ctypes.get_errno() == errno.EINVAL:  # before Linux 5.14
                        return len(self.own) + len(self.mapped)
                    failed += 1
        return failed


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


def mappings() -> List[Range]:
    """Where something is mapped, neighbours joined."""
    found: List[List[int]] = []
    for start, end, _, _ in _maps():
        if found and found[-1][1] == start:
            found[-1][1] = end
        else:
            found.append([start, end])
    return [(start, end) for start, end in found]


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
