"""Who may run a pocket, and what it may write: decided from the kernel's credentials and the operator's definition."""

from __future__ import annotations

import grp
import os
import pwd

from nsutil import processes
from nsutil.beneath import open_beneath
from pocketd.definitions import Pocket
from pocketd.wire import Error


def check_may_run(pocket: Pocket, peer: processes.Peer) -> None:
    """Raise Error unless the caller is root or named by may_run, as itself or by a group."""
    if peer.uid == 0:
        return
    try:
        user = pwd.getpwuid(peer.uid)
    except KeyError:
        user = None
    names = set()
    if user:
        names = {user.pw_name, *(f"@{grp.getgrgid(g).gr_name}" for g in os.getgrouplist(user.pw_name, user.pw_gid))}
    if not names & set(pocket.may_run):
        raise Error("forbidden", f"you may not run {pocket.name}: its `may_run` names neither you nor a group of yours")


def writable(directory: int, path: str) -> int:
    """A path of the pocket's directory that it may write, made as a directory where it is missing."""
    try:
        return open_beneath(directory, path, os.O_PATH)
    except FileNotFoundError:
        parent, _, name = path.rpartition("/")
        above = open_beneath(directory, parent, os.O_PATH | os.O_DIRECTORY) if parent else os.dup(directory)
        try:
            os.mkdir(name, 0o755, dir_fd=above)
            owner = os.fstat(directory)
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=above, follow_symlinks=False)
        finally:
            os.close(above)
        return open_beneath(directory, path, os.O_PATH)
