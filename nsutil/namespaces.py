"""Namespaces: joining, leaving, mapping ids.

Sources: namespaces(7), setns(2), unshare(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from nsutil import clone, privileges
from nsutil.library import load
from nsutil.syscalls import check, libc

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080  # a flag of unshare and clone3; of clone it is part of the exit signal
ALL = (CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET)

_library = load()


def unshare(flags: int) -> None:
    check(libc.unshare(flags), "unshare", f"flags {flags:#x}")


def setns(fd: int, kinds: int) -> None:
    """Join the namespaces `kinds` of a pidfd, or the one that an nsfs descriptor names."""
    check(libc.setns(fd, kinds), "setns", f"kinds {kinds:#x}")


def set_hostname(name: str) -> None:
    text = name.encode()
    check(libc.sethostname(ctypes.c_char_p(text), ctypes.c_size_t(len(text))), "sethostname", name)


def loopback_up() -> None:
    """Bring up `lo` in the present network namespace, unless it is up."""
    failed = -_library.livefork_raise_loopback()
    if failed:
        raise OSError(failed, f"lo: {os.strerror(failed)}")


def own_user(uid: int, gid: int, proc: int) -> bool:
    """Leave for a new user namespace that knows no id but the process's own, `uid` and `gid`.

    `proc`: its directory in a proc file system.

    False, and nothing has changed, where the kernel makes none (user.max_user_namespaces is 0, a filter). The process
    must have one thread, no supplementary group and CAP_SYS_ADMIN, which some kernels ask for; it has every capability
    in the new namespace afterwards, and none outside. What the kernel counts by user (user_namespaces(7); inotify's
    limits) is counted as this user's, who owns the namespace. Raises OSError when it fails half-way.
    """
    try:
        unshare(CLONE_NEWUSER)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EPERM, errno.EUSERS, errno.ENOSYS, errno.EINVAL):
            return False
        raise
    privileges.dumpable(True)  # else the files are root's
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        os.write(fd, text.encode())
        os.close(fd)
    privileges.dumpable(False)
    return True


def id_map(on_disk: tuple[int, int], shown: tuple[int, int]) -> int:
    """A user namespace for `mounts.set_attributes(userns=)`: files of ids `on_disk` (uid, gid) appear as `shown`'s.

    Returns a descriptor that the caller owns. Costs about 1 ms, so keep it. mount_setattr(2), "ID-mapped mounts".
    """
    holder = clone.pause(flags=CLONE_NEWUSER)
    try:
        at = Path(f"/proc/{holder.pid}")
        (at / "uid_map").write_text(f"{on_disk[0]} {shown[0]} 1\n")
        (at / "gid_map").write_text(f"{on_disk[1]} {shown[1]} 1\n")
        return os.open(at / "ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(holder.pid, 9)
        os.waitpid(holder.pid, 0)
        os.close(holder.pidfd)
