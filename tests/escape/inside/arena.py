"""Called in a session: its arenas, the memfds that it shares with its client, are to keep size and seals."""

from __future__ import annotations

import errno
import fcntl
import importlib
import os
from typing import Any

from tests.escape.inside import kernel, memory


def acts(fd: int) -> list[Any]:
    size = os.fstat(fd).st_size
    return [
        lambda: os.ftruncate(fd, 0),
        lambda: os.ftruncate(fd, size * 2),
        lambda: os.posix_fallocate(fd, 0, size * 2),
        lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ]


def change(tensor: Any, thread: str = "main") -> list[list[str]]:
    """The errors met at each of the session's memfds. `tensor` is in one of the client's."""
    if thread == "resident":
        found: list[list[str]] = importlib.import_module("resident").ask(change, {"tensor": tensor})
        return found
    return [[errno.errorcode.get(n, "done") for n in kernel.first_errno(acts(fd))] for fd in memory.memfds()]


def control() -> list[str]:
    """The same at one without seals."""
    fd = os.memfd_create("arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 4096)
        return [errno.errorcode.get(n, "done") for n in kernel.first_errno(acts(fd))]
    finally:
        os.close(fd)
