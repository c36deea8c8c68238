"""The templates of one generation: made when a launch needs one, made again when they die or go stale.

A template is stale when a file that it imported has changed since: a late import of a newer module would break a
running interpreter, so launches wait for one that is made of the new files alone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cgroup.node import Cgroup
from nsutil.messages import Fds
from pocketd import containers, events, filters, spawn
from pocketd.definitions import ModelFactory, ModelFile
from pocketd.staleness import Staleness
from pocketd.wire import Error, Message
from runtime import cold, runtimes

if TYPE_CHECKING:
    from pocketd.generation import Generation

START_TIMEOUT = 600.0  # seconds for a template to load: a cold page cache and a large model are slow
BACKOFF = (1.0, 5.0, 30.0, 120.0)  # seconds before a template that died is made again
LASTING = 60.0  # seconds that one has to live for the next of its deaths to be the first again

Progress = Callable[[str], None]
Models = frozenset[str] | None  # None: the root template


@dataclass
class Template:
    number: int
    kind: str  # "root" or "models"
    models: tuple[str, ...]
    leaf: Cgroup
    pid: int = 0
    ready: bool = False
    stale: bool = False
    started: float = field(default_factory=time.time)
    born: float = field(default_factory=time.monotonic)

    @property
    def key(self) -> Models:
        return None if self.kind == "root" else frozenset(self.models)


class Templates:
    """What there is, by number. One task makes each kind, however many launches wait for it."""

    def __init__(self, generation: Generation):
        self.generation = generation
        self.by_number: dict[int, Template] = {}
        self._making: dict[Models, asyncio.Task[Template]] = {}
        self._failures = 0
        self.staleness = Staleness(generation.name, generation.definition.rootfs, self._outdated)

    def __iter__(self) -> Iterator[Template]:
        return iter(list(self.by_number.values()))

    async def get(self, models: Models, progress: Progress = lambda text: None) -> Template:
        """The template that holds just `models` (None: the root template), made when there is none.

        Raises Error with the template's own standard error when it does not get ready.
        """
        while True:
            for t in self:
                if t.ready and not t.stale and t.key == models:
                    return t
            task = self._making.get(models)
            if task is None:
                task = self._making[models] = asyncio.ensure_future(self._make(models, progress))
                task.add_done_callback(lambda done: self._made(models, done))
            t = await asyncio.shield(task)
            if not t.stale:  # files may have changed while it loaded
                return t

    def _made(self, models: Models, task: asyncio.Task[Template]) -> None:
        if self._making.get(models) is task:
            del self._making[models]
        if not task.cancelled():
            task.exception()  # those who wait for it have it

    async def _make(self, models: Models, progress: Progress) -> Template:
        parent = None if models is None else await self.get(None, progress)
        g = self.generation
        assert g.tree and g.init
        if g.command is None:  # templates' notes keep it over a restart, and there was none then
            g.command, _ = await containers.command(g.definition)
        t = self._place(models)
        self.by_number[t.number] = t
        environment = self._environment()
        sources = None if models is None else {name: g.models[name] for name in t.models}
        begin = {
            "runtime": g.definition.runtime,
            "preload": list(g.definition.preload),
            "environment": environment,
            "models": sources,
            "filters": filters.compiled(),
            "named": {name: _named(model) for name, model in g.definition.models.items()},
        }
        note = {"models": list(t.models), "started": t.started, "command": g.command}
        fields: dict[str, Any] = {"template": t.number, "kind": t.kind, "begin": begin, "note": note}
        if parent is None:
            fields.update(command=g.command, environment=environment)
        else:
            fields["parent"] = parent.number

        def tell(text: str) -> None:
            progress(f"{g.name}: {text}")

        try:
            message, fds = await g.init.call("template", [t.leaf.fd], tell, START_TIMEOUT, **fields)
        except BaseException as e:
            self.by_number.pop(t.number, None)
            g.keep(g.drop_leaf(t.leaf))
            if isinstance(e, Error) and e.detail.get("stderr"):
                e.message = f"{e.message}\n{e.detail['stderr']}"
                e.args = (e.message,)
            raise
        with fds:
            self.ready(t, message, fds)
        tell(f"{t.kind} template ready after {message['seconds']:.1f} s ({message['threads']} threads)")
        return t

    def _place(self, models: Models) -> Template:
        """A number and a leaf that were never used before."""
        g = self.generation
        assert g.tree
        number = max(self.by_number, default=0) + 1
        with Cgroup("templates", g.tree) as templates:
            while str(number) in templates.names():
                number += 1
            templates.create(str(number)).close()
        leaf = Cgroup(f"templates/{number}", g.tree)
        return Template(number, "root" if models is None else "models", tuple(sorted(models or ())), leaf)

    def _environment(self) -> dict[str, str]:
        # Libraries that find no home make one in /tmp and remove it at exit, which in a worker is another /tmp. Huge
        # pages halve what a fork of a template costs. With a heap for each thread, a run's would grow where a rehearsal
        # had not been: thousands of faults in its first look.
        env = {**spawn.BARE, "HOME": "/tmp", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"}
        # What pocketd itself was started with counts where the runtime reads it, as for any program started there.
        definition = self.generation.definition
        runtime = runtimes.get(definition.runtime)
        pattern = cold.compiled(runtime.VARIABLES)
        given = {name: value for name, value in os.environ.items() if runtime.VARIABLES and pattern.match(name)}
        return {**env, **runtime.ENVIRONMENT, **given, **definition.env}

    def ready(self, t: Template, message: Message, fds: Fds) -> None:
        """Init says that a template can be forked; `fds` has the list of the files that it imported."""
        g = self.generation
        t.ready = True
        t.pid = (t.leaf.processes() or [0])[0]
        self._watch(fds)
        seconds = round(message["seconds"], 2)
        events.emit("template-ready", service=g.name, template=t.number, kind=t.kind, seconds=seconds)
        for old in self:
            if old.ready and old.key == t.key and (old.stale or old is not t):
                old.stale = True
                g.keep(self._retire(old))

    async def _retire(self, t: Template) -> None:
        """End a template; its workers live on."""
        if self.generation.init:
            await self.generation.init.send({"op": "retire", "template": t.number})

    def lost(self, number: int) -> None:
        """Init says that a template has ended."""
        t = self.by_number.pop(number, None)
        if t is None:
            return
        g = self.generation
        g.keep(g.drop_leaf(t.leaf))
        if t.ready and not t.stale and g.running:
            events.emit("template-lost", "warning", service=g.name, template=t.number, kind=t.kind)
            if time.monotonic() - t.born > LASTING:
                self._failures = 0
            g.keep(self._make_again(t))

    async def _make_again(self, lost: Template) -> None:
        """A template died: the same again, later and later while that keeps happening."""
        await asyncio.sleep(BACKOFF[min(self._failures, len(BACKOFF) - 1)])
        self._failures += 1
        try:
            await self.get(lost.key)
        except (Error, ConnectionError) as e:
            events.emit("template-failed", "error", service=self.generation.name, why=str(e))
            if self.generation.running:
                await self._make_again(lost)

    def _outdated(self) -> None:
        """Files that were imported have changed: all templates are stale, and are made again."""
        for t in self:
            t.stale = True
        self._making.clear()  # what is being made is stale too; who waits for it then asks again
        self.generation.keep(self._refresh())

    async def _refresh(self) -> None:
        wanted = {t.key for t in self}
        for key in sorted(wanted, key=lambda models: models is not None):  # the root template first
            try:
                await self.get(key)
            except (Error, ConnectionError) as e:
                events.emit("template-failed", "error", service=self.generation.name, why=str(e))
                return

    async def look_at_files(self) -> None:
        """After a restart: which files the templates are made of, and whether one has changed meanwhile."""
        for t in self:
            init = self.generation.init
            if t.ready and init:
                _, fds = await init.call("files", template=t.number)
                with fds:
                    self._watch(fds)

    def _watch(self, fds: Fds) -> None:
        """Watch the files that a template said it is made of; one of the version before said nothing."""
        if len(fds):
            snapshot = fds.take()
            try:
                self.staleness.watch(snapshot)
            finally:
                os.close(snapshot)

    def adopt(self, told: list[Message]) -> None:
        """Take over those that init says are there and that the kernel has a leaf for."""
        g = self.generation
        assert g.tree
        for m in told:
            number = int(m["template"])
            try:
                leaf = Cgroup(f"templates/{number}", g.tree)
            except FileNotFoundError:
                continue
            note = m["note"]
            pid = (leaf.processes() or [0])[0]
            models = tuple(note["models"])
            self.by_number[number] = Template(
                number, m["kind"], models, leaf, pid, bool(m["ready"]), False, note["started"]
            )
            g.command = note.get("command")

    def close(self) -> None:
        self.staleness.close()
        for t in self:
            t.leaf.close()
        self.by_number.clear()


def _named(model: ModelFile | ModelFactory) -> str:
    """A model as the definition has it, for messages."""
    return str(model.path) if isinstance(model, ModelFile) else f"{model.module}:{model.attribute}"
