"""One launch, from a caller's request to a worker in its place: who asks, which pocket, which files, which template.

The steps are in the order of the text. Nothing of what the caller sent for its program passes here: that waits on the
session's own socket for the worker.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cgroup.node import Cgroup
from nsutil import processes
from nsutil.messages import Fds
from pocketd import adopt, ahead, events, orders, permissions, shown, subordinates, unit, wire
from pocketd.definitions import Pocket
from pocketd.discretion import for_operators, starting
from pocketd.generation import Generation, Session
from pocketd.orders import Plan
from pocketd.templates import Progress
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

_SESSION = re.compile(r"[0-9a-f]{32}")
_MODES = ("program", "client")


async def login(daemon: Daemon, peer: processes.Peer, request: Message, fds: Fds, progress: Progress) -> Message:
    """Serve one login. `fds` is the caller's to close; raises Error with what to do about it."""
    marks = [("pocketd has the request", time.monotonic())]
    identity, mode = wire.field(request, "session", str), wire.field(request, "mode", str)
    if not _SESSION.fullmatch(identity) or mode not in _MODES:
        raise Error("bad-request", "a login names a session of 32 hexadecimal digits and a mode, program or client")
    with ExitStack() as stack:
        given = _take(request, fds, stack)
        service, definition = await daemon.resolve(wire.field(request, "name", str, None), peer)
        if definition and definition.cold and mode == "client":
            raise Error("cold", f"{definition.name} has cold = true: there is nothing warm that a client could call")
        known = service.find(identity)
        if known and peer.uid not in (0, known[1].note.get("caller", peer.uid)):
            raise Error("bad-request", "that session is not yours")
        if known:  # the same caller again, whose first request an earlier pocketd did not live to answer
            return _reply(*known)
        told = starting(peer, service.name, progress)
        with for_operators(peer, service.name):
            generation = await service.on(told)
        stack.enter_context(generation.busy())
        user = subordinates.owner_of(peer.uid)
        await daemon.turns.take(user)
        stack.callback(daemon.turns.give, user)
        if service.find(identity):  # by another login of that name, which waited for its turn too
            raise Error("bad-request", "that session is being launched")
        stack.enter_context(daemon.admission.launching(identity, user))
        plan = make_plan(daemon, generation, peer, definition, identity)
        launching = ahead.Launching(daemon, generation, plan, peer, request, given, marks)
        ready = await launching.from_slot()
        if ready is None:
            asking = definition.name if definition else "an ad hoc run"
            await daemon.admission.admit(asking, plan.limits, progress, given["hold"])
            if definition is None:  # which ids are free may have changed while it waited
                launching.plan = plan = make_plan(daemon, generation, peer, definition, identity)
            daemon.claimed.add(plan.uid)  # until its session is there, or is not
            stack.callback(daemon.claimed.discard, plan.uid)
            ready = await launching.from_template()
        if ready:
            return _reply(generation, ready)
        # An id of the range owns nothing on disk: its pocket's owner's files are shown as its own.
        shown_as = plan.uid if plan.uid != peer.uid else None
        if definition:
            files = shown.defined_files(daemon.identities, definition, shown_as, stack)
        else:
            files = await shown.callers_files(daemon.identities, shown_as, peer, request, given, stack)
        files += await unit.notify(request, given.get("notify"), peer, stack)
        secret = unit.credentials(request, given.get("credentials"))
        with for_operators(peer, service.name):
            template = await generation.templates.get(plan.loaded(mode), told)
        if not generation.running:
            raise Error("service", f"service {generation.name} was switched off meanwhile; ask again")
        if wire.field(request, "adopt", bool, False):
            leaf, where = adopt.place(daemon.host.hierarchy, peer, plan.limits, identity)
        else:
            leaf, where = make_leaf(generation, plan, identity), {}
        note = {**_note(plan, leaf, mode, files), **where, "caller": peer.uid}
        session = Session(identity, plan.name, note, leaf, 0, time.time())
        generation.sessions[identity] = session
        try:
            ordered = orders.orders(generation, plan, mode, files, secret)
            stack.callback(os.close, ordered)
            passed = [leaf.fd, given["session"], given["hold"], ordered, *(fd for fd, _ in files)]
            if secret:
                passed.append(given["credentials"])
            if plan.network == "host":
                passed.append(daemon.network)
            marks.append(("pocketd has what the worker needs", time.monotonic()))
            await _introduce(generation, template.number, session, mode, passed, marks)
        except BaseException:
            await generation.drop_session(session)
            raise
        events.emit(
            "session-started", service=service.name, pocket=plan.name, session=identity, pid=session.pid, mode=mode
        )
        return _reply(generation, session)


def _take(request: Message, fds: Fds, stack: ExitStack) -> dict[str, Any]:
    """The descriptors of a request by their roles: session, hold, dir, notify, credentials, any number of mounts."""
    given: dict[str, Any] = {"mount": []}
    for role in wire.field(request, "roles", list):
        if not isinstance(role, str):
            raise Error("bad-request", "the roles of a login's descriptors are words")
        fd = fds.take()
        stack.callback(os.close, fd)
        if role == "mount":
            given["mount"].append(fd)
        else:
            given[role] = fd
    if "session" not in given or "hold" not in given:
        raise Error("bad-request", "a login carries a session socket and a hold socket")
    return given


def make_plan(
    daemon: Daemon, generation: Generation, peer: processes.Peer, definition: Pocket | None, identity: str
) -> Plan:
    """Decide who the worker is: a pocket's own id, or the caller's own; root's caller gets an id of the range."""
    if definition is None:
        offered = frozenset(generation.definition.models)
        used = daemon.claimed | {s.note.get("uid", 0) for _, s in daemon.sessions()}
        if "defaults.run" in daemon.config.invalid:
            raise Error(
                "invalid", "[defaults.run] of the configuration is wrong; ad hoc runs would go without its limits"
            )
        name = f"run-{identity[:12]}"
        if name in daemon.config.pockets or any(s.pocket == name and s.id != identity for _, s in daemon.sessions()):
            raise Error("bad-request", f"there is a pocket {name} already; choose another session")
        uid = peer.uid or daemon.identities.ad_hoc(used)
        gid = peer.gid if peer.uid else uid
        limits = daemon.config.run_limits
        return Plan(name, None, uid, gid, "none", offered, limits, orders.home_of(peer.uid))
    permissions.check_may_run(definition, peer)
    return replace(orders.plan_of(daemon, generation, definition), home=orders.home_of(peer.uid))


def make_leaf(generation: Generation, plan: Plan, identity: str) -> Cgroup:
    """The session's own cgroup beneath its pocket's, which carries the limits. The caller owns it."""
    assert generation.tree
    orders.make_pocket(generation, plan.name, plan.limits, identity, alone=plan.definition is None)
    return Cgroup(f"pockets/{plan.name}/{identity}", generation.tree)


def _note(plan: Plan, leaf: Cgroup, mode: str, files: list[tuple[int, Message]]) -> Message:
    """What init keeps for us, so that a new pocketd knows the session again."""
    directory = files[0][1]["target"] if files else ""
    return {
        "pocket": plan.name,
        "uid": plan.uid,
        "leaf": leaf.kernel_path,
        "mode": mode,
        "directory": directory,
        "network": plan.network,
    }


async def _introduce(
    generation: Generation, template: int, session: Session, mode: str, passed: list[int], marks: orders.Marks
) -> None:
    """Hand all over to init, which has the template fork. After this pocketd is not needed."""
    if not generation.init:
        raise Error("service", f"service {generation.name} has ended")
    host = session.note["network"] == "host"
    fields: dict[str, Any] = {"session": session.id, "template": template, "mode": mode, "note": session.note}
    fields["marks"] = marks
    message, received = await generation.init.call("launch", passed, host_network=host, **fields)
    with received:
        if len(received):
            held = generation.held.current.get(session.pocket)  # it goes before its pocket's template, too
            session.pid = orders.pid_of(received.take(), held.oom_score if held else 0)
    session.started = time.time()


def _reply(generation: Generation, session: Session) -> Message:
    d = generation.definition
    return {"service": d.name, "pocket": session.pocket, "models": sorted(d.models), "pid": session.pid}
