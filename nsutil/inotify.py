"""Changes in directories: inotify(7), as one descriptor that is readable when something happened."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from nsutil.syscalls import libc

# sys/inotify.h
IN_MODIFY, IN_ATTRIB, IN_MOVED_FROM, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x4, 0x40, 0x80, 0x100, 0x200
IN_DELETE_SELF, IN_MOVE_SELF = 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED = 0x4000, 0x8000
_PARTS = 8  # reads of one turn: about what a queue holds (fs.inotify.max_queued_events)
IN_ONLYDIR, IN_MASK_ADD = 0x01000000, 0x20000000
_EVENT = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, len; then the name
_SELF = IN_DELETE_SELF | IN_MOVE_SELF
_NAMES = IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | _SELF
_CONTENT = IN_MODIFY | _NAMES


class Change(NamedTuple):
    path: str
    replaced: bool  # another file, or none, has that name now


class Inotify:
    """It owns its descriptor. Told is what something happened to, not what: whoever is woken looks at the files."""

    def __init__(self) -> None:
        fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), f"inotify_init1: {os.strerror(ctypes.get_errno())}")
        self._fd = fd
        self._watched: dict[int, str] = {}

    def add(self, directory: str, content: bool = True) -> None:
        """Watch the names in a directory and what is written to them; without `content`, whether this file or directory
        itself is moved or removed. Raises OSError: ENOSPC when the user's watches (fs.inotify.max_user_watches) are
        used up, FileNotFoundError, NotADirectoryError."""
        mask = IN_MASK_ADD | (_CONTENT | IN_ONLYDIR if content else _SELF)
        watch = libc.inotify_add_watch(self._fd, os.fsencode(directory), mask)
        if watch < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_add_watch {directory}: {os.strerror(number)}")
        self._watched[watch] = directory

    def watches(self, directory: str) -> bool:
        return directory in self._watched.values()

    def remove(self, directory: str) -> None:
        for watch in [watch for watch, known in self._watched.items() if known == directory]:
            libc.inotify_rm_watch(self._fd, watch)
            del self._watched[watch]

    def fileno(self) -> int:
        return self._fd

    def changes(self) -> list[Change]:
        """The paths that something has happened to, by the directories as they were added; "" where some were lost, or
        are left for the next time: whoever makes them may go on without end."""
        found = []
        for number, part in enumerate(self._parts(), 1):
            at = 0
            while at < len(part):
                watch, mask, _, size = _EVENT.unpack_from(part, at)
                name = part[at + _EVENT.size : at + _EVENT.size + size].rstrip(b"\0")
                at += _EVENT.size + size
                directory = self._watched.get(watch)
                if mask & IN_Q_OVERFLOW:
                    found.append(Change("", True))
                elif directory is not None and mask & _CONTENT:
                    path = os.path.join(directory, os.fsdecode(name)) if name else directory
                    found.append(Change(path, bool(mask & _NAMES)))
                if mask & IN_IGNORED:  # removed with its directory, or by `remove`
                    self._watched.pop(watch, None)
            if number == _PARTS:
                found.append(Change("", True))
        return found

    def _parts(self) -> Iterator[bytes]:
        try:
            for _ in range(_PARTS):
                yield os.read(self._fd, 65536)
        except BlockingIOError:
            pass

    def drain(self) -> None:
        """Forget what was told so far."""
        for _ in self._parts():
            pass

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
