"""A launch whose work was done ahead of time: from a slot, or from the pocket's own template.

Where neither is there, or this run cannot come from them, the launch goes the long way (pocketd.launch); its caller's
start, which waits on the session's socket, is untouched then.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from nsutil import processes
from pocketd import events, orders
from pocketd.generation import Generation, Session
from pocketd.orders import Plan
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from cgroup.node import Cgroup
    from pocketd.daemon import Daemon
    from pocketd.held import Holder
    from pocketd.slots import Slot

# A run's template or slot could not serve it, and another way may.
_ANOTHER_WAY = ("held", "no-template")


async def launch(
    daemon: Daemon,
    generation: Generation,
    plan: Plan,
    peer: processes.Peer,
    request: Message,
    given: dict[str, Any],
    marks: orders.Marks,
) -> Session | None:
    """A session whose worker is there sooner, or None. Raises Error for what is wrong with the launch itself."""
    definition = plan.definition
    mode = "program" if definition and definition.program else "client"
    if definition is None or definition.cold or request.get("mode") != mode:
        return None
    # What a service manager gives a run of its own, and a place in the caller's cgroup, the long way alone can give.
    if request.get("adopt") or set(given) - {"session", "hold", "mount", "dir"}:
        return None
    slot = generation.slots.take(daemon, definition, plan.home)
    if slot:
        session = _session(generation, plan, peer, str(request["session"]), slot.leaf, slot.held)
        session.pid = slot.pid
        marks.append(("pocketd has a slot", time.monotonic()))
        if await _tried(generation, session, generation.slots.assign(slot, session.id, session.note, given, marks)):
            return _started(generation, session, "slot")
    if not definition.checkpoint or not definition.program:
        return None
    holder = generation.held.ready_for(daemon, definition)
    if holder is None or not _at_home(plan, holder):
        return None
    session = _session(
        generation, plan, peer, str(request["session"]), holder.leaf(str(request["session"])), holder.number
    )
    marks.append(("pocketd has a leaf beneath the pocket's template", time.monotonic()))
    if await _tried(generation, session, generation.held.introduce(holder, session, given, marks)):
        return _started(generation, session, "held")
    return None


def _at_home(plan: Plan, holder: Holder | Slot) -> bool:
    """Whether the caller's home is one of those that were made."""
    assert plan.definition
    return not plan.home or plan.home in holder.homes or orders.beneath(plan.home, plan.definition)


def _session(
    generation: Generation, plan: Plan, peer: processes.Peer, identity: str, leaf: Cgroup, held: int | None
) -> Session:
    note = {
        "pocket": plan.name,
        "uid": plan.uid,
        "leaf": leaf.kernel_path,
        "mode": "program" if plan.definition and plan.definition.program else "client",
        "network": plan.network,
        "directory": str(plan.definition.dir) if plan.definition else "",
        "caller": peer.uid,
        "held": held,
    }
    session = generation.sessions[identity] = Session(identity, plan.name, note, leaf, 0, time.time())
    return session


async def _tried(generation: Generation, session: Session, launching: Any) -> bool:
    try:
        await launching
    except Error as e:
        await generation.drop_session(session)
        if e.code not in _ANOTHER_WAY:
            raise
        events.emit("launch-not-held", service=generation.name, pocket=session.pocket, why=e.message)
        return False
    except BaseException:
        await generation.drop_session(session)
        raise
    return True


def _started(generation: Generation, session: Session, way: str) -> Session:
    session.started = time.time()
    events.emit(
        "session-started",
        service=generation.name,
        pocket=session.pocket,
        session=session.id,
        pid=session.pid,
        mode=session.note["mode"],
        way=way,
    )
    return session
