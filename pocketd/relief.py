"""What was made ahead of time gives way: slots first, then pockets' templates that no run has, the least used first.

It is asked for by the kernel (pressure stall information), by a launch that finds no room (pocketd.admission), and by
the configured budget. To pressure that a pocket makes at limits of its own (pocketd.stalls) nothing of others gives
way. What gave way is made again on demand: a launch that misses it goes the long way.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING

from cgroup.pressure import HOST, Trigger
from pocketd import events, measured
from pocketd.held import REST
from pocketd.stalls import Stalls

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation
    from pocketd.held import Holder

_LOOK = 5.0  # seconds between looks at ages and the budget
_STALL, _WINDOW = 0.3, 2.0  # seconds: how much of two seconds some work waits for memory before anything gives way
_STEP = 1.0  # seconds from one step to the next
_CALM = 30.0  # seconds without pressure before slots are made again


class Relief:
    def __init__(self, daemon: Daemon):
        self.daemon = daemon
        self.stalls = Stalls(daemon)
        self._eased = 0.0  # when anything was last asked to give way
        self._squeezed = 0.0  # and all pockets' slots

    def easing(self) -> bool:
        """Whether something gave way so lately that it may not have ended yet."""
        return time.monotonic() - self._eased < _STEP

    async def run(self) -> None:
        trigger = self._trigger()
        loop = asyncio.get_running_loop()
        self.stalls.look()
        if trigger:
            loop.add_reader(trigger.fileno(), self._felt)
        try:
            while True:
                await asyncio.sleep(_LOOK)
                self.stalls.look()
                await self.look()
        finally:
            if trigger:
                loop.remove_reader(trigger.fileno())
                trigger.close()

    def _felt(self) -> None:
        if not self.easing():
            own = self.stalls.own("some")
            self.ease("it stalls for memory at limits of its own" if own else "this host stalls for memory", own)

    def _trigger(self) -> Trigger | None:
        try:
            return Trigger(os.open(HOST, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), _STALL, _WINDOW)
        except OSError as e:
            events.emit("no-pressure-trigger", "debug", why=str(e))
            return None

    def _generations(self) -> Iterator[Generation]:
        for service in self.daemon.services.values():
            yield from service.generations()

    def _holders(self) -> list[tuple[Generation, Holder]]:
        """Templates of pockets that launches come from, the least used first."""
        found = [(g, holder) for g in self._generations() for holder in g.held.current.values() if holder.ready]
        return sorted(found, key=lambda pair: pair[1].used)

    def ease(self, why: str, only: Collection[str] = ()) -> bool:
        """One step: all slots that wait, or else a template without runs; `only` of some pockets, where any are named.
        Whether there was anything."""
        self._eased = time.monotonic()
        slots = 0
        for g in self._generations():
            if only:
                slots += sum(g.slots.give_way(name) for name in only)
            else:
                self._squeezed, g.slots.squeezed = self._eased, True
                slots += g.slots.give_way()
        if slots:
            events.emit("slots-gave-way", "notice", count=slots, why=why)
            return True
        for g, holder in self._holders():
            # What one has in use its runs have too: its end would free little, and cost the next of them most.
            in_use = any(s.note.get("held") == holder.number for s in g.sessions.values())
            if not in_use and (not only or holder.pocket in only):
                g.held.give_up(holder, why, _CALM)
                return True
        return False

    async def look(self) -> None:
        now = time.monotonic()
        if self._squeezed and now - self._squeezed > _CALM:
            self._squeezed = 0.0
            for g in self._generations():
                g.slots.squeezed = False
        for g, holder in self._holders():
            age = holder.definition.max_age if holder.definition else None
            if age is not None and holder.definition and now - holder.born > age and g.held.may_renew(holder):
                g.held.renew(self.daemon, holder.definition)
        await self._keep_to_budget()

    async def _keep_to_budget(self) -> None:
        budget = self.daemon.config.held.budget
        if budget is None:
            return
        holders = self._holders()
        places = [[holder.itself, *g.slots.places(holder.pocket)] for g, holder in holders]
        found = iter(await measured.memory(list(chain.from_iterable(places))))
        costs = []
        for (_, holder), own in zip(holders, places, strict=True):
            itself, *slots = (m.private if m else 0 for m in islice(found, len(own)))
            costs.append(max(itself, holder.own) + sum(slots))  # what has been forked from it shares its pages
        total = sum(costs)
        for (g, holder), cost in zip(holders, costs, strict=True):
            if total <= budget:
                return
            if holder.stale is None:  # else it was given up meanwhile
                why = f"pockets that are held have {total >> 20}M of their own, and [held] budget is {budget >> 20}M"
                g.slots.give_way(holder.pocket)
                g.held.give_up(holder, why, REST)
            total -= cost
