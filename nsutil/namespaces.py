"""Namespaces: joining, leaving, mapping ids.

Sources: namespaces(7), setns(2), unshare(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from nsutil import clone
from nsutil.syscalls import check, libc

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# net/if.h, linux/sockios.h
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def unshare(flags: int) -> None:
    check(libc.unshare(flags), "unshare", f"flags {flags:#x}")


def setns(fd: int, kinds: int) -> None:
    """Join the namespaces `kinds` of a pidfd, or the one that an nsfs descriptor names."""
    check(libc.setns(fd, kinds), "setns", f"kinds {kinds:#x}")


def set_hostname(name: str) -> None:
    text = name.encode()
    check(libc.sethostname(ctypes.c_char_p(text), ctypes.c_size_t(len(text))), "sethostname", name)


def loopback_up() -> None:
    """Bring up `lo` in the present network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        request = struct.pack("16sh22x", b"lo", 0)
        flags = struct.unpack("16xh22x", fcntl.ioctl(s, _SIOCGIFFLAGS, request))[0]
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))


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
