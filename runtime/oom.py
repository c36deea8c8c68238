"""Death by memory.max or for want of threads, as the kernel's files tell of it (admin-guide/cgroup-v2).

Everything is read beneath the descriptor of the session's cgroup: a service has no cgroup mount of its own.
"""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Tuple

from pocketd.wire import Error, Message


def kills(leaf: int) -> int:
    """How many processes of this cgroup the kernel has killed for memory; 0 without the controller."""
    return _events(leaf, "memory.events").get("oom_kill", 0)


def error(leaf: int, note: Message) -> Error:
    """Which limit killed a worker of this cgroup: of itself, or of what its pocket's limits stand on above it."""
    path = str(note.get("leaf", ""))
    levels = [(at, os.path.normpath(f"{path}/{at}")) for at in _levels(note)]
    limited = [(at, cgroup, limit) for at, cgroup in levels for limit in [_number(leaf, f"{at}memory.max")] if limit]
    # memory.events.local counts how often this very limit was reached; memory.events has those below it too.
    hit = [level for level in limited if _events(leaf, f"{level[0]}memory.events.local").get("oom")]
    pocket = str(note.get("pocket"))
    if not hit:  # a process of the cgroup is counted there also when memory is short above
        text = f"pocket {pocket} was ended by the kernel: the host, or a cgroup above {path}, is out of memory"
        return Error("memory", text, pocket=pocket, limit=None, peak=None, cgroup=None)
    at, cgroup, limit = hit[0]
    peak = _number(leaf, f"{at}memory.peak")  # Linux 5.19
    # A unit's or a container's limit is not the pocket's own, so it is named.
    foreign = note.get("adopted") is True or cgroup == note.get("unit")
    whose = f"the memory.max of {size(limit)} of {cgroup}" if foreign else f"its memory.max of {size(limit)}"
    text = f"pocket {pocket} was ended by {whose}" + (f" (peak {size(peak)})" if peak else "")
    return Error("memory", text, pocket=pocket, limit=limit, peak=peak, cgroup=cgroup)


def _levels(note: Message) -> Tuple[str, ...]:
    """Where limits of a session may stand: at its cgroup, and at its pocket's, which is above it, or above that of the
    pocket's template that it came from. Of a cgroup that is somebody else's, what is above is not the pocket's."""
    if note.get("adopted") is True:
        return ("",)
    return ("", "../", "../../") if note.get("held") else ("", "../")


def threads(leaf: int, note: Message) -> Optional[Error]:
    """What may have ended a worker that aborted: libraries do when a thread of theirs cannot be started.

    The event is counted where the limit stands, or before Linux 6.11 where the process was.
    """
    levels = _levels(note)
    limit = next((n for n in (_number(leaf, f"{at}pids.max") for at in levels) if n), None)
    if limit is None or not any(_events(leaf, f"{at}pids.events").get("max") for at in levels):
        return None
    text = f"pocket {note.get('pocket')} has reached its pids.max of {limit}, and pids.max counts threads"
    return Error("limit", text, limit=limit)


def size(number: int) -> str:
    value = float(number)
    for unit in ("", "K", "M", "G"):
        if value < 1024:
            return f"{value:.1f}{unit}" if unit else str(number)
        value /= 1024
    return f"{value:.1f}T"


def _number(leaf: int, name: str) -> Optional[int]:
    """A file of one number; None for "max" and where there is none."""
    text = _read(leaf, name).strip()
    return int(text) if text.isdigit() else None


def _events(leaf: int, name: str) -> Dict[str, int]:
    pairs: Any = (line.split() for line in _read(leaf, name).splitlines())
    return {key: int(value) for key, value in pairs}


def _read(leaf: int, name: str) -> str:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf)
        with os.fdopen(fd) as f:
            return f.read()
    except OSError:
        return ""
