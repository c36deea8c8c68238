"""Whether anything beneath some directories changes: one inotify for all of pocketd's, a watch on each directory.

What is told is only that something did, and where; it is acted on at once, and once more when all is quiet.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from nsutil.inotify import Change, Inotify
from pocketd import events

_MOST = 4096  # directories of one watch
_ENTRIES = 1 << 17  # that are looked at to find them: the directories are others', and pocketd has one thread


@dataclass(eq=False)
class Watch:
    """What is watched together. `changed(path)` is called when something changes, `quiet()` when it is over.

    `tops`: files and directories; `apart`: those in them, or elsewhere, of which only counts that another file, or
    none, has their name: what was shown of them is not what is there then. `above`: directories in which such a name is
    looked for, as it may not be there yet.
    """

    name: str
    tops: tuple[str, ...]
    apart: frozenset[str]
    above: frozenset[str]
    changed: Callable[[str], None]
    quiet: Callable[[], None]
    seconds: float  # without a change until `quiet`
    directories: set[str] = field(default_factory=set)
    timer: asyncio.TimerHandle | None = None

    def counts(self, change: Change) -> bool:
        """A lost event ("") counts as one. Bytecode says no more than its sources: whoever runs a program writes it."""
        path = change.path
        if path in self.apart:
            return change.replaced
        if "/__pycache__" in path:
            return False
        ours = not path or any(_within(path, top) for top in self.tops)
        return ours and not any(_within(path, top) for top in self.apart)

    def find(self) -> Iterator[str]:
        """The directories to watch, those beneath `tops` among them."""
        waiting = [top if os.path.isdir(top) else os.path.dirname(top) for top in self.tops]
        alone = {os.path.dirname(top) for top in self.tops if not os.path.isdir(top)}
        seen: set[str] = set()
        left = _ENTRIES
        while waiting and len(seen) < _MOST and left > 0:
            directory = waiting.pop()
            if directory in seen:
                continue
            seen.add(directory)
            yield directory
            if directory in alone:
                continue  # only a file of it counts
            try:
                with os.scandir(directory) as entries:
                    for e in itertools.islice(entries, left):
                        left -= 1
                        if e.is_dir(follow_symlinks=False) and e.path not in self.apart:
                            waiting.append(e.path)
            except OSError:
                continue  # gone since, or not ours to see
        if waiting:
            why = f"more than {_MOST} directories or {_ENTRIES} entries: changes in the others are not noticed"
            hint = "leave what does not change out of the pocket's directory, or reload after a change"
            events.emit("files-not-watched", "warning", pocket=self.name, why=why, hint=hint)


class Files:
    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._inotify: Inotify | None = None

    def watch(
        self,
        name: str,
        tops: Iterable[str],
        apart: Iterable[str],
        above: Iterable[str],
        changed: Callable[[str], None],
        quiet: Callable[[], None],
        seconds: float,
    ) -> Watch:
        """Watch the directories that there are, until `forget`: one that is made later is a change of the one above it,
        and whoever goes on from there watches anew. What cannot be watched is said in an event, and is no error."""
        watch = Watch(name, tuple(tops), frozenset(apart), frozenset(above), changed, quiet, seconds)
        self._watches.append(watch)
        self._add(watch)
        return watch

    def _add(self, watch: Watch) -> None:
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                asyncio.get_running_loop().add_reader(self._inotify.fileno(), self.look)
            for directory in (*watch.find(), *watch.above):
                if directory not in watch.directories:
                    self._inotify.add(directory)
                    watch.directories.add(directory)
            for path in watch.apart - watch.directories:
                with suppress(FileNotFoundError):
                    self._inotify.add(path, content=False)
                    watch.directories.add(path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # gone since
        except OSError as e:
            hint = {
                errno.ENOSPC: "raise fs.inotify.max_user_watches",
                errno.EMFILE: "raise fs.inotify.max_user_instances",
            }
            events.emit("files-not-watched", "warning", pocket=watch.name, why=str(e), hint=hint.get(e.errno or 0))

    def look(self) -> None:
        """Act on what has happened until now."""
        changes = self._inotify.changes() if self._inotify else []
        if not changes:
            return
        for watch in list(self._watches):
            change = next((change for change in changes if watch.counts(change)), None)
            if change is None:
                continue
            watch.changed(change.path or next(iter((*watch.tops, *watch.apart))))
            watch.directories = {d for d in watch.directories if self._inotify and self._inotify.watches(d)}
            if watch.timer:
                watch.timer.cancel()
            watch.timer = asyncio.get_running_loop().call_later(watch.seconds, self._calm, watch)

    def _calm(self, watch: Watch) -> None:
        watch.timer = None
        watch.quiet()

    def forget(self, watch: Watch) -> None:
        if watch.timer:
            watch.timer.cancel()
            watch.timer = None
        self._watches.remove(watch)
        for directory in watch.directories:
            if self._inotify and not any(directory in other.directories for other in self._watches):
                self._inotify.remove(directory)


def _within(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")
