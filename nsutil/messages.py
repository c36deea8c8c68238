"""One datagram with descriptors over a SEQPACKET unix socket.

A message is bytes and a list of descriptors. Bytes too long for one datagram travel in a sealed memfd, which is then
the last descriptor; the receiver cannot tell the difference. Descriptors that arrive are owned by the receiver and are
close-on-exec; a message whose descriptors were truncated by the kernel is an error, and none of them stays open.

Sources: unix(7), cmsg(3), memfd_create(2).
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from typing import Iterable, Iterator

from nsutil import memory

# The kernel's own limit is SCM_MAX_FD, 253. No message of ours needs more than these.
MAX_FDS = 32
# One datagram; longer bodies go by memfd. Well below the default net.core.wmem_default (212992).
MAX_INLINE = 32 * 1024
# A body in a memfd; argv and environment together are at most 6 MiB by execve(2)'s own rules.
MAX_BODY = 16 * 1024 * 1024

_INLINE, _MEMFD = b"\0", b"\1"


class MessageError(Exception):
    """What arrived is not a message. The peer is at fault; its socket should be closed."""


class DescriptorsLost(MessageError):
    """The kernel could not install all descriptors of a message: this process has no room for them (RLIMIT_NOFILE)."""


class Fds:
    """Received descriptors, closed together unless taken one by one.

    `take()` hands the next one on to the caller; leaving the `with` block closes those that nobody took.
    """

    def __init__(self, fds: Iterable[int] = ()):
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> int:
        """The next descriptor, owned by the caller from now on. Raises MessageError when there is none."""
        if not self._fds:
            raise MessageError("the message carries fewer descriptors than it must")
        return self._fds.pop(0)

    def rest(self) -> list[int]:
        """All that remain, owned by the caller from now on."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        for fd in self.rest():
            os.close(fd)

    def __enter__(self) -> Fds:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[int]:
        return iter(self._fds)


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected SEQPACKET sockets."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, body: bytes, fds: Iterable[int] = (), flags: int = 0) -> None:
    """Send one message. The descriptors stay the caller's. Raises OSError, ValueError for a body over MAX_BODY."""
    if len(body) <= MAX_INLINE and fds == ():
        # Most messages, and all in a session's calls: half the cost of sendmsg with lists of parts.
        sock.send(_INLINE + body, flags | _NOSIGNAL)
        return
    fds = list(fds)
    if len(fds) > MAX_FDS - 1:
        raise ValueError(f"{len(fds)} descriptors in one message; at most {MAX_FDS - 1} are sent")
    if len(body) <= MAX_INLINE:
        _send(sock, [_INLINE, body], fds, flags)
        return
    if len(body) > MAX_BODY:
        raise ValueError(f"a message of {len(body)} bytes; at most {MAX_BODY} are sent")
    fd = memory.sealed(body, "message")
    try:
        _send(sock, [_MEMFD], [*fds, fd], flags)
    finally:
        os.close(fd)


def _send(sock: socket.socket, parts: list[bytes], fds: list[int], flags: int) -> None:
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg(parts, control, flags | _NOSIGNAL)


# As plain numbers: an operation on socket.MsgFlag costs as much as the system call.
_NOSIGNAL, _CLOEXEC = int(socket.MSG_NOSIGNAL), int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED, _CONTROL_TRUNCATED = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)
_EITHER = _TRUNCATED | _CONTROL_TRUNCATED
_CONTROL = socket.CMSG_SPACE(MAX_FDS * 4)
# Nothing can be added to an Fds, so one without descriptors serves all messages that carry none.
NONE = Fds()


def receive(sock: socket.socket, flags: int = 0, limit: int = MAX_BODY) -> tuple[bytes, Fds]:
    """Receive one message: its body, of at most `limit` bytes, and its descriptors; NONE itself where it has none.

    Raises EOFError when the peer has closed, MessageError for what is not a message, OSError.
    """
    try:
        data, ancillary, got, _ = sock.recvmsg(MAX_INLINE + 1, _CONTROL, flags | _CLOEXEC)
    except ConnectionResetError:
        # A peer that closed without having read all makes this error come once, ahead of what it had sent before
        # (unix(7) is silent; __skb_try_recv_datagram looks at sk_err first). Its last words matter most.
        data, ancillary, got, _ = sock.recvmsg(MAX_INLINE + 1, _CONTROL, flags | _CLOEXEC)
    if data and data[0] == 0 and not ancillary and not got & _EITHER and len(data) <= limit:
        return data[1:], NONE
    fds = Fds(fd for level, kind, block in ancillary for fd in _descriptors(level, kind, block))
    try:
        if got & _CONTROL_TRUNCATED and len(fds) < MAX_FDS:
            raise DescriptorsLost("no descriptor could be opened for what a message carried: RLIMIT_NOFILE is reached")
        if got & _CONTROL_TRUNCATED:
            raise MessageError(f"more than {MAX_FDS} descriptors in one message")
        if got & _TRUNCATED:
            raise MessageError(f"a datagram of more than {MAX_INLINE + 1} bytes")
        if not data:
            raise EOFError("the peer closed its socket")
        if data[:1] == _INLINE and len(data) > limit + 1:
            raise MessageError(f"a message of {len(data) - 1} bytes; at most {limit} are accepted")
        if data[:1] == _INLINE:
            return data[1:], fds if len(fds) else NONE
        if data != _MEMFD or not len(fds):
            raise MessageError("a datagram that is neither a body nor a body in a memfd")
        *others, last = fds.rest()
        fds = Fds(others) if others else NONE
        try:
            return memory.read_sealed(last, limit), fds
        finally:
            os.close(last)
    except memory.SealError as e:
        fds.close()
        raise MessageError(str(e)) from None
    except BaseException:
        fds.close()
        raise


def carries(sock: socket.socket) -> bool:
    """Whether the next message carries descriptors, which are not received by this. Raises BlockingIOError, OSError."""
    return bool(_peek(sock, 0)[1] & _CONTROL_TRUNCATED)


def drained(sock: socket.socket) -> bool:
    """End a connection that nobody else has, and take out what was not read. False where a message with descriptors is
    left in it: they are closed by whoever closes the socket last, who may wait for those who made them (SO_LINGER)."""
    try:
        sock.shutdown(socket.SHUT_RDWR)  # nothing can be added
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # else an empty message looks like the end
        while True:
            ancillary, got = _peek(sock, socket.CMSG_SPACE(12))  # struct ucred comes first, and fills it
            if got & _CONTROL_TRUNCATED or not ancillary:
                return not got & _CONTROL_TRUNCATED
            sock.recv(1, socket.MSG_DONTWAIT)
    except OSError:  # it was connected to nobody
        return True


def _peek(sock: socket.socket, room: int) -> tuple[list[tuple[int, int, bytes]], int]:
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
    try:
        _, ancillary, got, _ = sock.recvmsg(1, room, flags)
    except ConnectionResetError:  # as in `receive`
        _, ancillary, got, _ = sock.recvmsg(1, room, flags)
    return ancillary, got


def _descriptors(level: int, kind: int, block: bytes) -> tuple[int, ...]:
    if level != socket.SOL_SOCKET or kind != socket.SCM_RIGHTS:
        return ()
    count = len(block) // 4
    return struct.unpack(f"{count}i", block[: count * 4])


@contextlib.contextmanager
def short_name(path: str) -> Iterator[str]:
    """A name for `path` that a socket's address can hold however long `path` is (unix(7): 107 bytes)."""
    fd = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{os.path.basename(path)}"
    finally:
        os.close(fd)
