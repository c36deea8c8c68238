"""Processes by what the kernel says of them: pidfds, peers of sockets, memory.

Sources: pidfd_open(2), unix(7), proc(5).
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from dataclasses import dataclass
from typing import Iterable, Sequence

from nsutil.syscalls import SYS_CLOSE_RANGE, check, libc, syscall

# asm-generic/socket.h; 6.5 and later
SO_PEERPIDFD = 77
SO_PEERGROUPS = 59  # 4.13 and later


@dataclass(frozen=True)
class Peer:
    """Who connected a unix socket. `pidfd` is the caller's to close; `pid` is as this process sees it. `groups`: the
    supplementary ones that it had then."""

    pid: int
    uid: int
    gid: int
    pidfd: int
    groups: tuple[int, ...] = ()


class Gone(Exception):
    """The process has ended, or its pid belongs to another by now."""


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of who connected `sock`, as they were then (unix(7), SO_PEERCRED)."""
    pid, uid, gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def peer(sock: socket.socket) -> Peer:
    """The process that connected `sock`, held by a pidfd. Raises Gone, OSError.

    Before SO_PEERPIDFD (6.5) the pid is opened and checked to have been the same process before and after.
    """
    pid, uid, gid = credentials(sock)
    groups = groups_of(sock)
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
        return Peer(pid, uid, gid, struct.unpack("i", raw)[0], groups)
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
    return Peer(pid, uid, gid, fd, groups)


def groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The supplementary groups of who connected `sock`, as they were then. Raises OSError."""
    size = ctypes.c_uint(0)
    # The first call says how many bytes they take (ERANGE). By libc, since Python's own gives 1024 at most.
    libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, None, ctypes.byref(size))
    found = (ctypes.c_uint * (size.value // 4))()
    result = libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, found, ctypes.byref(size))
    check(result, "getsockopt SO_PEERGROUPS")
    return tuple(found)


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


def close_others(keep: Iterable[int]) -> None:
    """Close every descriptor but 0, 1, 2 and those in `keep`."""
    first = 3
    for fd in sorted(k for k in keep if k > 2):
        if fd > first:
            syscall(SYS_CLOSE_RANGE, first, fd - 1, 0, call="close_range")
        first = fd + 1
    syscall(SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0, call="close_range")


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


# linux/prctl.h
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_title: list[object] = []  # the memory that the kernel reads /proc/self/cmdline from
_places: list[int] = []  # of a process's map what no fork changes


def set_command_line(words: Sequence[bytes]) -> bool:
    """Make /proc/self/cmdline say `words`, and /proc/self/environ nothing. False where the kernel cannot.

    prctl(2), PR_SET_MM_MAP: needs CONFIG_CHECKPOINT_RESTORE and, unlike the rest of PR_SET_MM, no privilege. The kernel
    wants the whole map again: proc_pid_stat(5), fields 26 to 28 and 45 to 51.
    """
    text = b"\0".join(words) + b"\0"
    buffer = ctypes.create_string_buffer(text, len(text) + 1)
    start = ctypes.addressof(buffer)
    if not _places:
        with open("/proc/self/stat", "rb") as f:
            stat = f.read()
        fields = [b"", b"", b"", *stat[stat.rindex(b")") + 2 :].split()]  # fields[3] is the state
        n = [int(v) for v in fields[4:]]
        _places[:] = *n[22:24], *n[41:43], n[43], n[24]
    *code_and_data, brk, stack = _places
    present = libc.sbrk(0)
    auxiliary = 0
    packed = struct.pack(
        "12QIi", *code_and_data, brk, present, stack, start, start + len(text), start + len(text), start + len(text),
        auxiliary, 0, -1,
    )  # fmt: skip
    block = ctypes.create_string_buffer(packed, len(packed))
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.addressof(block), len(packed), 0):
        return False
    _title[:] = [buffer]
    return True
