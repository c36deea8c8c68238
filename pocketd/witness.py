"""What the kernel says of a running worker: `pocket inspect --privileges`. Nothing here is our own belief.

A worker has as many threads and descriptors as it likes: a child of pocketd's (pocketd.apart) looks at so many and
says what it left out.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from cgroup.hierarchy import NoCgroup2
from nsutil import processes
from pocketd import measured, wire
from pocketd.apart import Apart
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

# proc_pid_status(5)
_STATUS = (
    "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp",
    "Seccomp_filters",
)  # fmt: skip
WORKERS = 32
THREADS, SETS = 1000, 50  # of one worker: threads that are looked at, and different sets of values that are shown
DESCRIPTORS, LONGEST = 200, 400  # of one worker, and characters of what one refers to
PATIENCE = 2.0  # seconds for one worker


async def privileges(daemon: Daemon, peer: processes.Peer, name: str) -> Message:
    """Of each worker of a pocket, or of the session of that id. Root sees all, others their own. Raises Error."""
    found = [(s, s.leaf.kernel_path) for _, s in daemon.sessions() if name in (s.pocket, s.id) and s.pid and s.leaf]
    mine = [(s, path) for s, path in found if peer.uid in (0, s.note.get("uid"))]
    if not mine:
        raise Error("not-found", f"no worker of {name!r} that you may see is running; start one and ask again")
    places = [(s.pid, path) for s, path in mine[:WORKERS]]
    workers, left = [], len(mine)
    child = Apart(lambda ours: _look(ours, places), ())
    try:
        for s, _ in mine[:WORKERS]:
            message, _ = await child.answer(PATIENCE)
            left -= 1
            if message["worker"]:
                workers.append({"session": s.id, "pocket": s.pocket, **message["worker"]})
    except Error:
        pass  # one that keeps it waiting: it and those after it are left out
    finally:
        child.end()
    if not workers and not left:
        raise Error("gone", "the worker has ended")
    return {"workers": workers, "left_out": [f"{left} workers"] if left else []}


def _look(ours: socket.socket, places: Sequence[tuple[int, str]]) -> None:
    """In the child: a message for each worker, without it where it has ended."""
    for pid, path in places:
        worker = None
        with suppress(OSError, processes.Gone, NoCgroup2):
            pidfd = os.pidfd_open(pid)
            try:
                if measured.within(pid, path):
                    worker = of(pid)
                    processes.pid_of(pidfd)  # still its pid, so it was all the time
            except processes.Gone:
                worker = None
            finally:
                os.close(pidfd)
        wire.send(ours, {"worker": worker})


def of(pid: int) -> Message:
    """status (each set of values, with how many threads have it), namespaces, mounts, limits, descriptors; and what of
    it was left out. Raises OSError where the process has ended."""
    place = f"/proc/{pid}"
    tasks, more_tasks = _first(THREADS, f"{place}/task")
    fds, more_fds = _first(DESCRIPTORS, f"{place}/fd")
    threads: Counter[tuple[tuple[str, str], ...]] = Counter()
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):  # that thread has ended
            threads[_status(f"{place}/task/{task}")] += 1
    left_out = [f"threads after the first {THREADS}"] if more_tasks else []
    left_out += ["values that fewer threads have"] if len(threads) > SETS else []
    left_out += [f"descriptors after the first {DESCRIPTORS}"] if more_fds else []
    return {
        "pid": pid,
        "status": [{"threads": count, **dict(values)} for values, count in threads.most_common(SETS)],
        "namespaces": {kind: os.readlink(f"{place}/ns/{kind}") for kind in sorted(os.listdir(f"{place}/ns"))},
        "shared": sorted(kind for kind in os.listdir(f"{place}/ns") if _same(place, kind)),
        "uid_map": _lines(f"{place}/uid_map"),
        "cgroup": _lines(f"{place}/cgroup")[-1:],
        "limits": _lines(f"{place}/limits"),
        "mountinfo": _lines(f"{place}/mountinfo"),
        "descriptors": dict(_descriptors(place, fds)),
        "left_out": left_out,
    }


def _first(count: int, directory: str) -> tuple[list[str], bool]:
    """The first of the names in a directory, which are numbers, and whether there are more."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in islice(entries, count + 1)]
    return sorted(names[:count], key=int), len(names) > count


def _descriptors(place: str, fds: list[str]) -> Iterator[tuple[str, str]]:
    for fd in fds:
        with suppress(FileNotFoundError):  # it was closed meanwhile
            path = os.readlink(f"{place}/fd/{fd}")
            yield fd, path if len(path) <= LONGEST else f"{path[:LONGEST]}..."


def _status(place: str) -> tuple[tuple[str, str], ...]:
    fields = (line.partition(":") for line in _lines(f"{place}/status"))
    return tuple((key, " ".join(value.split())) for key, _, value in fields if key in _STATUS)


def _same(place: str, kind: str) -> bool:
    """Whether it is the host's: the namespace that pocketd itself is in."""
    return os.readlink(f"{place}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")


def _lines(path: str) -> list[str]:
    """The lines of a file, which a line feed alone ends: a thread's name has other such characters."""
    with open(path, errors="replace", newline="\n") as file:
        return file.read().removesuffix("\n").split("\n")
