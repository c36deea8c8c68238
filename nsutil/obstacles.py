"""What of this process a fork does not carry over, or would leave shared with every child, as the kernel tells it.

Descriptors share their open file description with the child's (fork(2)): a file's offset, an epoll set, a socket.
Writable MAP_SHARED mappings share their pages. POSIX timers, aio contexts, io_uring and locked memory stay behind.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import platform
import re
import select
import stat
import struct
import termios
from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

from nsutil.syscalls import check, libc


class Obstacle(NamedTuple):
    kind: str  # "file", "epoll", "socket", "device", "mapping", "timer", ...
    name: str  # what the kernel calls it: a path, "anon_inode:[eventpoll]", "socket:[123]"
    fd: int | None
    range: tuple[int, int] | None  # of a mapping
    protection: int  # of a mapping: PROT_READ | PROT_WRITE | PROT_EXEC
    remedy: str  # "reopen", "remake", "privatize", "refuse", "ignore"

    def __str__(self) -> str:
        if self.fd is not None:
            return f"descriptor {self.fd} ({self.kind}: {self.name})"
        if self.range is not None:
            return f"mapping {self.range[0]:x}-{self.range[1]:x} ({self.kind}: {self.name})"
        return f"{self.kind}: {self.name}"


def named(obstacles: Iterable[Obstacle]) -> str:
    """All of them, once each file: a device's context has many descriptors and mappings of it."""
    same: dict[tuple[str, str], list[Obstacle]] = {}
    for o in obstacles:
        same.setdefault((o.kind, o.name), []).append(o)
    said = []
    for (kind, name), those in same.items():
        fds, maps = [str(o.fd) for o in those if o.fd is not None], sum(o.range is not None for o in those)
        if len(those) == 1 or not fds and not maps:
            said.append(str(those[0]))
            continue
        count = [f"descriptor{'s' * (len(fds) > 1)} {', '.join(fds[:4])}{', ...' * (len(fds) > 4)}"] * bool(fds)
        count += [f"{maps} mapping{'s' * (maps > 1)}"] * bool(maps)
        said.append(f"{' and '.join(count)} ({kind}: {name})")
    return "; ".join(said)


# /proc/PID/fd's links to anonymous inodes. What is not here is refused.
_ANONYMOUS = {
    "[eventpoll]": ("epoll", "remake"),
    "[eventfd]": ("eventfd", "remake"),
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
        if remedy == "remake" and not _can_be_remade(fd, kind):
            remedy = "refuse"
    return Obstacle(kind, link, fd, None, 0, remedy)


class _Watched(NamedTuple):
    fd: int
    events: int
    data: int


def _of_epoll(fd: int) -> list[_Watched]:
    """What an epoll set watches. Raises OSError where a file in it is no more what its descriptor names: it stays in
    the set while another descriptor has it, and cannot be named then. proc(5), /proc/PID/fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        text = file.read()
    found = []
    for tfd, events, data, inode in re.findall(
        r"^tfd: +(\d+) events: +([0-9a-f]+) data: +([0-9a-f]+) .*ino:([0-9a-f]+)", text, re.M
    ):
        if os.fstat(int(tfd)).st_ino != int(inode, 16):
            raise OSError(errno.EBADF, f"descriptor {tfd} is another file than the one that is watched")
        found.append(_Watched(int(tfd), int(events, 16), int(data, 16)))
    return found


def _of_eventfd(fd: int) -> tuple[int, int]:
    """Its count, and its flags for eventfd(2). Raises OSError where the kernel does not say whether it is a semaphore
    (before Linux 6.5)."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        text = file.read()
    count, semaphore = (re.search(rf"^eventfd-{what}: +([0-9a-f]+)$", text, re.M) for what in ("count", "semaphore"))
    if count is None or semaphore is None:
        raise OSError(errno.ENOSYS, "the kernel does not say what kind of eventfd it is")
    nonblocking = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_NONBLOCK
    return int(count[1], 16), os.EFD_CLOEXEC | nonblocking | (os.EFD_SEMAPHORE if semaphore[1] == "1" else 0)


def _can_be_remade(fd: int, kind: str) -> bool:
    if kind == "eventfd" and not hasattr(os, "eventfd"):  # Python 3.10
        return False
    try:
        _of_epoll(fd) if kind == "epoll" else _of_eventfd(fd)
    except OSError:
        return False
    return True


def _with_own_pipes(found: list[Obstacle]) -> list[Obstacle]:
    """The same, but that pipes of which this process has both ends can be remade: with one a thread wakes another."""
    ends: dict[str, dict[int, set[int]]] = {}
    for o in found:
        if o.kind == "pipe" and o.fd is not None:
            flags = fcntl.fcntl(o.fd, fcntl.F_GETFL)
            ends.setdefault(o.name, {}).setdefault(flags & os.O_ACCMODE, set()).add(flags)
    own = {
        name
        for name, flags in ends.items()
        if name.startswith("pipe:")
        and set(flags) == {os.O_RDONLY, os.O_WRONLY}
        and all(len(f) == 1 for f in flags.values())
    }  # where one end has two sets of flags, it was opened twice
    return [o._replace(remedy="remake") if o.kind == "pipe" and o.name in own else o for o in found]


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

    Each has a remedy: "reopen" and "remake" (`renew(fds)` in the child, before its threads are back), "privatize"
    (`clone.privatize_shared_mappings()`), "refuse" (nothing can be done here: name it to the program's author),
    "ignore" (shared, and harmless).
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
    found = _with_own_pipes(found) + shared_mappings()
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


def renew(fds: Iterable[int]) -> None:
    """Give this process what it shares with its parent for itself: of files that are open for reading an offset of its
    own, of those that are open for writing a copy, which nobody else sees; event descriptors with the same count; pipes
    with the same in them; epoll sets that watch the same. Raises OSError, see `reopen`."""
    sets: dict[int, list[_Watched]] = {}
    pipes: dict[str, list[int]] = {}
    for fd in fds:
        kind = _descriptor(fd).kind
        if kind == "epoll":
            sets[fd] = _of_epoll(fd)
        elif kind == "pipe":
            pipes.setdefault(os.readlink(f"/proc/self/fd/{fd}"), []).append(fd)
        elif kind == "eventfd":
            count, flags = _of_eventfd(fd)
            _put(fd, os.eventfd(0, flags))
            if count:  # of a new one at most 32 bits can be said
                os.eventfd_write(fd, count)
        elif is_written(fd):
            _copy(fd)
        else:
            reopen(fd)
    for ends in pipes.values():
        _remake_pipe(ends)
    for fd in sets:  # one may watch another
        with select.epoll() as new:
            _put(fd, os.dup(new.fileno()))
    for fd, watched in sets.items():
        for one in watched:
            event = _EPOLL_EVENT.pack(one.events, one.data)
            check(libc.epoll_ctl(fd, _EPOLL_CTL_ADD, one.fd, event), "epoll_ctl", f"descriptor {one.fd}")


# sys/epoll.h: packed on x86-64 alone.
_EPOLL_CTL_ADD, _EPOLL_EVENT = 1, struct.Struct("=IQ" if platform.machine() == "x86_64" else "=I4xQ")


def _put(fd: int, new: int) -> None:
    """Have `fd` name what `new` does, which is closed."""
    inherited = fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC == 0
    try:
        os.dup2(new, fd, inheritable=inherited)
    finally:
        os.close(new)


_TEE_NONBLOCK, _SETPIPE_SZ, _GETPIPE_SZ = 2, 1031, 1032  # SPLICE_F_NONBLOCK and F_*, bits/fcntl-linux.h


def _remake_pipe(ends: Sequence[int]) -> None:
    """Put a new pipe in the place of one whose descriptors these are. Its bytes stay in the old one too (tee(2))."""
    flags = {fd: fcntl.fcntl(fd, fcntl.F_GETFL) for fd in ends}
    old = next(fd for fd in ends if flags[fd] & os.O_ACCMODE == os.O_RDONLY)
    new = dict(zip((os.O_RDONLY, os.O_WRONLY), os.pipe()))
    try:
        size = fcntl.fcntl(old, _GETPIPE_SZ)
        if size != fcntl.fcntl(new[os.O_RDONLY], _GETPIPE_SZ):
            fcntl.fcntl(new[os.O_RDONLY], _SETPIPE_SZ, size)
        held = array.array("i", [0])
        fcntl.ioctl(old, termios.FIONREAD, held)
        if held[0]:
            check(libc.tee(old, new[os.O_WRONLY], ctypes.c_size_t(held[0]), _TEE_NONBLOCK), "tee", f"descriptor {old}")
        for fd in ends:
            end = new[flags[fd] & os.O_ACCMODE]
            fcntl.fcntl(end, fcntl.F_SETFL, flags[fd] & (os.O_NONBLOCK | os.O_DIRECT))
            _put(fd, os.dup(end))
    finally:
        for end in new.values():
            os.close(end)


def _copy(fd: int) -> None:
    flags, position = fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR)
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
    except BaseException:
        os.close(new)
        raise
    _put(fd, new)


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
