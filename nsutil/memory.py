"""memfds and their seals.

A mapping of a memfd that its owner can shrink is a SIGBUS waiting to happen, so the receiver checks seals and size
before it maps or reads (memfd_create(2), "File sealing"; fcntl(2), F_ADD_SEALS).
"""

from __future__ import annotations

import fcntl
import os
import stat

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
