"""Who may run a pocket, and what it may write: decided from the kernel's credentials and the operator's definition."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Collection

from cgroup.hierarchy import path_of
from nsutil import processes
from nsutil.beneath import open_beneath
from pocketd.definitions import Pocket, Service
from pocketd.wire import Error


def check_may_run(pocket: Pocket, peer: processes.Peer) -> None:
    """Raise Error unless the caller is root or named by may_run."""
    if not named(pocket.may_run, peer):
        raise Error("forbidden", f"you may not run {pocket.name}: its `may_run` names neither you nor a group of yours")


def check_may_use(service: Service, peer: processes.Peer) -> None:
    """The same for runs without a definition. Without `may_run` they are open to whoever may connect."""
    if service.may_run is not None and not named(service.may_run, peer):
        raise Error("forbidden", f"you may not run programs in {service.name}: its `may_run` does not name you")


def named(allowed: Collection[str], peer: processes.Peer) -> bool:
    """Whether the caller is root, or named: as itself, by a group that it had when it connected, or by the cgroup that
    the kernel has it in. Names of the definition are looked up; of the caller only what the kernel says counts."""
    if peer.uid == 0:
        return True
    places = []
    for word in allowed:
        if word.startswith("cgroup:"):
            places.append(word.partition(":")[2].rstrip("/"))
        elif word.startswith("@"):
            if _gid(word[1:]) in (peer.gid, *peer.groups):
                return True
        elif _uid(word) == peer.uid:
            return True
    if not places:
        return False
    found = cgroup_of(peer)
    return any(found == place or found.startswith(f"{place}/") for place in places)


def _uid(name: str) -> int | None:
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _gid(name: str) -> int | None:
    """A group's number; it may be named by that where it has no name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return int(name) if name.isascii() and name.isdigit() else None


def cgroup_of(peer: processes.Peer) -> str:
    """The caller's cgroup, by the pidfd that the kernel gave with the connection: a reused pid deceives nobody."""
    try:
        path = path_of(peer.pid)
        if processes.pid_of(peer.pidfd) == peer.pid:  # still there, so the pid was its own when it was looked up
            return path
    except (OSError, processes.Gone):
        pass
    raise Error("gone", "the caller has ended")


def writable(directory: int, path: str) -> int:
    """A path of the pocket's directory that it may write, made as a directory where it is missing."""
    try:
        return open_beneath(directory, path, os.O_PATH)
    except FileNotFoundError:
        parent, _, name = path.rpartition("/")
        above = open_beneath(directory, parent, os.O_PATH | os.O_DIRECTORY) if parent else os.dup(directory)
        try:
            os.mkdir(name, 0o755, dir_fd=above)
            made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
            try:
                if not os.listdir(made):  # else its owner has put another in its place meanwhile
                    owner = os.fstat(directory)
                    os.fchown(made, owner.st_uid, owner.st_gid)
            finally:
                os.close(made)
        finally:
            os.close(above)
        return open_beneath(directory, path, os.O_PATH)
