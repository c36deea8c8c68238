"""Paths from outside, resolved beneath a directory by the kernel (openat2(2), RESOLVE_BENEATH)."""

from __future__ import annotations

import ctypes
import os

from nsutil.syscalls import SYS_OPENAT2, syscall

# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_BENEATH = 0x08


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Open the relative `path` beneath the descriptor `directory`; no `..`, absolute path or link leads out of it.

    The caller owns the descriptor. Raises OSError: EXDEV for a path that leads out, ENOENT, ENOSYS before Linux 5.6.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
    name = ctypes.c_char_p(os.fsencode(path))
    size = ctypes.c_size_t(ctypes.sizeof(how))
    return syscall(SYS_OPENAT2, directory, name, ctypes.byref(how), size, call="openat2", detail=path)
