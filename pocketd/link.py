"""A SEQPACKET connection on the event loop: messages in order to one handler, requests awaited by id.

Sending never blocks the daemon: a peer whose buffer is full for longer than `SEND_TIMEOUT` is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from nsutil.messages import DescriptorsLost, Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message

SEND_TIMEOUT = 5.0  # seconds


class Link:
    """`handle(message, fds)` gets what is no reply and owns the descriptors; `closed(reason)` comes last"""

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[Message, Fds], None],
        closed: Callable[[str], None],
    ):
        sock.setblocking(False)
        self.sock: socket.socket | None = sock
        self._handle = handle
        self._closed = closed
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[asyncio.Future[tuple[Message, Fds]], Callable[[str], None] | None]] = {}
        self._sending = asyncio.Lock()
        # By number: asyncio writes out (repr) each object that is new to it, for an error that it does not raise.
        asyncio.get_running_loop().add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        for _ in range(64):  # then other connections get their turn
            if self.sock is None:
                return
            try:
                message, fds = wire.receive(self.sock)
            except BlockingIOError:
                return
            except (EOFError, OSError, MessageError) as e:
                if isinstance(e, DescriptorsLost):  # the peer did nothing wrong, and should know
                    with contextlib.suppress(OSError):
                        wire.send(self.sock, {"id": None, "error": Error("full", f"pocketd: {e}").wire()})
                self.close(str(e))
                return
            waiting = self._waiting.get(message.get("id", 0)) if "op" not in message else None
            if waiting is None:
                self._handle(message, fds)
            elif "progress" in message:
                fds.close()
                if waiting[1]:
                    waiting[1](str(message["progress"]))
            elif not waiting[0].done():
                waiting[0].set_result((message, fds))
            else:
                fds.close()

    async def send(self, message: Message, fds: Iterable[int] = ()) -> None:
        """Send one message; descriptors stay the caller's. Raises ConnectionError when the peer is gone or stuck."""
        async with self._sending:
            if self.sock is None:
                raise ConnectionError("the connection is closed")
            loop = asyncio.get_running_loop()
            try:
                wire.send(self.sock, message, fds)
                return
            except BlockingIOError:
                pass
            except OSError as e:
                self.close(str(e))
                raise ConnectionError(str(e)) from None
            writable: asyncio.Future[None] = loop.create_future()
            sock = self.sock
            loop.add_writer(sock.fileno(), lambda: None if writable.done() else writable.set_result(None))
            try:
                async with asyncio.timeout(SEND_TIMEOUT):
                    await writable
                wire.send(sock, message, fds)
            except (TimeoutError, OSError) as e:
                self.close("the peer does not read")
                raise ConnectionError(str(e)) from None
            finally:
                if self.sock is not None:
                    loop.remove_writer(sock.fileno())

    def call(
        self,
        op: str,
        fds: Iterable[int] = (),
        progress: Callable[[str], None] | None = None,
        timeout: float | None = 30.0,
        **fields: Any,
    ) -> Coroutine[Any, Any, tuple[Message, Fds]]:
        """Make a request, at once where there is room for it, and await its reply; the caller owns the reply's
        descriptors. Raises Error, ConnectionError when it is awaited."""
        message = {"op": op, "id": next(self._ids), **fields}
        future: asyncio.Future[tuple[Message, Fds]] = asyncio.get_running_loop().create_future()
        unsent = None if self._try(message, fds) else (message, list(fds))
        self._waiting[message["id"]] = (future, progress)
        return self._reply(message, future, timeout, unsent)

    def _try(self, message: Message, fds: Iterable[int]) -> bool:
        """Send a message if that can be done now."""
        if self.sock is None or self._sending.locked():
            return False
        try:
            wire.send(self.sock, message, fds)
        except OSError:
            return False
        return True

    async def _reply(
        self,
        request: Message,
        future: asyncio.Future[tuple[Message, Fds]],
        timeout: float | None,
        unsent: tuple[Message, Iterable[int]] | None,
    ) -> tuple[Message, Fds]:
        try:
            if unsent:
                await self.send(*unsent)
            async with asyncio.timeout(timeout):
                message, received = await future
        except TimeoutError:
            raise Error("timeout", f"no answer to {request['op']!r} within {timeout:g} s") from None
        finally:
            del self._waiting[request["id"]]
        if "error" in message:
            received.close()
            raise Error.unwire(message["error"])
        return message, received

    def _let_go(self, sock: socket.socket) -> None:
        sock.close()

    def close(self, reason: str = "closed") -> None:
        if self.sock is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.sock.fileno())
        loop.remove_writer(self.sock.fileno())
        self._let_go(self.sock)
        self.sock = None
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError(reason))
        self._closed(reason)
