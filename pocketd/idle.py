"""`idle = "reclaim"`: memory of what does nothing goes back to the host, or to its swap, until it is needed again.

Whether something does nothing its cgroup's cpu.stat says: no request is ever seen here. A running program is never
touched; client sessions are, and templates while nothing of their generation works: a worker's pages are for the most
part its template's, and the kernel reclaims those whoever uses them (folio_referenced() leaves out other cgroups).
memory.reclaim (Linux 5.19) reclaims beneath a cgroup at once; without swap only pages of files can go.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cgroup.node import Cgroup
from nsutil import clone
from pocketd import events, spawn

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation, Session

_LOOK = 1.0  # seconds between looks
_NOISE = 20  # microseconds of cpu time between two looks that are no work: half of what the smallest request takes
_LONGEST = 60.0  # seconds for a reclaim on a slow swap


@dataclass
class _Seen:
    cpu: int
    since: float  # it has not worked since then
    reclaimed: bool = False


class Idle:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._seen: dict[str, _Seen] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            generations = [g for s in self.daemon.services.values() for g in s.generations()]
            looked_at = [g for g in generations if g.definition.idle == "reclaim"]
            there = {leaf.kernel_path: seen for g in looked_at for leaf, seen in self._look(g)}
            self._seen = there
            for g in looked_at:  # one at a time, then a new look: others may be at work again by then
                for leaf in self._idle(g)[:1]:
                    await self._reclaim(g, leaf)

    def _look(self, g: Generation) -> Iterator[tuple[Cgroup, _Seen]]:
        now = time.monotonic()
        for leaf in (*(s.leaf for s in _clients(g)), *(t.leaf for t in g.templates if t.ready)):
            if leaf and leaf.fd >= 0:
                try:
                    cpu = leaf.cpu_stat["usage_usec"]
                except OSError:
                    continue  # it ended just now
                seen = self._seen.get(leaf.kernel_path)
                if seen is None or cpu - seen.cpu > _NOISE:
                    seen = _Seen(cpu, now)
                seen.cpu = cpu
                yield leaf, seen

    def _idle(self, g: Generation) -> list[Cgroup]:
        """What has done nothing for long enough and was not reclaimed since it did something."""
        end = time.monotonic() - g.definition.idle_after
        clients = [s.leaf for s in _clients(g) if s.leaf]
        found = [leaf for leaf in clients if self._since(leaf) <= end]
        if len(found) == len(g.sessions):  # no program runs, and no client works
            found += [t.leaf for t in g.templates if t.ready and self._since(t.leaf) <= end]
        return [leaf for leaf in found if not self._seen[leaf.kernel_path].reclaimed]

    def _since(self, leaf: Cgroup) -> float:
        seen = self._seen.get(leaf.kernel_path)
        return seen.since if seen else float("inf")

    async def _reclaim(self, g: Generation, leaf: Cgroup) -> None:
        path = leaf.kernel_path
        self._seen[path].reclaimed = True
        try:
            before, after = await reclaim(leaf)
        except OSError as e:  # no controller here, no process for it, or it ended just now
            events.emit("not-reclaimed", "debug", service=g.name, cgroup=path, why=str(e))
            return
        events.emit("reclaimed", service=g.name, cgroup=path, before=before, after=after)


def _clients(g: Generation) -> list[Session]:
    return [s for s in g.sessions.values() if s.note.get("mode") == "client" and not s.adopted]


async def reclaim(leaf: Cgroup) -> tuple[int, int]:
    """Reclaim all that can be; bytes charged before and after. A child waits for the kernel, not the daemon.

    Raises OSError.
    """
    before = leaf.memory_current
    file = os.open("memory.reclaim", os.O_WRONLY | os.O_CLOEXEC, dir_fd=leaf.fd)
    try:
        child = clone.fork()
        if child is None:
            try:
                os.dup2(file, 0)
                os.closerange(1, 1 << 16)  # callers' sockets too, whose end others wait for
                os.write(0, str(before).encode())
            finally:  # EAGAIN: less than all could be, as always
                os._exit(0)
    finally:
        os.close(file)
    await spawn.ended(child, _LONGEST)
    return before, leaf.memory_current
