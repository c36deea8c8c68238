"""`pocket warm` and `pocket cool`: a pocket's template made, or given up, at its owner's wish."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nsutil import processes
from pocketd import permissions
from pocketd.definitions import Pocket
from pocketd.discretion import for_operators, starting
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation
    from pocketd.held import Holder
    from pocketd.templates import Progress

CHANGES = 5  # of a pocket's files, while it is being held


async def warm(daemon: Daemon, peer: processes.Peer, name: str, progress: Progress) -> Message:
    """Hold a pocket at its checkpoint, or preloaded; returns when it is and its slots wait. Raises Error that
    says why it cannot be."""
    service, definition = await daemon.resolve(name, peer)
    if definition is None:
        raise Error("bad-request", f"{name} is a service, which is warm while it is on: pocket {name} on")
    if not (definition.is_held or definition.warm):
        raise Error("hold", f"{name} has nothing to be warm; its definition may have {_choices(definition)}")
    permissions.check_may_run(definition, peer)
    with for_operators(peer, service.name):
        generation = await service.on(starting(peer, service.name, progress))
    with generation.busy():
        facts: Message = {}
        if definition.is_held:
            generation.held.forget_failure(name)
            facts = (await _held(daemon, generation, definition, progress)).facts
        if definition.warm:
            progress(f"{name}: making {definition.warm} slots")
            await generation.slots.fill(daemon, definition)
            await generation.slots.settle(name)
    return {
        "name": name,
        "service": service.name,
        "slots": generation.slots.made(name),
        "mode": definition.mode,
        **facts,
    }


async def _held(daemon: Daemon, generation: Generation, definition: Pocket, progress: Progress) -> Holder:
    """The template, made anew as often as its files change while it is made, within reason."""
    for _ in range(CHANGES):
        try:
            return await generation.held.get(daemon, definition, progress)
        except Error as e:
            if e.code != "changed":
                raise
        definition = daemon.config.pockets.get(definition.name, definition)
    return await generation.held.get(daemon, definition, progress)


def _choices(definition: Pocket) -> str:
    slots = "warm = 1, for a worker made ahead of time"
    if definition.program:
        return f'checkpoint = "main", to be held before that function is first called, and {slots}'
    return f'preload = ["app"], to have that module of its directory imported for all sessions, and {slots}'


def cool(daemon: Daemon, peer: processes.Peer, name: str) -> Message:
    """End a pocket's template; runs that came from it go on."""
    daemon.check_known(name, peer)
    definition = daemon.config.pockets.get(name)
    if definition is None:
        if name in daemon.config.invalid:
            daemon.service(name)  # which says what is wrong with it
        raise Error("not-found", f"there is no pocket {name!r}")
    permissions.check_may_run(definition, peer)
    there = [
        bool(g.slots.give_way(name)) | g.held.cool(name) for s in daemon.services.values() for g in s.generations()
    ]
    return {"name": name, "already": not any(there)}


def facts(said: Message) -> Message:
    """What a template said of itself, as far as it can be that: its words are its program's."""
    found: Message = {}
    for key in ("seconds", "threads", "files", "working_set", "run"):
        value = said.get(key)
        found[key] = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    for key in ("variables", "unsure", "noted"):
        value = said.get(key)
        words = value if isinstance(value, list) else []
        found[key] = [word[:200] for word in words if isinstance(word, str)][:100]
    return found


def begin(daemon: Daemon, generation: Generation) -> None:
    """A service is on: what its pockets' definitions want to be ready is made, beside."""
    for definition in daemon.config.pockets.values():
        if definition.warm and _service(daemon, definition) == generation.name:
            generation.keep(generation.slots.fill(daemon, definition))


def _service(daemon: Daemon, definition: Pocket) -> str | None:
    if definition.service is not None:
        return definition.service
    return next(iter(daemon.services)) if len(daemon.services) == 1 else None


def state(daemon: Daemon, definition: Pocket) -> tuple[dict[str, Any], Holder | None]:
    """Whether a pocket is held, for `pocket ps`: "rehearsed", "held", "holding", "cool", or "not held" with
    the reason. And its template, if there is one."""
    generations = [g for s in daemon.services.values() for g in s.generations()]
    ready = sum(g.slots.count(definition.name) for g in generations)
    took = max((g.slots.took.get(definition.name, 0.0) for g in generations), default=0.0)
    slots: dict[str, Any] = {"slots": None, "warm": 0, "slot_seconds": None}
    if definition.warm:
        slots = {"slots": ready, "warm": definition.warm, "slot_seconds": round(took, 4) or None}
    if not definition.is_held:
        return {"held": None, **slots}, None
    for service in daemon.services.values():
        for g in service.generations():
            holder = g.held.current.get(definition.name)
            if holder:
                why = holder.facts.get("not_rehearsed")
                kind = "rehearsed" if holder.facts.get("rehearsed") else "held"
                template = {"template_pid": holder.pid, "template_charged": holder.charged()}
                return {**slots, "held": kind, "why_not_rehearsed": why, **template}, holder
            if g.held.holding(definition.name):
                return {**slots, "held": "holding"}, None
            failed = g.held.failed.get(definition.name)
            if failed and failed[0] == definition:
                return {**slots, "held": "not held", "why_not_held": failed[1]}, None
    return {**slots, "held": "cool"}, None
