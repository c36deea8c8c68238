"""What init does with sockets that others made."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Any

from nsutil import clone, processes
from pocketd.wire import Error


def hold_socket(fd: int) -> socket.socket:
    """The socket that `fd` is, which it takes over. Raises Error, `fd` still the caller's, where it is another kind's:
    such may be readable for ever and never read (ip(7), IP_RECVERR), and this loop would serve nobody else."""
    return _seqpacket(fd, "hold")


def check_socket(fd: int) -> None:
    """Raise Error unless `fd`, a session's, is a socket as a worker wants it."""
    _seqpacket(fd, "session").detach()


def _seqpacket(fd: int, role: str) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise Error("bad-request", f"the {role} socket is no socket") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
        sock.detach()
        raise Error("bad-request", f"the {role} socket is not a unix socket of type SOCK_SEQPACKET")
    return sock


def let_go(hold: socket.socket, trusted: bool) -> None:
    """Close a hold socket. The last close of it closes the descriptors that are in flight in it too, and may wait for
    whoever made them: where that is not root, a child has the last one, and ends without waiting (pocketd.apart)."""
    hold.shutdown(socket.SHUT_RDWR)  # its caller hears of it whoever else has a descriptor
    if trusted:
        hold.close()
        return
    try:
        waits, ours = os.pipe2(os.O_CLOEXEC)
    except OSError:
        hold.detach()  # better open for ever
        return
    try:
        child = clone.fork()
        if child is None:
            try:
                processes.close_others([hold.fileno(), waits])
                os.read(waits, 1)  # until the other end is closed, and `hold` before it
            finally:
                os._exit(0)
        hold.close()
        os.close(child.pidfd)
    except OSError:
        hold.detach()
    finally:
        os.close(waits)
        os.close(ours)


def readable(fd: int) -> bool:
    poll = select.poll()  # not select(2), which knows no descriptor above 1023
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def credentials(sock: socket.socket) -> Any:
    return struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
