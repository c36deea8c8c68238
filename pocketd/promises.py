"""What pockets are promised by memory.low and memory.min, made true above them.

The kernel protects a cgroup by no more than each of its ancestors is protected (cgroup-v2, "Memory Interface Files":
effective boundaries). So every cgroup of ours above a pocket's has the sum of what the pockets beneath it were
promised: SCOPE/service/pockets, SCOPE/service, and, written by whoever made them, SCOPE and what holds the scopes.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping

from cgroup.node import Cgroup
from pocketd import events
from pocketd.scopes import MOST, Scopes, text
from pocketd.wire import Error

PROTECTIONS = ("memory.low", "memory.min")


class Promises:
    """The promises of one generation: those of its pockets that have a cgroup, and the service's own."""

    def __init__(self, scopes: Scopes, scope: str):
        self._scopes = scopes
        self._scope = scope
        self._given: dict[str, dict[str, int]] = {limit: {} for limit in PROTECTIONS}
        self._kept: dict[str, tuple[int, int]] = {}
        self._spreading = asyncio.Lock()

    def give(self, pocket: str | None, limits: Mapping[str, str]) -> bool:
        """Note what a pocket (None: the service itself) is promised from now on; whether `spread` has work to do."""
        changed = False
        for limit in PROTECTIONS:
            if limit in limits:
                size, given = _bytes(limits[limit]), self._given[limit]
                changed |= given.get(pocket or "", 0) != size
                given[pocket or ""] = size
        return changed

    def take_back(self, pocket: str) -> bool:
        """The pocket has no cgroup any more; whether `spread` has work to do."""
        taken = [given.pop(pocket, 0) for given in self._given.values()]
        return any(taken)

    def find(self, tree: Cgroup) -> None:
        """Read in the kernel's files what an earlier pocketd gave."""
        with Cgroup("pockets", tree) as pockets:
            for name in pockets.names():
                with Cgroup(name, pockets) as pocket:
                    files = pocket.files()
                    self.give(name, {limit: _read(pocket, limit) for limit in PROTECTIONS if limit in files})

    async def spread(self, tree: Cgroup) -> None:
        """Write the sums above the pockets, from the top. What cannot be written is an event, no launch's failure."""
        async with self._spreading:
            for limit, given in self._given.items():
                pockets = min(MOST, sum(size for name, size in given.items() if name))
                kept = (max(pockets, given.get("", 0)), pockets)
                if kept == self._kept.get(limit):
                    continue
                try:
                    await self._scopes.promise(self._scope, limit, kept[0])
                    tree.apply({limit: text(kept[0])})
                    with Cgroup("pockets", tree) as holder:
                        holder.apply({limit: text(pockets)})
                    self._kept[limit] = kept
                except (OSError, ValueError, Error) as e:
                    if not os.path.isdir(tree.directory):
                        return  # the service ended meanwhile
                    events.emit("promise-not-kept", "warning", scope=self._scope, limit=limit, why=str(e))


def _read(cgroup: Cgroup, limit: str) -> str:
    return cgroup.get_property(limit.encode()).strip()


def _bytes(value: str) -> int:
    return MOST if value == "max" else int(value)
