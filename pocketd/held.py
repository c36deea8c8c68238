"""Pockets' templates of one generation: made when a pocket is run, or warmed, and given up when what they saw changes.

A launch never waits for one: while there is none that is ready it goes the long way, from the root template. A template
is its pocket's own code, in its pocket's own cgroup, and is believed as little as any worker.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cgroup.limits import CONTROLLERS
from cgroup.node import Cgroup
from nsutil import mounts
from nsutil.messages import Fds
from pocketd import events, filters, measured, orders, shown, warming
from pocketd.definitions import Pocket
from pocketd.discretion import for_operators
from pocketd.link import Link
from pocketd.measured import Place
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation, Session
    from pocketd.templates import Progress, Template

NUMBERS = 1 << 20  # above those of the service's own templates
TRIALS = (1, 2, 5)  # runs of a sample before its rehearsal, as far as one more may show more
REHEARSING = 210.0  # seconds more for each of those, and for what follows them: a minute at most for each run
LEAST_RUN = 4 << 20  # bytes that a run has of its own at the least
GRACE = 5.0  # seconds in which a template that is overdue may say where it is
BACKOFF = 10.0  # seconds before a template that died is made again
REST = 60.0  # seconds before one that gave way is, unless somebody warms it
_PATIENCE = 8  # launches in a row of one user that a template may refuse before it is asked less often
_PASSING = ("no-template", "service", "stopping")  # errors that say nothing of the pocket


@dataclass
class Holder:
    """One pocket's template. Owns its cgroup's descriptors."""

    pocket: str
    definition: Pocket | None  # None: an earlier pocketd's, which is being given up
    number: int
    cgroup: Cgroup  # it and its sessions' leaves are beneath
    parent: Template | None = None
    place: int = -1  # the same, as a mount of its own with no way up: for descriptors that the template gets
    uid: int = 0
    homes: tuple[str, ...] = ()
    pid: int = 0
    ready: bool = False
    ended: bool = False  # it is being cleared away
    stale: str | None = None  # why no launch comes from it any more
    own: int = 0  # bytes that it had of its own before anything was forked from it, with which it shares them
    oom_score: int = 0  # of its workers: within its pocket's memory.max each goes before their template
    facts: Message = field(default_factory=dict)
    refusals: dict[int, tuple[int, int]] = field(default_factory=dict)  # by uid: in a row, and launches not to ask for
    born: float = field(default_factory=time.monotonic)
    used: float = field(default_factory=time.monotonic)  # when a launch last came from it

    def leaf(self, name: str) -> Cgroup:
        """A leaf for a session, which the template may clone into. The caller owns it."""
        leaf = self.cgroup.create(name)
        give(leaf.fd, self.uid)
        return leaf

    def seen(self, leaf: Cgroup) -> int:
        """A leaf's directory as the template may have it; the caller's."""
        return os.open(os.fsdecode(leaf.name), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.place)

    @property
    def itself(self) -> Place:
        """The process, without its sessions: for its memory."""
        return self.cgroup.kernel_path, [self.pid]

    def charged(self) -> int | None:
        """Bytes that are charged to its pocket for it; None where the host's cgroup2 lacks the memory controller."""
        try:
            with Cgroup("self", self.cgroup) as own:
                return own.stats().memory_current
        except OSError:
            return None

    def may_serve(self, uid: int) -> bool:
        """Whether a launch of this user is to ask it. One that is refused each time, for what the template cannot
        know, would cost each of that user's launches a fork in vain: it is asked less and less often."""
        refusals, skip = self.refusals.get(uid, (0, 0))
        if skip:
            self.refusals[uid] = refusals, skip - 1
        return not skip

    def served(self, uid: int, well: bool) -> None:
        refusals = 0 if well else self.refusals.get(uid, (0, 0))[0] + 1
        self.refusals[uid] = refusals, min(2 ** max(0, refusals - _PATIENCE), 64) if refusals >= _PATIENCE else 0
        while len(self.refusals) > 1000:
            self.refusals.pop(next(iter(self.refusals)))

    def close(self) -> None:
        self.cgroup.close()
        if self.place >= 0:
            os.close(self.place)
            self.place = -1


class Held:
    """What there is, by number; of each pocket one that launches come from."""

    def __init__(self, generation: Generation):
        self.generation = generation
        self.by_number: dict[int, Holder] = {}
        self.current: dict[str, Holder] = {}
        self.failed: dict[str, tuple[Pocket, str]] = {}  # why a pocket cannot be held, until it is another
        self.cool_until: dict[str, float] = {}
        self._changing: set[str] = set()  # held until their files changed; held again when those are quiet
        self._making: dict[str, asyncio.Task[Holder]] = {}
        self._last = NUMBERS

    def __iter__(self) -> Iterator[Holder]:
        return iter(list(self.by_number.values()))

    def has(self, pocket: str) -> bool:
        return any(h.pocket == pocket for h in self.by_number.values())

    # -- for launches

    def ready_for(self, daemon: Daemon, definition: Pocket) -> Holder | None:
        """The template that a launch of this pocket can come from now. Where there should be one, it is begun."""
        name = definition.name
        daemon.files.look()  # what changed until now counts for this launch already
        holder = self.current.get(name)
        if holder and holder.ready and not self._outdated(holder, definition):
            holder.used = time.monotonic()
            return holder
        if name not in self._making and time.monotonic() >= self.cool_until.get(name, 0.0):
            self.begin(daemon, definition)
        return None

    def _outdated(self, holder: Holder, definition: Pocket) -> bool:
        if holder.definition != definition:
            self.give_up(holder, "its definition is another one")
        elif holder.parent is None or holder.parent.stale:
            self.give_up(holder, "the service's own template is made anew")
        return holder.stale is not None

    def begin(self, daemon: Daemon, definition: Pocket) -> None:
        """Make one beside, unless it is known that it cannot be."""
        known = self.failed.get(definition.name)
        if known and known[0] == definition:
            return
        self.generation.keep(self._quietly(daemon, definition))

    def renew(self, daemon: Daemon, definition: Pocket) -> None:
        """Make another beside the one that there is, and in its place when it is ready."""
        if definition.name not in self._making:
            self.generation.keep(self._quietly(daemon, definition, True))

    def may_renew(self, holder: Holder) -> bool:
        """Whether another that is made in its place may succeed: it has not just failed, nor by what it is."""
        known = self.failed.get(holder.pocket)
        rests = time.monotonic() < self.cool_until.get(holder.pocket, 0.0)
        return not rests and not (known and known[0] == holder.definition)

    def resting(self, pocket: str) -> float:
        """Seconds for which none is to be made that nobody asks for: it gave way, or has died."""
        holder = self.current.get(pocket)
        rest = self.cool_until.get(pocket, 0.0) - time.monotonic()
        return 0.0 if holder and holder.ready else max(0.0, rest)

    def holding(self, pocket: str) -> bool:
        return pocket in self._making

    async def _quietly(self, daemon: Daemon, definition: Pocket, another: bool = False) -> None:
        with suppress(Error, OSError, ConnectionError):
            await self.get(daemon, definition, lambda text: None, another)

    async def get(self, daemon: Daemon, definition: Pocket, progress: Progress, another: bool = False) -> Holder:
        """The pocket's template, made if there is none. Raises Error that says why it cannot be held; "changed" when
        its files or its definition became others meanwhile."""
        name = definition.name
        holder = self.current.get(name)
        if holder and holder.ready and not another and not self._outdated(holder, definition):
            return holder
        task = self._making.get(name)
        known = self.failed.get(name)
        if task is None and not another and known and known[0] == definition:
            raise Error("hold", known[1])
        if task is None:
            task = asyncio.ensure_future(self._make(daemon, definition, progress))
            self._making[name] = task
            task.add_done_callback(lambda done: self._made(definition, done))
        try:
            holder = await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            if name in self._changing:
                raise Error("changed", f"{name} is not held: its files change; run it again when they do not") from None
            raise Error("cooled", f"{name} is not held: it was cooled meanwhile") from None
        if self._outdated(holder, definition):  # begun by an older definition
            raise Error("changed", f"{name} is not held: {holder.stale}")
        return holder

    def _made(self, definition: Pocket, task: asyncio.Task[Holder]) -> None:
        if self._making.get(definition.name) is task:
            del self._making[definition.name]
        if task.cancelled():
            return
        e = task.exception()
        if e is None:
            self.failed.pop(definition.name, None)
            return
        why = e.message if isinstance(e, Error) else f"{type(e).__name__}: {e}"
        if isinstance(e, ConnectionError) or (isinstance(e, Error) and e.code in _PASSING):
            self.cool_until[definition.name] = time.monotonic() + BACKOFF
        else:
            self.failed[definition.name] = definition, why
        first, _, _ = why.partition("\n")
        events.emit("pocket-not-held", "warning", service=self.generation.name, pocket=definition.name, why=first)

    # -- making

    async def _make(self, daemon: Daemon, definition: Pocket, progress: Progress) -> Holder:
        """Held and rehearsed; or, where the rehearsal fails, held without, with the reason in `facts`."""
        self.generation.changes.watch(daemon, definition)
        why = _not_to_rehearse(definition)
        # A sample of which no two runs do the same, for it prints the time, has to be run twice before its rehearsal to
        # show what that left, and more often where two are the same by chance: of random digits every tenth is. It is
        # run in the template too, and may end that.
        for trials in TRIALS if definition.rehearse is not None and why is None else ():
            try:
                return await self._try(daemon, definition, progress, trials)
            except Error as e:
                if e.code == "unlike" and trials != TRIALS[-1]:
                    continue
                if e.code not in ("rehearsal", "unlike", "template"):
                    raise
                why = f"the rehearsal failed: {e.message}" if e.code == "template" else e.message
                events.emit(
                    "pocket-not-rehearsed", "warning", service=self.generation.name, pocket=definition.name, why=why
                )
                progress(f"{definition.name}: {why}")
                break
        holder = await self._try(daemon, definition, progress)
        holder.facts["not_rehearsed"] = why
        return holder

    async def _try(self, daemon: Daemon, definition: Pocket, progress: Progress, trials: int = 0) -> Holder:
        """`trials`: how often the sample is run before its rehearsal; 0: there is none."""
        g = self.generation
        plan = orders.plan_of(daemon, g, definition)
        with for_operators(None, g.name):
            parent = await g.templates.get(plan.loaded(definition.mode))
        if not g.init or not g.tree:
            raise Error("service", f"service {g.name} has ended")
        progress(f"{definition.name}: {_doing(definition, trials > 0)}")
        holder = self._place(daemon, definition, parent)
        try:
            with ExitStack() as stack:
                message, passed = self._orders(daemon, definition, plan, holder, trials, stack)
                timeout = daemon.config.held.timeout
                reply, fds = await self._asked(g.init, passed, timeout, REHEARSING * trials, message)
                fds.close()
            with Cgroup("self", holder.cgroup) as own:
                holder.pid = (own.processes() or [0])[0]
            (found,) = await measured.memory([holder.itself])
            holder.own = found.private if found else 0
            if holder.stale:
                raise Error("hold", holder.stale)
            self._settle(holder, reply)
        except BaseException as e:
            await self._retire(holder)
            if isinstance(e, Error):
                raise _explained(e, definition) from None
            raise
        holder.facts["rehearsed"] = trials > 0
        return holder

    async def _asked(
        self, init: Link, passed: list[int], timeout: float, rehearsing: float, message: Message
    ) -> tuple[Message, Fds]:
        """Init's answer. A template that is overdue, at its checkpoint or with its rehearsal, is asked where it is, and
        ended if it does not say."""
        patience = timeout + rehearsing
        late, loop = time.monotonic() + patience + GRACE, asyncio.get_running_loop()

        def say(op: str) -> None:
            self.generation.keep(init.send({"op": op, "template": message["template"]}))

        asking = [loop.call_later(seconds, say, "overdue") for seconds in {timeout, patience}]
        timers = [*asking, loop.call_later(patience + GRACE, say, "retire")]
        try:
            return await init.call("hold", passed, timeout=patience + 4 * GRACE, **message)
        except Error as e:
            if e.code == "template" and time.monotonic() >= late:
                raise Error("hold", f"it was not held after {patience:.0f} s, and was ended", **e.detail) from None
            raise
        finally:
            for timer in timers:
                timer.cancel()

    def _place(self, daemon: Daemon, definition: Pocket, parent: Template) -> Holder:
        """Its cgroup beneath the pocket's, with a leaf for itself."""
        g = self.generation
        assert g.tree
        self._last += 1
        number = self._last
        if definition.run_as:
            uid = definition.run_as.uid
        else:
            uid = daemon.identities.named(definition.name)
        leaf = f"template-{number - NUMBERS}"
        orders.make_pocket(g, definition.name, definition.limits, leaf)
        cgroup = Cgroup(f"pockets/{definition.name}/{leaf}", g.tree)
        with cgroup.create("self") as own:
            give(cgroup.fd, uid)
            give(own.fd, uid)
        holder = Holder(definition.name, definition, number, cgroup, parent, uid=uid)
        holder.place = mounts.open_tree(cgroup.directory)
        holder.homes = orders.homes(definition)
        self.by_number[number] = holder
        return holder

    def _orders(
        self, daemon: Daemon, definition: Pocket, plan: orders.Plan, holder: Holder, trials: int, stack: ExitStack
    ) -> tuple[Message, list[int]]:
        g = self.generation
        files = shown.defined_files(daemon.identities, definition, holder.uid, stack)
        environment = {"HOME": holder.homes[0] if holder.homes else "/", **_own_environment(), **definition.env}
        hold: Message = {
            "rehearse": list(definition.rehearse or ()) if trials else None,
            "trials": trials,
            "environment": environment,
            "filters": filters.compiled(clone3=True),
            "timeout": daemon.config.held.timeout,
            "patience": daemon.config.held.timeout + REHEARSING * trials,
        }
        if definition.program:
            hold["program"] = os.path.join(definition.dir, definition.program)
            hold["checkpoint"] = definition.checkpoint
            hold["rehearse_until"] = definition.rehearse_until
            hold["packages"] = os.path.join(definition.dir, definition.packages) if definition.packages else None
        else:
            hold["preload"] = list(definition.preload)
        more = {"hold": hold, "homes": list(holder.homes)}
        told = orders.orders(g, plan, "hold", files, None, more)
        stack.callback(os.close, told)
        own = os.open("self", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=holder.cgroup.fd)
        stack.callback(os.close, own)
        host = definition.allow.network == "host"
        passed = [holder.cgroup.fd, told, *(fd for fd, _ in files), own, *([daemon.network] if host else [])]
        note = {"pocket": definition.name, "uid": holder.uid, "leaf": holder.cgroup.kernel_path}
        assert holder.parent
        fields = {"template": holder.number, "parent": holder.parent.number, "note": note, "host_network": host}
        return fields, passed

    def _settle(self, holder: Holder, reply: Message) -> None:
        """It is held: from now on processes are born beneath its cgroup, and none stands in it."""
        assert holder.definition
        holder.cgroup.enable(CONTROLLERS)
        holder.facts = warming.facts(reply)
        holder.facts["runs"] = self._runs(holder)
        holder.ready = True
        self.current[holder.pocket] = holder
        g = self.generation
        seconds = round(holder.facts["seconds"] or 0.0, 2)
        events.emit("pocket-held", service=g.name, pocket=holder.pocket, template=holder.number, seconds=seconds)
        for old in self:
            if old.pocket == holder.pocket and old is not holder:
                self.give_up(old, "there is a newer one")
        if holder.definition.warm:
            g.slots.fill_later(holder.pocket, 0.0)

    def _runs(self, holder: Holder) -> int | None:
        """How many runs at once its pocket's memory.max leaves room for; None where there is no such limit. Raises
        Error where it leaves none: the kernel would end the first."""
        assert holder.definition
        most = holder.definition.limits.get("memory.max", "max")
        with Cgroup("self", holder.cgroup) as own:
            charged = own.stats().memory_current
        if charged is None or not most.isdigit():
            return None
        run = max(holder.facts.get("run") or 0, LEAST_RUN)
        runs = (int(most) - charged) // run
        sizes = f"its template has {charged >> 20}M, one run {run >> 20}M, memory.max is {int(most) >> 20}M"
        if runs < 1:
            raise Error("hold", f"{sizes}: that leaves no room for a run")
        # What the kernel compares is what each has in memory, of others' too; a little more, for its page tables.
        holder.oom_score = min(1000, 50 + 1000 * _resident(holder.pid) // int(most))
        return runs

    # -- launching

    async def introduce(self, holder: Holder, session: Session, given: dict[str, Any], marks: orders.Marks) -> None:
        """Have it make a session's worker. Raises Error("held") where this run cannot come from it: its caller's start
        is untouched then."""
        g = self.generation
        if not g.init:
            raise Error("service", f"service {g.name} has ended")
        leaf = session.leaf
        assert leaf
        seen = holder.seen(leaf)
        try:
            passed = [leaf.fd, given["session"], given["hold"], seen]
            fields: dict[str, Any] = {"template": holder.number, "mode": session.note["mode"], "note": session.note}
            fields["marks"] = marks
            _, received = await g.init.call("launch", passed, session=session.id, **fields)
        finally:
            os.close(seen)
        with received:
            if len(received):
                session.pid = orders.pid_of(received.take(), holder.oom_score)

    # -- its end

    def give_up(self, holder: Holder, why: str, rest: float = 0.0) -> None:
        """No launch comes from it any more; its workers live on. `rest`: seconds in which none makes another."""
        if rest:
            self.cool_until[holder.pocket] = time.monotonic() + rest
        if holder.stale is None:
            holder.stale = why
            if self.current.get(holder.pocket) is holder:
                del self.current[holder.pocket]
            events.emit("pocket-given-up", service=self.generation.name, pocket=holder.pocket, why=why)
            self.generation.keep(self._retire(holder))

    def outdated(self, pocket: str, number: int | None, why: str) -> None:
        """A template says that what its program read is not so any more; the next launch has another made."""
        holder = self.current.get(pocket)
        if holder and holder.number == number:
            self.give_up(holder, why, BACKOFF)  # its runs may be what changes it

    async def _retire(self, holder: Holder) -> None:
        holder.stale = holder.stale or "it was given up"
        if self.generation.init:
            await self.generation.init.send({"op": "retire", "template": holder.number})

    def lost(self, number: int) -> bool:
        """Init says that a template has ended. False when it is none of these."""
        holder = self.by_number.get(number)
        if holder is None:
            return False
        if self.current.get(holder.pocket) is holder and holder.ready:
            del self.current[holder.pocket]
            events.emit("pocket-template-lost", "warning", service=self.generation.name, pocket=holder.pocket)
            self.cool_until[holder.pocket] = time.monotonic() + BACKOFF
        if holder.ended:
            return True
        holder.ended = True
        holder.stale, holder.ready = holder.stale or "it ended", False
        self.generation.keep(self._clear(holder))
        return True

    async def _clear(self, holder: Holder) -> None:
        """Remove what it leaves, once no session of it is there."""
        g = self.generation
        with suppress(OSError), Cgroup("self", holder.cgroup) as own:
            own.kill()  # what its program has started goes with it
        while any(s.note.get("held") == holder.number for s in g.sessions.values()):
            waits = [s.over.wait() for s in g.sessions.values() if s.note.get("held") == holder.number]
            await asyncio.gather(*waits)
        self.by_number.pop(holder.number, None)
        if g.tree:
            await g.drop_leaf(holder.cgroup)
            g.drop_pocket(holder.pocket)
        holder.close()

    def cool(self, pocket: str) -> bool:
        """End a pocket's template, at its owner's wish, or its making. Whether there was one."""
        self.failed.pop(pocket, None)
        self._changing.discard(pocket)
        making, holder = self._making.pop(pocket, None), self.current.get(pocket)
        if making:
            making.cancel()
        if holder:
            self.give_up(holder, "it was cooled")
        return bool(making or holder)

    def drop_undefined(self, daemon: Daemon) -> None:
        """Give up what is held of pockets that have no definition any more."""
        slots, changes = self.generation.slots, self.generation.changes
        for name in {h.pocket for h in self} | {s.pocket for s in slots.by_id.values()} | changes.names():
            if name not in daemon.config.pockets:
                slots.give_way(name)
                self.cool(name)
                changes.forget(name)

    def forget_failure(self, pocket: str) -> None:
        self.failed.pop(pocket, None)
        self.cool_until.pop(pocket, None)

    def close(self) -> None:
        for holder in self:
            holder.close()
        self.by_number.clear()
        self.current.clear()

    # -- changes of its pocket's files (pocketd.changes)

    def changed(self, pocket: str, path: str) -> None:
        holder, making = self.current.get(pocket), self._making.pop(pocket, None)
        if self.failed.pop(pocket, None) or holder or making:
            self._changing.add(pocket)
        if making:
            making.cancel()  # it may have read what was there before
        if holder:
            self.give_up(holder, f"{path} has changed")

    def quiet(self, daemon: Daemon, definition: Pocket) -> None:
        if definition.name not in self._changing:
            return  # it was cooled meanwhile, or before
        self._changing.discard(definition.name)
        if definition.is_held and definition.name not in self.current:
            self.begin(daemon, definition)

    # -- after a restart

    def adopt(self, told: list[Message]) -> None:
        """Those that an earlier pocketd had made are given up: they are made again when they are wanted."""
        g = self.generation
        for m in told:
            number = int(m["template"])
            self._last = max(self._last, number)
            note = m["note"]
            try:
                cgroup = Cgroup(f"pockets/{note['pocket']}/template-{number - NUMBERS}", g.tree)
            except (OSError, KeyError, TypeError):
                continue
            holder = Holder(str(note["pocket"]), None, number, cgroup)
            self.by_number[number] = holder
            self.give_up(holder, "pocketd was started again")


def _resident(pid: int) -> int:
    """Bytes of a process that are in memory, shared ones too; 0 where it has ended (proc_pid_statm(5))."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def give(leaf: int, uid: int) -> None:
    """Let a pocket's template clone into this cgroup, which takes the right to write cgroup.procs of both ends and of
    their common ancestor (cgroup-v2, "Delegation Containment")."""
    fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf)
    try:
        os.fchown(fd, uid, -1)
    finally:
        os.close(fd)


def _not_to_rehearse(definition: Pocket) -> str | None:
    """Why a pocket's sample is not to be run ahead of time, or None: it must leave no trace outside."""
    if definition.rehearse is None:
        return None
    if definition.allow.network != "none" or definition.allow.devices:
        return "a pocket with a network or devices is not rehearsed: what its sample does there cannot be undone"
    return None


def _doing(definition: Pocket, rehearse: bool) -> str:
    if not definition.program:
        return f"preloading {', '.join(definition.preload)}"
    what = "up to its checkpoint, and its rehearsal" if rehearse else "up to its checkpoint"
    return f"running {definition.program} {what}"


def _own_environment() -> dict[str, str]:
    """What callers mostly have as pocketd has it; the rest of a template's environment is its definition's."""
    names = ("PATH", "LANG", "LANGUAGE", "TZ")
    return {k: v for k, v in os.environ.items() if k in names or k.startswith("LC_")}


def _explained(e: Error, definition: Pocket) -> Error:
    output = e.detail.get("output") or ""
    if e.code in ("rehearsal", "unlike"):
        return Error(e.code, f"{definition.name} is held without a rehearsal: {e.message}")
    text = f"{definition.name} is not held: {e.message}"
    code = e.code if e.code == "template" else "hold"
    return Error(code, f"{text}\n{output}".rstrip() if output else text)
