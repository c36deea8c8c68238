"""What may wait for a caller's sake, done by a child of pocketd's: pocketd has one thread, for everybody.

Whoever closes a descriptor may wait for its maker: close(2) sends FLUSH to a FUSE file system and writes an NFS file's
pages; the last close of a TCP socket with SO_LINGER waits until its peer has read. Descriptors in flight are closed by
whoever closes the socket last in whose queue they are. stat(2) and open_tree(2) may ask a server as well. So messages
with descriptors of callers who are not trusted are received by a child, an *usher*, which passes on what can be closed
without any of this, and holds a descriptor of its own of each until the request is over: pocketd's is never the last.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import NoReturn

from nsutil import clone, memory, messages, processes, signals
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message

ANSWER = 10.0  # seconds that a child may take
BEARERS = 8  # children at once that let go of connections
LADEN = 1024  # connections that wait for one of them; no more are accepted then
AGAIN = 0.1  # seconds between two of them
_bearers = 0
_laden: list[socket.socket] = []


class Apart:
    """A child that does `work` with its end of a socket pair, and with the descriptors in `keep` of all that we have.

    It ends with pocketd, if not before. Raises CloneError.
    """

    def __init__(self, work: Callable[[socket.socket], object], keep: Iterable[int]):
        self._sock, theirs = messages.pair()
        with theirs:
            try:
                child = clone.fork()
            except BaseException:
                self._sock.close()
                raise
            if child is None:
                _be(work, theirs, {theirs.fileno(), *keep})
        self._child = child
        self._sock.setblocking(False)

    async def answer(self, patience: float = ANSWER) -> tuple[Message, Fds]:
        """Its next message. Raises Error, also where it does not come in time."""
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._sock, lambda: None if readable.done() else readable.set_result(None))
        try:
            async with asyncio.timeout(patience):
                await readable
            message, fds = wire.receive(self._sock)
        except TimeoutError:
            raise Error("timeout", f"a file system did not answer within {patience:g} s") from None
        except EOFError:
            raise Error("internal", "a child of pocketd's ended without an answer") from None
        finally:
            loop.remove_reader(self._sock)
        if "error" in message:
            fds.close()
            raise Error.unwire(message["error"])
        return message, fds

    def end(self, then: Callable[[], object] = lambda: None) -> None:
        """Let it end, in its own time: `then` is called when it has."""
        self._sock.close()
        child = self._child
        loop = asyncio.get_running_loop()

        def ended() -> None:
            loop.remove_reader(child.pidfd)
            os.close(child.pidfd)
            os.waitpid(child.pid, 0)
            then()

        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
        loop.add_reader(child.pidfd, ended)


def _be(work: Callable[[socket.socket], object], ours: socket.socket, keep: set[int]) -> NoReturn:
    try:
        signals.reset()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        processes.close_others(keep)
        try:
            work(ours)
        except Error as e:
            wire.send(ours, {"error": e.wire()})
        except OSError as e:
            wire.send(ours, {"error": Error("kernel", str(e)).wire()})
    finally:
        # Not by closing anything: a process that ends does not wait for SO_LINGER (af_inet.c, inet_release).
        os._exit(0)


# -- requests


class Refused(Error):
    """A request whose descriptors are none that a request can have: `request` is the rest of it."""

    def __init__(self, request: Message, text: str):
        super().__init__("bad-request", text)
        self.request = request


def usher(sock: socket.socket) -> Apart:
    """A child that receives the next message of `sock`, a connection of a caller's, for `ushered`."""

    def work(ours: socket.socket) -> None:
        try:
            body, fds = messages.receive(sock, socket.MSG_DONTWAIT, wire.REQUEST.body)
        except (MessageError, EOFError) as e:
            raise Error("protocol", str(e)) from None
        strange = [n for n, fd in enumerate(fds) if not harmless(fd)]
        wire.send(ours, {"body": body, "strange": strange}, () if strange else fds)
        ours.recv(1)  # until pocketd has closed what it got of us, or has ended

    return Apart(work, [sock.fileno()])


async def ushered(child: Apart) -> tuple[Message, Fds]:
    """The message that an usher has received. Raises Refused, MessageError, and Error where there will be none."""
    answer, fds = await child.answer()
    try:
        request = wire.unpack(answer["body"], wire.REQUEST)
    except BaseException:
        fds.close()
        raise
    if answer["strange"]:
        text = "neither a unix socket, a sealed memfd nor opened by O_PATH: a request carries nothing else"
        raise Refused(request, f"descriptor {answer['strange'][0]} of the request is {text}")
    return request, fds


def harmless(fd: int) -> bool:
    """Whether closing a copy of `fd`, others being open, waits for nobody; and this asks nobody but the kernel."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        return True
    try:
        return fcntl.fcntl(fd, memory.F_GET_SEALS) & memory.MESSAGE_SEALS == memory.MESSAGE_SEALS
    except OSError:
        pass
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return sock.family == socket.AF_UNIX
    finally:
        sock.detach()


# -- connections


def let_go(sock: socket.socket) -> None:
    """Close a caller's connection, in a child where that may wait for somebody: soon, with all that come meanwhile."""
    if messages.drained(sock):
        sock.close()
        return
    _laden.append(sock)
    if len(_laden) == 1:
        asyncio.get_running_loop().call_later(AGAIN, _bear)


def burdened() -> bool:
    """Whether so many connections wait to be let go that there should be no more."""
    return len(_laden) >= LADEN


def _bear() -> None:
    """Let go of all that wait: by one child, so that what a caller sends costs no fork each."""
    global _bearers
    try:
        if _bearers >= BEARERS:
            raise BlockingIOError
        # It has them until we have closed them: ours is not the last.
        bearer = Apart(lambda ours: ours.recv(1), [sock.fileno() for sock in _laden])
    except OSError:
        asyncio.get_running_loop().call_later(AGAIN, _bear)
        return
    _bearers += 1
    for sock in _laden:
        sock.close()
    _laden.clear()
    bearer.end(_borne)


def _borne() -> None:
    global _bearers
    _bearers -= 1
