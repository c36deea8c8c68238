"""Changes in directories: inotify(7), as one descriptor that is readable when something happened."""

from __future__ import annotations

import ctypes
import os

from nsutil.syscalls import libc

# sys/inotify.h
IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_ONLYDIR = 0x01000000
_CONTENT = IN_MODIFY | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF


class Inotify:
    """It owns its descriptor. What happened is not told: whoever is woken looks at the files themselves."""

    def __init__(self) -> None:
        fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"inotify_init1: {os.strerror(ctypes.get_errno())}")
        self._fd = fd

    def add(self, directory: str) -> None:
        """Watch the names in a directory and what is written to them. Raises OSError: ENOSPC when the user's watches
        (fs.inotify.max_user_watches) are used up, FileNotFoundError, NotADirectoryError."""
        if libc.inotify_add_watch(self._fd, os.fsencode(directory), _CONTENT | IN_ONLYDIR) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_add_watch {directory}: {os.strerror(number)}")

    def fileno(self) -> int:
        return self._fd

    def drain(self) -> None:
        """Forget what was told so far."""
        try:
            while os.read(self._fd, 65536):
                pass
        except BlockingIOError:
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
