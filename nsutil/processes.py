"""Processes by what the kernel says of them: pidfds, peers of sockets, memory.

Sources: pidfd_open(2), unix(7), proc(5).
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass

# asm-generic/socket.h; 6.5 and later
SO_PEERPIDFD = 77


@dataclass(frozen=True)
class Peer:
    """Who connected a unix socket. `pidfd` is the caller's to close; `pid` is as this process sees it."""

    pid: int
    uid: int
    gid: int
    pidfd: int


class Gone(Exception):
    """The process has ended, or its pid belongs to another by now."""


def peer(sock: socket.socket) -> Peer:
    """The process that connected `sock`, held by a pidfd. Raises Gone.

    Before SO_PEERPIDFD (6.5) the pid is opened and checked to have been the same process before and after.
    """
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return Peer(pid, uid, gid, struct.unpack("i", raw)[0])
    except OSError:
        pass
    before = start_time(pid)
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        raise Gone(f"process {pid} has ended") from None
    if start_time(pid) != before:
        os.close(fd)
        raise Gone(f"process {pid} is another one by now")
    return Peer(pid, uid, gid, fd)


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of the process. Raises Gone. proc_pid_stat(5), field 22."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read()
    except OSError:
        raise Gone(f"process {pid} has ended") from None
    return int(text[text.rindex(b")") + 2 :].split()[19])


def pid_of(pidfd: int) -> int:
    """The pid of a pidfd as this process sees it. Raises Gone when the process was reaped."""
    with open(f"/proc/self/fdinfo/{pidfd}") as f:
        for line in f:
            if line.startswith("Pid:"):
                pid = int(line.split()[1])
                if pid > 0:
                    return pid
    raise Gone("the process has ended")


@dataclass(frozen=True)
class Memory:
    """Bytes: what only this process holds, what it shares, its proportional share."""

    private: int
    shared: int
    proportional: int


def memory(pid: int) -> Memory:
    """The memory of a process, from /proc/PID/smaps_rollup. Raises Gone."""
    sums = {"Private_": 0, "Shared_": 0, "Pss": 0}
    try:
        with open(f"/proc/{pid}/smaps_rollup") as f:
            for line in f:
                name, _, rest = line.partition(":")
                for key in sums:
                    if name == key or (key.endswith("_") and name.startswith(key)):
                        sums[key] += int(rest.split()[0]) * 1024
    except (OSError, ValueError):
        raise Gone(f"process {pid} has ended") from None
    return Memory(sums["Private_"], sums["Shared_"], sums["Pss"])


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with its reaped children. Raises Gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            text = f.read()
    except OSError:
        raise Gone(f"process {pid} has ended") from None
    fields = text[text.rindex(b")") + 2 :].split()
    return sum(int(v) for v in fields[11:15]) / os.sysconf("SC_CLK_TCK")
