"""memfds and their seals.

A mapping of a memfd that its owner can shrink is a SIGBUS waiting to happen, so the receiver checks seals and size
before it maps or reads (memfd_create(2), "File sealing"; fcntl(2), F_ADD_SEALS).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import stat

from nsutil.syscalls import check, error, libc

# linux/fcntl.h (fcntl exports these from Python 3.8 on Linux)
F_ADD_SEALS = 1033
F_GET_SEALS = 1034
F_SEAL_SEAL = 0x01
F_SEAL_SHRINK = 0x02
F_SEAL_GROW = 0x04
F_SEAL_WRITE = 0x08

# An arena's size is fixed for good; its contents are not.
ARENA_SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW
# A message's body is fixed altogether.
MESSAGE_SEALS = ARENA_SEALS | F_SEAL_WRITE


class SealError(Exception):
    """A memfd that is not what it must be: not a memfd, not sealed, too long."""


def create(size: int, name: str) -> int:
    """A memfd of `size` bytes with ARENA_SEALS: its size can never change. The caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, F_ADD_SEALS, ARENA_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def sealed(body: bytes, name: str) -> int:
    """A memfd that holds `body` and can never change. The caller owns the descriptor."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(body)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, F_ADD_SEALS, MESSAGE_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_sealed(fd: int, seals: int, limit: int) -> int:
    """The size in bytes of the memfd `fd`, once the kernel has said that it has `seals` and is at most `limit` bytes.

    Raises SealError otherwise.
    """
    try:
        have = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        raise SealError("the descriptor is not a memfd") from None
    if have & seals != seals:
        raise SealError(f"the memfd is not sealed: it has seals {have:#x}, it needs {seals:#x}")
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise SealError(f"the memfd has {status.st_size} bytes; at most {limit} are accepted")
    return status.st_size


def read_sealed(fd: int, limit: int) -> bytes:
    """The contents of a memfd with MESSAGE_SEALS. Raises SealError when it is anything else."""
    size = check_sealed(fd, MESSAGE_SEALS, limit)
    parts, at = [], 0
    while at < size:
        part = os.pread(fd, size - at, at)
        if not part:
            raise SealError("the memfd is shorter than its size")
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def trim() -> None:
    """Give the allocator's free memory back to the kernel. malloc_trim(3); a libc without it has nothing to give."""
    try:
        _malloc_trim = ctypes.PyDLL(None).malloc_trim
    except AttributeError:
        return
    _malloc_trim(ctypes.c_size_t(0))


_MADV_COLLAPSE = 25  # asm-generic/mman-common.h, Linux 6.1


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


# asm-generic/mman-common.h, linux/mman.h
_PROT_READ_WRITE, _MAP_SHARED, _MAP_PRIVATE, _MAP_ANONYMOUS, _MREMAP_MAYMOVE, _MREMAP_FIXED = 0x3, 0x1, 0x2, 0x20, 1, 2
_FAILED = ctypes.c_void_p(-1).value


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
