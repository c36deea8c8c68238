"""Admission: a launch waits its turn, or is refused in words, where this host's memory cannot hold it; and where its
user has as many sessions as one may have.

The host's word is MemAvailable (proc_meminfo(5)) and its pressure stall information (kernel document
accounting/psi). What pockets were promised by memory.low and have not used yet is not available to others, nor is the
configured reserve. Nobody else is pushed into an out-of-memory kill by a launch that could have waited.
"""

from __future__ import annotations

import asyncio
import re
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cgroup.node import Cgroup
from cgroup.pressure import stalled
from pocketd import events
from pocketd.subordinates import owner_of
from pocketd.wire import Error

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# What a worker needs until its first result: copied pages of its template, its own tables. docs/performance.md has what
# TensorFlow's take.
WORKER = 32 << 20
YOUNG = 2.0  # seconds in which a worker has not yet taken what it will
_LOOK = 0.25  # seconds; no descriptor tells of MemAvailable


class Admission:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._line: list[object] = []  # those who wait, first come, first served
        self._launching: dict[str, int] = {}  # sessions that are not there yet, and their users

    @contextmanager
    def launching(self, identity: str, user: int) -> Iterator[None]:
        """While a session is being launched: no other gets its identity, and it is one of those that its user may have,
        who is not counted where that is root. Raises Error."""
        if identity in self._launching:
            raise Error("bad-request", "that session is being launched")
        most = self.daemon.config.admission.sessions
        if user and self._sessions(user) >= most:
            raise Error(
                "too-many",
                f"you have {most} sessions, as many as one user may have at once; end some (pocket ps, pocket stop) or "
                "ask root to raise sessions in [admission] of pocketd.conf",
            )
        self._launching[identity] = user
        try:
            yield
        finally:
            del self._launching[identity]

    def _sessions(self, user: int) -> int:
        """How many a user has, those that are being launched among them."""
        known = (s.note.get("caller", 0) for _, s in self.daemon.sessions() if s.id not in self._launching)
        of_uids = Counter([*known, *self._launching.values()])
        return sum(count for uid, count in of_uids.items() if owner_of(uid) == user)

    async def admit(self, name: str, limits: Mapping[str, str], progress: Callable[[str], None], hold: int) -> None:
        """Return when there is room for a worker of pocket `name`. Raises Error("host-memory") when there is not.

        `hold`, which stays the caller's, is one end of a socket whose other end whoever waits closes to give up.
        """
        rules = self.daemon.config.admission
        why = self.refusal(name, limits)
        if why is None and not self._line:
            return
        if why:
            self.daemon.relief.ease(f"a launch of {name} waits for memory")
        why = why or "others wait for memory"
        if len(self._line) >= rules.queue:
            raise Error("host-memory", f"{name} was not started: {why}; {len(self._line)} launches wait already")
        place = object()
        self._line.append(place)
        events.emit("launch-waits", "notice", pocket=name, why=why, waiting=len(self._line))
        progress(f"waiting for memory: {why}")
        try:
            async with asyncio.timeout(rules.wait):
                while self._line[0] is not place or self.refusal(name, limits):
                    if _closed(hold):
                        raise Error("gone", f"the caller of {name} did not wait")
                    if not self.daemon.relief.easing():
                        self.daemon.relief.ease(f"a launch of {name} waits for memory")
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            why = self.refusal(name, limits) or "others wait for memory"
            raise Error(
                "host-memory",
                f"{name} was not started: {why}; it waited {rules.wait:g} s. End something (pocket ps), or change "
                "[admission] in pocketd.conf",
            ) from None
        finally:
            self._line.remove(place)

    def refusal(self, name: str, limits: Mapping[str, str]) -> str | None:
        """Why there is no room now, or None."""
        rules = self.daemon.config.admission
        pressure = stalled()  # reclaiming what is idle is no stall for the kernel (Linux 5.9, seen)
        if pressure is not None and pressure >= rules.pressure:
            return f"this host stalls for memory {pressure:.0f}% of the time (the limit is {rules.pressure:g}%)"
        running = any(s.pocket == name for _, s in self.daemon.sessions())
        # What a pocket was promised is set aside from its first worker on.
        need = WORKER if running else max(WORKER, _number(limits.get("memory.low")))
        most = _number(limits.get("memory.max"))
        need = min(need, most) if most else need
        available, promised = memory_available(), self._promised(name)
        if need <= available - promised - rules.reserve:
            return None
        return (
            f"a worker needs about {_size(need)}, and this host has {_size(available)} available, of which "
            f"{_size(rules.reserve)} are kept in reserve and {_size(promised)} are promised to others"
        )

    def _promised(self, name: str) -> int:
        """Bytes that other pockets may still take: by memory.low, or as they have only just begun."""
        now, config, promised = time.time(), self.daemon.config, 0
        seen: set[str] = set()
        for g, s in self.daemon.sessions():
            if s.leaf and 0 <= now - s.started < YOUNG:  # less than 0: the clock was set back since
                promised += max(0, WORKER - (_current(s.leaf) or 0))
            if s.pocket in seen or s.pocket == name or not g.tree:
                continue
            seen.add(s.pocket)
            definition = config.pockets.get(s.pocket)
            low = _number((definition.limits if definition else config.run_limits).get("memory.low"))
            if low:
                promised += max(0, low - self._charged(s.pocket))
        return promised

    def _charged(self, name: str) -> int:
        total = 0
        for service in self.daemon.services.values():
            for g in service.generations():
                try:
                    if g.tree:
                        with Cgroup(f"pockets/{name}", g.tree) as pocket:
                            total += _current(pocket) or 0
                except OSError:
                    pass  # it has no worker here
        return total


def memory_available() -> int:
    """Bytes that can be used without swapping, by the kernel's own estimate."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


def _closed(sock: int) -> bool:
    """Whether nobody has the other end of a socket any more."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))


def _current(cgroup: Cgroup) -> int | None:
    try:
        return cgroup.memory_current
    except OSError:
        return None


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _size(count: int) -> str:
    return f"{max(0, count) / (1 << 20):.0f}M"
