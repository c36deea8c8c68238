"""Changes of a pocket by its author: its pocket.toml is read again after two quiet seconds.

The rest of the configuration is the operator's, and is read again at the operator's word alone.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from nsutil.inotify import Inotify
from pocketd import events
from pocketd.config import AUTHORS_FILE
from pocketd.staleness import QUIET

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

Identity = tuple[int, int, int] | None
_ABSENT = 10.0  # seconds from one look for a pocket's directory that is not there to the next


class Authors:
    """Watches the directories of all pockets. What else happens in them wakes it, and is found to be nothing."""

    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._known: dict[str, Identity] = {}
        self._inotify: Inotify | None = None
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Watch the pockets that there are now; called again whenever the configuration was read."""
        self.close()
        config = self.daemon.config
        self._known = {name: _identity(str(p.dir)) for name, p in config.pockets.items()}
        try:
            self._inotify = Inotify()
            for pocket in config.pockets.values():
                self._inotify.add(str(pocket.dir))
        except OSError as e:
            events.emit("pockets-not-watched", "warning", why=str(e))
        if self._inotify:
            asyncio.get_running_loop().add_reader(self._inotify.fileno(), self._woken)

    def _woken(self) -> None:
        assert self._inotify
        self._inotify.drain()
        if self._timer is None:  # looked at once in that time, however busy a directory is
            self._timer = asyncio.get_running_loop().call_later(QUIET, self._look)

    def _look(self) -> None:
        self._timer = None
        changed, gone = [], False
        for name, known in list(self._known.items()):
            pocket = self.daemon.config.pockets.get(name) or self.daemon.last_right.get(name)
            found = None
            if pocket:
                gone |= not self._watch(str(pocket.dir))
                found = _identity(str(pocket.dir))
            if found != known:
                self._known[name] = found
                changed.append(name)
        if gone:  # another directory may come in its place, of which nothing would tell
            self._timer = asyncio.get_running_loop().call_later(_ABSENT, self._look)
        if changed:
            self.daemon.configure_pockets(changed)

    def _watch(self, directory: str) -> bool:
        """Watch what has that name now, which may be another directory than before. Whether there is one."""
        try:
            if self._inotify:
                self._inotify.add(directory)
        except OSError:
            return os.path.isdir(directory)
        return True

    def close(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if self._inotify:
            asyncio.get_running_loop().remove_reader(self._inotify.fileno())
            self._inotify.close()
            self._inotify = None


def _identity(directory: str) -> Identity:
    try:
        s = os.lstat(f"{directory}/{AUTHORS_FILE}")
    except OSError:
        return None
    return (s.st_mtime_ns, s.st_size, s.st_ino)
