"""Whose stall it is, when this host stalls for memory.

A pocket that is at its own memory.max or memory.high makes itself wait, and the kernel counts that in the host's
pressure too (kernel documents accounting/psi and admin-guide/cgroup-v2). Nothing that others give up would help it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from cgroup.node import Cgroup
from cgroup.pressure import HOST, totals

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

_KEPT = 1.0  # seconds for which an answer holds: who waits for memory asks more often

Kind = Literal["some", "full"]


class Stall(NamedTuple):
    """Of the host or of a pocket, since it began or between two looks."""

    some: int = 0  # microseconds in which some of its work waited for memory
    full: int = 0  # and all of it
    reached: int = 0  # how often a pocket was at its memory.max or memory.high

    def since(self, before: Stall) -> Stall:
        return Stall(*(now - then for now, then in zip(self, before, strict=True)))


class Look(NamedTuple):
    host: Stall
    pockets: dict[tuple[str, str], Stall]  # by pocket and cgroup, as a pocket has one in each generation


def own(kind: Kind, host: Stall, pockets: Iterable[tuple[str, Stall]]) -> frozenset[str]:
    """Pockets whose own the host's stall is: each that stalled for more than half of it is at limits of its own. None
    where another did too, which waits for this host then, or where no pocket did."""
    whole: int = getattr(host, kind)
    most = [(name, stall) for name, stall in pockets if whole and getattr(stall, kind) * 2 > whole]
    return frozenset(name for name, _ in most) if all(stall.reached for _, stall in most) else frozenset()


class Stalls:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._before: Look | None = None  # the last look but one, so that some seconds are told of
        self._last: Look | None = None
        self._told: tuple[float, Stall, list[tuple[str, Stall]]] = 0.0, Stall(), []

    def look(self) -> None:
        """To be called every few seconds. Where the host has not stalled since, no pocket has."""
        host = _host()
        self._before = self._last
        if self._last is None or self._last.host != host:
            self._last = Look(host, self._pockets())

    def own(self, kind: Kind) -> frozenset[str]:
        """Pockets whose own the host's stall of the last seconds is."""
        now, before = time.monotonic(), self._before
        if before and now - self._told[0] >= _KEPT:
            host, pockets = _host().since(before.host), self._pockets().items()
            self._told = now, host, [(key[0], s.since(before.pockets.get(key, Stall()))) for key, s in pockets]
        return own(kind, *self._told[1:])

    def _pockets(self) -> dict[tuple[str, str], Stall]:
        """Of those that have a cgroup; none where the host's cgroup2 lacks the memory controller."""
        found: dict[tuple[str, str], Stall] = {}
        for service in self.daemon.services.values():
            for g in service.generations():
                names = {s.pocket for s in g.sessions.values()} | {h.pocket for h in g.held}
                for name in names | {s.pocket for s in g.slots.by_id.values()}:
                    try:
                        with Cgroup(f"pockets/{name}", g.tree) as pocket:
                            events = pocket.memory_events
                            stall = totals(pocket.get_property(b"memory.pressure"))
                    except OSError:
                        continue  # it ended just now, or there is no such file
                    reached = events["max"] + events["high"]
                    found[name, pocket.kernel_path] = Stall(stall["some"], stall["full"], reached)
        return found


def _host() -> Stall:
    try:
        found = totals(Path(HOST).read_text())
    except OSError:
        return Stall()  # no PSI
    return Stall(found["some"], found["full"])
