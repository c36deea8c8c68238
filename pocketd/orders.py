"""Who a worker is and what it is told: decided in pocketd, read by the worker alone."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cgroup.limits import CONTROLLERS, LimitError, Limits, processors
from cgroup.node import Cgroup
from nsutil import memory, processes
from pocketd import paths, wire
from pocketd.definitions import Pocket
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon
    from pocketd.generation import Generation

Marks = list[tuple[str, float]]  # what was done when, for `pocket run --trace` (runtime.trace)
_DEFAULTS = {"pids.max": "4096"}  # of a pocket that says nothing of it: a fork bomb stays within it
_HOMES = 16  # that are made in a worker before it is known whose it is
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

    def loaded(self, mode: str) -> frozenset[str] | None:
        """The models that a worker's template holds; None: it comes from the root template."""
        return self.models if mode == "client" and self.models else None


def plan_of(daemon: Daemon, generation: Generation, definition: Pocket) -> Plan:
    """The same for a defined pocket whoever runs it, without a home."""
    if definition.run_as:
        uid, gid = definition.run_as.uid, definition.run_as.gid
    else:
        uid = gid = daemon.identities.named(definition.name)
    models = frozenset(definition.allow.models) & frozenset(generation.definition.models)
    return Plan(definition.name, definition, uid, gid, definition.allow.network, models, definition.limits, "")


def homes(definition: Pocket) -> tuple[str, ...]:
    """The homes of those who may run a pocket, as far as they are named, each or as a group; root's first."""
    names: list[str] = []
    for who in definition.may_run:
        with suppress(KeyError):
            names += grp.getgrnam(who[1:]).gr_mem if who.startswith("@") else [who]
    uids = [0]
    for name in names[:_HOMES]:
        with suppress(KeyError):
            uids.append(pwd.getpwnam(name).pw_uid)
    found = [home for home in map(home_of, uids) if home and not beneath(home, definition)]
    return tuple(dict.fromkeys(found))[:_HOMES]


def beneath(path: str, definition: Pocket) -> bool:
    return f"{path}/".startswith(f"{definition.dir}/")


def home_of(uid: int) -> str:
    try:
        home = pwd.getpwuid(uid).pw_dir
    except KeyError:
        return ""
    return home if home.startswith("/") and paths.refuse_directory(home) is None else ""


def make_pocket(generation: Generation, name: str, limits: Limits, leaf: str, alone: bool = False) -> None:
    """A pocket's cgroup, with its limits, and one beneath it. It may be there, unless it is for one session `alone`, of
    which others could know the name."""
    with ExitStack() as stack:
        pockets = stack.enter_context(Cgroup("pockets", generation.tree))
        try:
            pocket = stack.enter_context(pockets.create(name, exist_ok=not alone))
        except FileExistsError:
            raise Error("bad-request", f"there is a pocket {name} already; choose another session") from None
        try:
            enabled = pocket.enable(CONTROLLERS)
            pocket.apply({**(_DEFAULTS if "pids" in enabled else {}), **limits})
            pocket.create(leaf).close()
        except (LimitError, OSError) as e:
            if not pocket.names():  # made for this alone, which will not be
                pocket.remove()
            raise Error("limit" if isinstance(e, LimitError) else "cgroup", f"pocket {name}: {e}") from None
    generation.promise(name, limits)


def _preload(generation: Generation, definition: Pocket | None) -> list[str]:
    """What sessions have in them that come the long way, unless it is known not to end well."""
    return list(definition.preload) if definition and definition.name not in generation.held.failed else []


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


def orders(
    generation: Generation,
    plan: Plan,
    mode: str,
    files: list[tuple[int, Message]],
    secret: str | None,
    more: Message | None = None,
) -> int:
    """What the worker is to do, in a sealed memfd that it alone reads; the caller owns the descriptor.

    A template passes it on unread: what it had once held, later workers of other pockets could find in their memory.
    """
    directory = files[0][1]["target"]
    home = "" if plan.home == directory or plan.home.startswith(directory + "/") else plan.home
    told = {
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
        "threads": (plan.definition.threads if plan.definition else None) or processors(plan.limits),
        "defined": plan.definition is not None,
        "cold": bool(plan.definition and plan.definition.cold),
        "preload": _preload(generation, plan.definition) if mode == "client" else [],
        **(more or {}),
    }
    return memory.sealed(wire.pack(told), "orders")


def pid_of(pidfd: int, oom_score: int = 0) -> int:
    """A worker's pid here; 0 where it has ended already, a short program, whose caller has its status. Takes over
    `pidfd`."""
    try:
        if oom_score:
            set_oom_score(pidfd, oom_score)
        return processes.pid_of(pidfd)
    except processes.Gone:
        return 0
    finally:
        os.close(pidfd)


def set_oom_score(pidfd: int, score: int) -> None:
    """By how many thousandths of its limit a worker counts as larger, where the kernel looks for whom to end."""
    with suppress(OSError, processes.Gone), open(f"/proc/{processes.pid_of(pidfd)}/oom_score_adj", "w") as f:
        processes.pid_of(pidfd)  # opened while it was there: no other's that has its number now
        f.write(str(score))
