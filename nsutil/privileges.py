"""Giving up privilege, while the process has one thread: what is dropped then, every later thread lacks as well.

Sources: capabilities(7), prctl(2), keyctl_join_session_keyring(3), linux/capability.h, linux/prctl.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from contextlib import contextmanager
from typing import Any, Container, Iterable, Iterator

from nsutil.syscalls import (
    SYS_CAPGET,
    SYS_CAPSET,
    SYS_KEYCTL,
    SYS_SETFSGID,
    SYS_SETFSUID,
    SYS_SETGROUPS,
    SYS_SETRESGID,
    SYS_SETRESUID,
    libc,
    prctl,
    syscall,
)

# linux/prctl.h
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
PR_SET_NAME = 15
# linux/capability.h
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SETPCAP = 0, 1, 3, 5, 6, 7, 8
CAP_NET_ADMIN, CAP_SYS_CHROOT, CAP_SYS_ADMIN, CAP_MKNOD = 12, 18, 21, 27
# linux/keyctl.h
_KEYCTL_JOIN_SESSION_KEYRING = 1


def drop_bounding_set(keep: Container[int] = ()) -> None:
    """Let no execve(2) from here on gain a capability but those in `keep`. What the process holds now it keeps.
    Inherited by forks."""
    capability = 0
    while libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:  # EINVAL past the last that the kernel knows
        if capability not in keep:
            prctl(PR_CAPBSET_DROP, capability, call="prctl(PR_CAPBSET_DROP)")
        capability += 1


def drop_capabilities(keep: Iterable[int] = ()) -> None:
    """Empty the effective, permitted, inheritable and ambient sets, but for what of `keep` is permitted now: that stays
    permitted and is effective."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, call="prctl(PR_CAP_AMBIENT)")
    kept = sum(1 << capability for capability in keep)
    held = _permitted() & kept if kept else 0
    _set_capabilities(effective=held, permitted=held)


# The system calls, not libc's functions: those would tell every thread that libc knows of, and wait for threads which
# in a live fork's child are not there yet (nptl(7), "signal-based ... UIDs and GIDs").


def leave_groups() -> None:
    """Have no supplementary group."""
    syscall(SYS_SETGROUPS, 0, 0, call="setgroups")


def become(uid: int, gid: int, *, keep: bool = False) -> None:
    """Take on an identity for good. `keep`: with the capabilities held now, which leaving uid 0 takes else."""
    if keep:
        prctl(PR_SET_KEEPCAPS, 1, call="prctl(PR_SET_KEEPCAPS)")
    syscall(SYS_SETRESGID, gid, gid, gid, call="setresgid", detail=str(gid))
    syscall(SYS_SETRESUID, uid, uid, uid, call="setresuid", detail=str(uid))
    if keep:
        _raise_permitted()


@contextmanager
def filing_as(uid: int, gid: int) -> Iterator[None]:
    """Use files as that user would, and none of the capabilities that let root use others' (capabilities(7), "Effect of
    user ID changes"); mounts need SYS_ADMIN as ever. Supplementary groups still count: `leave_groups` first."""
    _file_as(uid, gid)
    try:
        yield
    finally:
        _file_as(os.geteuid(), os.getegid())


def _file_as(uid: int, gid: int) -> None:
    for number, call, wanted in ((SYS_SETFSGID, "setfsgid", gid), (SYS_SETFSUID, "setfsuid", uid)):
        syscall(number, wanted, call=call)
        if syscall(number, -1, call=call) != wanted:  # setfsuid(2): it returns what was there, and no error
            raise OSError(errno.EPERM, f"{call}: {os.strerror(errno.EPERM)} ({wanted})")


def _raise_permitted() -> None:
    """Make what is permitted effective: a change of uid leaves it permitted alone (capabilities(7))."""
    held = _permitted()
    _set_capabilities(effective=held, permitted=held)


def _permitted() -> int:
    sets = ctypes.create_string_buffer(24)
    syscall(SYS_CAPGET, _this_thread(), sets, call="capget")
    words = struct.unpack("6I", sets.raw)  # effective, permitted, inheritable; low words, then high ones
    return int(words[1] | words[4] << 32)


def _set_capabilities(effective: int, permitted: int) -> None:
    """With an empty inheritable set: nothing here gives capabilities on by that."""
    low = [effective & 0xFFFFFFFF, permitted & 0xFFFFFFFF, 0]
    words = struct.pack("6I", *low, effective >> 32, permitted >> 32, 0)
    syscall(SYS_CAPSET, _this_thread(), ctypes.create_string_buffer(words, 24), call="capset")


def _this_thread() -> Any:
    return ctypes.create_string_buffer(struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0), 8)


def no_new_privileges() -> None:
    """Let no execve(2) from here on give privileges (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    prctl(PR_SET_NO_NEW_PRIVS, 1, call="prctl(PR_SET_NO_NEW_PRIVS)")


def new_session_keyring() -> None:
    """An anonymous session keyring in place of the inherited one. Kernels built without keyrings have none to share."""
    try:
        syscall(SYS_KEYCTL, _KEYCTL_JOIN_SESSION_KEYRING, 0, call="keyctl(KEYCTL_JOIN_SESSION_KEYRING)")
    except OSError:
        pass


def dumpable(on: bool) -> None:
    """Whether others of the same uid may trace this process, and whether it owns its /proc/self."""
    prctl(PR_SET_DUMPABLE, int(on), call="prctl(PR_SET_DUMPABLE)")


def set_name(name: str) -> None:
    """The process's name as ps and top show it: at most 15 bytes."""
    text = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(text), call="prctl(PR_SET_NAME)")
