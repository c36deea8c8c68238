"""What there is, as the kernel says: `pocket ps` and `pocket logs`."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from cgroup.node import Cgroup
from nsutil import processes
from pocketd import measured, permissions, warming
from pocketd.generation import Generation, Session
from pocketd.measured import Place
from pocketd.services import RunningService
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

Row = dict[str, Any]


async def ps(daemon: Daemon, peer: processes.Peer) -> Message:
    """Services, templates, pockets and workers; memory in bytes, age and cpu in seconds. Others' only for root, and
    nothing of others' is looked at for anybody else."""
    now = time.time()
    services, templates, workers = [], [], []
    running: dict[str, list[tuple[RunningService, Generation, Session]]] = {}
    looks: list[tuple[Row, Place]] = []  # whose memory is to be measured
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
            row.update(generation=g.number, pid=t.pid, age=_age(now, t.started))
            templates.append(row)
            looks.append((row, _look(row, t.leaf)))
        for g, s in service.sessions():
            if peer.uid not in (0, s.note.get("uid")):
                continue
            row = {"session": s.id, "pocket": s.pocket, "service": d.name, "mode": s.note.get("mode")}
            row.update(pid=s.pid, state="running" if s.pid else "starting", age=_age(now, s.started))
            row.update(directory=s.note.get("directory"), generation=g.number)
            workers.append(row)
            looks.append((row, _look(row, s.leaf)))
            running.setdefault(s.pocket, []).append((service, g, s))
    pockets = {name: _pocket(name, found) for name, found in running.items()}
    for name, definition in daemon.config.pockets.items():
        if name not in pockets and daemon.offers(name, peer):
            idle = {"name": name, "service": definition.service, "state": "idle", "workers": 0, "charged": None}
            pockets[name] = idle
    held: list[tuple[Row, Place]] = []
    for name, row in pockets.items():
        row["last"] = _last(daemon, name)
        known = daemon.config.pockets.get(name)
        if known:
            told, holder = warming.state(daemon, known)
            row.update(told)
            if holder:
                held.append((row, holder.itself))
    for name, problems in daemon.config.invalid.items() if peer.uid == 0 else ():
        why = "; ".join(p.message for p in problems)
        pockets.setdefault(name, {"name": name, "service": None, "state": "invalid", "why": why, "workers": 0})
    found = await measured.memory([place for _, place in (*looks, *held)])
    for (row, _), m in zip(looks, found[: len(looks)], strict=True):
        row.update(private=m and m.private, shared=m and m.shared, proportional=m and m.proportional)
    for (row, _), m in zip(held, found[len(looks) :], strict=True):
        row["template_private"] = m and m.private
    rows = sorted(pockets.values(), key=lambda row: str(row["name"]))
    return {"services": services, "templates": templates, "pockets": rows, "workers": workers}


def _age(now: float, since: float) -> float:
    return max(0.0, now - since)  # the clock may have been set back


def _generation(g: Generation) -> Row:
    """What only this generation still holds is its templates' and its sessions' memory."""
    row: Row = {"number": g.number, "sessions": len(g.sessions), "pid": g.init_pid, "charged": None}
    if g.tree:
        try:
            row["charged"] = g.tree.stats().memory_current
        except OSError:
            pass  # it ended just now
    return row


def _pocket(name: str, sessions: list[tuple[RunningService, Generation, Session]]) -> Row:
    service = sessions[-1][0].name
    row: Row = {"name": name, "service": service, "state": "running", "workers": len(sessions), "charged": None}
    for tree in dict.fromkeys(g.tree for _, g, s in sessions if s.leaf and g.tree):
        try:
            with Cgroup(f"pockets/{name}", tree) as pocket:
                charged = pocket.stats().memory_current
        except OSError:
            continue  # it ended just now
        if charged is not None:
            row["charged"] = (row["charged"] or 0) + charged
    return row


def _last(daemon: Daemon, pocket: str) -> dict[str, Any] | None:
    """How a limit last ended one of a pocket's workers."""
    found = [g.endings[pocket] for s in daemon.services.values() for g in s.generations() if pocket in g.endings]
    return max(found, key=lambda ending: ending["at"], default=None)


def _look(row: Row, leaf: Cgroup | None) -> Place:
    """What is charged to a leaf (None where the host's cgroup2 lacks the memory controller) and its cpu time, for its
    row; and its processes, to be measured: of all of them together private, shared and proportional memory."""
    row.update(charged=None, cpu=0.0, processes=0)
    if leaf is None or leaf.fd < 0:
        return "", ()
    try:
        stats = leaf.stats()
        row.update(charged=stats.memory_current, cpu=stats.cpu_usec / 1e6)
        pids = leaf.processes()
    except OSError:
        return "", ()  # it ended while we looked
    row["processes"] = len(pids)
    return leaf.kernel_path, pids


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
