"""The control socket: who connects, what they may ask, one answer to each request.

A peer that sends what is no message loses its connection, and nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from nsutil import processes
from nsutil.messages import Fds, MessageError, short_name
from pocketd import events, launch, observe, rights, tuning, wire, witness
from pocketd.definitions import describe
from pocketd.link import Link
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

CONNECTIONS = 512  # at once; the listening queue holds those beyond
REST = 0.2  # seconds
_PENDING = 16  # requests of one connection at once


class Connection:
    """One client of the control socket, known by the kernel's word."""

    def __init__(self, daemon: Daemon, sock: socket.socket, peer: processes.Peer, gone: Callable[[Connection], None]):
        self.daemon = daemon
        self.peer = peer
        self._gone = gone
        self._tasks: set[asyncio.Task[None]] = set()
        self.link = Link(sock, self._handle, self._closed)

    def _closed(self, reason: str) -> None:
        if not self._tasks:
            self._release()

    def _release(self) -> None:
        if self.peer.pidfd >= 0:
            os.close(self.peer.pidfd)
            self.peer = processes.Peer(self.peer.pid, self.peer.uid, self.peer.gid, -1)
            self._gone(self)

    def _handle(self, message: Message, fds: Fds) -> None:
        if len(self._tasks) >= _PENDING:
            fds.close()
            self.link.close("too many requests at once")
            return
        task = asyncio.ensure_future(self._answer(message, fds))
        self._tasks.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.link.sock is None and not self._tasks:
            self._release()

    async def _answer(self, message: Message, fds: Fds) -> None:
        number = message.get("id")
        reports: list[asyncio.Task[None]] = []

        def progress(text: str) -> None:
            reports.append(asyncio.ensure_future(self._say({"id": number, "progress": text})))

        with fds:
            try:
                operation = OPERATIONS.get(str(message.get("op")))
                if operation is None:
                    raise Error("bad-request", f"there is no operation {message.get('op')!r}")
                result = await operation(self, message, fds, progress)
                reply: Message = {"id": number, "ok": True, **result}
            except Error as e:
                reply = {"id": number, "error": e.wire()}
            except MessageError as e:
                reply = {"id": number, "error": Error("bad-request", str(e)).wire()}
            except (OSError, ConnectionError, TimeoutError) as e:
                reply = {"id": number, "error": Error("kernel", f"{type(e).__name__}: {e}").wire()}
            except Exception as e:  # a fault of ours ends this request, not the daemon
                events.emit("fault", "error", operation=str(message.get("op")), why=f"{type(e).__name__}: {e}")
                reply = {"id": number, "error": Error("internal", f"{type(e).__name__}: {e}").wire()}
        for report in reports:
            await report
        await self._say(reply)

    async def _say(self, message: Message) -> None:
        try:
            await self.link.send(message)
        except ConnectionError:
            pass

    def must_be_root(self, what: str) -> None:
        if self.peer.uid != 0:
            raise Error("forbidden", f"only root may {what}")


Operation = Callable[[Connection, Message, Fds, Callable[[str], None]], Awaitable[Message]]


async def _login(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return await launch.login(c.daemon, c.peer, message, fds, progress)


async def _describe(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return c.daemon.describe(wire.field(message, "name", str), c.peer)


async def _on(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    c.must_be_root("switch a service on")
    service = c.daemon.service(wire.field(message, "name", str))
    already = service.state == "on"
    await service.on(progress)
    return {"already": already}


async def _off(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    c.must_be_root("switch a service off")
    if wire.field(message, "all", bool, False):
        on = [service for service in c.daemon.services.values() if any(service.generations())]
        for service in on:
            progress(f"{service.name}: {len(list(service.sessions()))} sessions end")
            await service.off()
        c.daemon.tidy()
        return {"names": [service.name for service in on]}
    service = c.daemon.service(wire.field(message, "name", str))
    already = service.state == "off"
    await service.off()
    c.daemon.tidy()
    return {"already": already}


async def _reload(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    """The configuration again; and, where a service is named, its next generation."""
    c.must_be_root("reload")
    name = wire.field(message, "name", str, None)
    c.daemon.configure()
    result = {"problems": describe(c.daemon.config.problems).splitlines()}
    if name is None:
        return result
    service = c.daemon.service(name)
    await service.reload(progress)
    c.daemon.tidy()
    return {**result, "state": service.state, "generation": service.current.number if service.current else None}


async def _set(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    c.must_be_root("change limits")
    limits, persist = wire.field(message, "limits", dict), wire.field(message, "persist", bool, False)
    return tuning.set_limits(c.daemon, wire.field(message, "name", str), limits, persist)


async def _inspect(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return tuning.inspect(c.daemon, c.peer, wire.field(message, "name", str))


async def _allow(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    c.must_be_root("change rights")
    words, name = wire.field(message, "what", list), wire.field(message, "name", str)
    if not words or not all(isinstance(word, str) for word in words):
        raise Error("bad-request", f"name a right: {rights.FORMS}")
    give, persist = wire.field(message, "allow", bool), wire.field(message, "persist", bool, False)
    return rights.change(c.daemon, name, words, give, persist)


async def _privileges(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return witness.privileges(c.daemon, c.peer, wire.field(message, "name", str))


async def _ps(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return observe.ps(c.daemon, c.peer)


async def _logs(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    lines = wire.field(message, "lines", int, 200)
    return {"lines": observe.logs(c.daemon, c.peer, wire.field(message, "name", str), max(1, min(lines, 10000)))}


async def _stop(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    name = wire.field(message, "name", str)
    timeout = wire.field(message, "timeout", int, 10)
    return {"stopped": await c.daemon.stop_sessions(name, c.peer, max(0, min(timeout, 600)))}


OPERATIONS: dict[str, Operation] = {
    "login": _login,
    "describe": _describe,
    "on": _on,
    "off": _off,
    "reload": _reload,
    "set": _set,
    "inspect": _inspect,
    "allow": _allow,
    "privileges": _privileges,
    "ps": _ps,
    "logs": _logs,
    "stop": _stop,
}


class Control:
    """The listening socket. It owns the socket; and its name, unless a socket unit does, which passed it as `given`."""

    def __init__(self, daemon: Daemon, path: str, group: int | None, given: socket.socket | None = None):
        self.daemon = daemon
        self.path = path if given is None else None
        self.connections: set[Any] = set()
        self._resting: asyncio.TimerHandle | None = None
        self.sock = given or self._bind(path, group)
        self.sock.setblocking(False)
        asyncio.get_running_loop().add_reader(self.sock, self._accept)

    @staticmethod
    def _bind(path: str, group: int | None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        temporary = f"{path}.{os.getpid()}"
        with short_name(temporary) as name:
            sock.bind(name)
        os.chmod(temporary, 0o660 if group is not None else 0o600)
        if group is not None:
            os.chown(temporary, 0, group)
        sock.listen(1024)
        os.rename(temporary, path)  # over the name that an earlier pocketd left
        return sock

    def _accept(self) -> None:
        try:
            sock, _ = self.sock.accept()
        except BlockingIOError:
            return
        except OSError as e:
            self._rest(e)
            return
        try:
            peer = processes.peer(sock)
        except (processes.Gone, OSError) as e:
            _refuse(sock, Error("kernel", f"pocketd cannot see who calls: {e}"))
            return
        if len(self.connections) >= CONNECTIONS:
            events.emit("too-many-connections", "warning", limit=CONNECTIONS)
            os.close(peer.pidfd)
            _refuse(sock, Error("full", f"pocketd has {CONNECTIONS} connections already; try again later"))
            return
        self.connections.add(Connection(self.daemon, sock, peer, self.connections.discard))

    def _rest(self, e: OSError) -> None:
        """accept(2) failed, for want of descriptors or memory: callers wait in its queue; the loop does not spin."""
        events.emit("accept-failed", "warning", why=str(e))
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.sock)
        self._resting = loop.call_later(REST, lambda: loop.add_reader(self.sock, self._accept))

    def close(self) -> None:
        if self._resting:
            self._resting.cancel()
        asyncio.get_running_loop().remove_reader(self.sock)
        self.sock.close()
        if self.path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        for connection in list(self.connections):
            connection.link.close("pocketd ends")


def _refuse(sock: socket.socket, error: Error) -> None:
    """An answer to whatever a caller will ask, who may not ask: it has no id."""
    with sock, contextlib.suppress(OSError):
        wire.send(sock, {"id": None, "error": error.wire()}, flags=socket.MSG_DONTWAIT)
