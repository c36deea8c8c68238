"""How much memory processes of pockets have, measured by a child of pocketd's (pocketd.apart).

/proc/PID/smaps_rollup waits for the lock of that process's mappings, which the process can hold for as long as it likes
(a page of a FUSE file that nobody serves), and takes as long as it has mappings.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from contextlib import suppress

from cgroup.hierarchy import NoCgroup2, path_of
from nsutil import processes
from nsutil.processes import Memory
from pocketd import wire
from pocketd.apart import Apart
from pocketd.wire import Error

LOOKING = 2.0  # seconds that one answer may take to look at processes
PATIENCE = 0.5  # seconds for one process: others are looked at then, by another child

Place = tuple[str, Sequence[int]]
"""A cgroup by its path, and pids of processes that were in it or beneath it."""


async def memory(places: Sequence[Place]) -> list[Memory | None]:
    """Of each place: private and proportional memory of all its processes together, and the most that one shares. What
    ended meanwhile counts as nothing. None where it could not be measured in time."""
    found: list[Memory | None] = []
    if not any(pids for _, pids in places):
        return [Memory(0, 0, 0)] * len(places)
    with suppress(TimeoutError, OSError):  # OSError: no process is left for it
        async with asyncio.timeout(LOOKING):
            while len(found) < len(places):
                await _measured(places[len(found) :], found)
    return found + [None] * (len(places) - len(found))


async def _measured(places: Sequence[Place], found: list[Memory | None]) -> None:
    """Add to `found` what one child says, up to a process that keeps it waiting, for which there is None."""
    child = Apart(lambda ours: _measure(ours, places), ())
    try:
        for _ in places:
            while True:
                message, _ = await child.answer(PATIENCE)
                if "memory" in message:
                    break
            found.append(Memory(*message["memory"]))
    except Error:
        found.append(None)
    finally:
        child.end()


def _measure(ours: socket.socket, places: Sequence[Place]) -> None:
    """In the child: a message for each process that is done with, and one for each place."""
    for path, pids in places:
        private = shared = proportional = 0
        for pid in pids:
            with suppress(processes.Gone, OSError, NoCgroup2):
                m = processes.memory(pid)
                if within(pid, path):  # else the pid is another's by now
                    private += m.private
                    shared = max(shared, m.shared)
                    proportional += m.proportional
            wire.send(ours, {})
        wire.send(ours, {"memory": [private, shared, proportional]})


def within(pid: int, path: str) -> bool:
    """Whether a process is in the cgroup at `path`, or beneath it. Raises OSError when it has ended, NoCgroup2."""
    now = path_of(pid)
    return now == path or now.startswith(f"{path}/")
