"""A launch whose work was done ahead of time: from a slot, or from the pocket's own template.

Where neither is there, or this run cannot come from them, the launch goes the long way (pocketd.launch); its caller's
start, which waits on the session's socket, is untouched then.
"""

from __future__ import annotations

import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nsutil import processes
from pocketd import events, orders
from pocketd.generation import Generation, Session
from pocketd.orders import Plan
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from cgroup.node import Cgroup
    from pocketd.daemon import Daemon
    from pocketd.definitions import Pocket
    from pocketd.held import Holder

# A run's template or slot could not serve it, and another way may.
_ANOTHER_WAY = ("held", "unlike", "outdated", "no-template")


@dataclass
class Launching:
    """One launch, as far as it can come from what was made ahead of time."""

    daemon: Daemon
    generation: Generation
    plan: Plan
    peer: processes.Peer
    request: Message
    given: dict[str, Any]  # the caller's descriptors by their roles
    marks: orders.Marks
    _refused: bool = False  # by a slot of the pocket's template: that one would refuse it as well

    @property
    def definition(self) -> Pocket | None:
        """The pocket's, where such a launch can be what was asked for."""
        definition = self.plan.definition
        if definition is None or definition.cold or self.request.get("mode") != definition.mode:
            return None
        # What a service manager gives a run of its own, and a place in the caller's cgroup, only the long way gives.
        if self.request.get("adopt") or set(self.given) - {"session", "hold", "mount", "dir"}:
            return None
        return definition

    async def from_slot(self) -> Session | None:
        """A session whose worker waits already, or None. Raises Error for what is wrong with the launch itself."""
        definition, slots = self.definition, self.generation.slots
        if definition is None or self._in_vain(self.generation.held.current.get(definition.name)):
            return None
        slot = slots.take(self.daemon, definition, self.plan.home)
        if slot is None:
            return None
        session = self._session(slot.leaf, slot.held)
        session.pid = slot.pid
        self.marks.append(("pocketd has a slot", time.monotonic()))
        why = await self._tried(session, slots.assign(slot, session.id, session.note, self.given, self.marks))
        self._refused = why == "unlike"
        if slot.held and why in (None, "unlike"):
            self._remember(self.generation.held.by_number.get(slot.held), why is None)
        return self._started(session, "slot") if why is None else None

    def _in_vain(self, holder: Holder | None) -> bool:
        """Whether this user's launches have been refused by a template, so that this one goes another way at once."""
        self._refused = holder is not None and not holder.may_serve(self.peer.uid)
        return self._refused

    def _remember(self, holder: Holder | None, done: bool) -> None:
        if holder:
            holder.used = time.monotonic()
            holder.served(self.peer.uid, done)

    async def from_template(self) -> Session | None:
        """A session whose worker the pocket's own template makes, or None. Raises Error likewise."""
        definition, held = self.definition, self.generation.held
        if not definition or not definition.is_held or self._refused:
            return None
        holder = held.ready_for(self.daemon, definition)
        if holder is None:
            return None
        if self.plan.home not in ("", *holder.homes) and not orders.beneath(self.plan.home, definition):
            elsewhere = f"{self.plan.home}, its caller's home, is not among those of who may_run names"
            events.emit("launch-not-held", service=self.generation.name, pocket=definition.name, why=elsewhere)
            return None
        session = self._session(holder.leaf(str(self.request["session"])), holder.number)
        self.marks.append(("pocketd has a leaf beneath the pocket's template", time.monotonic()))
        why = await self._tried(session, held.introduce(holder, session, self.given, self.marks))
        self._remember(holder, why is None)
        return self._started(session, "held") if why is None else None

    def _session(self, leaf: Cgroup, held: int | None) -> Session:
        plan, identity = self.plan, str(self.request["session"])
        note = {
            "pocket": plan.name,
            "uid": plan.uid,
            "leaf": leaf.kernel_path,
            "mode": self.request["mode"],
            "network": plan.network,
            "directory": str(plan.definition.dir) if plan.definition else "",
            "caller": self.peer.uid,
            "held": held,
        }
        session = self.generation.sessions[identity] = Session(identity, plan.name, note, leaf, 0, time.time())
        return session

    async def _tried(self, session: Session, launching: Coroutine[Any, Any, None]) -> str | None:
        """None when it is launched; else the code of the error for which it is to go another way."""
        generation = self.generation
        try:
            await launching
        except Error as e:
            await generation.drop_session(session)
            if e.code not in _ANOTHER_WAY:
                raise
            if e.code == "outdated":
                generation.held.outdated(session.pocket, session.note.get("held"), e.message)
            events.emit("launch-not-held", service=generation.name, pocket=session.pocket, why=e.message)
            self.marks.append((f"refused: {e.message}", time.monotonic()))
            return e.code
        except BaseException:
            await generation.drop_session(session)
            raise
        return None

    def _started(self, session: Session, way: str) -> Session:
        session.started = time.time()
        events.emit(
            "session-started",
            service=self.generation.name,
            pocket=session.pocket,
            session=session.id,
            pid=session.pid,
            mode=session.note["mode"],
            way=way,
        )
        return session
