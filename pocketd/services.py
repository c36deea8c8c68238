"""What operators switch: a service, with the generation that new logins go to and those that still end.

`pocket reload` makes a new generation beside the current one. When it is ready new logins go there; the old one ends
with its last session. A new one that fails leaves the old in its place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from pocketd import containers, events
from pocketd.definitions import Service
from pocketd.generation import Generation, Session
from pocketd.host import Host
from pocketd.templates import Progress, Template
from pocketd.wire import Error


class RunningService:
    """One service. `state` is "off", "starting", "on", "stopping" or "failed" (then `why` says why)."""

    def __init__(self, definition: Service, host: Host, ready: Callable[[Generation], None] = lambda generation: None):
        """`ready` is told of each generation that logins go to from then on."""
        self.ready = ready
        self.definition = definition  # the configuration's; a generation keeps the one that it was made by
        self.host = host
        self.state = "off"
        self.why: Error | None = None
        self.since = time.time()
        self.current: Generation | None = None
        self.old: list[Generation] = []
        self.changing = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def log_path(self) -> str:
        return str(self.host.state_dir / "services" / f"{self.name}.log")

    def log_tail(self, lines: int = 20) -> str:
        return containers.tail(self.host.state_dir / "services" / f"{self.name}.log", lines)

    def generations(self) -> Iterator[Generation]:
        """Those that there are, the current one first."""
        if self.current:
            yield self.current
        yield from self.old

    def sessions(self) -> Iterator[tuple[Generation, Session]]:
        for generation in self.generations():
            for session in list(generation.sessions.values()):
                yield generation, session

    def templates(self) -> Iterator[tuple[Generation, Template]]:
        for generation in self.generations():
            for template in generation.templates:
                yield generation, template

    def find(self, identity: str) -> tuple[Generation, Session] | None:
        for generation in self.generations():
            if identity in generation.sessions:
                return generation, generation.sessions[identity]
        return None

    # -- on

    async def on(self, progress: Progress) -> Generation:
        """Switch on; returns the current generation, its templates ready. Raises Error with the reason otherwise."""
        if self.state == "on" and self.current:
            return self.current
        async with self.changing:
            if self.state == "on" and self.current:
                return self.current
            self._change("starting")
            try:
                self.current = await self._make(self.definition, self._next(), progress)
            except Error as e:
                self._change("failed", e)
                raise
            self._change("on")
            self.ready(self.current)
            return self.current

    def _next(self) -> int:
        return max((g.number for g in self.generations()), default=0) + 1

    async def _make(self, definition: Service, number: int, progress: Progress) -> Generation:
        generation = Generation(definition, self.host, number, self._changed)
        try:
            await generation.start(progress)
        except (Error, OSError, ConnectionError) as e:
            error = e if isinstance(e, Error) else Error("service", f"{type(e).__name__}: {e}")
            error.message = f"service {self.name} does not start: {error.message}"
            error.args = (error.message,)
            await generation.clear()
            raise error from None
        except asyncio.CancelledError:
            await generation.clear()
            raise
        return generation

    def _change(self, state: str, why: Error | None = None) -> None:
        self.state, self.why, self.since = state, why, time.time()
        level = "error" if why else "info"
        events.emit(f"service-{state}", level, service=self.name, why=why.message if why else None)

    # -- reload

    async def reload(self, progress: Progress) -> None:
        """Make a new generation by the present definition; new logins go there once it is ready.

        Raises Error when it does not get ready; what was there goes on then, unless `reload = "replace"` ended it.
        """
        async with self.changing:
            if self.state != "on" or not self.current:
                return  # the next login makes it by the present definition
            before, number = self.current, self._next()
            events.emit("service-reloading", service=self.name, generation=number)
            if self.definition.reload == "replace":
                await self._replace(before, number, progress)
                return
            try:
                self.current = await self._make(self.definition, number, progress)
            except Error as e:
                e.message += f"\nthe generation before ({before.number}) stays in its place"
                e.args = (e.message,)
                events.emit("reload-failed", "error", service=self.name, generation=number, why=e.message)
                raise
            self.old.append(before)
            self.ready(self.current)
        events.emit("service-reloaded", service=self.name, generation=number, sessions_in_old=len(before.sessions))
        if not before.occupied:
            await self._finish(before)

    async def _replace(self, before: Generation, number: int, progress: Progress) -> None:
        """For hosts that cannot hold two at once: the old one ends first, with its sessions."""
        self._change("starting")
        self.current = None
        await before.end()
        try:
            self.current = await self._make(self.definition, number, progress)
        except Error as e:
            self._change("failed", e)
            raise
        self._change("on")
        self.ready(self.current)

    def _changed(self, generation: Generation, lost: Error | None) -> None:
        """A generation's last session has ended, or its init is gone."""
        if generation in self.old:
            generation.keep(self._finish(generation))
        elif lost and generation is self.current:
            self.current = None
            self._change("failed", lost)
            self.old.append(generation)  # until it is cleared, so that nothing of it is missed
            generation.keep(self._finish(generation))

    async def _finish(self, generation: Generation) -> None:
        if generation in self.old:
            self.old.remove(generation)
            await generation.end()
            events.emit("generation-ended", service=self.name, generation=generation.number)

    # -- off

    async def off(self) -> None:
        """Switch off: every session ends. Idempotent."""
        async with self.changing:
            if self.state == "off" and not self.old:
                return
            self._change("stopping")
            ending, self.current, self.old = list(self.generations()), None, []
            await asyncio.gather(*(generation.end() for generation in ending))
            self._change("off")

    # -- after a restart

    async def adopt(self, numbers: list[int]) -> bool:
        """Take over the generations that the runtime directory names. Whether there is one to log in to."""
        found = [Generation(self.definition, self.host, number, self._changed) for number in sorted(numbers)]
        found = [generation for generation in found if await generation.adopt()]
        if found:
            # The newest, unless its making did not come to an end.
            ready = [g for g in found if any(t.ready for t in g.templates)]
            self.current = (ready or found)[-1]
            self.old = [g for g in found if g is not self.current]
        for generation in [g for g in self.old if not g.occupied]:
            generation.keep(self._finish(generation))
        if self.current:
            self._change("on")
            self.ready(self.current)
        return self.current is not None

    def leave(self) -> None:
        """pocketd ends; the service goes on."""
        self.state = "left"
        for generation in self.generations():
            generation.leave()
