"""One cgroup: a node of cgroupspy's tree that holds its directory open.

cgroupspy's `Node` gives a cgroup its name, parent and paths. What it does by path, this does beneath directory
descriptors, so that a cgroup that was removed and made again is not taken for the one that was opened. Its `children`
list stays unused: the kernel's directory is the list.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import select
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from cgroupspy.nodes import Node

from cgroup import limits as limits_of
from cgroup.attributes import Attributes
from cgroup.limits import LimitError

# Names that we give: a definition's name, a session's id, a unit's name. Never a path, a dot file or "..".
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,254}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def check_name(name: str) -> None:
    """Raises ValueError for what cannot be the name of a cgroup of ours."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot be the name of a cgroup; use letters, digits and _ . : @ -")


@dataclass(frozen=True)
class Stats:
    """What the kernel says of a cgroup and all beneath it; None where the controller is not enabled for it."""

    populated: bool
    cpu_usec: int  # cpu.stat usage_usec, which needs no controller
    memory_current: int | None
    memory_peak: int | None
    oom_kills: int | None
    pids_current: int | None


class Cgroup(Node, Attributes):
    """A cgroup whose directory is open in `fd`, which is fit for CLONE_INTO_CGROUP (clone(2): O_RDONLY will do).

    It owns `fd`: close it, or use it in `with`. Closing leaves the cgroup itself as it is. A parent must be open while
    a child is removed. Attributes of files are those of `Attributes`.
    """

    CONTROLLERS: dict[bytes, type] = {}  # cgroupspy's are v1's
    parent: Cgroup | None
    fd: int
    full_path: bytes
    path: bytes

    def __init__(self, name: str | bytes, parent: Cgroup | None = None):
        """Open the existing cgroup `name` beneath `parent`; for the root, `name` is the path of the cgroup2 mount.

        `name` may lead through several ("pockets/detect"), each part of it ours or checked: nothing here stops "..".
        Raises FileNotFoundError where there is none.
        """
        super().__init__(name, parent)
        try:
            self.fd = os.open(name, _DIRECTORY, dir_fd=parent.fd if parent is not None else None)
        except OSError as e:
            raise OSError(e.errno, f"cannot open the cgroup {self.directory}: {e.strerror}") from None

    __hash__ = object.__hash__  # Node defines __eq__ alone

    @property
    def directory(self) -> str:
        """Its directory in the file system, for people and for programs beside us; ours use `fd`."""
        return os.fsdecode(self.full_path)

    @property
    def kernel_path(self) -> str:
        """Its path as /proc/PID/cgroup shows it: beneath the cgroup2 mount, from "/"."""
        return os.fsdecode(self.path)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Files

    def get_property(self, filename: bytes) -> str:
        """The text of a file, as cgroupspy's descriptors ask for it. Raises OSError naming the file."""
        try:
            fd = os.open(filename, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
            with open(fd, "rb", buffering=0) as file:
                return file.readall().decode()
        except OSError as e:
            raise OSError(e.errno, f"reading {self.directory}/{os.fsdecode(filename)}: {e.strerror}") from None

    def set_property(self, filename: bytes, value: str) -> None:
        """Write a file in one write(2). Raises OSError naming the file and the value."""
        try:
            fd = os.open(filename, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as e:
            where = f"{self.directory}/{os.fsdecode(filename)}"
            raise OSError(e.errno, f"writing {value!r} to {where}: {e.strerror}") from None

    def files(self) -> frozenset[str]:
        """The names of the kernel's files in it: what this kernel offers with the controllers it has."""
        with os.scandir(self.fd) as entries:
            return frozenset(e.name for e in entries if not e.is_dir(follow_symlinks=False))

    def stats(self) -> Stats:
        """One reading. Raises OSError when the cgroup is gone."""
        files = self.files()
        return Stats(
            populated=bool(self.events["populated"]) if "cgroup.events" in files else True,  # the root has none
            cpu_usec=self.cpu_stat["usage_usec"],
            memory_current=self.memory_current if "memory.current" in files else None,
            memory_peak=self.memory_peak if "memory.peak" in files else None,
            oom_kills=self.memory_events["oom_kill"] if "memory.events" in files else None,
            pids_current=self.pids_current if "pids.current" in files else None,
        )

    def apply(self, limits: Mapping[str, str]) -> None:
        """Write parsed limits (`limits.parse`), one device in a write. Raises LimitError naming what was refused.

        Those before the refused one are in force then.
        """
        for name, text in limits.items():
            for line in text.splitlines() or [text]:
                try:
                    self.set_property(name.encode(), line)
                except FileNotFoundError:
                    raise LimitError(
                        f"{name} = {line!r} cannot be enforced: {self.directory} has no such file, as the controller "
                        f"{limits_of.controller(name)!r} is not enabled for it or this kernel lacks the file"
                    ) from None
                except OSError as e:
                    raise LimitError(
                        f"{name} = {line!r} was refused by the kernel: {os.strerror(e.errno or 0)}"
                    ) from None

    def enable(self, controllers: Collection[str]) -> frozenset[str]:
        """Enable those of `controllers` that it has for its children; returns what is enabled of them afterwards.

        Raises OSError: EBUSY where processes stand in the cgroup itself (cgroup-v2, "No Internal Process Constraint").
        """
        wanted = frozenset(controllers) & set(self.controllers)
        missing = wanted - set(self.subtree_control)
        if missing:
            try:
                self.set_property(b"cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(missing)))
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise
                raise OSError(
                    e.errno,
                    f"cannot enable {' '.join(sorted(missing))} for the children of {self.directory}: processes stand "
                    "in it, and cgroup2 has controllers below a cgroup or processes in it, not both",
                ) from None
        return wanted

    # The tree

    def create(self, name: str, exist_ok: bool = False) -> Cgroup:
        """Make the child `name` and open it; the caller owns it.

        Raises ValueError for a name that is none of ours, FileExistsError unless `exist_ok`: a leaf is used once,
        since a cgroup that was ever killed kills what is cloned into it.
        """
        check_name(name)
        try:
            os.mkdir(name, 0o755, dir_fd=self.fd)
        except FileExistsError:
            if not exist_ok:
                raise FileExistsError(errno.EEXIST, f"the cgroup {self.directory}/{name} exists already") from None
        except OSError as e:
            raise OSError(e.errno, f"cannot make the cgroup {self.directory}/{name}: {e.strerror}") from None
        return Cgroup(name, self)

    def names(self) -> list[str]:
        """The names of its children, sorted."""
        with os.scandir(self.fd) as entries:
            return sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))

    def descendants(self) -> Iterator[Cgroup]:
        """Every cgroup beneath it, children before parents, each open until the next is asked for."""
        for name in self.names():
            try:
                child = Cgroup(name, self)
            except FileNotFoundError:  # removed since it was listed
                continue
            with child:
                yield from child.descendants()
                yield child

    def processes(self) -> list[int]:
        """The pids of all processes in it and beneath it, as this pid namespace counts (0: not visible here)."""
        found = list(self.procs)
        for child in self.descendants():
            try:
                found.extend(child.procs)
            except OSError as e:
                if e.errno != errno.ENODEV:  # removed since it was opened
                    raise
        return found

    def remove(self) -> None:
        """Remove it and every cgroup beneath it, and close it. What is gone already is no error.

        Raises OSError: EBUSY while processes are in it (`kill`, `wait_empty`).
        """
        if self.parent is None:
            raise ValueError("the root of the hierarchy cannot be removed")
        for child in self.descendants():
            child._rmdir()
        self._rmdir()
        self.close()

    def _rmdir(self) -> None:
        assert self.parent is not None
        try:
            os.rmdir(self.name, dir_fd=self.parent.fd)
        except FileNotFoundError:
            pass
        except OSError as e:
            raise OSError(e.errno, f"cannot remove the cgroup {self.directory}: {e.strerror}") from None

    # Its end

    def kill(self) -> None:
        """SIGKILL to every process in it and beneath it, forks in flight included (cgroup.kill, Linux 5.14).

        It is of no more use then: what is cloned into a cgroup that was ever killed is killed. Never on an adopted one.
        """
        self.set_property(b"cgroup.kill", "1")

    def watch(self) -> Populated:
        """What tells when the last process has gone; the caller owns it."""
        return Populated(self)

    def wait_empty(self, timeout: float) -> None:
        """Wait until no process is in it or beneath it. Raises TimeoutError after `timeout` seconds."""
        with self.watch() as watch:
            watch.wait(timeout)


class Populated:
    """Whether a cgroup has processes, as a descriptor that can be waited for.

    cgroup.events is ready for POLLPRI once it has changed since it was last read (cgroup-v2, "[Un]populated
    Notification"), which neither select(2) nor asyncio's add_reader can wait for. An epoll descriptor that holds it can
    be: it is readable when something happened; `populated()` reads what, and arms it again.
    """

    def __init__(self, cgroup: Cgroup):
        self._cgroup = cgroup.directory
        self._file = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=cgroup.fd)
        try:
            self._epoll = select.epoll()
            self._epoll.register(self._file, select.EPOLLPRI)
        except BaseException:
            os.close(self._file)
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def populated(self) -> bool:
        """What the kernel says now; False when the cgroup has been removed."""
        try:
            text = os.pread(self._file, 4096, 0)
        except OSError as e:
            if e.errno == errno.ENODEV:
                return False
            raise
        return b"populated 1" in text.splitlines()

    def wait(self, timeout: float) -> None:
        """Block until no process is left. Raises TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.populated():
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"after {timeout:g} s there are processes in {self._cgroup}")
            self._epoll.poll(left)

    async def empty(self, timeout: float) -> None:
        """The same on the running event loop."""
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        loop.add_reader(self.fileno(), changed.set)
        try:
            async with asyncio.timeout(timeout):
                while self.populated():
                    changed.clear()
                    await changed.wait()
        except TimeoutError:
            raise TimeoutError(f"after {timeout:g} s there are processes in {self._cgroup}") from None
        finally:
            loop.remove_reader(self.fileno())

    def close(self) -> None:
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
