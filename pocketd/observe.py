"""What there is, as the kernel says: `pocket ps` and `pocket logs`."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from cgroup.node import Cgroup
from nsutil import processes
from pocketd import permissions, warming
from pocketd.generation import Generation, Session
from pocketd.services import RunningService
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

_LOOKING = 2.0  # seconds that one answer may take to look at processes


def ps(daemon: Daemon, peer: processes.Peer) -> Message:
    """Services, templates, pockets and workers; memory in bytes, age and cpu in seconds. Others' only for root."""
    now, until = time.time(), time.monotonic() + _LOOKING
    services, templates, workers = [], [], []
    pockets: dict[str, dict[str, Any]] = {}
    for service in daemon.services.values():
        d = service.definition
        services.append(
            {
                "name": d.name,
                "runtime": d.runtime,
                "state": service.state,
                "why": service.why.message if service.why and peer.uid == 0 else None,
                "pid": service.current.init_pid if service.current else None,
                "age": _age(now, service.since),
                "generation": service.current.number if service.current else None,
                "generations": [_generation(g) for g in service.generations()],
                "models": sorted(d.models),
            }
        )
        for g, t in service.templates() if peer.uid == 0 else ():
            state = "stale" if t.stale else "ready" if t.ready else "loading"
            row = {"service": d.name, "number": t.number, "kind": t.kind, "models": list(t.models), "state": state}
            templates.append(
                {**row, "generation": g.number, "pid": t.pid, "age": _age(now, t.started), **usage(t.leaf, until)}
            )
        for g, s in service.sessions():
            if peer.uid not in (0, s.note.get("uid")):
                continue
            row = {"session": s.id, "pocket": s.pocket, "service": d.name, "mode": s.note.get("mode")}
            row.update(pid=s.pid, state="running" if s.pid else "starting", age=_age(now, s.started))
            row.update(directory=s.note.get("directory"))
            row.update(generation=g.number, **usage(s.leaf, until))
            workers.append(row)
            pockets[s.pocket] = _pocket(service, g, s)
    for name, definition in daemon.config.pockets.items():
        idle = {"name": name, "service": definition.service, "state": "idle", "workers": 0, "charged": None}
        pockets.setdefault(name, idle)
    for row in pockets.values():
        row["last"] = _last(daemon, str(row["name"]))
        known = daemon.config.pockets.get(str(row["name"]))
        if known:
            row.update(warming.state(daemon, known))
    for name, problems in daemon.config.invalid.items() if peer.uid == 0 else ():
        why = "; ".join(p.message for p in problems)
        pockets.setdefault(name, {"name": name, "service": None, "state": "invalid", "why": why, "workers": 0})
    rows = sorted(pockets.values(), key=lambda row: str(row["name"]))
    return {"services": services, "templates": templates, "pockets": rows, "workers": workers}


def _age(now: float, since: float) -> float:
    return max(0.0, now - since)  # the clock may have been set back


def _generation(g: Generation) -> dict[str, Any]:
    """What only this generation still holds is its templates' and its sessions' memory."""
    row: dict[str, Any] = {"number": g.number, "sessions": len(g.sessions), "pid": g.init_pid, "charged": None}
    if g.tree:
        try:
            row["charged"] = g.tree.stats().memory_current
        except OSError:
            pass  # it ended just now
    return row


def _pocket(service: RunningService, g: Generation, session: Session) -> dict[str, Any]:
    count = sum(1 for _, s in service.sessions() if s.pocket == session.pocket)
    row = {"name": session.pocket, "service": service.name, "state": "running", "workers": count, "charged": None}
    if session.leaf and g.tree:
        try:
            with Cgroup(f"pockets/{session.pocket}", g.tree) as pocket:
                row["charged"] = pocket.stats().memory_current
        except OSError:
            pass  # it ended just now
    return row


def _last(daemon: Daemon, pocket: str) -> dict[str, Any] | None:
    """How a limit last ended one of a pocket's workers."""
    found = [g.endings[pocket] for s in daemon.services.values() for g in s.generations() if pocket in g.endings]
    return max(found, key=lambda ending: ending["at"], default=None)


def usage(leaf: Cgroup | None, until: float = math.inf) -> dict[str, Any]:
    """Of all processes in a leaf: private, shared and proportional memory, what is charged to the leaf, cpu time. Of
    those processes that could be looked at `until` then (time.monotonic()): pockets may make it take long.

    `charged` is None where the host's cgroup2 lacks the memory controller.
    """
    row: dict[str, Any] = {"private": 0, "shared": 0, "proportional": 0, "charged": None, "cpu": 0.0, "processes": 0}
    if leaf is None or leaf.fd < 0:
        return row
    try:
        stats = leaf.stats()
        row.update(charged=stats.memory_current, cpu=stats.cpu_usec / 1e6)
        pids = leaf.processes()
        row["processes"] = len(pids)
        for pid in pids:
            if time.monotonic() > until:
                break
            m = processes.memory(pid)
            row["private"] += m.private
            row["shared"] = max(row["shared"], m.shared)
            row["proportional"] += m.proportional
    except (OSError, processes.Gone):
        pass  # it ended while we looked
    return row


def logs(daemon: Daemon, peer: processes.Peer, name: str, lines: int) -> list[str]:
    """The last lines of a service's log, or those of one pocket in any. Owners see their own pocket's alone."""
    if name in daemon.services:
        if peer.uid != 0:
            raise Error("forbidden", "only root may read a service's log")
        text = daemon.services[name].log_tail(lines)
        return text.split("\n") if text else []
    definition = daemon.config.pockets.get(name)
    if definition:
        permissions.check_may_run(definition, peer)
    elif peer.uid != 0 or not name.startswith("run-"):
        raise Error("not-found", f"there is no service or pocket {name!r}")
    found: deque[str] = deque(maxlen=lines)
    for service in daemon.services.values():
        if not os.path.exists(service.log_path):
            continue
        with open(service.log_path, encoding="utf-8", errors="replace", newline="\n") as f:
            found.extend(line.rstrip("\n") for line in f if line.partition(" ")[2].startswith(f"pocket {name} "))
    return list(found)
