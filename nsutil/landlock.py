"""Landlock: a process gives up rights to files, signals and abstract sockets, for itself and all that it makes.

It holds whatever mounts, ids and capabilities say, and cannot be taken back. Sources: landlock(7), kernel document
userspace-api/landlock, linux/landlock.h. What a kernel does not know is left out: `abi()` says what there is.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Iterable

from nsutil.syscalls import SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_RESTRICT_SELF, syscall

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
# linux/landlock.h, LANDLOCK_ACCESS_FS_*
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_CHAR, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8
MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = 1 << 9, 1 << 10, 1 << 11, 1 << 12
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15  # ABI 2 (5.19), 3 (6.2), 5 (6.10)
_SINCE = {REFER: 2, TRUNCATE: 3, IOCTL_DEV: 5}
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1  # ABI 6 (6.12)
_SCOPED = 6

CHANGE = (
    WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_CHAR | MAKE_DIR | MAKE_REG | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK
    | MAKE_SYM | REFER | TRUNCATE | IOCTL_DEV
)  # fmt: skip
# What may be changed where changes are allowed: device files are made by nobody.
ORDINARY = CHANGE & ~(MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV)
USE = WRITE_FILE | TRUNCATE | IOCTL_DEV  # files that are there, devices among them


def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none or it is not switched on (lsm=)."""
    try:
        return syscall(SYS_LANDLOCK_CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION, call="landlock_create_ruleset")
    except OSError:
        return 0


def restrict(writable: Iterable[str], usable: Iterable[str]) -> None:
    """Let this thread change nothing but what is beneath `writable`, and write to what is there beneath `usable`.

    With ABI 6 also: signal no process, and connect to no abstract socket, outside of what it starts from now on.
    Reading stays as it is. Needs no_new_privs, and `abi()` of at least 1. Raises OSError.
    """
    version = abi()
    known = CHANGE & ~sum(right for right, since in _SINCE.items() if since > version)
    scopes = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= _SCOPED else 0
    head = struct.pack("QQQ", known, 0, scopes)[: 24 if scopes else 8]  # struct landlock_ruleset_attr
    block = ctypes.create_string_buffer(head, len(head))
    ruleset = syscall(SYS_LANDLOCK_CREATE_RULESET, block, len(head), 0, call="landlock_create_ruleset")
    try:
        for paths, rights in ((writable, ORDINARY), (usable, USE)):
            for path in paths:
                _allow(ruleset, path, rights & known)
        syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, call="landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= USE  # EINVAL for the rights of directories
        rule = struct.pack("=Qi", rights, fd)  # struct landlock_path_beneath_attr, packed
        block = ctypes.create_string_buffer(rule, len(rule))
        syscall(SYS_LANDLOCK_ADD_RULE, ruleset, _RULE_PATH_BENEATH, block, 0, call="landlock_add_rule", detail=path)
    finally:
        os.close(fd)
