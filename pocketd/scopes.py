"""Where services' cgroups are: SCOPE/service/{init,templates,pockets}, apart from pocketd's own, which they outlive.

SCOPE is a transient scope unit under systemd (systemd_units.py), else a directory beneath `--cgroup`. Limits of a
service stand on SCOPE/service, never on SCOPE: that one is the unit's, and systemd writes its attributes again at each
daemon-reload.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from cgroup.hierarchy import Hierarchy
from cgroup.limits import CONTROLLERS
from cgroup.node import Cgroup
from nsutil import clone
from pocketd import events, spawn, systemd_units
from pocketd.wire import Error

TREE = "service"
SLICE = "pocketd.slice"
MARGIN = 3.0  # seconds for init to end what has not ended in time, before systemd does
MOST = (1 << 64) - 1  # bytes: "max", and systemd's infinity
_PROPERTIES = {"memory.low": "MemoryLow", "memory.min": "MemoryMin"}  # systemd.resource-control(5)


class Scopes(Protocol):
    """How scopes are made, found and ended. The caller owns the cgroups that are returned."""

    where: str  # for people

    def making(self, name: str, stop_timeout: float) -> AbstractAsyncContextManager[Cgroup]:
        """The new scope's tree, into which the first process is to be born meanwhile. Raises Error, OSError."""

    def find(self, name: str) -> Cgroup | None:
        """The tree of a scope that is there."""

    async def end(self, name: str, tree: Cgroup, patience: float = 2.0) -> None:
        """Wait `patience` seconds for its processes to end, kill those that are left, and remove it all."""

    async def promise(self, name: str, limit: str, size: int) -> None:
        """Protect the memory of a scope by `limit` (memory.low or memory.min; bytes), and what holds the scopes by
        the sum of theirs. Raises Error, OSError, LimitError."""

    def close(self) -> None:
        """pocketd ends: remove what only it needed."""


class Directories:
    """Scopes as plain directories beneath a base."""

    def __init__(self, base: Cgroup):
        self.base = base
        self.where = base.directory
        self._sums = Sums()

    @asynccontextmanager
    async def making(self, name: str, stop_timeout: float) -> AsyncIterator[Cgroup]:
        scope = self.base.create(name, exist_ok=True)
        scope.enable(CONTROLLERS)
        yield scope.create(TREE)

    def find(self, name: str) -> Cgroup | None:
        try:
            return _tree(Cgroup(name, self.base))
        except FileNotFoundError:
            return None

    async def end(self, name: str, tree: Cgroup, patience: float = 2.0) -> None:
        await _empty(tree, patience)
        tree.remove()
        if tree.parent:
            tree.parent.remove()
        for limit, total in self._sums.forget(name):
            self.base.apply({limit: text(total)})

    async def promise(self, name: str, limit: str, size: int) -> None:
        self.base.apply({limit: text(self._sums.add(limit, name, size))})
        with Cgroup(name, self.base) as scope:
            scope.apply({limit: text(size)})

    def close(self) -> None:
        try:
            self.base.remove()
        except OSError:
            pass  # services are on, or somebody else's cgroups are in it


class Units:
    """Scopes as transient units of systemd, delegated to us, in pocketd.slice."""

    def __init__(self, hierarchy: Hierarchy):
        self.hierarchy = hierarchy
        self.where = SLICE
        self._sums = Sums()

    @asynccontextmanager
    async def making(self, name: str, stop_timeout: float) -> AsyncIterator[Cgroup]:
        # A scope unit begins with a process; this one leaves it when the service's own is there.
        holder = clone.pause(flags=0)
        try:
            await systemd_units.start_scope(name, holder.pid, SLICE, "A warm service of pocketd", stop_timeout + MARGIN)
            scope = self.hierarchy.open(self._path(name))
            yield scope.create(TREE)
        finally:
            await spawn.ended(holder, 0.0)
        scope.enable(CONTROLLERS)  # no process stands in it any more

    def _path(self, name: str) -> str:
        return f"{systemd_units.root()}{SLICE}/{name}"

    def find(self, name: str) -> Cgroup | None:
        try:
            return _tree(self.hierarchy.open(self._path(name)))
        except FileNotFoundError:
            return None

    async def end(self, name: str, tree: Cgroup, patience: float = 2.0) -> None:
        await _empty(tree, patience)
        tree.remove()
        try:
            await systemd_units.stop(name)
        except Error as e:  # nothing is left in it, and systemd removes a scope that is empty by itself
            events.emit("scope-not-stopped", "warning", scope=name, why=e.message)
        if tree.parent:
            tree.parent.remove()  # what was no unit's, systemd leaves
        for limit, total in self._sums.forget(name):
            with contextlib.suppress(Error):  # it went with its last scope
                await systemd_units.set_properties(SLICE, [(_PROPERTIES[limit], ("t", total))])

    async def promise(self, name: str, limit: str, size: int) -> None:
        total = self._sums.add(limit, name, size)
        await systemd_units.set_properties(SLICE, [(_PROPERTIES[limit], ("t", total))])
        await systemd_units.set_properties(name, [(_PROPERTIES[limit], ("t", size))])

    def close(self) -> None:
        pass  # systemd removes a scope that is empty, and a slice that has none


class Sums:
    """Bytes that scopes are promised, by limit and scope."""

    def __init__(self) -> None:
        self._given: dict[str, dict[str, int]] = {}

    def add(self, limit: str, name: str, size: int) -> int:
        """The new sum of that limit."""
        given = self._given.setdefault(limit, {})
        given[name] = size
        return min(MOST, sum(given.values()))

    def forget(self, name: str) -> list[tuple[str, int]]:
        """The limits whose sums are others without that scope, and the sums."""
        gone = [limit for limit, given in self._given.items() if given.pop(name, 0)]
        return [(limit, min(MOST, sum(self._given[limit].values()))) for limit in gone]


def text(size: int) -> str:
    """Bytes as the kernel's files take them."""
    return "max" if size == MOST else str(size)


def _tree(scope: Cgroup) -> Cgroup | None:
    try:
        return Cgroup(TREE, scope)
    except FileNotFoundError:
        scope.close()
        return None


async def _empty(tree: Cgroup, patience: float) -> None:
    with contextlib.suppress(FileNotFoundError), tree.watch() as watch:  # systemd may have removed it by now
        try:
            await watch.empty(patience)
        except TimeoutError:
            tree.kill()
            await watch.empty(30.0)
