"""Files of one generation's pockets: what was made of them ahead of time is given up when they change, and made again
once they are quiet."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from nsutil.beneath import open_as_named
from pocketd import permissions
from pocketd.definitions import Pocket
from pocketd.files import Watch
from pocketd.wire import Error

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation

QUIET = 2.0  # seconds without a change of a pocket's files before anything is made of them again


class Changes:
    def __init__(self, generation: Generation):
        self.generation = generation
        self._watches: dict[str, Watch] = {}
        self._daemon: Daemon | None = None

    def watch(self, daemon: Daemon, definition: Pocket) -> None:
        """Watch a pocket's files, as they are now: of a held one all that its definition shows it, but for what it may
        write itself; of any, that what is shown is still what has that name."""
        self._daemon = daemon
        name, directory = definition.name, str(definition.dir)
        self.forget(name)
        sources = [str(m.source) for m in definition.mounts]
        apart = [os.path.join(directory, written) for written in definition.allow.write]
        _make_places(definition)
        tops: list[str] = []
        if definition.is_held:
            tops = [directory, *(str(m.source) for m in definition.mounts if not m.writable)]
        apart += [source for source in (directory, *sources) if source not in tops]
        # What is shown somewhere by a mount is not deleted before that ends: only its directory tells.
        above = {os.path.dirname(path) for path in apart}

        def changed(path: str) -> None:
            if definition.is_held:
                self.generation.held.changed(name, path)
            else:
                self.generation.slots.give_way(name)

        def quiet() -> None:
            present = daemon.config.pockets.get(name)
            if not present or not self.generation.running:
                return
            if definition.is_held:
                self.generation.held.quiet(daemon, present)
            elif present.warm:
                self.generation.slots.fill_later(name, 0.0)

        self._watches[name] = daemon.files.watch(name, tops, apart, above, changed, quiet, QUIET)

    def names(self) -> set[str]:
        return set(self._watches)

    def forget(self, pocket: str) -> None:
        watch = self._watches.pop(pocket, None)
        if watch and self._daemon:
            self._daemon.files.forget(watch)

    def close(self) -> None:
        for pocket in self.names():
            self.forget(pocket)


def _make_places(definition: Pocket) -> None:
    """What the pocket may write and is not there yet: made now, it is no change later."""
    with suppress(Error, OSError):  # whoever shows it says what is wrong
        top = open_as_named(definition.dir, os.O_PATH | os.O_DIRECTORY)
        try:
            for name in definition.allow.write:
                os.close(permissions.writable(top, name))
        finally:
            os.close(top)
