"""pocketd: read the configuration, take over what is on, answer the control socket, leave all running at the end."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import functools
import grp
import os
import platform
import re
import resource
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import prctl

from cgroup.hierarchy import DEFAULT_BASE, Hierarchy, NoCgroup2
from cgroup.limits import CONTROLLERS, Limits
from nsutil import processes
from pocketd import __version__, config, events, permissions, supervision, systemd_units, tuning, warming, weights
from pocketd.admission import Admission
from pocketd.authors import Authors
from pocketd.control import Control
from pocketd.definitions import Allow, Config, Pocket, Service
from pocketd.files import Files
from pocketd.generation import Generation, Session
from pocketd.host import Host
from pocketd.identities import Identities
from pocketd.idle import Idle
from pocketd.paths import Mount
from pocketd.relief import Relief
from pocketd.scopes import Directories, Scopes, Units
from pocketd.services import RunningService
from pocketd.turns import Turns
from pocketd.wire import Error, Message

OLDEST_KERNEL = (6, 1)
REST = 10.0  # seconds until what failed beside the requests begins anew


class Daemon:
    """All that pocketd knows. Owns every descriptor in it."""

    def __init__(self, config_path: Path, read: Callable[[], Config], host: Host):
        self.config_path = config_path
        self.read = read
        self.host = host
        self.identities = Identities(host.state_dir / "ids.json")
        self.network = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.services: dict[str, RunningService] = {}
        self.config = Config({}, {})
        self.changed: dict[str, Limits] = {}  # by `pocket set`
        self.rights: dict[str, tuple[Allow, tuple[Mount, ...]]] = {}  # by `pocket allow` and `pocket deny`
        self.admission = Admission(self)
        self.turns = Turns()
        self.relief = Relief(self)
        self.files = Files()
        self.last_right: dict[str, Pocket] = {}  # of pockets that their authors have made invalid since
        self.authors = Authors(self)
        self.claimed: set[int] = set()  # uids of launches that have no session yet
        self.configure()

    def configure(self) -> None:
        """Read the configuration. What runs keeps the definition that it was made by."""
        self.config = settings = self.read()
        changed, self.changed, self.rights = self.changed, {}, {}
        for problem in settings.problems:
            where = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
            events.emit(
                "config-problem", "error", file=where, key=problem.key, value=problem.value, problem=problem.message
            )
        for notice in settings.notices:
            events.emit("config-notice", "notice", notice=notice)
        for name, definition in settings.services.items():
            if name in self.services:
                self.services[name].definition = definition
            else:
                self.services[name] = RunningService(definition, self.host, self._ready)
        for name, service in list(self.services.items()):
            # One that is on and has no definition any more can still be seen and switched off.
            if name not in settings.services and service.state in ("off", "failed"):
                del self.services[name]
        for name, limits in changed.items():
            tuning.take_back(self, name, limits)
        self.last_right = {}
        self.authors.watch()
        for service in self.services.values():
            for generation in service.generations():
                generation.held.drop_undefined(self)
            if service.current:
                self._ready(service.current)

    def configure_pockets(self, names: Iterable[str]) -> None:
        """Their authors changed something: those pockets' definitions again, and nothing else of the configuration.

        By one reading, which is of all that there is, however many they are.
        """
        read, now = self.read(), self.config
        # The operator may be changing the configuration too: until that is read, what it leaves out holds as it was.
        known = {name for name in names if name in read.pockets or name in read.invalid}
        pockets = {key: value for key, value in now.pockets.items() if key not in known}
        invalid = {key: value for key, value in now.invalid.items() if key not in known}
        for name in sorted(known):
            pocket = read.pockets.get(name)
            if pocket:
                limits = MappingProxyType({**pocket.limits, **self.changed.get(name, {})})
                allow, mounts = self.rights.get(name, (pocket.allow, pocket.mounts))
                pockets[name] = replace(pocket, limits=limits, allow=allow, mounts=mounts)
            else:
                invalid[name] = read.invalid[name]
                self.last_right.setdefault(name, now.pockets.get(name) or self.last_right[name])
            events.emit("pocket-changed", pocket=name, valid=pocket is not None)
        self.config = replace(now, pockets=MappingProxyType(pockets), invalid=MappingProxyType(invalid))

    def change_limits(self, name: str, limits: Limits) -> None:
        """What `pocket set` changed, for the next launches; reading the configuration again takes it back."""
        self.changed[name] = MappingProxyType({**self.changed.get(name, {}), **limits})
        pocket, service = self.config.pockets.get(name), self.services.get(name)
        if pocket:
            changed = replace(pocket, limits=MappingProxyType({**pocket.limits, **limits}))
            self.config = replace(self.config, pockets=MappingProxyType({**self.config.pockets, name: changed}))
        elif service:
            definition = service.definition
            service.definition = replace(definition, limits=MappingProxyType({**definition.limits, **limits}))

    def change_rights(self, name: str, allow: Allow, mounts: tuple[Mount, ...]) -> None:
        """What `pocket allow` or `deny` changed, for the next launches; reading the configuration takes it back."""
        self.rights[name] = (allow, mounts)
        changed = replace(self.config.pockets[name], allow=allow, mounts=mounts)
        self.config = replace(self.config, pockets=MappingProxyType({**self.config.pockets, name: changed}))

    def tidy(self) -> None:
        """Remove copies of models that nothing uses any more."""
        used = {path for s in self.services.values() for g in s.generations() for path in g.models.values()}
        if not any(service.state == "starting" for service in self.services.values()):
            weights.collect(self.host.models, used)

    def sessions(self) -> Iterator[tuple[Generation, Session]]:
        for service in self.services.values():
            yield from service.sessions()

    def service(self, name: str) -> RunningService:
        if name in self.services:
            return self.services[name]
        if name in self.config.invalid:
            why = config.describe(self.config.invalid[name])
            raise Error("invalid", f"{name} has a wrong definition: {why}")
        if name in self.config.pockets:
            raise Error("not-a-service", f"{name} is a pocket; services are {self._names()}")
        raise Error("not-found", f"there is no service {name!r}; services are {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted(self.services)) or "none"

    def offers(self, name: str, peer: processes.Peer) -> bool:
        """Whether the caller may hear of `name` whatever runs: any service, what it may run.

        Whoever may run a pocket that has become invalid hears why (`service`).
        """
        pocket = self.config.pockets.get(name) or self.last_right.get(name)
        return peer.uid == 0 or name in self.services or bool(pocket and permissions.named(pocket.may_run, peer))

    def knows(self, name: str, peer: processes.Peer) -> bool:
        """Whether the caller may hear of `name`: that, its own sessions and their pockets."""
        mine = (s for _, s in self.sessions() if peer.uid == s.note.get("uid"))
        return self.offers(name, peer) or any(name in (s.pocket, s.id) for s in mine)

    def check_known(self, name: str, peer: processes.Peer) -> None:
        """Raise Error unless the caller knows of `name`. The words are the same whether there is none of that name or
        it is another's: otherwise anybody could find out by asking which pockets and sessions there are."""
        if self.knows(name, peer):
            return
        raise Error(
            "forbidden",
            f"you may not run {name[:80]}: there is no service or pocket of that name, or its `may_run` names neither "
            "you nor a group of yours",
        )

    async def resolve(self, name: str | None, peer: processes.Peer) -> tuple[RunningService, Pocket | None]:
        """The service, and the pocket's definition if `name` has one, that a login is for."""
        if name is None:
            if len(self.services) != 1 and "tensorflow" not in self.services:
                raise Error("ambiguous", f"name the service to log in to: {self._names()}")
            name = "tensorflow" if "tensorflow" in self.services else next(iter(self.services))
        pocket = self.config.pockets.get(name)
        if pocket is None:
            service = self.service(name)
            permissions.check_may_use(service.definition, peer)
            return self._startable(service), None
        permissions.check_may_run(pocket, peer)
        if pocket.service is not None:
            return self._startable(self.service(pocket.service)), pocket
        if len(self.services) == 1:
            return self._startable(next(iter(self.services.values()))), pocket
        raise Error("ambiguous", f"pocket {name} names no service; write service = one of {self._names()}")

    def _startable(self, service: RunningService) -> RunningService:
        if service.state != "on" and service.definition.start == "manual":
            raise Error("service-off", f"service {service.name} is off; switch it on by: pocket {service.name} on")
        return service

    def _ready(self, generation: Generation) -> None:
        warming.begin(self, generation)

    def describe(self, name: str, peer: processes.Peer) -> Message:
        """What the command must know of a name: a service, or a pocket with its program."""
        pocket = self.config.pockets.get(name)
        if pocket is None:
            return {"kind": "service", "runtime": self.service(name).definition.runtime}
        permissions.check_may_run(pocket, peer)
        return {
            "kind": "pocket",
            "service": pocket.service,
            "program": pocket.program,
            "directory": str(pocket.dir),
            "environment": dict(pocket.env),
            "packages": pocket.packages,
        }

    async def stop_sessions(self, name: str, peer: processes.Peer, timeout: int) -> int:
        """End a pocket's sessions, or the session of that id: SIGTERM, then for good. Returns how many there were."""
        found = [(g, s) for g, s in self.sessions() if name in (s.pocket, s.id)]
        for _, s in found:
            if peer.uid not in (0, s.note.get("uid")):
                raise Error("forbidden", f"{name} is not yours")
        if not found and name not in self.config.pockets:
            raise Error("not-found", f"there is no pocket or session {name!r}")
        for g, s in found:
            if g.init:
                (await g.init.call("end", session=s.id, signal=int(signal.SIGTERM)))[1].close()
        waits = [asyncio.ensure_future(s.over.wait()) for _, s in found]
        if waits:
            await asyncio.wait(waits, timeout=timeout)
        for (g, s), wait in zip(found, waits, strict=True):
            if not wait.done() and g.init:
                (await g.init.call("end", session=s.id))[1].close()
                await wait
        return len(found)

    async def take_over(self) -> None:
        """Find again what an earlier pocketd left on."""
        found: dict[str, list[int]] = {}
        place = self.host.runtime_dir / "services"
        for directory in sorted(place.iterdir()) if place.is_dir() else []:
            name, _, number = directory.name.partition(":")
            found.setdefault(name, []).append(int(number or 1))
        for name, numbers in found.items():
            if name not in self.services:
                # It runs, and the configuration no longer has it: it can be seen and switched off.
                self.services[name] = RunningService(Service(name), self.host, self._ready)
            if not await self.services[name].adopt(numbers) and name not in self.config.services:
                del self.services[name]
        self.tidy()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pocketd", description="Runs featherweight pockets inside warm services.")
    parser.add_argument("--config", type=Path, help=f"the configuration (default {config.DEFAULT_PATH})")
    parser.add_argument("--runtime-dir", type=Path, default=Path("/run/pocketd"), help="sockets (default %(default)s)")
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/pocketd"), help="what lasts (%(default)s)")
    parser.add_argument(
        "--cgroup", help=f"beneath the cgroup2 mount (default: scopes of systemd, without it {DEFAULT_BASE})"
    )
    parser.add_argument("--check", action="store_true", help="read the configuration, say what is wrong, and end")
    parser.add_argument("--version", action="version", version=f"pocketd {__version__}")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        hierarchy = Hierarchy.find()
    except NoCgroup2 as e:
        sys.exit(f"pocketd: {e}")
    read = functools.partial(config.load, options.config or config.DEFAULT_PATH, options.config is not None)
    if options.check:
        sys.exit(check(read(hierarchy.refusals)))
    if os.geteuid() != 0:
        sys.exit("pocketd: must run as root: it makes namespaces, mounts and cgroups")
    release = tuple(int(n) for n in re.findall(r"\d+", platform.release())[:2])
    if release < OLDEST_KERNEL:
        sys.exit(f"pocketd: needs Linux 6.1 or later; this is {platform.release()}")
    if options.cgroup is None and systemd_units.booted():
        scopes: Scopes = Units(hierarchy)
        offered = None  # there is no cgroup yet that has the files of all controllers
    else:
        base = hierarchy.base(options.cgroup or DEFAULT_BASE, CONTROLLERS)
        scopes, offered = Directories(base), base.files()
    read = functools.partial(read, functools.partial(hierarchy.refusals, offered=offered))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0o022)
    prctl.set_name("pocketd")
    try:
        asyncio.run(serve(options, read, hierarchy, scopes))
    except Error as e:
        sys.exit(f"pocketd: {e}")


def check(settings: Config) -> int:
    """`pocketd --check`: all that is wrong, one line each."""
    if settings.problems:
        print(config.describe(settings.problems), file=sys.stderr)
        return 1
    print(f"the configuration is right: {len(settings.services)} services, {len(settings.pockets)} pockets")
    return 0


async def serve(options: argparse.Namespace, read: Callable[[], Config], hierarchy: Hierarchy, scopes: Scopes) -> None:
    for path, mode in ((options.runtime_dir, 0o755), (options.state_dir, 0o700)):
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(mode)
    check_length(options.runtime_dir)
    lock = take_lock(options.runtime_dir)
    daemon = Daemon(
        options.config or config.DEFAULT_PATH,
        read,
        Host(hierarchy, scopes, options.runtime_dir.resolve(), options.state_dir.resolve()),
    )
    await daemon.take_over()
    try:
        group = grp.getgrnam("pocket").gr_gid
    except KeyError:
        group = None
    control = Control(daemon, str(options.runtime_dir / "pocketd.sock"), group, supervision.listening_socket())
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reconfigure, daemon)
    events.emit("started", version=__version__, runtime_dir=options.runtime_dir, scopes=scopes.where)
    supervision.notify("READY=1")
    beside = [
        asyncio.ensure_future(task)
        for task in (
            boot(daemon),
            supervision.watchdog(),
            lasting("idle", Idle(daemon).run),
            lasting("relief", daemon.relief.run),
        )
    ]
    await stop.wait()
    supervision.notify("STOPPING=1")
    for task in beside:
        task.cancel()
    control.close()
    remains = [name for name, service in daemon.services.items() if any(service.generations())]
    for service in daemon.services.values():
        service.leave()
    scopes.close()
    events.emit("ended", services_left_on=remains)
    os.close(lock)


async def lasting(name: str, run: Callable[[], Awaitable[None]], rest: float = REST) -> None:
    """Run what does not end. A fault of ours in it is said, and after `rest` seconds it begins anew."""
    while True:
        try:
            await run()
        except Exception as e:
            events.emit("task-failed", "error", task=name, why=repr(e))
        await asyncio.sleep(rest)


def reconfigure(daemon: Daemon) -> None:
    """SIGHUP: the configuration again. A service that runs takes its new definition by `pocket reload`."""
    supervision.reloading()
    daemon.configure()
    events.emit("reloaded", services=len(daemon.config.services), pockets=len(daemon.config.pockets))
    supervision.notify("READY=1")


async def boot(daemon: Daemon) -> None:
    """Services with start = "boot", one at a time."""
    for service in list(daemon.services.values()):
        if service.definition.start == "boot" and service.state != "on":
            try:
                await service.on(lambda text: None)
            except (Error, ConnectionError):
                pass  # it said so itself


def check_length(runtime_dir: Path) -> None:
    """A unix socket's name has at most 107 bytes (unix(7)), and clients connect by this one."""
    longest = 107 - len("/pocketd.sock")
    if len(os.fsencode(runtime_dir.resolve())) > longest:
        raise Error("config", f"--runtime-dir {runtime_dir} is too long for a socket's name; at most {longest} bytes")


def take_lock(runtime_dir: Path) -> int:
    """One pocketd for one runtime directory. The lock goes with the descriptor, however the process ends."""
    fd = os.open(runtime_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Error("running", f"another pocketd has {runtime_dir}; give this one a --runtime-dir of its own") from None
    return fd


if __name__ == "__main__":
    main()
