"""Whether anything beneath some directories changes: inotify on each directory of them.

What is told is only that something did, and where; it is acted on at once, and once more when all is quiet.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterable

from nsutil.inotify import Inotify
from pocketd import events

_MOST = 4096  # directories


class Files:
    """Watches until `close`. `changed(path)` is called at the first change, `quiet()` when there was none for a while.

    `apart`: directories in these that do not count.
    """

    def __init__(
        self,
        name: str,
        tops: Iterable[str],
        apart: Iterable[str],
        changed: Callable[[str], None],
        quiet: Callable[[], None],
        seconds: float,
    ):
        self._name = name
        self._tops = list(tops)
        self._apart = frozenset(apart)
        self._changed = changed
        self._quiet = quiet
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._inotify = Inotify()
        self._count = 0
        self._add()
        asyncio.get_running_loop().add_reader(self._inotify.fileno(), self.look)

    def _add(self) -> None:
        self._count = 0
        try:
            for top in self._tops:
                self._beneath(top)
        except OSError as e:
            hint = "raise fs.inotify.max_user_watches" if e.errno == errno.ENOSPC else None
            events.emit("files-not-watched", "warning", pocket=self._name, why=str(e), hint=hint)

    def _beneath(self, top: str) -> None:
        directories = [top if os.path.isdir(top) else os.path.dirname(top)]
        while directories and self._count < _MOST:
            directory = directories.pop()
            try:
                self._inotify.add(directory)
                with os.scandir(directory) as entries:
                    found = [e.path for e in entries if e.is_dir(follow_symlinks=False)]
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue  # gone since
            self._count += 1
            if os.path.isdir(top):
                directories += [path for path in found if path not in self._apart]

    def look(self) -> None:
        """Act on what has happened until now."""
        names = [name for name in self._inotify.names() if self._counts(name)]
        if not names:
            return
        self._changed(names[0] or self._tops[0])
        self._add()  # directories that are new
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._calm)

    def _counts(self, name: str) -> bool:
        """A lost event counts as one."""
        ours = not name or any(_beneath(name, top) for top in self._tops)
        return ours and not any(_beneath(name, top) for top in self._apart)

    def _calm(self) -> None:
        self._timer = None
        self._quiet()

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        asyncio.get_running_loop().remove_reader(self._inotify.fileno())
        self._inotify.close()


def _beneath(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")
