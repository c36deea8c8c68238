"""Paths from outside, resolved by the kernel with no surprises (openat2(2)): beneath a directory, or without links."""

from __future__ import annotations

import ctypes
import os

from nsutil.syscalls import SYS_OPENAT2, syscall

# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08


_AT_FDCWD = -100


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Open the relative `path` beneath the descriptor `directory`; no `..`, absolute path or link leads out of it.

    The caller owns the descriptor. Raises OSError: EXDEV for a path that leads out, ENOENT, ENOSYS before Linux 5.6.
    """
    return _openat2(directory, path, flags, RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)


def open_as_named(path: str | os.PathLike[str], flags: int) -> int:
    """Open an absolute path of which no part is a symbolic link, whoever may have changed a directory on the way.

    The caller owns the descriptor. Raises OSError: ELOOP where there is a link.
    """
    return _openat2(_AT_FDCWD, os.fspath(path), flags, RESOLVE_NO_SYMLINKS)


def _openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    name = ctypes.c_char_p(os.fsencode(path))
    size = ctypes.c_size_t(ctypes.sizeof(how))
    return syscall(SYS_OPENAT2, directory, name, ctypes.byref(how), size, call="openat2", detail=path)
