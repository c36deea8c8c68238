"""What of this process a fork does not carry over, or would leave shared with every child, as the kernel tells it.

Descriptors share their open file description with the child's (fork(2)): a file's offset, an epoll set, a socket.
Writable MAP_SHARED mappings share their pages. POSIX timers, aio contexts, io_uring and locked memory stay behind.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections.abc import Container
from typing import NamedTuple


class Obstacle(NamedTuple):
    kind: str  # "file", "epoll", "socket", "device", "mapping", "timer", ...
    name: str  # what the kernel calls it: a path, "anon_inode:[eventpoll]", "socket:[123]"
    fd: int | None
    range: tuple[int, int] | None  # of a mapping
    protection: int  # of a mapping: PROT_READ | PROT_WRITE | PROT_EXEC
    remedy: str  # "reopen", "privatize", "refuse", "ignore"

    def __str__(self) -> str:
        if self.fd is not None:
            return f"descriptor {self.fd} ({self.kind}: {self.name})"
        if self.range is not None:
            return f"mapping {self.range[0]:x}-{self.range[1]:x} ({self.kind}: {self.name})"
        return f"{self.kind}: {self.name}"


# /proc/PID/fd's links to anonymous inodes. What is not here is refused.
_ANONYMOUS = {
    "[eventpoll]": ("epoll", "refuse"),
    "[eventfd]": ("eventfd", "refuse"),
    "[timerfd]": ("timerfd", "refuse"),
    "inotify": ("inotify", "refuse"),
    "[io_uring]": ("io_uring", "refuse"),
    "[signalfd]": ("signalfd", "ignore"),  # a read takes the reader's own signals (signalfd(2))
    "[pidfd]": ("pidfd", "ignore"),  # it has no state
    "[landlock-ruleset]": ("landlock", "ignore"),
    "bpf-prog": ("bpf", "ignore"),
}
# linux/Documentation/admin-guide/devices.txt: null, zero, full, random, urandom, tty. They have no state of an opener.
_STATELESS = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0)}


def _descriptor(fd: int) -> Obstacle:
    link, status = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
    kind, remedy = "unknown", "refuse"
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH or stat.S_ISDIR(status.st_mode):
        kind, remedy = "directory" if stat.S_ISDIR(status.st_mode) else "path", "ignore"
    elif stat.S_ISREG(status.st_mode):
        kind, remedy = "file", "ignore" if link.startswith("/proc/") or _is_namespace(link) else "reopen"
    elif stat.S_ISSOCK(status.st_mode):
        kind = "socket"
    elif stat.S_ISFIFO(status.st_mode):
        kind = "pipe"
    elif stat.S_ISCHR(status.st_mode):
        number = (os.major(status.st_rdev), os.minor(status.st_rdev))
        terminal = number[0] in (4, 5) or 136 <= number[0] <= 143  # tty, pts
        kind, remedy = "terminal" if terminal else "device", "ignore" if terminal or number in _STATELESS else "refuse"
    elif stat.S_ISBLK(status.st_mode):
        kind = "device"
    elif link.startswith("anon_inode:"):
        kind, remedy = _ANONYMOUS.get(link[len("anon_inode:") :], (link[len("anon_inode:") :].strip("[]"), "refuse"))
    return Obstacle(kind, link, fd, None, 0, remedy)


def _is_namespace(link: str) -> bool:
    return re.fullmatch(r"[a-z_]+:\[\d+\]", link) is not None


_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([r-])(w)([x-])s [0-9a-f]+ ([0-9a-f]+):([0-9a-f]+) \d+ *(.*)")


def shared_mappings() -> list[Obstacle]:
    """The writable MAP_SHARED mappings of this process (/proc/self/maps)."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            match = _MAPPING.fullmatch(line.rstrip("\n"))
            if match is None:
                continue
            start, end, read, _, execute, _, _, name = match.groups()
            protection = (read == "r") * 1 | 2 | (execute == "x") * 4
            kind, remedy = "mapping", "privatize"
            if name.startswith("/[aio]"):
                kind, remedy = "aio", "refuse"
            elif name.startswith("anon_inode:"):
                kind, remedy = _ANONYMOUS.get(name[len("anon_inode:") :], ("mapping", "refuse"))[0], "refuse"
            elif name.startswith("/dev/") and not name.startswith(("/dev/shm/", "/dev/zero")):
                kind, remedy = "device", "refuse"
            found.append(Obstacle(kind, name or "anonymous", None, (int(start, 16), int(end, 16)), protection, remedy))
    return found


def inspect(keep: Container[int]) -> list[Obstacle]:
    """What a fork of this process would not carry over as it is, apart from the descriptors in `keep`.

    Each has a remedy: "reopen" (`reopen(fd)` in the child), "privatize" (`clone.privatize_shared_mappings()`), "refuse"
    (nothing can be done here: name it to the program's author), "ignore" (shared, and harmless).
    """
    found = []
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd in keep:
            continue
        try:
            found.append(_descriptor(fd))
        except OSError:
            pass  # the listing's own descriptor, closed since
    found += shared_mappings()
    try:
        with open("/proc/self/timers") as file:  # needs CONFIG_CHECKPOINT_RESTORE
            timers = re.findall(r"^ID: (\d+)$", file.read(), re.MULTILINE)
    except FileNotFoundError:
        timers = []
    found += [Obstacle("timer", f"POSIX timer {timer}", None, None, 0, "refuse") for timer in timers]
    with open("/proc/self/status") as file:
        locked = re.search(r"^VmLck:\s+(\d+) kB", file.read(), re.MULTILINE)
    if locked and locked[1] != "0":
        found.append(Obstacle("locked memory", f"{locked[1]} kB by mlock", None, None, 0, "refuse"))
    return found


_OWN = "own copy"  # the name of a memfd, by memfd_create(2)
LARGEST_COPY = 16 << 20  # bytes


def is_written(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def is_copied(obstacle: Obstacle) -> bool:
    """Whether it is what `renew` has put in a file's place."""
    return obstacle.name.startswith(f"/memfd:{_OWN}")


def renew(fd: int) -> None:
    """Give this process a regular file of its parent's for itself: one that is open for reading once more, with an
    offset of its own; of one that is open for writing a copy, which nobody else sees. Raises OSError, see `reopen`."""
    if not is_written(fd):
        reopen(fd)
        return
    flags, position = fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR)
    inherited = fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC == 0
    new = os.memfd_create(_OWN, os.MFD_CLOEXEC)
    try:
        content, at = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC), 0
        try:
            while sent := os.sendfile(new, content, at, LARGEST_COPY):
                at += sent
        finally:
            os.close(content)
        os.lseek(new, position, os.SEEK_SET)
        fcntl.fcntl(new, fcntl.F_SETFL, flags & (os.O_APPEND | os.O_NONBLOCK))
        os.dup2(new, fd, inheritable=inherited)
    finally:
        os.close(new)


def reopen(fd: int) -> None:
    """Give this process an offset of its own in the regular file `fd`: the same file, flags and position, by
    /proc/self/fd. A file that has been unlinked is reopened too. Raises OSError, when the file may not be opened
    any more: do it before privileges are given up.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    inherited = fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC == 0
    position = os.lseek(fd, 0, os.SEEK_CUR)
    access = flags & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_DSYNC | os.O_SYNC | os.O_DIRECT | os.O_NOATIME)
    new = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    try:
        os.lseek(new, position, os.SEEK_SET)
        os.dup2(new, fd, inheritable=inherited)
    finally:
        os.close(new)
