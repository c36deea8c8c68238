"""`idle = "reclaim"`: memory of what does nothing goes back to the host, or to its swap, until it is needed again.

Whether something does nothing its cgroup's cpu.stat says: no request is ever seen here. A running program is never
touched; client sessions and templates are. memory.reclaim (Linux 5.19) reclaims beneath a cgroup at once; without swap
only pages of files can go.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cgroup.node import Cgroup
from nsutil import clone
from pocketd import events, spawn

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation

_LOOK = 1.0  # seconds between looks
_NOISE = 1000  # microseconds of cpu time between two looks that are no work
_LONGEST = 60.0  # seconds for a reclaim on a slow swap


@dataclass
class _Seen:
    cpu: int
    since: float
    reclaimed: bool = False


class Idle:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._seen: dict[str, _Seen] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            there: dict[str, _Seen] = {}
            for service in self.daemon.services.values():
                for g in service.generations():
                    if g.definition.idle == "reclaim":
                        for leaf in _leaves(g):
                            await self._look(g, leaf, there)
            self._seen = there

    async def _look(self, g: Generation, leaf: Cgroup, there: dict[str, _Seen]) -> None:
        path, now = leaf.kernel_path, time.monotonic()
        try:
            cpu = leaf.cpu_stat["usage_usec"]
        except OSError:
            return  # it ended just now
        seen = self._seen.get(path)
        if seen is None or cpu - seen.cpu > _NOISE:
            seen = _Seen(cpu, now)
        there[path] = seen
        if seen.reclaimed or now - seen.since < g.definition.idle_after:
            return
        seen.reclaimed = True
        before, after = await reclaim(leaf)
        events.emit("reclaimed", service=g.name, cgroup=path, before=before, after=after)
        try:
            seen.cpu = leaf.cpu_stat["usage_usec"]  # what reclaiming itself cost is no work
        except OSError:
            pass  # it ended meanwhile


def _leaves(g: Generation) -> list[Cgroup]:
    sessions = [s.leaf for s in g.sessions.values() if s.note.get("mode") == "client" and not s.adopted]
    return [leaf for leaf in (*sessions, *(t.leaf for t in g.templates if t.ready)) if leaf and leaf.fd >= 0]


async def reclaim(leaf: Cgroup) -> tuple[int, int]:
    """Reclaim all that can be; bytes charged before and after. A child waits for the kernel, not the daemon."""
    try:
        before = leaf.memory_current
    except OSError:
        return 0, 0  # no controller here, or it ended just now
    child = clone.fork()
    if child is None:
        try:
            leaf.set_property(b"memory.reclaim", str(before))
        finally:  # EAGAIN: less than all could be, as always
            os._exit(0)
    await spawn.ended(child, _LONGEST)
    try:
        return before, leaf.memory_current
    except OSError:
        return before, 0
