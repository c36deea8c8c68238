"""Attempts to take from others what they need to run: their priority, and what the kernel counts by user."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import struct
import threading
from collections.abc import Callable
from typing import Any

from tests.escape.inside.kernel import call, checked, libc, victim

MOST = 1_000_000
HELD: list[int] = []  # descriptors that exhaust something, for as long as this process lives
_QUEUED = signal.SIGRTMAX - 3
_IOPRIO_IDLE = 3 << 13  # linux/ioprio.h

libc.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


def _limit(pid: int) -> object:
    return call("prlimit64", pid, resource.RLIMIT_CORE, struct.pack("QQ", 0, 0), 0)


_ACTS: dict[str, Callable[[int], object]] = {
    "setpriority": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
    "setpriority of a group": lambda pid: os.setpriority(os.PRIO_PGRP, pid, 19),
    "sched_setscheduler": lambda pid: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
    "sched_setaffinity": lambda pid: os.sched_setaffinity(pid, {0}),
    "ioprio_set": lambda pid: call("ioprio_set", 1, pid, _IOPRIO_IDLE),
    "prlimit": _limit,
}


def slow_down(how: str, pids: list[int]) -> list[int]:
    """Of `pids`, or of a victim where there are none, those that were made slower or poorer, or that there were."""
    with victim() as own:
        os.setpgid(own, own)
        reached = []
        for pid in pids or [own]:
            if pids and (pid in (1, own) or os.path.exists(f"/proc/self/task/{pid}")):
                continue  # a number of one's own pid namespace
            with contextlib.suppress(ProcessLookupError):
                _ACTS[how](pid)
                reached.append(pid if pids else 0)
        return reached


def slow_down_root() -> bool:
    """All processes of root's that there are."""
    os.setpriority(os.PRIO_USER, 0, 19) if os.getuid() == 0 else call("setpriority", os.PRIO_USER, 0xFFFF, 19)
    return True


def one(kind: str) -> bool:
    """One more of what is counted by user; it is kept."""
    HELD.extend(_MAKE[kind]())
    return True


def exhaust(kind: str) -> str:
    """Until the kernel refuses: the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    for _ in range(MOST):
        try:
            one(kind)
        except OSError as e:
            return errno.errorcode[e.errno or 0]
    return ""


def release() -> bool:
    while HELD:
        os.close(HELD.pop())
    return True


def _queue() -> list[int]:
    """A message queue as large as may be, its name gone at once (RLIMIT_MSGQUEUE counts its bytes)."""
    name = f"/starving-{os.getpid()}-{len(HELD)}".encode()
    attributes = struct.pack("llll32x", 0, 10, 8192, 0)
    fd = checked("mq_open", libc.mq_open(name, os.O_RDWR | os.O_CREAT, 0o600, attributes))
    checked("mq_unlink", libc.mq_unlink(name))
    return [fd]


def _signal() -> list[int]:
    """One more queued for this thread (RLIMIT_SIGPENDING)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [_QUEUED])
    call("tgkill", os.getpid(), threading.get_native_id(), _QUEUED)
    return []


_MAKE: dict[str, Callable[[], list[int]]] = {
    "inotify instances": lambda: [checked("inotify_init1", libc.inotify_init1(0))],
    "message queues": _queue,
    "queued signals": _signal,
}


def room(path: str) -> int:
    """Bytes that are free where `path` is."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def fill(path: str, size: int) -> dict[str, Any]:
    """A file of that size; the room there before and after."""
    before = room(path)
    fd = os.open(f"{path}/filling", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    HELD.append(fd)
    os.posix_fallocate(fd, 0, size)
    return {"before": before, "after": room(path)}
