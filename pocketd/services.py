"""What is on: a service container with its init, templates and sessions, as pocketd knows it and the kernel confirms.

pocketd holds nothing that it could not learn again: after a restart it connects to each init in the runtime directory,
asks what is there, and checks that against the cgroups.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cgroup.hierarchy import Hierarchy, path_of
from cgroup.limits import CONTROLLERS
from cgroup.node import Cgroup
from nsutil import messages, processes
from nsutil.messages import Fds
from pocketd import containers, events, spawn
from pocketd.definitions import ModelFactory, ModelFile, Service
from pocketd.link import Link
from pocketd.wire import Error, Message
from runtime import cold, runtimes

START_TIMEOUT = 600.0  # seconds for a template to load: a cold page cache and a large model are slow
BACKOFF = (1.0, 5.0, 30.0, 120.0)  # seconds before a template that died is made again

Progress = Callable[[str], None]


@dataclass
class Template:
    number: int
    kind: str  # "root" or "models"
    models: tuple[str, ...]
    leaf: Cgroup
    pid: int = 0
    ready: bool = False
    started: float = field(default_factory=time.time)


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


class RunningService:
    """One service. `state` is "off", "starting", "on" or "failed" (then `why` says why)."""

    def __init__(self, definition: Service, hierarchy: Hierarchy, base: Cgroup, runtime_dir: Path, state_dir: Path):
        self.definition = definition
        self.hierarchy = hierarchy
        self.base = base
        self.place = runtime_dir / "services" / definition.name
        self.log_path = state_dir / "services" / f"{definition.name}.log"
        self.state = "off"
        self.why: Error | None = None
        self.since = time.time()
        self.scope: Cgroup | None = None
        self.init: Link | None = None
        self.init_pid = 0
        self.templates: dict[int, Template] = {}
        self.sessions: dict[str, Session] = {}
        self.command: list[str] | None = None
        self.changing = asyncio.Lock()
        self._making: dict[frozenset[str] | None, asyncio.Task[Template]] = {}
        self._failures = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def scope_name(self) -> str:
        return f"pocketd-{self.name}.scope"

    # -- on

    async def on(self, progress: Progress) -> None:
        """Switch on; returns when its templates are ready. Idempotent. Raises Error with the reason when it fails."""
        async with self.changing:
            if self.state == "on":
                return
            self._change("starting")
            try:
                await self._start(progress)
            except (Error, OSError, ConnectionError) as e:
                error = e if isinstance(e, Error) else Error("service", f"{type(e).__name__}: {e}")
                error.message = f"service {self.name} does not start: {error.message}"
                error.args = (error.message,)
                await self._clear()
                self._change("failed", error)
                raise error from None
            self._change("on")

    def _change(self, state: str, why: Error | None = None) -> None:
        self.state, self.why, self.since = state, why, time.time()
        level = "error" if why else "info"
        events.emit(f"service-{state}", level, service=self.name, why=why.message if why else None)

    async def _start(self, progress: Progress) -> None:
        progress(f"{self.name}: making the container")
        await self._sweep()
        self.scope = self.base.create(self.scope_name)
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.scope.create("init") as leaf:
            self.command = await containers.make(self.definition, self.scope, leaf, self.place, self.log_path)
        self.scope.enable(CONTROLLERS)
        for part in ("templates", "pockets"):
            with self.scope.create(part) as child:
                child.enable(CONTROLLERS)
        self.scope.apply(self.definition.limits)
        await self._connect()
        await self.template(None, progress)
        if self.definition.models:
            await self.template(frozenset(self.definition.models), progress)

    def log_tail(self, lines: int = 20) -> str:
        return containers.tail(self.log_path, lines)

    async def _connect(self) -> None:
        """Connect to init, and believe it only as far as the kernel says that it is ours."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with messages.short_name(str(self.place / "init.sock")) as name:
                sock.connect(name)
            self.init = Link(sock, self._event, self._lost)
        except BaseException:
            sock.close()
            raise
        message, fds = await self.init.call("hello")
        fds.close()
        try:
            peer = processes.peer(sock)
        except processes.Gone:
            raise Error("service", "its init has ended") from None
        os.close(peer.pidfd)
        self.init_pid = peer.pid
        self._believe(message)

    def _believe(self, hello: Message) -> None:
        """Take over what init says is there, where the kernel has a cgroup for it."""
        assert self.scope
        for t in hello["templates"]:
            number = int(t["template"])
            try:
                leaf = Cgroup(f"templates/{number}", self.scope)
            except FileNotFoundError:
                continue
            note = t["note"]
            pid = (leaf.processes() or [0])[0]
            template = Template(number, t["kind"], tuple(note["models"]), leaf, pid, bool(t["ready"]), note["started"])
            self.templates[number] = template
            self.command = note.get("command")
        for s in hello["sessions"]:
            note = s["note"]
            try:
                leaf = self.hierarchy.open(note["leaf"])
            except (FileNotFoundError, ValueError):
                continue
            self.sessions[s["session"]] = Session(
                s["session"], note["pocket"], note, leaf, _host_pid(leaf, s["pid"]), s["started"]
            )
        for s in hello["ended"]:
            self._keep(self._end_session(s["session"]))

    # -- templates

    async def template(self, models: frozenset[str] | None, progress: Progress = lambda text: None) -> Template:
        """The template that holds just `models` (None: the root template), made when there is none.

        Raises Error with the template's own standard error when it does not get ready.
        """
        for t in self.templates.values():
            if t.ready and (
                t.kind == "root" if models is None else frozenset(t.models) == models and t.kind == "models"
            ):
                return t
        task = self._making.get(models)
        if task is None:
            task = asyncio.ensure_future(self._make_template(models, progress))
            self._making[models] = task
            task.add_done_callback(lambda _: self._making.pop(models, None))
        return await asyncio.shield(task)

    async def _make_template(self, models: frozenset[str] | None, progress: Progress) -> Template:
        parent = None if models is None else await self.template(None, progress)
        assert self.scope and self.init
        d = self.definition
        if self.command is None:  # templates' notes keep it over a restart, and there was none then
            self.command, _ = await containers.command(d)
        number = max(self.templates, default=0) + 1
        with Cgroup("templates", self.scope) as templates:
            while str(number) in templates.names():  # a leaf is used once
                number += 1
            templates.create(str(number)).close()
        leaf = Cgroup(f"templates/{number}", self.scope)
        kind = "root" if models is None else "models"
        names = tuple(sorted(models or ()))
        t = self.templates[number] = Template(number, kind, names, leaf)
        # Libraries that find no home make one in /tmp and remove it at exit, which in a worker is another /tmp. Huge
        # pages halve what a fork of a template costs.
        env = {**spawn.BARE, "HOME": "/tmp", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        # What pocketd itself was started with counts where the runtime reads it, as for any program started there.
        runtime = runtimes.get(d.runtime)
        pattern = cold.compiled(runtime.VARIABLES)
        given = {name: value for name, value in os.environ.items() if runtime.VARIABLES and pattern.match(name)}
        env = {**env, **runtime.ENVIRONMENT, **given, **d.env}
        begin = {
            "runtime": d.runtime,
            "preload": list(d.preload),
            "environment": env,
            "models": None if models is None else {name: _source(d.models[name]) for name in names},
        }
        note = {"models": list(names), "started": t.started, "command": self.command}
        fields: dict[str, Any] = {"template": number, "kind": kind, "begin": begin, "note": note}
        if parent is None:
            fields.update(command=self.command, environment=env)
        else:
            fields["parent"] = parent.number

        def tell(text: str) -> None:
            progress(f"{self.name}: {text}")

        try:
            message, fds = await self.init.call("template", [leaf.fd], tell, START_TIMEOUT, **fields)
        except BaseException as e:
            self.templates.pop(number, None)
            self._keep(self._drop_leaf(leaf))
            if isinstance(e, Error) and e.detail.get("stderr"):
                e.message = f"{e.message}\n{e.detail['stderr']}"
                e.args = (e.message,)
            raise
        fds.close()
        t.ready = True
        t.pid = (leaf.processes() or [0])[0]
        tell(f"{kind} template ready after {message['seconds']:.1f} s ({message['threads']} threads)")
        events.emit(
            "template-ready", service=self.name, template=number, kind=kind, seconds=round(message["seconds"], 2)
        )
        return t

    # -- what init says by itself

    def _event(self, message: Message, fds: Fds) -> None:
        fds.close()
        if message.get("op") == "session-ended":
            self._keep(self._end_session(message["session"], message.get("status")))
        elif message.get("op") == "template-ended":
            t = self.templates.pop(message["template"], None)
            if t:
                self._keep(self._drop_leaf(t.leaf))
                if t.ready and self.state == "on":
                    events.emit("template-lost", "warning", service=self.name, template=t.number, kind=t.kind)
                    self._keep(self._make_again(t))

    async def _make_again(self, lost: Template) -> None:
        """A template died: the same again, later and later while that keeps happening."""
        await asyncio.sleep(BACKOFF[min(self._failures, len(BACKOFF) - 1)])
        self._failures += 1
        try:
            await self.template(None if lost.kind == "root" else frozenset(lost.models))
            self._failures = 0
        except (Error, ConnectionError) as e:
            events.emit("template-failed", "error", service=self.name, why=str(e))
            if self.state == "on":
                await self._make_again(lost)

    def _lost(self, reason: str) -> None:
        """Init is gone, and all in its pid namespace with it; or it closed the connection, which it never does."""
        self.init = None
        if self.state == "on":
            error = Error("service", f"service {self.name} ended: its init is gone ({reason})")
            self._change("failed", error)
            self._keep(self._clear_after_loss())

    async def _clear_after_loss(self) -> None:
        async with self.changing:
            if self.state == "failed":
                await self._clear()

    async def _end_session(self, identity: str, status: int | None = None) -> None:
        session = self.sessions.get(identity)
        if session:
            code = os.waitstatus_to_exitcode(status) if status is not None else None
            events.emit("session-ended", service=self.name, pocket=session.pocket, session=identity, status=code)
            await self.drop_session(session)
        if self.init:
            await self.init.send({"op": "forget", "session": identity})

    async def drop_session(self, session: Session) -> None:
        """Remove a session's leaf, and its pocket's cgroup when it was the last."""
        leaf, session.leaf = session.leaf, None
        if leaf and session.adopted:
            leaf.close()
        elif leaf:
            pocket = leaf.kernel_path.rsplit("/", 1)[0]
            await self._drop_leaf(leaf)
            if not any(s.pocket == session.pocket and s is not session for s in self.sessions.values()):
                try:
                    with self.hierarchy.open(pocket) as parent:
                        parent.remove()
                except OSError:
                    pass  # another launch of this pocket has a leaf there already
        self.sessions.pop(session.id, None)
        session.over.set()

    async def _drop_leaf(self, leaf: Cgroup) -> None:
        try:
            with leaf.watch() as watch:
                try:
                    await watch.empty(10.0)
                except TimeoutError:
                    leaf.kill()
                    await watch.empty(10.0)
            leaf.remove()
        except (OSError, TimeoutError) as e:
            if self.scope:  # else the whole scope goes, and took it along
                events.emit("cgroup-left", "warning", service=self.name, why=str(e))
        finally:
            leaf.close()

    # -- off

    async def off(self) -> None:
        """Switch off: every session ends. Idempotent."""
        async with self.changing:
            if self.state == "off":
                return
            self._change("stopping")
            if self.init:
                try:
                    (await self.init.call("stop", timeout=5.0))[1].close()
                except (Error, ConnectionError):
                    pass
            await self._clear()
            self._change("off")

    async def _clear(self) -> None:
        """Leave nothing: no process, no cgroup, no socket."""
        if self.init:
            self.init.close("the service is off")
            self.init = None
        if self.scope:
            scope, self.scope = self.scope, None
            with scope.watch() as watch:
                try:
                    await watch.empty(2.0)
                except TimeoutError:
                    scope.kill()
                    await watch.empty(30.0)
            for session in self.sessions.values():
                if session.leaf:
                    session.leaf.close()
                session.over.set()
            for t in self.templates.values():
                t.leaf.close()
            scope.remove()
        self.sessions.clear()
        self.templates.clear()
        shutil.rmtree(self.place, ignore_errors=True)

    async def _sweep(self) -> None:
        """What a service of this name left that nobody holds any more."""
        try:
            scope = Cgroup(self.scope_name, self.base)
        except FileNotFoundError:
            return
        scope.kill()
        with scope.watch() as watch:
            await watch.empty(30.0)
        scope.remove()

    async def adopt(self) -> bool:
        """After a restart: take over the service if its init is there and is ours by the kernel's word."""
        try:
            self.scope = Cgroup(self.scope_name, self.base)
            await self._connect()
        except (OSError, Error, ConnectionError) as e:
            events.emit("service-not-adopted", "notice", service=self.name, why=str(e))
            await self._clear()
            return False
        wanted = f"{self.scope.kernel_path}/init"
        try:
            found = path_of(self.init_pid)
        except OSError:
            found = ""
        if found != wanted:
            events.emit("init-is-not-ours", "error", service=self.name, cgroup=found, expected=wanted)
            await self._clear()
            return False
        self._change("on")
        await self._sweep_leaves()
        return True

    async def _sweep_leaves(self) -> None:
        """Leaves that no session has: their launch did not come to an end before the old pocketd did."""
        assert self.scope
        live = {s.leaf.kernel_path for s in self.sessions.values() if s.leaf}
        with Cgroup("pockets", self.scope) as pockets:
            for name in pockets.names():
                with Cgroup(f"pockets/{name}", self.scope) as pocket:
                    for leaf_name in pocket.names():
                        leaf = Cgroup(f"pockets/{name}/{leaf_name}", self.scope)
                        if leaf.kernel_path in live:
                            leaf.close()
                        else:
                            await self._drop_leaf(leaf)
                    if not pocket.names():
                        pocket.remove()
        with Cgroup("templates", self.scope) as templates:
            for name in templates.names():
                if int(name) not in self.templates:
                    await self._drop_leaf(Cgroup(f"templates/{name}", self.scope))

    def leave(self) -> None:
        """pocketd ends; the service goes on."""
        self.state = "left"
        if self.init:
            self.init.close("pocketd ends")

    def _keep(self, coroutine: Any) -> None:
        """Run beside; a task that nobody holds may be collected in mid-flight."""
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            events.emit("task-failed", "error", service=self.name, why=repr(task.exception()))


def _source(model: ModelFile | ModelFactory) -> str:
    return str(model.path) if isinstance(model, ModelFile) else f"{model.module}:{model.attribute}"


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
