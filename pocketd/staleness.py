"""Whether the files that a template imported are still those that lie on disk.

inotify wakes us; what is compared then is each file's time, size and inode, so a change that happened while no pocketd
ran is seen too, and a file that was written again just as it was costs nothing but a look.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import msgpack

from nsutil import memory
from nsutil.inotify import Inotify
from pocketd import events

QUIET = 2.0  # seconds without a change before one is acted on: an installation writes many files
LONGEST = 30.0  # seconds after which it is acted on all the same
_MOST = 64 << 20  # bytes of a snapshot


class Staleness:
    """Watches the files of one generation's templates. `changed` is called when one of them is another."""

    def __init__(self, name: str, root: Path | None, changed: Callable[[], None]):
        self._name = name
        self._root = str(root) if root else ""
        self._changed = changed
        self._files: dict[str, tuple[int, int, int]] = {}
        self._directories: set[str] = set()
        self._late: set[str] = set()  # files that changed while a template loaded
        self._inotify: Inotify | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._first = 0.0

    def watch(self, snapshot: int) -> None:
        """Watch the files that runtime.imported.snapshot names. `snapshot` stays the caller's."""
        listed = msgpack.unpackb(memory.read_sealed(snapshot, _MOST), unicode_errors="surrogateescape")
        for path, mtime, size, inode, late, *real in listed:
            found = self._root + str(real[0]) if self._root and real else self._root + str(path)
            self._files[found] = (int(mtime), int(size), int(inode))
            if late and found not in self._late:  # once: some packages write files of theirs when they are imported
                self._late.add(found)
                self._files[found] = (0, 0, 0)
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._woken)
            for directory in {os.path.dirname(path) for path in self._files} - self._directories:
                self._add(directory)
        except OSError as e:
            hint = "raise fs.inotify.max_user_watches" if e.errno == errno.ENOSPC else None
            events.emit("files-not-watched", "warning", service=self._name, why=str(e), hint=hint)
        if self._stale():
            self._woken()

    def _add(self, directory: str) -> None:
        assert self._inotify
        try:
            self._inotify.add(directory)
            self._directories.add(directory)
        except (FileNotFoundError, NotADirectoryError):
            pass  # gone since: `_stale` sees that

    def _woken(self) -> None:
        loop = asyncio.get_running_loop()
        if self._inotify:
            self._inotify.drain()
        if self._timer:
            self._timer.cancel()
        else:
            self._first = loop.time()
        delay = min(QUIET, max(0.0, self._first + LONGEST - loop.time()))
        self._timer = loop.call_later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        stale = self._stale()
        if stale:
            events.emit("files-changed", "notice", service=self._name, count=len(stale), first=stale[0])
            self.forget()
            self._changed()

    def _stale(self) -> list[str]:
        return [path for path, known in self._files.items() if _identity(path) != known]

    def forget(self) -> None:
        """The templates that were made of these files are made again, and name theirs anew. A directory may be another
        by then, of the same name, which is not watched yet."""
        self._files.clear()
        self._directories.clear()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._inotify:
            asyncio.get_running_loop().remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None


def _identity(path: str) -> tuple[int, int, int]:
    try:
        s = os.stat(path)
    except OSError:
        return (0, 0, 0)
    return (s.st_mtime_ns, s.st_size, s.st_ino)
