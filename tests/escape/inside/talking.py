"""Attempts to reach others by sockets, by System V's and POSIX's means, and by other machines' system calls."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import socket
import struct
from typing import Any

from tests.escape.inside.kernel import checked, libc

KEY = 0x0E5CA9E
KEPT: list[Any] = []  # what a process makes for others to find, for as long as it lives

libc.shmat.restype = ctypes.c_void_p
libc.mq_open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]


def make_ipc() -> dict[str, int]:
    """A segment, a queue and a semaphore of System V and shared memory of POSIX, for everybody."""
    shm = os.open("/dev/shm/escape", os.O_RDWR | os.O_CREAT, 0o666)
    os.fchmod(shm, 0o666)
    KEPT.append(shm)
    return {
        "shm": checked("shmget", libc.shmget(KEY, 4096, 0o1666)),
        "msg": checked("msgget", libc.msgget(KEY, 0o1666)),
        "sem": checked("semget", libc.semget(KEY, 1, 0o1666)),
    }


def make_queue() -> bool:
    """A message queue of POSIX."""
    old = os.umask(0)
    try:
        KEPT.append(checked("mq_open", libc.mq_open(b"/escape", os.O_RDWR | os.O_CREAT, 0o666, None)))
    finally:
        os.umask(old)
    return True


def find_ipc(kind: str) -> bool:
    if kind == "shm":
        checked("shmget", libc.shmget(KEY, 4096, 0))
    elif kind == "msg":
        checked("msgget", libc.msgget(KEY, 0))
    elif kind == "sem":
        checked("semget", libc.semget(KEY, 1, 0))
    elif kind == "mq":
        os.close(checked("mq_open", libc.mq_open(b"/escape", os.O_RDWR, 0, None)))
    else:
        os.close(os.open("/dev/shm/escape", os.O_RDONLY))
    return True


def use_ipc(kind: str, number: int) -> bool:
    """By its number, past the key."""
    if kind == "shm":
        if libc.shmat(number, None, 0) == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), "shmat")
    elif kind == "msg":
        checked("msgctl", libc.msgctl(number, 2, ctypes.create_string_buffer(256)))  # IPC_STAT
    else:
        checked("semctl", libc.semctl(number, 0, 12))  # GETVAL
    return True


def listen_abstract(name: str) -> bool:
    for kind, suffix in ((socket.SOCK_STREAM, ""), (socket.SOCK_DGRAM, "-d")):
        s = socket.socket(socket.AF_UNIX, kind)
        s.bind(f"\0{name}{suffix}")
        if kind == socket.SOCK_STREAM:
            s.listen(100)
        KEPT.append(s)
    return True


def connect_abstract(name: str) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(f"\0{name}")
    return True


def send_abstract(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(b"x", f"\0{name}-d")
    return True


def make_socket(family: int, kind: int, protocol: int) -> bool:
    os.close(checked("socket", libc.socket(family, kind, protocol)))
    return True


def make_pair(family: int, kind: int) -> bool:
    """Both ends of a family that has pairs; of another the kernel makes the sockets, and then says that it has none."""
    ends = (ctypes.c_int * 2)()
    checked("socketpair", libc.socketpair(family, kind, 0, ends))
    for fd in ends:
        os.close(fd)
    return True


def ask_route(what: str) -> bool:
    """A change by rtnetlink, whose acknowledgement has the kernel's error (rtnetlink(7), netlink(7))."""
    lo = socket.if_nametoindex("lo")
    with contextlib.suppress(OSError):
        set_interface()  # a route wants it up
    if what == "link":  # RTM_NEWLINK: lo down
        kind, body = 16, struct.pack("BxHiII", 0, 0, lo, 0, 1)
    elif what == "address":  # RTM_NEWADDR: 127.9.9.9/32 on lo
        attribute = struct.pack("HH4s", 8, 2, socket.inet_aton("127.9.9.9"))
        kind, body = 20, struct.pack("BBBBi", socket.AF_INET, 32, 0, 0, lo) + attribute
    else:  # RTM_NEWROUTE: 198.51.100.0/24 by lo
        attributes = struct.pack("HH4sHHi", 8, 1, socket.inet_aton("198.51.100.0"), 8, 4, lo)
        kind, body = 24, struct.pack("BBBBBBBBI", socket.AF_INET, 24, 0, 0, 254, 4, 253, 1, 0) + attributes
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.bind((0, 0))
        flags = 0x405 if kind != 16 else 0x5  # NLM_F_CREATE, NLM_F_ACK, NLM_F_REQUEST
        s.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        reply = s.recv(4096)
    error = -struct.unpack_from("i", reply, 16)[0]
    if error:
        raise OSError(error, os.strerror(error))
    return True


def set_interface() -> bool:
    """The same by an old ioctl."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sh22x", b"lo", 0x49))  # SIOCSIFFLAGS
    return True


def write_by_terminal(fd: int, how: str) -> bool:
    """On a terminal that was passed: type for its other users, take it, give it a line discipline."""
    if how == "TIOCSTI":
        fcntl.ioctl(fd, 0x5412, b"x")
    elif how == "TIOCSCTTY":
        fcntl.ioctl(fd, 0x540E, 1)  # by force
    else:
        fcntl.ioctl(fd, 0x5423, struct.pack("i", 0))  # TIOCSETD
    return True


# Other ways into the kernel. x86 only: int $0x80 takes i386's numbers, and bit 30 x32's.

# push rbx; mov eax, 20 (getpid); int 0x80; movsxd rax, eax; pop rbx; ret
_I386_GETPID = bytes.fromhex("53b814000000cd804863c05bc3")
# push rbx; mov eax, 26 (ptrace); xor ebx, ebx (PTRACE_TRACEME); int 0x80; movsxd rax, eax; pop rbx; ret
_I386_TRACEME = bytes.fromhex("53b81a00000031dbcd804863c05bc3")
_X32 = 0x40000000


def by_int_80(what: str) -> bool:
    assert platform.machine() == "x86_64"
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_I386_GETPID if what == "getpid" else _I386_TRACEME)
    entry = ctypes.addressof(ctypes.c_char.from_buffer(page))
    result = ctypes.CFUNCTYPE(ctypes.c_long)(entry)()
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return True


def by_x32(number: int) -> bool:
    return checked("x32", libc.syscall(ctypes.c_long(number | _X32), 0, 0, 0, 0)) >= 0


def lead_and_write(fd: int, how: str) -> bool:
    """As the leader of a new session without a terminal, which a worker is."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        try:
            write_by_terminal(fd, how)
        except OSError as e:
            os._exit(e.errno or 1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0
