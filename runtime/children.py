"""What init starts and holds: templates and sessions, and what the kernel says of them."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from nsutil import clone, privileges
from pocketd.wire import Message
from runtime import template

NEVER = float("inf")


@dataclass
class Session:
    id: str
    note: Message  # pocketd's own words about it, given back by `hello` after a restart
    template: int
    pause: Optional[clone.Child]  # None: made by a pocket's template, in that one's pid namespace (runtime.holding)
    hold: Optional[socket.socket]
    leaf: int  # cgroup directory, for memory.events
    request: Any  # pocketd's id of the launch, until it is answered
    deadline: float
    launch: int  # the number by which the template knows it
    started: float = 0.0
    pid: int = 0
    pidfd: int = -1
    status: Optional[int] = None
    oom_kills: int = 0  # of its cgroup before it began: an adopted one may have seen some
    ended: bool = False  # by us, so that its death is nobody else's doing
    vacant: bool = False  # its pid namespace has ended, and its template has not said yet what came of the launch
    error: Optional[Message] = None  # what is known of its death beside its status
    events: int = -1  # its leaf's cgroup.events, where it has no pause
    early: Optional[Tuple[int, int]] = None  # its worker's pid and status, where it ended before it was said to be born
    output: Optional[int] = None  # our end of the worker's standard output, in client mode
    resting: float = NEVER  # when its output is read again, which is too much

    def summary(self) -> Message:
        return {
            "session": self.id,
            "note": self.note,
            "template": self.template,
            "started": self.started,
            "pid": self.pid,
        }


@dataclass
class Template:
    number: int
    kind: str
    note: Message
    talk: socket.socket
    stderr: int
    request: Any
    pid: int = 0
    status: Optional[int] = None  # how it ended
    ready: Optional[Message] = None
    files: int = -1  # a memfd that lists what it imported (runtime.imported)
    pause: Optional[clone.Child] = None  # of a pocket's template
    pause_ended: bool = False
    printed: List[int] = field(default_factory=list)  # files into which a pocket's template prints until it is ready
    namespace: int = -1  # of a pocket's template: its mount namespace, from before anything of its program ran
    layers: List[List[int]] = field(
        default_factory=list
    )  # mounts in it that take what rehearsals write, the last on top
    resting: float = NEVER  # when its output is read again, which is too much
    tail: List[bytes] = field(default_factory=list)  # its last lines, for the error when it does not get ready

    def summary(self) -> Message:
        return {"template": self.number, "kind": self.kind, "note": self.note, "pid": self.pid, "ready": self.ready}


def output_pipe() -> Tuple[int, int]:
    """A pipe for what a process writes, both ends the caller's. It is read without waiting: the end's number may have
    been another's when epoll told of it."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(ours, False)
    return ours, theirs


def processes_of(leaf: int) -> List[int]:
    """The pids in a cgroup, whose directory is open as `leaf`."""
    try:
        fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=leaf)
    except OSError:
        return []
    with open(fd, "rb") as f:
        return [int(line) for line in f]


def is_child(pid: int) -> bool:
    """Whether a process is a child of this one (proc_pid_stat(5); its name, which it chooses, may be anything)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return int(f.read().rpartition(b")")[2].split()[1]) == os.getpid()
    except (OSError, ValueError, IndexError):
        return False


def cgroup_of(pid: int) -> Optional[str]:
    """A process's cgroup, as long as it is not reaped."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as f:
            return next((os.fsdecode(line[3:].rstrip(b"\n")) for line in f if line.startswith(b"0::")), None)
    except OSError:
        return None


def is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[:1] == [b"T"]
    except OSError:
        return False


def by_default(pid: int, number: int) -> bool:
    """Whether the process neither handles nor ignores a signal (proc_pid_status(5), SigCgt and SigIgn)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as f:  # its name, which it chooses, may be anything
            masks = [int(line.split()[1], 16) for line in f if line.startswith((b"SigCgt:", b"SigIgn:"))]
    except OSError:
        return False
    return not any(mask >> (number - 1) & 1 for mask in masks)


def start_template(
    command: Optional[List[str]], environment: Dict[str, str], talk: socket.socket, err: int, leaf: int
) -> int:
    """A root template, born in its own leaf: `command` with `talk` as descriptor 3, or, without one, this process's
    own code (a launcher for root file systems that have no Python). Returns its pid."""
    child = clone.fork(cgroup=leaf)
    if child is not None:
        os.close(child.pidfd)
        return child.pid
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(err, 1)
        os.dup2(err, 2)
        fd = os.dup(talk.fileno())  # out of the way of 3
        os.dup2(fd, 3)
        os.closerange(4, 1 << 20)
        os.chdir("/")
        privileges.set_name("pocket-template")
        if command:
            os.set_inheritable(3, True)
            os.execve(command[0], command, environment)
        template.main(socket.socket(fileno=3))
    except BaseException as e:
        os.write(2, f"{command[0] if command else 'launcher'}: {type(e).__name__}: {e}\n".encode())
    os._exit(127)
