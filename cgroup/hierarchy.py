"""Where this host's cgroup2 is, which controllers it has, and whether a limit can be enforced there.

Read from /proc/self/mountinfo (proc_pid_mountinfo(5)), never assumed: cgroup2 is at /sys/fs/cgroup on most hosts, at
/sys/fs/cgroup/unified where cgroup v1 holds the controllers, and elsewhere where somebody mounted it so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cgroup import limits as limits_of
from cgroup.node import Cgroup, check_name

# Beneath the cgroup2 mount, where no --cgroup says otherwise. Not beneath pocketd's own cgroup: what runs must survive
# it, and systemd cannot restart a unit whose root cgroup has controllers enabled.
DEFAULT_BASE = "pocketd"


class NoCgroup2(Exception):
    """This host has no usable cgroup2 mount; the message says what to do."""


@dataclass(frozen=True)
class Mount:
    """A cgroup2 mount, and what cgroup v1 holds beside it."""

    path: str
    nsdelegate: bool
    legacy: Mapping[str, str]  # controller of cgroup v1 -> where it is mounted


def parse_mountinfo(text: str) -> Mount | None:
    """The cgroup2 mount in the text of a mountinfo file: the last one that shows a whole hierarchy and can be written.

    None when there is none.
    """
    found: Mount | None = None
    legacy: dict[str, str] = {}
    for line in text.split("\n"):
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(kind) < 3:
            continue
        path = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if kind[0] == "cgroup":
            legacy.update((option, path) for option in kind[2].split(",") if option not in ("rw", "ro"))
        # A mount's root other than "/" is a part of a hierarchy that somebody bound elsewhere.
        elif kind[0] == "cgroup2" and fields[3] == "/" and "ro" not in fields[5].split(","):
            found = Mount(path, "nsdelegate" in kind[2].split(","), legacy)
    return found


@dataclass(frozen=True)
class Hierarchy:
    """This host's cgroup2. It owns `root`: close it, or use it in `with`."""

    mount: Mount
    root: Cgroup
    controllers: frozenset[str]  # what the root has
    disabled: frozenset[str]  # what the kernel has and was told on its command line not to use

    @classmethod
    def find(cls) -> Self:
        """Open this host's cgroup2. Raises NoCgroup2."""
        mount = parse_mountinfo(Path("/proc/self/mountinfo").read_text(errors="surrogateescape"))
        if mount is None:
            raise NoCgroup2(
                "no writable cgroup2 is mounted on this host; pocketd needs one for its workers. On a host without "
                "systemd: mount -t cgroup2 none /sys/fs/cgroup"
            )
        try:
            with ExitStack() as stack:
                root = stack.enter_context(Cgroup(mount.path))
                found = cls(mount, root, frozenset(root.controllers), _disabled())
                stack.pop_all()  # `found` owns it now
                return found
        except OSError as e:
            raise NoCgroup2(f"the cgroup2 at {mount.path} cannot be used: {e.strerror}") from None

    def close(self) -> None:
        self.root.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, kernel_path: str) -> Cgroup:
        """An existing cgroup by its path as /proc/PID/cgroup shows it; the caller owns it.

        Raises ValueError for a path that leaves the hierarchy (a process in another cgroup namespace's part shows as
        "/../..."), FileNotFoundError.
        """
        parts = [part for part in kernel_path.split("/") if part]
        if not parts or any(part in (".", "..") or "\0" in part for part in parts):
            raise ValueError(f"{kernel_path!r} is not a cgroup beneath {self.mount.path}")
        # kernfs has no symbolic links, so without "." and ".." the path cannot leave the mount.
        return Cgroup("/".join(parts), self.root)

    def base(self, path: str = DEFAULT_BASE, controllers: Collection[str] = limits_of.CONTROLLERS) -> Cgroup:
        """Make, where need be, the cgroup at `path` beneath the root, with those `controllers` that there are.

        They are enabled in every cgroup on the way down and in it, for its children. `path` is the operator's. The
        caller owns what is returned. Raises ValueError for a path that is none, OSError.
        """
        parts = [part for part in path.split("/") if part]
        if not parts:
            raise ValueError("pocketd's cgroup cannot be the root of the hierarchy; name one beneath it")
        for part in parts:  # all of them before the first is made
            check_name(part)
        here = self.root
        for depth, part in enumerate(parts, 1):
            try:
                here.enable(controllers)
                here.create(part, exist_ok=True).close()
            finally:
                if here is not self.root:
                    here.close()
            here = Cgroup("/".join(parts[:depth]), self.root)
        try:
            here.enable(controllers)
        except BaseException:
            here.close()
            raise
        return here

    def refusals(self, limits: Collection[str], offered: Collection[str] | None = None) -> list[tuple[str, str]]:
        """Those of `limits` that cannot be enforced on this host, each with the reason and what to do.

        `offered` are the files that cgroups here have (`Cgroup.files` of pocketd's base): with them, also what the
        controller has and this kernel does not offer is refused (swap accounting off, a page size that there is not).
        """
        missing = dict(limits_of.missing_controllers(limits, self.controllers))
        refused = [(name, limits_of.explain_missing(name, self.mount.legacy, self.disabled)) for name in missing]
        for name in limits:
            if offered is not None and name not in missing and name not in offered:
                reason = (
                    f"this host's cgroups have the controller {limits_of.controller(name)!r} but no file {name}, so it "
                    "cannot be enforced; leave the limit out"
                )
                refused.append((name, reason))
        return refused


def _disabled() -> frozenset[str]:
    """The controllers that /proc/cgroups shows as not enabled."""
    try:
        text = Path("/proc/cgroups").read_text()
    except FileNotFoundError:  # a kernel without cgroup v1 may have none
        return frozenset()
    rows = (line.split() for line in text.splitlines() if not line.startswith("#"))
    return frozenset(row[0] for row in rows if len(row) == 4 and row[3] == "0")


def path_of(pid: int | str) -> str:
    """The cgroup of a process by its path beneath the cgroup2 mount ("/" for the root), from /proc/PID/cgroup.

    Raises OSError when the process is gone, NoCgroup2 when the kernel shows none.
    """
    with open(f"/proc/{pid}/cgroup", "rb") as file:
        # Not by str.splitlines(): what else ends a line to it (U+2028, \x0b) may stand in the name of a cgroup.
        for line in file.read().split(b"\n"):
            if line.startswith(b"0::"):
                return os.fsdecode(line[3:])
    raise NoCgroup2("the kernel shows no cgroup2 membership for the process")
