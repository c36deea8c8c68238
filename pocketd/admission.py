"""Admission: a launch waits its turn, or is refused in words, where this host's memory cannot hold it; and where its
user has as many sessions as one may have.

The host's word is MemAvailable (proc_meminfo(5)) and its pressure stall information (kernel document
accounting/psi). What pockets were promised by memory.low and have not used yet is not available to others, nor is the
configured reserve. Nobody else is pushed into an out-of-memory kill by a launch that could have waited.

The turn is that of the launch which has waited longest, of those that there is room for: one that needs much does not
keep those waiting that need little. Of one uid two wait at most, as no more are in their turn (pocketd.turns).
"""

from __future__ import annotations

import asyncio
import re
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cgroup.node import Cgroup
from cgroup.pressure import stalled
from pocketd import definitions, events
from pocketd.subordinates import owner_of
from pocketd.wire import Error

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# What a worker needs until its first result: copied pages of its template, its own tables. docs/performance.md has what
# TensorFlow's take.
WORKER = 32 << 20
YOUNG = 2.0  # seconds in which a worker has not yet taken what it will
_LOOK = 0.25  # seconds; no descriptor tells of MemAvailable


@dataclass(frozen=True)
class Room:
    """What this host has for launches now. Bytes."""

    available: int
    pressure: float | None = None  # percent of the time that all stalls for memory; None without PSI
    own: frozenset[str] = frozenset()  # pockets whose own that is (pocketd.stalls)
    young: int = 0  # what workers that have only just begun may still take
    promised: Mapping[str, int] = field(default_factory=dict)  # by pocket that runs: of its memory.low, not used yet


@dataclass(eq=False)
class Launch:
    """One that wants room for a worker of pocket `name`."""

    name: str
    limits: Mapping[str, str]


def refusal(launch: Launch, room: Room, rules: definitions.Admission) -> str | None:
    """Why there is no room, or None."""
    name, limits, pressure = launch.name, launch.limits, room.pressure
    if pressure is not None and pressure >= rules.pressure and (name in room.own or not room.own):
        whose = ", most of it this pocket at its own memory.max or memory.high" if room.own else ""
        return f"this host stalls for memory {pressure:.0f}% of the time (the limit is {rules.pressure:g}%){whose}"
    # What a pocket was promised is set aside from its first worker on.
    need = WORKER if name in room.promised else max(WORKER, _number(limits.get("memory.low")))
    most = _number(limits.get("memory.max"))
    need = min(need, most) if most else need
    promised = room.young + sum(size for other, size in room.promised.items() if other != name)
    if need <= room.available - promised - rules.reserve:
        return None
    return (
        f"a worker needs about {_size(need)}, and this host has {_size(room.available)} available, of which "
        f"{_size(rules.reserve)} are kept in reserve and {_size(promised)} are promised to others"
    )


class Admission:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self._line: list[Launch] = []  # those that wait, the oldest first
        self._turn: Launch | None = None  # whose turn it was at the last look; it may be gone since
        self._looked = 0.0
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
        rules, launch = self.daemon.config.admission, Launch(name, limits)
        why = self._refusal(launch)
        if why is None and self._next() is None:
            return
        if why:
            self._ease(launch)
        why = why or "others wait for memory"
        if len(self._line) >= rules.queue:
            raise Error("host-memory", f"{name} was not started: {why}; {len(self._line)} launches wait already")
        self._line.append(launch)
        events.emit("launch-waits", "notice", pocket=name, why=why, waiting=len(self._line))
        progress(f"waiting for memory: {why}")
        try:
            async with asyncio.timeout(rules.wait):
                while self._next() is not launch or self._refusal(launch):
                    if _closed(hold):
                        raise Error("gone", f"the caller of {name} did not wait")
                    if not self.daemon.relief.easing():
                        self._ease(launch)
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            why = self._refusal(launch) or "others wait for memory"
            raise Error(
                "host-memory",
                f"{name} was not started: {why}; it waited {rules.wait:g} s. End something (pocket ps), or change "
                "[admission] in pocketd.conf",
            ) from None
        finally:
            self._line.remove(launch)

    def _next(self) -> Launch | None:
        """Whose turn it is, of those that wait. One in each while, so that what it takes is seen before the next."""
        now = time.monotonic()
        if not self._line:
            self._turn = None
        elif now - self._looked >= _LOOK:
            room, rules = self._room(), self.daemon.config.admission
            self._turn = next((launch for launch in self._line if refusal(launch, room, rules) is None), None)
            self._looked = now
        return self._turn

    def _ease(self, launch: Launch) -> None:
        """What was made ahead of time gives way to a launch; where its pocket itself is why it waits, its own alone."""
        only = [launch.name] if launch.name in self._stall()[1] else []
        self.daemon.relief.ease(f"a launch of {launch.name} waits for memory", only)

    def _refusal(self, launch: Launch) -> str | None:
        return refusal(launch, self._room(), self.daemon.config.admission)

    def _room(self) -> Room:
        now, config, young = time.time(), self.daemon.config, 0
        promised: dict[str, int] = {}
        for _, s in self.daemon.sessions():
            if s.leaf and 0 <= now - s.started < YOUNG:  # less than 0: the clock was set back since
                young += max(0, WORKER - (_current(s.leaf) or 0))
            if s.pocket not in promised:
                definition = config.pockets.get(s.pocket)
                low = _number((definition.limits if definition else config.run_limits).get("memory.low"))
                promised[s.pocket] = max(0, low - self._charged(s.pocket)) if low else 0
        return Room(memory_available(), *self._stall(), young, promised)

    def _stall(self) -> tuple[float | None, frozenset[str]]:
        """Percent of the time that all stalls for memory; where it is too much, pockets whose own that is."""
        pressure = stalled()  # reclaiming what is idle is no stall for the kernel (Linux 5.9, seen)
        much = pressure is not None and pressure >= self.daemon.config.admission.pressure
        return pressure, self.daemon.relief.stalls.own("full") if much else frozenset()

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
