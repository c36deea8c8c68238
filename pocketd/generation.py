"""One generation of a service: a container with its init, templates and sessions, as the kernel confirms them.

pocketd holds nothing that it could not learn again: after a restart it connects to each init in the runtime directory,
asks what is there, and checks that against the cgroups.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cgroup.hierarchy import path_of
from cgroup.limits import CONTROLLERS, LimitError, Limits
from cgroup.node import Cgroup
from nsutil import messages, processes
from nsutil.messages import Fds
from pocketd import containers, events, weights
from pocketd.changes import Changes
from pocketd.definitions import ModelFactory, ModelFile, Service
from pocketd.held import Held
from pocketd.link import Link
from pocketd.promises import Promises
from pocketd.slots import Slots
from pocketd.templates import Progress, Templates
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.host import Host


WEIGHT = "1000"  # cpu.weight of what serves all pockets, whose own together is 100


@dataclass
class Session:
    id: str
    pocket: str
    note: Message
    leaf: Cgroup | None
    pid: int  # as the host counts; 0 until it is born
    started: float
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def adopted(self) -> bool:
        """Whether its leaf is somebody else's cgroup, which is never killed and never removed here."""
        return self.note.get("adopted") is True


class Generation:
    """A service as it was made once. `changed` is told when its last session has ended and when its init is lost.

    `running` from when its templates are ready until it is cleared or lost.
    """

    def __init__(
        self, definition: Service, host: Host, number: int, changed: Callable[[Generation, Error | None], None]
    ):
        self.definition = definition
        self.number = number
        self.host = host
        label = definition.name if number == 1 else f"{definition.name}:{number}"
        self.place = host.runtime_dir / "services" / label
        self.scope_name = f"pocketd-{label}.scope"
        self.log_path = host.state_dir / "services" / f"{definition.name}.log"
        self.tree: Cgroup | None = None
        self.init: Link | None = None
        self.init_pid = 0
        self.running = False
        self.started = time.time()
        self.templates = Templates(self)
        self.held = Held(self)
        self.slots = Slots(self)
        self.changes = Changes(self)
        self.promises = Promises(host.scopes, self.scope_name)
        self.sessions: dict[str, Session] = {}
        self.endings: dict[str, Message] = {}  # the last one that a limit was the reason of, by pocket
        self.command: list[str] | None = None
        self.models: dict[str, str] = {}  # name -> what a template is told to load
        self.logins = 0  # in progress
        self._changed = changed
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return self.definition.name

    # -- its beginning

    async def start(self, progress: Progress) -> None:
        """Make it; returns when its templates are ready. Raises Error, OSError, ConnectionError: then `clear` it."""
        progress(f"{self.name}: making the container")
        await self.sweep()
        for name, model in self.definition.models.items():
            self.models[name] = await self._source(name, model)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        async with self.host.scopes.making(self.scope_name, self.definition.stop_timeout) as self.tree:
            with self.tree.create("init") as leaf:
                self.command = await containers.make(self.definition, self.models, leaf, self.place, self.log_path)
        self.tree.enable(CONTROLLERS)
        for part in ("templates", "pockets"):
            with self.tree.create(part) as child:
                child.enable(CONTROLLERS)
        for part in ("init", "templates"):  # launches go on however much pockets compute
            with Cgroup(part, self.tree) as cgroup, suppress(LimitError):
                cgroup.apply({"cpu.weight": WEIGHT})
        self.tree.apply(self.definition.limits)
        self.promise(None, self.definition.limits)
        await self._connect({"definition": self.definition.wire(), "models": self.models})
        await self.templates.get(None, progress)
        if self.definition.models:
            await self.templates.get(frozenset(self.definition.models), progress)
        self.running = True

    async def _source(self, name: str, model: ModelFile | ModelFactory) -> str:
        """What a template loads: a factory, or a private copy of a file."""
        if isinstance(model, ModelFactory):
            return f"{model.module}:{model.attribute}"
        return str(await weights.copy(model.path, self.host.models, name))

    async def _connect(self, keep: Message | None = None) -> None:
        """Connect to init, and hear it only when the kernel says that it is ours. `keep`: it was made just now."""
        assert self.tree
        sock, pid = self._dial()
        if keep is not None and pid == os.getpid():
            # The socket's creator is who the kernel names until init itself listens, which it does before it answers.
            self.init = Link(sock, self._event, lambda reason: None)
            (await self.init.call("hello"))[1].close()
            self.init.close()
            sock, pid = self._dial()
        wanted, found = f"{self.tree.kernel_path}/init", path_of(pid)
        if found != wanted:
            sock.close()
            raise Error("service", f"what listens as its init is in {found}, not in {wanted}")
        self.init, self.init_pid = Link(sock, self._event, self._lost), pid
        message, fds = await self.init.call("hello", keep=keep, stop_timeout=self.definition.stop_timeout)
        fds.close()
        self._believe(message)

    def _dial(self) -> tuple[socket.socket, int]:
        """A connection to who listens as init, and the pid of that. Raises OSError, Error."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with messages.short_name(str(self.place / "init.sock")) as name:
                sock.connect(name)
            peer = processes.peer(sock)
            os.close(peer.pidfd)
            return sock, peer.pid
        except processes.Gone:
            sock.close()
            raise Error("service", "its init has ended") from None
        except BaseException:
            sock.close()
            raise

    def _believe(self, hello: Message) -> None:
        """Take over what init says is there, where the kernel has a cgroup for it."""
        kept = hello.get("kept")
        if kept:  # what runs keeps the definition that it was made by, whatever the configuration says by now
            self.definition = Service.unwire(kept["definition"])
            self.models = kept["models"]
        self.templates.adopt([t for t in hello["templates"] if t["kind"] != "pocket"])
        assert self.tree
        ours = f"{self.tree.kernel_path}/pockets/"
        for s in hello["sessions"]:
            note = s["note"]
            if note.get("slot"):  # an earlier pocketd's: made again when they are wanted
                self.keep(self._end_slot(s["session"]))
                continue
            if not str(note["leaf"]).startswith((ours, *([str(note["unit"]) + "/"] if note.get("unit") else []))):
                if note.get("adopted") is not True:
                    continue  # nobody else's cgroup is ever ours to end
            try:
                leaf = self.host.hierarchy.open(note["leaf"])
            except (FileNotFoundError, ValueError):
                continue
            self.sessions[s["session"]] = Session(
                s["session"], note["pocket"], note, leaf, _host_pid(leaf, s["pid"]), s["started"]
            )
        self.held.adopt([t for t in hello["templates"] if t["kind"] == "pocket"])
        for s in hello["ended"]:
            self.keep(self._end_session(s["session"], s.get("status"), s.get("error")))

    async def _end_slot(self, identity: str) -> None:
        if self.init:
            with suppress(Error, ConnectionError):
                (await self.init.call("end", session=identity))[1].close()

    # -- what init says by itself

    def _event(self, message: Message, fds: Fds) -> None:
        with fds:
            op = message.get("op")
            if op == "session-ended" and self.slots.ended(message["session"]):
                pass
            elif op == "session-ended":
                self.keep(self._end_session(message["session"], message.get("status"), message.get("error")))
            elif op == "session-born" and message["session"] in self.sessions:  # asked for by the pocketd before
                session = self.sessions[message["session"]]
                if len(fds):
                    session.pid = _pid(fds.take())
            elif op == "template-ready" and message["template"] in self.templates.by_number:
                self.templates.ready(self.templates.by_number[message["template"]], message, fds)
            elif op == "template-ended" and not self.held.lost(message["template"]):
                self.templates.lost(message["template"])

    def _lost(self, reason: str) -> None:
        """Init is gone, and all in its pid namespace with it; or it closed the connection, which it never does."""
        self.init = None
        if self.running:
            self.running = False
            self._changed(self, Error("service", f"service {self.name} ended: its init is gone ({reason})"))

    async def _end_session(self, identity: str, status: int | None = None, error: Any = None) -> None:
        session = self.sessions.get(identity)
        if session:
            code = os.waitstatus_to_exitcode(status) if status is not None else None
            events.emit("session-ended", service=self.name, pocket=session.pocket, session=identity, status=code)
            if error:
                self._remember(session.pocket, Error.unwire(error))
            await self.drop_session(session)
        if self.init:
            await self.init.send({"op": "forget", "session": identity})

    def _remember(self, pocket: str, error: Error) -> None:
        """A worker that the kernel ended for its limit: for the journal, and for `pocket ps`."""
        details = {key: error.detail.get(key) for key in ("limit", "peak", "cgroup")}
        events.emit("memory-limit", "warning", service=self.name, pocket=pocket, why=error.message, **details)
        self.endings.pop(pocket, None)
        self.endings[pocket] = {"why": error.message, "code": error.code, "at": time.time(), **details}
        while len(self.endings) > 1000:
            self.endings.pop(next(iter(self.endings)))

    async def drop_session(self, session: Session) -> None:
        """Remove a session's leaf, and its pocket's cgroup when it was the last."""
        leaf, session.leaf = session.leaf, None
        if leaf and session.adopted:
            leaf.close()
        elif leaf:
            await self.drop_leaf(leaf)
        self.sessions.pop(session.id, None)
        if leaf and not session.adopted and "unit" not in session.note:  # a unit's cgroup is its manager's to remove
            self.drop_pocket(session.pocket)
        session.over.set()
        if not self.occupied:
            self._changed(self, None)

    def drop_pocket(self, pocket: str) -> None:
        """Remove a pocket's cgroup, when nothing of it is left in this generation."""
        running = any(s.pocket == pocket for s in self.sessions.values())
        if running or self.held.has(pocket) or self.slots.has(pocket) or not self.tree:
            return
        try:
            with Cgroup(f"pockets/{pocket}", self.tree) as cgroup:
                cgroup.remove()
            if self.promises.take_back(pocket):
                self._spread()
        except OSError:
            pass  # another launch of this pocket has a leaf there already

    def promise(self, pocket: str | None, limits: Limits) -> None:
        """A pocket's cgroup, or the service's own (None), has these limits from now on."""
        if self.promises.give(pocket, limits):
            self._spread()

    def _spread(self) -> None:
        if self.tree:
            self.keep(self.promises.spread(self.tree))

    @property
    def occupied(self) -> bool:
        return bool(self.sessions) or self.logins > 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A login is in progress: a generation that is not the current one any more waits for it."""
        self.logins += 1
        try:
            yield
        finally:
            self.logins -= 1
            if not self.occupied:
                self._changed(self, None)

    async def drop_leaf(self, leaf: Cgroup) -> None:
        try:
            with leaf.watch() as watch:
                try:
                    await watch.empty(10.0)
                except TimeoutError:
                    leaf.kill()
                    await watch.empty(10.0)
            leaf.remove()
        except (OSError, TimeoutError) as e:
            removed = isinstance(e, OSError) and e.errno in (errno.ENOENT, errno.ENODEV)  # by the manager of its unit
            if self.tree and not removed:  # else the whole tree goes, and took it along
                events.emit("cgroup-left", "warning", service=self.name, why=str(e))
        finally:
            leaf.close()

    # -- its end

    async def end(self) -> None:
        """End every session, in order: SIGTERM, then `stop_timeout` seconds. Leave nothing."""
        self.running = False
        patience = 2.0
        if self.init:
            try:
                (await self.init.call("stop", timeout=5.0))[1].close()
                patience += self.definition.stop_timeout
            except (Error, ConnectionError):
                pass
        await self.clear(patience)

    async def clear(self, patience: float = 0.0) -> None:
        """Leave nothing: no process, no cgroup, no socket. What has not ended after `patience` seconds is killed."""
        self.running = False
        if self.init:
            self.init.close("the service is off")
            self.init = None
        if self.tree:
            tree, self.tree = self.tree, None
            for session in self.sessions.values():
                if session.leaf:
                    session.leaf.close()
                session.over.set()
            self.templates.close()
            self.held.close()
            self.slots.close()
            self.changes.close()
            await self.host.scopes.end(self.scope_name, tree, patience)
        self.sessions.clear()
        shutil.rmtree(self.place, ignore_errors=True)

    async def sweep(self) -> None:
        """End what a generation of this name left that nobody holds any more."""
        tree = self.host.scopes.find(self.scope_name)
        if tree:
            await self.host.scopes.end(self.scope_name, tree, patience=0.0)

    # -- after a restart

    async def adopt(self) -> bool:
        """Take it over if its init is there and is ours by the kernel's word; otherwise clear it."""
        try:
            self.tree = self.host.scopes.find(self.scope_name)
            if self.tree is None:
                raise Error("service", f"there is no cgroup {self.scope_name}")
            await self._connect()
        except (OSError, Error, ConnectionError, ValueError, KeyError, TypeError, AttributeError) as e:
            # The last four: an init that says nonsense, which pocketd must outlive.
            events.emit("service-not-adopted", "notice", service=self.name, generation=self.number, why=str(e))
            await self.clear()
            return False
        self.running = True
        await self._sweep_leaves()
        self.promises.find(self.tree)
        self.promise(None, self.definition.limits)
        self._spread()
        self.keep(self.templates.look_at_files())
        return True

    async def _sweep_leaves(self) -> None:
        """Leaves that no session has: their launch did not come to an end before the old pocketd did."""
        assert self.tree
        live = {s.leaf.kernel_path for s in self.sessions.values() if s.leaf}
        live |= {holder.cgroup.kernel_path for holder in self.held}
        with Cgroup("pockets", self.tree) as pockets:
            for name in pockets.names():
                with Cgroup(f"pockets/{name}", self.tree) as pocket:
                    for leaf_name in pocket.names():
                        leaf = Cgroup(f"pockets/{name}/{leaf_name}", self.tree)
                        if any(path == leaf.kernel_path or path.startswith(f"{leaf.kernel_path}/") for path in live):
                            leaf.close()
                        else:
                            await self.drop_leaf(leaf)
                    if not pocket.names():
                        pocket.remove()
        with Cgroup("templates", self.tree) as templates:
            for name in templates.names():
                if int(name) not in self.templates.by_number:
                    await self.drop_leaf(Cgroup(f"templates/{name}", self.tree))

    def leave(self) -> None:
        """pocketd ends; the generation goes on."""
        self.running = False
        if self.init:
            self.init.close("pocketd ends")

    # -- tasks

    def keep(self, coroutine: Any) -> None:
        """Run beside; a task that nobody holds may be collected in mid-flight."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            events.emit("task-failed", "error", service=self.name, why=repr(task.exception()))


def _pid(pidfd: int) -> int:
    """The pid of a worker; 0 when it has ended already. Closes the descriptor."""
    try:
        return processes.pid_of(pidfd)
    except processes.Gone:
        return 0
    finally:
        os.close(pidfd)


def _host_pid(leaf: Cgroup, pid_in_service: int) -> int:
    """The pid here of the process in `leaf` that init knows by `pid_in_service`; 0 when the kernel shows none."""
    for pid in leaf.processes():
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"^NSpid:\s+(.*)$", text, re.MULTILINE)
        if found and str(pid_in_service) in found[1].split()[1:-1]:
            return pid
    return 0
