"""Limits as they hold, and changing them live: `pocket inspect` and `pocket set`.

What is set lasts until the configuration is read again. `--persist` writes pocketd.conf.d/90-NAME.conf, which is the
only record: what pocketd knows of it is what it reads there, as of any drop-in.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import tomli_w

from cgroup import limits as limits_of
from cgroup.limits import LimitError, Limits
from cgroup.node import Cgroup
from nsutil import processes
from pocketd import events, permissions
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# Those of which the smallest on the way up is what holds.
_SMALLEST = ("memory.max", "memory.high", "memory.swap.max", "pids.max", "cpu.max")


def set_limits(daemon: Daemon, name: str, given: Mapping[str, object], keep: bool) -> Message:
    """Change limits of a pocket (its total) or a service, in its cgroups and for its next launches. Raises Error."""
    parsed = _parse(daemon, name, given)
    kind = "pocket" if name in daemon.config.pockets else "service" if name in daemon.services else None
    cgroups = _cgroups(daemon, name)
    if kind is None and not cgroups:
        raise Error("not-found", f"there is no pocket or service {name!r}")
    if kind is None and keep:
        raise Error("bad-request", f"{name} has no definition that could keep a limit; leave --persist out")
    units = {s.note["leaf"].rpartition("/")[2] for _, s in daemon.sessions() if s.pocket == name and s.adopted}
    try:
        for path in cgroups:
            with daemon.host.hierarchy.open(path) as cgroup:
                cgroup.apply(parsed)
    except (LimitError, OSError) as e:
        raise Error("limit", f"{name}: {e}") from None
    if keep and kind:
        try:
            persist(daemon, name, kind, {"limits": dict(given)})
        except Error as e:
            raise Error(e.code, f"the limits hold now, and {e.message}") from None
    _promise(daemon, name, cgroups, parsed)
    daemon.change_limits(name, parsed)
    events.emit("limits-set", name=name, limits=dict(parsed), persist=keep, cgroups=len(cgroups))
    return {"limits": dict(parsed), "cgroups": cgroups, "units": sorted(units)}


def take_back(daemon: Daemon, name: str, changed: Limits) -> None:
    """After the configuration was read again: what `pocket set` had changed is as the definition says."""
    pocket, service = daemon.config.pockets.get(name), daemon.config.services.get(name)
    defined = pocket.limits if pocket else service.limits if service else {}
    limits = {limit: defined.get(limit, limits_of.lifted(limit, text)) for limit, text in changed.items()}
    for path in _cgroups(daemon, name):
        try:
            with daemon.host.hierarchy.open(path) as cgroup:
                cgroup.apply(limits)
            _promise(daemon, name, [path], limits)
        except (LimitError, OSError) as e:
            events.emit("limits-not-taken-back", "warning", name=name, why=str(e))


def _parse(daemon: Daemon, name: str, given: Mapping[str, object]) -> Limits:
    parsed: dict[str, str] = {}
    for limit, value in given.items():
        try:
            parsed[limit] = limits_of.parse(limit, value)
        except LimitError as e:
            raise Error("limit", f"{name}: {limit} = {value!r} {e}") from None
    if not parsed:
        raise Error("bad-request", f"name a limit to set, such as: pocket set {name} memory.max=200M")
    for limit, reason in daemon.host.hierarchy.refusals(parsed):
        raise Error("limit", f"{name}: {limit}: {reason}")
    return MappingProxyType(parsed)


def _cgroups(daemon: Daemon, name: str) -> list[str]:
    """The kernel paths of what carries the limits of a service or a pocket now."""
    service = daemon.services.get(name)
    if service:
        return [g.tree.kernel_path for g in service.generations() if g.tree]
    found = []
    for service in daemon.services.values():
        for g in service.generations():
            if g.tree:
                with contextlib.suppress(FileNotFoundError), Cgroup(f"pockets/{name}", g.tree) as pocket:
                    found.append(pocket.kernel_path)
    for _, s in daemon.sessions():
        if s.pocket == name and s.leaf and s.note.get("unit"):  # beneath a unit's cgroup, with the definition's limits
            found.append(s.leaf.kernel_path)
    return found


def _promise(daemon: Daemon, name: str, cgroups: list[str], limits: Limits) -> None:
    """The cgroups of a service or a pocket have these limits now: what is above them must know (pocketd.promises)."""
    for service in daemon.services.values():
        for g in service.generations():
            if g.tree and g.tree.kernel_path in cgroups:
                g.promise(None, limits)
            elif g.tree and f"{g.tree.kernel_path}/pockets/{name}" in cgroups:
                g.promise(name, limits)


def _drop_in(daemon: Daemon, name: str) -> Path:
    path = daemon.config_path
    return path.with_name(path.name + ".d") / f"90-{name}.conf"


def persist(daemon: Daemon, name: str, kind: str, keys: Mapping[str, Any]) -> None:
    """Write keys of a definition to its drop-in: lists replace what stood there, tables are merged. Raises Error."""
    path = _drop_in(daemon, name)
    try:
        tree = tomllib.loads(path.read_text()) if path.exists() else {}
        definition = tree.setdefault(kind, {}).setdefault(name, {})
        for key, value in keys.items():
            definition[key] = {**definition.get(key, {}), **value} if isinstance(value, Mapping) else value
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with open(temporary, "w") as file:
            file.write("# Written by `pocket --persist`; remove the file to take it back.\n" + tomli_w.dumps(tree))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, ValueError, AttributeError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise Error("state", f"{path} cannot be written: {why}; mend it and say it again") from None


# -- inspect


def inspect(daemon: Daemon, peer: processes.Peer, name: str) -> Message:
    """What a pocket or a service is: its definition, and what the kernel holds it to. Raises Error."""
    if name in daemon.services:
        if peer.uid:
            raise Error("forbidden", "only root may inspect a service")
        service = daemon.services[name]
        shown = plain(service.definition)
        return {"kind": "service", "name": name, "state": service.state, "definition": shown, **_held(daemon, name)}
    definition = daemon.config.pockets.get(name)
    if definition:
        permissions.check_may_run(definition, peer)
    elif peer.uid or not _cgroups(daemon, name):
        raise Error("not-found", f"there is no pocket or service {name!r}")
    sessions = []
    for g, s in daemon.sessions():
        if s.pocket == name and s.leaf:
            row = {"session": s.id, "pid": s.pid, "service": g.name, "generation": g.number, "adopted": s.adopted}
            sessions.append({**row, "cgroup": s.leaf.kernel_path, **_levels(daemon, s.leaf.kernel_path)})
    shown = plain(definition) if definition else None
    return {"kind": "pocket", "name": name, "definition": shown, "sessions": sessions, **_held(daemon, name)}


def _held(daemon: Daemon, name: str) -> dict[str, Any]:
    return {"cgroups": [{"cgroup": path, **_levels(daemon, path)} for path in _cgroups(daemon, name)]}


def _levels(daemon: Daemon, path: str) -> dict[str, Any]:
    """The limits of a cgroup and of all above it, and which of them hold: the smallest."""
    levels: list[dict[str, Any]] = []
    parts = [part for part in path.split("/") if part]
    for depth in range(len(parts), 0, -1):
        with contextlib.suppress(OSError, ValueError), daemon.host.hierarchy.open("/".join(parts[:depth])) as cgroup:
            values = {}
            for name in sorted(cgroup.files() & set(limits_of.NAMES)):
                text = cgroup.get_property(name.encode()).strip()
                if text not in ("", "max", "max 100000", "0" if name.endswith((".low", ".min")) else "max"):
                    values[name] = text
            levels.append({"cgroup": cgroup.kernel_path, "limits": values})
    holds = {}
    for name in _SMALLEST:
        said = [(level["limits"][name], level["cgroup"]) for level in levels if name in level["limits"]]
        if said:
            value, where = min(said, key=lambda pair: _amount(pair[0]))
            holds[name] = {"value": value, "cgroup": where}
    return {"levels": levels, "holds": holds}


def _amount(text: str) -> float:
    first, _, period = text.partition(" ")
    if first == "max":
        return float("inf")
    return int(first) / int(period) if period else int(first)


def plain(value: Any) -> Any:
    """Definitions' values as msgpack and JSON have them."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
