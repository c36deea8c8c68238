"""What the kernel says of a running worker: `pocket inspect --privileges`. Nothing here is our own belief."""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING

from nsutil import processes
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# proc_pid_status(5)
_STATUS = (
    "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
    "Seccomp_filters",
)  # fmt: skip


def privileges(daemon: Daemon, peer: processes.Peer, name: str) -> Message:
    """Of each worker of a pocket, or of the session of that id. Root sees all, others their own. Raises Error."""
    found = [s for _, s in daemon.sessions() if name in (s.pocket, s.id) and s.pid]
    mine = [s for s in found if peer.uid in (0, s.note.get("uid"))]
    if not mine:
        raise Error("not-found", f"no worker of {name!r} that you may see is running; start one and ask again")
    return {"workers": [{"session": s.id, "pocket": s.pocket, **of(s.pid)} for s in mine]}


def of(pid: int) -> Message:
    """status (each set of values, with how many threads have it), namespaces, mounts, limits. Raises Error."""
    place = f"/proc/{pid}"
    try:
        threads = Counter(_status(f"{place}/task/{task}") for task in os.listdir(f"{place}/task"))
        return {
            "pid": pid,
            "status": [{"threads": count, **dict(values)} for values, count in threads.most_common()],
            "namespaces": {kind: os.readlink(f"{place}/ns/{kind}") for kind in sorted(os.listdir(f"{place}/ns"))},
            "shared": sorted(kind for kind in os.listdir(f"{place}/ns") if _same(place, kind)),
            "uid_map": _lines(f"{place}/uid_map"),
            "cgroup": _lines(f"{place}/cgroup")[-1:],
            "limits": _lines(f"{place}/limits"),
            "mountinfo": _lines(f"{place}/mountinfo"),
            "descriptors": {fd: os.readlink(f"{place}/fd/{fd}") for fd in sorted(os.listdir(f"{place}/fd"), key=int)},
        }
    except OSError:
        raise Error("gone", "the worker has ended") from None


def _status(place: str) -> tuple[tuple[str, str], ...]:
    fields = (line.partition(":") for line in _lines(f"{place}/status"))
    return tuple((key, " ".join(value.split())) for key, _, value in fields if key in _STATUS)


def _same(place: str, kind: str) -> bool:
    """Whether it is the host's: the namespace that pocketd itself is in."""
    return os.readlink(f"{place}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")


def _lines(path: str) -> list[str]:
    with open(path, errors="replace") as file:
        return file.read().splitlines()
