"""One launch, from a caller's request to a worker in its place: who asks, which pocket, which files, which template.

The steps are in the order of the text. Nothing of what the caller sent for its program passes here: that waits on the
session's own socket for the worker.
"""

from __future__ import annotations

import os
import pwd
import re
import stat
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cgroup.limits import CONTROLLERS, LimitError, Limits
from cgroup.node import Cgroup
from nsutil import memory, processes
from nsutil.messages import Fds
from pocketd import adopt, events, paths, permissions, trees, unit, wire
from pocketd.definitions import Pocket
from pocketd.generation import Generation, Session
from pocketd.templates import Progress
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

_SESSION = re.compile(r"[0-9a-f]{32}")
_MODES = ("program", "client")
_DEFAULTS = {"pids.max": "4096"}  # of a pocket that says nothing of it: a fork bomb stays within it
_TMP = 1 << 30  # bytes, at most, of a worker's /tmp, home and /dev/shm each: charged to its pocket as it writes


@dataclass(frozen=True)
class Plan:
    """What a launch needs to know of its pocket, whether it has a definition or not."""

    name: str
    definition: Pocket | None
    uid: int
    gid: int
    network: str
    models: frozenset[str]
    limits: Limits
    home: str


async def login(daemon: Daemon, peer: processes.Peer, request: Message, fds: Fds, progress: Progress) -> Message:
    """Serve one login. `fds` is the caller's to close; raises Error with what to do about it."""
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
        generation = await service.on(progress)
        stack.enter_context(generation.busy())
        limits = definition.limits if definition else daemon.config.run_limits
        asking = definition.name if definition else "an ad hoc run"
        await daemon.admission.admit(asking, limits, progress, given["hold"])
        plan = make_plan(daemon, generation, peer, definition, identity)
        daemon.claimed.add(plan.uid)  # until its session is there, or is not
        stack.callback(daemon.claimed.discard, plan.uid)
        files = _files(daemon, plan, peer, request, given, stack)
        files += unit.notify(request, given.get("notify"), peer, daemon.identities, stack)
        secret = unit.credentials(request, given.get("credentials"))
        models = plan.models if mode == "client" and plan.models else None
        template = await generation.templates.get(models, progress)
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
            orders = _orders(generation, plan, mode, files, secret)
            stack.callback(os.close, orders)
            passed = [leaf.fd, given["session"], given["hold"], orders, *(fd for fd, _ in files)]
            if secret:
                passed.append(given["credentials"])
            if plan.network == "host":
                passed.append(daemon.network)
            await _introduce(generation, template.number, session, mode, passed)
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
    offered = frozenset(generation.definition.models)
    used = daemon.claimed | {s.note.get("uid", 0) for _, s in daemon.sessions()}
    if definition is None:
        if "defaults.run" in daemon.config.invalid:
            raise Error(
                "invalid", "[defaults.run] of the configuration is wrong; ad hoc runs would go without its limits"
            )
        uid = peer.uid or daemon.identities.ad_hoc(used)
        gid = peer.gid if peer.uid else uid
        limits = daemon.config.run_limits
        return Plan(f"run-{identity[:12]}", None, uid, gid, "none", offered, limits, _home(peer.uid))
    permissions.check_may_run(definition, peer)
    if definition.run_as:
        uid, gid = definition.run_as.uid, definition.run_as.gid
    else:
        uid = gid = daemon.identities.named(definition.name)
    models = frozenset(definition.allow.models) & offered
    return Plan(
        definition.name, definition, uid, gid, definition.allow.network, models, definition.limits, _home(peer.uid)
    )


def _home(uid: int) -> str:
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        return ""
    return home if home.startswith("/") and paths.refuse_directory(home) is None else ""


def _files(
    daemon: Daemon, plan: Plan, peer: processes.Peer, request: Message, given: dict[str, Any], stack: ExitStack
) -> list[tuple[int, Message]]:
    """The pocket's trees with the place of each, the directory first."""
    found: list[tuple[int, Message]] = []
    # An id of the range owns nothing on disk: its pocket's owner's files are shown as its own.
    uid = plan.uid if plan.uid != peer.uid else None

    def add(fd: int, target: str, writable: bool, pidfd: int | None = None, alias: str | None = None) -> None:
        tree = trees.make(fd, pidfd, writable=writable, uid=uid, identities=daemon.identities)
        stack.callback(os.close, tree)
        directory = os.path.isdir(f"/proc/self/fd/{fd}")
        place = {"target": target, "alias": alias, "directory": directory, "writable": writable}
        found.append((tree, place))

    definition = plan.definition
    if definition is None:
        if "dir" not in given:
            raise Error("bad-request", "an ad hoc run sends its directory")
        foreign = not _same_mounts(peer.pidfd, peer.pid)
        directory = str(request.get("path")) if foreign else os.readlink(f"/proc/self/fd/{given['dir']}")
        _refuse(directory)
        add(given["dir"], directory, True, peer.pidfd if foreign else None, "/pocket")
        for fd, mount in zip(given["mount"], wire.field(request, "mounts", list, []), strict=False):
            target = os.fsdecode(wire.field(mount, "target", bytes))
            writable = wire.field(mount, "writable", bool, False)
            source = target if foreign else os.readlink(f"/proc/self/fd/{fd}")
            try:
                paths.parse_mount(f"{source}:{target}{':rw' if writable else ''}")
            except ValueError as e:
                raise Error("mount", f"--mount {source}:{target} {e}") from None
            add(fd, target, writable, peer.pidfd if foreign else None)
        return found
    fd = os.open(definition.dir, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    add(fd, str(definition.dir), False, None, "/pocket")
    for name in definition.allow.write:
        path = permissions.writable(fd, name)
        stack.callback(os.close, path)
        add(path, f"{definition.dir}/{name}", True, None, f"/pocket/{name}")
    for m in definition.mounts:
        shown = os.open(m.source, os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, shown)
        add(shown, str(m.target), m.writable)
    return found


def _refuse(directory: str) -> None:
    why = paths.refuse_directory(directory)
    if why:
        raise Error("directory", f"{directory} cannot be a pocket's directory: it {why}. Choose another by --dir")


def _same_mounts(pidfd: int, pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        raise Error("gone", "the caller has ended") from None


def make_leaf(generation: Generation, plan: Plan, identity: str) -> Cgroup:
    """The session's own cgroup beneath its pocket's, which carries the limits. The caller owns it."""
    assert generation.tree
    path = f"pockets/{plan.name}"
    with Cgroup("pockets", generation.tree) as pockets, pockets.create(plan.name, exist_ok=True) as pocket:
        try:
            enabled = pocket.enable(CONTROLLERS)
            pocket.apply({**(_DEFAULTS if "pids" in enabled else {}), **plan.limits})
            pocket.create(identity).close()
        except (LimitError, OSError) as e:
            if not pocket.names():  # made for this session, which will not be
                pocket.remove()
            raise Error("limit" if isinstance(e, LimitError) else "cgroup", f"pocket {plan.name}: {e}") from None
    generation.promise(plan.name, plan.limits)
    return Cgroup(f"{path}/{identity}", generation.tree)


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


def _devices(plan: Plan) -> list[Message]:
    """The device files of the host that the pocket may use: its worker makes its own of the same numbers."""
    found = []
    for path in plan.definition.allow.devices if plan.definition else ():
        try:
            status = os.lstat(path)
        except OSError as e:
            raise Error("device", f"{plan.name} may use {path}, which is not there: {e.strerror}") from None
        if not stat.S_ISCHR(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise Error("device", f"{plan.name} may use {path}, which is no device file")
        found.append({"path": path, "kind": stat.S_IFMT(status.st_mode), "number": status.st_rdev})
    return found


def _orders(generation: Generation, plan: Plan, mode: str, files: list[tuple[int, Message]], secret: str | None) -> int:
    """What the worker is to do, in a sealed memfd that it alone reads; the caller owns the descriptor.

    A template passes it on unread: what it had once held, later workers of other pockets could find in their memory.
    """
    directory = files[0][1]["target"]
    home = "" if plan.home == directory or plan.home.startswith(directory + "/") else plan.home
    orders = {
        "mode": mode,
        "network": plan.network,
        "uid": plan.uid,
        "gid": plan.gid,
        "mounts": [place for _, place in files],
        "hostname": plan.name,
        "home": home,
        "tmp": _TMP,
        "shm": _TMP,
        "directory": directory,
        "credentials": secret,
        "exit": generation.definition.exit,
        "pids_max": plan.limits.get("pids.max"),
        "devices": _devices(plan),
        "defined": plan.definition is not None,
        "cold": bool(plan.definition and plan.definition.cold),
    }
    return memory.sealed(wire.pack(orders), "orders")


async def _introduce(generation: Generation, template: int, session: Session, mode: str, passed: list[int]) -> None:
    """Hand all over to init, which has the template fork. After this pocketd is not needed."""
    if not generation.init:
        raise Error("service", f"service {generation.name} has ended")
    host = session.note["network"] == "host"
    fields: dict[str, Any] = {"session": session.id, "template": template, "mode": mode, "note": session.note}
    message, received = await generation.init.call("launch", passed, host_network=host, **fields)
    with received:
        if len(received):
            pidfd = received.take()
            try:
                session.pid = processes.pid_of(pidfd)
            except processes.Gone:
                pass  # a short program: its caller has its status
            finally:
                os.close(pidfd)
    session.started = time.time()


def _reply(generation: Generation, session: Session) -> Message:
    d = generation.definition
    return {"service": d.name, "pocket": session.pocket, "models": sorted(d.models), "pid": session.pid}
