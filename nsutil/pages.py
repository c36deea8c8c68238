"""This process's pages: given back, made huge, shared with its children, or its own again. madvise(2), mremap(2)."""

from __future__ import annotations

import ctypes
import mmap
from typing import List, Optional, Tuple

from nsutil.syscalls import check, error, libc

# asm-generic/mman-common.h, linux/mman.h; MADV_POPULATE_WRITE from Linux 5.14, MADV_COLLAPSE from Linux 6.1
_MADV_DONTNEED, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 4, 23, 25
_PROT_READ_WRITE, _MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS, _MREMAP_MAYMOVE, _MREMAP_FIXED = 0x3, 0x1, 0x2, 0x20, 1, 2
_FAILED = ctypes.c_void_p(-1).value


def trim() -> None:
    """Give the allocator's free memory back to the kernel. malloc_trim(3); a libc without it has nothing to give."""
    try:
        _malloc_trim = ctypes.PyDLL(None).malloc_trim
    except AttributeError:
        return
    _malloc_trim(ctypes.c_size_t(0))


def unmap_files() -> None:
    """Take the pages of files, which are libraries, out of this process's page tables. An import reads far more of them
    than is looked at afterwards (of TensorFlow's 240 MB, half of it relocations): they stay in the page cache, from
    which the kernel can drop them, and this process or a child maps again what it comes to. Private mappings that are
    not written to alone, and none with a page that was changed before: madvise(2), MADV_DONTNEED, would lose it."""
    place: Optional[Tuple[int, int]] = None
    with open("/proc/self/smaps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split(None, 5)
            if not words[0].endswith(":"):
                addresses, rights, inode = words[0], words[1], words[4]
                start, _, end = addresses.partition("-")
                place = (int(start, 16), int(end, 16)) if rights[1::2] == "-p" and inode != "0" else None
            elif words[0] == "Anonymous:" and place and words[1] == "0":
                first, last = place
                libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_OF_HEAP = 32 << 20  # bytes of a block; what is larger has a mapping of its own (HEAP_MAX_SIZE / 2 in malloc.c)


def keep_free_memory() -> bool:
    """Let the allocator keep what is freed until `trim` is called, in this process and its children: what one call has
    needed the next one finds made. mallopt(3). False where the C library is another."""
    try:
        mallopt = libc.mallopt
    except AttributeError:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1) and mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_HEAP))


def heap_end() -> int:
    """An address. brk(2)."""
    return libc.sbrk(0) or 0


def extend_heap(end: int) -> None:
    """Have the heap reach to that address at least, with free memory that no page is made for yet; after
    `keep_free_memory`, which leaves it there. Less where memory is short."""
    blocks: List[int] = []
    while heap_end() < end:
        block = libc.malloc(min(end - heap_end(), _LARGEST_OF_HEAP // 2))
        if not block:
            break
        blocks.append(block)
    for block in blocks:
        libc.free(block)


class _Mallinfo2(ctypes.Structure):
    """struct mallinfo2, mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


_HUGE, _NEXT = 2 << 20, 1 << 20  # bytes: of a huge page, and that a child allocates before it has done much
_BLOCK = 64 << 10  # less than what malloc(3) makes a mapping of its own of


def prepare_heap() -> None:
    """Have the pages of this process where its heap grows next. Where the heap comes into 2 MiB of which nothing is
    there yet, the kernel makes a huge page (glibc.malloc.hugetlb=1), which each child would have to itself for its
    first few words; of one that is there it copies 4 KiB. A C library before glibc 2.33 leaves all as it is."""
    try:
        mallinfo2 = libc.mallinfo2
    except AttributeError:
        return
    mallinfo2.restype = _Mallinfo2
    end = heap_end()
    top = end - mallinfo2().keepcost
    next_page = -(-top // _HUGE) * _HUGE
    if not 0 < top < end or next_page - top >= _NEXT:
        return
    if next_page < end:
        libc.madvise(ctypes.c_void_p(next_page), ctypes.c_size_t(mmap.PAGESIZE), _MADV_POPULATE_WRITE)
        return
    # What is free at a heap's end is given back where it is a huge page or more; so the last word stays.
    blocks: List[int] = []
    while heap_end() == end and len(blocks) < _HUGE // _BLOCK:
        blocks.append(libc.malloc(_BLOCK))
    last = libc.malloc(_BLOCK)
    for block in blocks:
        libc.free(block)
    libc.realloc(last, 1)


def collapse() -> None:
    """Make huge pages of this process's anonymous memory, of each 2 MiB where there is anything: a fork then copies one
    entry instead of 512. The pages are its own afterwards, also where it shared them. madvise(2), MADV_COLLAPSE; an
    older kernel, or one that is short of huge pages, leaves all as it is."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            addresses, rights, _, _, inode, *name = line.split(None, 5)
            if rights == "rw-p" and inode == "0" and name != ["[stack]\n"]:
                start, _, end = addresses.partition("-")
                found.append((int(start, 16), int(end, 16)))
    for first, last in found:
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_COLLAPSE)


def share(start: int, end: int, protection: int) -> None:
    """Make a range of this process's memory a MAP_SHARED mapping of its own, with the same content, that children made
    by fork(2) share with it. No other thread may use it meanwhile. Raises OSError."""
    _replace(start, end, protection, _MAP_SHARED)


def own(start: int, end: int) -> None:
    """Make the pages of a range of a shared mapping this process's own, with what they hold now. What lies there stays
    where it is; whoever else has them mapped shares them no more. Raises OSError."""
    page = mmap.PAGESIZE
    _replace(start // page * page, -(-end // page) * page, _PROT_READ_WRITE, _MAP_PRIVATE)


def _replace(start: int, end: int, protection: int, kind: int) -> None:
    size = end - start
    new = libc.mmap(None, size, _PROT_READ_WRITE, kind | _MAP_ANONYMOUS, -1, 0)
    if new == _FAILED:
        raise error("mmap", f"{size} bytes")
    ctypes.memmove(new, start, size)
    check(libc.mprotect(new, size, protection), "mprotect", f"{size} bytes")
    if libc.mremap(new, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, start) == _FAILED:
        raise error("mremap", f"{size} bytes")
