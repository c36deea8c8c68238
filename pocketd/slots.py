"""Slots of one generation: workers of a pocket made ahead of time, `warm` of them, each for one launch.

They stand beneath their pocket's own cgroup, and come from the pocket's template, where it has one, else from the
service's root template. One that is handed out is replaced a little later, when its program has had its start.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import defaultdict, deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cgroup.node import Cgroup
from nsutil import messages
from pocketd import events, orders, shown, wire
from pocketd.definitions import Pocket
from pocketd.measured import Place
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation
    from pocketd.held import Holder
    from pocketd.templates import Template

# Seconds after a launch until its slot is replaced, which takes a processor for as long as a first result does: the
# program goes first. Where none is left for the next launch it goes first but for its start.
DELAY, NONE_LEFT = 1.0, 0.05
BACKOFF = 5.0  # seconds after a slot that could not be made
MADE = 30.0  # seconds that slots may take until they wait, for who waits for that
TAKEN = 3.0  # seconds that a slot may take to say that it has its session
_OOM_SCORE = 1000  # of one that waits: it ends before anything that runs (proc_pid_oom_score_adj(5))
_WORDS = wire.Bounds(4 * 1024, 4, 32)


@dataclass
class Slot:
    id: str
    pocket: str
    definition: Pocket
    parent: Template | Holder
    uid: int
    leaf: Cgroup
    homes: tuple[str, ...]
    held: int | None  # the number of the pocket's template that it comes from
    pid: int = 0
    pidfd: int = -1
    oom_score: int = 0  # of its session's worker
    begun: float = field(default_factory=time.monotonic)
    ready: bool = False
    gone: bool = False
    sock: socket.socket | None = None  # what it listens on, our end
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # it waits, or has ended
    taken: asyncio.Future[None] | None = None  # its answer, once it has been given a session

    def answer(self, error: Error | None) -> None:
        if self.taken is None or self.taken.done():
            return
        if error:
            self.taken.set_exception(error)
        else:
            self.taken.set_result(None)

    def close(self) -> None:
        self.settled.set()
        if self.sock:
            asyncio.get_running_loop().remove_reader(self.sock)
            self.sock.close()
            self.sock = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def _identity() -> str:
    """No session's, which its caller chooses: whoever logged in by a slot's would be given what is another's."""
    return f"slot-{os.urandom(16).hex()}"


class Slots:
    """By id all there are, and by pocket those that wait, the oldest first."""

    def __init__(self, generation: Generation):
        self.generation = generation
        self.by_id: dict[str, Slot] = {}
        self.waiting: dict[str, deque[Slot]] = {}
        self.took: dict[str, float] = {}  # seconds from the asking for a slot until it waited, of each pocket's latest
        self.squeezed = False  # memory is short: none is made
        self._filling: dict[str, asyncio.TimerHandle] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._given_up: defaultdict[str, int] = defaultdict(int)  # how often: a filling that began before is over then
        self._daemon: Daemon | None = None

    def has(self, pocket: str) -> bool:
        return any(s.pocket == pocket for s in self.by_id.values())

    def count(self, pocket: str) -> int:
        return len(self.waiting.get(pocket, ()))

    def made(self, pocket: str) -> int:
        """With those that are not ready yet."""
        return sum(s.pocket == pocket and not s.gone for s in self.by_id.values())

    def take(self, daemon: Daemon, definition: Pocket, home: str) -> Slot | None:
        """A slot for a launch of this pocket now, or None. Either way what is missing is made in a while."""
        if not definition.warm:
            return None
        self._daemon = daemon
        daemon.files.look()  # what changed until now counts for this launch already
        queue = self.waiting.get(definition.name, deque())
        found = None
        while queue and found is None:
            slot = queue.popleft()
            if self._good(slot, definition):
                if home and home not in slot.homes and not orders.beneath(home, definition):
                    queue.appendleft(slot)
                    break
                found = slot
            else:
                self._end(slot)
        self.fill_later(definition.name, DELAY if queue else NONE_LEFT)
        return found

    def _good(self, slot: Slot, definition: Pocket) -> bool:
        if slot.gone or slot.definition != definition or slot.parent.stale:
            return False
        holder = self.generation.held.current.get(definition.name)
        if holder and (holder.parent is None or holder.parent.stale):
            return False  # the service's libraries are others now
        # Once the pocket is held, slots that come from the root template are of an older kind.
        return holder is None or not holder.ready or slot.held == holder.number

    def fill_later(self, pocket: str, delay: float = NONE_LEFT) -> None:
        """Where it is to be already, it is brought forward, but for what has to wait longer: for BACKOFF."""
        if not self.generation.running:
            return
        loop = asyncio.get_running_loop()
        known, now = self._filling.get(pocket), loop.time()
        if known and now + delay < known.when() <= now + DELAY:
            known.cancel()
            known = None
        if known is None:
            self._filling[pocket] = loop.call_later(delay, self._fill, pocket)

    def _fill(self, pocket: str) -> None:
        self._filling.pop(pocket, None)
        daemon = self._daemon
        definition = daemon.config.pockets.get(pocket) if daemon else None
        if daemon and definition and self.generation.running:
            self.generation.keep(self.fill(daemon, definition, self._given_up[pocket]))

    async def fill(self, daemon: Daemon, definition: Pocket, since: int | None = None) -> None:
        """Make what is missing, one after the other. Ends those that are of no use any more."""
        self._daemon = daemon
        since = self._given_up[definition.name] if since is None else since
        async with self._turns[definition.name]:  # else two that are asked at once make twice as many
            await self._fill_up(daemon, definition, since)

    async def _fill_up(self, daemon: Daemon, definition: Pocket, since: int) -> None:
        name = definition.name
        for slot in [s for s in self.by_id.values() if s.pocket == name and not self._good(s, definition)]:
            self._end(slot)
        while self.generation.running and not self.squeezed and self._given_up[name] == since:
            there = [s for s in self.by_id.values() if s.pocket == name and not s.gone]
            if not there and not definition.is_held:
                self.generation.changes.watch(daemon, definition)
            if len(there) >= self._wanted(definition) or daemon.config.pockets.get(name) != definition:
                return
            rest = self.generation.held.resting(name) if definition.is_held else 0.0
            if rest:  # slots of the service's own template would be of no use as soon as it is held again
                self.fill_later(name, rest)
                return
            try:
                await self._make(daemon, definition)
            except (Error, OSError, ConnectionError) as e:
                if isinstance(e, Error) and e.code in ("changed", "cooled"):
                    return  # the next launch begins anew, or the end of the changes does
                why = e.message if isinstance(e, Error) else str(e)
                events.emit("slot-not-made", "warning", service=self.generation.name, pocket=name, why=why)
                self.fill_later(name, BACKOFF)
                return

    async def settle(self, pocket: str) -> None:
        """Until each that was asked for waits, or has ended."""
        with suppress(TimeoutError):
            async with asyncio.timeout(MADE):
                for slot in [s for s in self.by_id.values() if s.pocket == pocket]:
                    await slot.settled.wait()

    def _wanted(self, definition: Pocket) -> int:
        """No more than leave room for a run within the pocket's memory.max."""
        holder = self.generation.held.current.get(definition.name)
        runs = holder.facts.get("runs") if holder else None
        return definition.warm if runs is None else min(definition.warm, max(1, runs - 1))

    async def _make(self, daemon: Daemon, definition: Pocket) -> None:
        g = self.generation
        holder = None
        if definition.is_held:
            try:
                holder = await g.held.get(daemon, definition, lambda text: None)
            except Error:
                if definition.name not in g.held.failed:
                    raise  # it was cooled, or changes: not what would last
        with ExitStack() as stack:
            if holder:
                await self._from_held(holder, definition, stack)
            else:
                await self._from_root(daemon, definition, stack)

    async def _from_root(self, daemon: Daemon, definition: Pocket, stack: ExitStack) -> None:
        g = self.generation
        plan = orders.plan_of(daemon, g, definition)
        template = await g.templates.get(plan.loaded(definition.mode))
        identity = _identity()
        homes = orders.homes(definition)
        files = shown.defined_files(daemon.identities, definition, plan.uid, stack)
        program = str(definition.dir / definition.program) if definition.program else None
        more: Message = {"slot": True, "homes": list(homes), "program": program}
        told = orders.orders(g, plan, definition.mode, files, None, more)
        stack.callback(os.close, told)
        orders.make_pocket(g, plan.name, plan.limits, identity)  # last: what can fail was before it
        leaf = Cgroup(f"pockets/{plan.name}/{identity}", g.tree)
        slot = Slot(identity, plan.name, definition, template, plan.uid, leaf, homes, None)
        host = plan.network == "host"
        passed = [leaf.fd, told, *(fd for fd, _ in files), *([daemon.network] if host else [])]
        await self._ask(slot, template.number, host, passed)

    async def _from_held(self, holder: Holder, definition: Pocket, stack: ExitStack) -> None:
        identity = _identity()
        leaf = holder.leaf(identity)
        seen = holder.seen(leaf)
        stack.callback(os.close, seen)
        slot = Slot(identity, definition.name, definition, holder, holder.uid, leaf, holder.homes, holder.number)
        slot.oom_score = holder.oom_score
        await self._ask(slot, holder.number, False, [leaf.fd, seen])

    async def _ask(self, slot: Slot, template: int, host: bool, passed: list[int]) -> None:
        g = self.generation
        assert g.init
        self.by_id[slot.id] = slot
        leaf = slot.leaf.kernel_path
        note = {"slot": True, "pocket": slot.pocket, "uid": slot.uid, "leaf": leaf, "held": slot.held}
        slot.sock, theirs = messages.pair()
        slot.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(slot.sock, self._hear, slot)
        try:
            fds = [passed[0], theirs.fileno(), *passed[1:]]
            fields: dict[str, Any] = {
                "mode": slot.definition.mode,
                "slot": slot.id,
                "template": template,
                "note": note,
                "host_network": host,
            }
            _, received = await g.init.call("slot", fds, **fields)
        except BaseException:
            await self._drop(slot)
            raise
        finally:
            theirs.close()
        with received:
            if len(received):
                slot.pidfd = received.take()
                slot.pid = orders.pid_of(os.dup(slot.pidfd), _OOM_SCORE)

    def _hear(self, slot: Slot) -> None:
        """A few words of no consequence, of a process that is not trusted."""
        assert slot.sock
        try:
            if messages.carries(slot.sock):
                raise messages.MessageError("a slot sends no descriptors")
            message, fds = wire.receive(slot.sock, bounds=_WORDS)
            fds.rest()
        except BlockingIOError:
            return
        except (EOFError, OSError, messages.MessageError):
            message = {"op": "refused", "error": Error("held", "its slot has ended").wire()}
        operation = message.get("op")
        if operation == "waiting" and not slot.gone and not slot.ready:
            slot.ready = True
            slot.settled.set()
            self.took[slot.pocket] = time.monotonic() - slot.begun
            self.waiting.setdefault(slot.pocket, deque()).append(slot)
            return
        if operation == "taken" or slot.taken is None:
            slot.close()
            slot.answer(None)
            if slot.taken is None and not slot.gone:  # by itself: it failed, or was killed
                why = Error.unwire(message.get("error")).message[:1000]
                events.emit("slot-not-made", "warning", service=self.generation.name, pocket=slot.pocket, why=why)
                self._end(slot)
                self.fill_later(slot.pocket, BACKOFF)
            return
        asyncio.get_running_loop().remove_reader(slot.sock)  # closed when init has let go of it: it waits for that
        said = Error.unwire(message.get("error"))
        slot.answer(Error("outdated" if said.code == "outdated" else "unlike", said.message[:1000]))

    # -- handed out

    async def assign(
        self, slot: Slot, identity: str, note: Message, given: dict[str, Any], marks: orders.Marks
    ) -> None:
        """Give a slot its session. Raises Error("held") where it cannot be that: its caller's start is untouched."""
        g = self.generation
        if not g.init or slot.sock is None:
            raise Error("held", f"service {g.name} has ended, or the slot")
        del self.by_id[slot.id]
        slot.gone = True
        slot.taken = asyncio.get_running_loop().create_future()
        # Init first: should pocketd end between the two, nothing runs that init does not know of.
        known = g.init.call("assign", [given["hold"]], slot=slot.id, session=identity, note=note)
        try:
            marks.append(("pocketd wakes the slot", time.monotonic()))
            try:
                wire.send(slot.sock, {"op": "session", "marks": marks}, [given["session"]])
            except OSError as e:
                slot.answer(Error("held", f"its slot has ended: {e}"))
            _, fds = await known
            fds.close()
            orders.set_oom_score(slot.pidfd, slot.oom_score)  # only now: it waits for a processor that is free
            try:
                async with asyncio.timeout(TAKEN):
                    await slot.taken
            except TimeoutError:
                raise Error("held", f"its slot did not answer within {TAKEN:g} s") from None
        except Error:
            if g.init:
                with suppress(Error, ConnectionError):  # before it ends, of which its caller would hear
                    await g.init.call("release", session=identity)
            raise
        finally:
            slot.close()

    # -- their end

    def ended(self, identity: str) -> bool:
        """Init says that a session is over: was it a slot?"""
        slot = self.by_id.get(identity)
        if slot is None:
            return False
        self.generation.keep(self._drop(slot))
        if not slot.gone:
            self.fill_later(slot.pocket, BACKOFF)  # it died by itself
        return True

    async def _drop(self, slot: Slot) -> None:
        slot.gone = True
        slot.close()
        with suppress(ValueError, KeyError):
            self.waiting[slot.pocket].remove(slot)
        if self.by_id.pop(slot.id, None):
            await self.generation.drop_leaf(slot.leaf)
            self.generation.drop_pocket(slot.pocket)

    def _end(self, slot: Slot) -> None:
        """End one that waits: it is of no use any more, or its memory is wanted."""
        if not slot.gone:
            slot.gone = True
            with suppress(ValueError, KeyError):
                self.waiting[slot.pocket].remove(slot)
            self.generation.keep(self._kill(slot.id))

    async def _kill(self, identity: str) -> None:
        init = self.generation.init
        if init:
            with suppress(Error, ConnectionError):
                (await init.call("end", session=identity))[1].close()

    def give_way(self, pocket: str | None = None) -> int:
        """End all that wait, of one pocket or of all. Returns how many."""
        found = [s for s in self.by_id.values() if not s.gone and pocket in (None, s.pocket)]
        for name in [name for name in self._given_up if pocket in (None, name)]:
            self._given_up[name] += 1
        for name in [name for name in self._filling if pocket in (None, name)]:
            self._filling.pop(name).cancel()  # the next launch begins anew
        for slot in found:
            self._end(slot)
        return len(found)

    def places(self, pocket: str) -> list[Place]:
        """The processes of those that wait: for their memory."""
        found = [slot for slot in self.by_id.values() if slot.pocket == pocket and slot.pid]
        return [(slot.leaf.kernel_path, [slot.pid]) for slot in found]

    def close(self) -> None:
        for timer in self._filling.values():
            timer.cancel()
        self._filling.clear()
        for slot in self.by_id.values():
            slot.close()
            slot.leaf.close()
        self.by_id.clear()
        self.waiting.clear()
        self.took.clear()
