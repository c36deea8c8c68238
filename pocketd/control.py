"""The control socket: who connects, what they may ask, one answer to each request.

A peer that sends what is no message loses its connection, and nobody else notices. Nor does anybody notice one that
asks much: its uid has a share of the connections and of the requests in a second, one request is read in its turn, and
what it sends beyond that waits in its own socket. A connection may stay as long as a request of its is answered (a
login that waits for memory); one that says nothing ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nsutil import messages, processes
from nsutil.messages import DescriptorsLost, Fds, MessageError, short_name
from pocketd import apart, events, launch, observe, rights, subordinates, tuning, warming, wire, witness
from pocketd.definitions import describe
from pocketd.link import Link
from pocketd.wire import Error, Message

if TYPE_CHECKING:
    from pocketd.daemon import Daemon

CONNECTIONS = 512  # at once; the listening queue holds those beyond
BACKLOG = 32  # of the listening queue: who connects waits for all before it, and sleeps where it is full
RESERVED = 64  # of them for root alone
SHARE = 128  # of them for one other uid
RATE, BURST = 200.0, 200  # requests and connections in a second of one uid but root's, and how many of them at once
PART = 2  # one of so many is what requests of one uid but root's get of pocketd's time
LATE = 2.0  # seconds that a request would have to wait: no more connections then
SILENCE = 60.0  # seconds without a request, since it connected or was answered last
REST = 0.2  # seconds
USHERS = 32  # of one uid: its requests with descriptors at once
LOOKS = 2  # of one uid: its requests at once for which a child looks at processes
_PENDING = 4  # requests of one connection at once
_ACCEPTED, _ACCEPTING = 16, 0.002  # connections in one turn of the loop, and seconds: others' requests are in it too


class Share:
    """What the callers of one uid, and of its subordinate ones, have of pocketd."""

    def __init__(self, uid: int):
        self.uid = uid
        self.connections = 0
        self.ushers = asyncio.Semaphore(USHERS)
        self.looks = asyncio.Semaphore(LOOKS)
        self._turn = asyncio.Lock()
        self._due = 0.0  # when all that was asked would have been asked at RATE

    def full(self) -> bool:
        return self.uid != 0 and self.connections >= SHARE

    def wait(self) -> float:
        """How many seconds the next request has to wait."""
        return max(0.0, self._due - time.monotonic() - BURST / RATE) if self.uid else 0.0

    def late(self) -> bool:
        return self.wait() > LATE

    def pay(self, seconds: float) -> None:
        """What has come, or was answered, makes the next ones wait so much longer."""
        self._due = max(self._due, time.monotonic()) + seconds

    async def serve(self, answering: Coroutine[Any, Any, None]) -> None:
        """Answer a request: one of this uid's begins in a turn of the loop, however many there are, and it is paid for
        by those that come after it."""
        if not self.uid:
            await answering
            return
        async with self._turn:
            await asyncio.sleep(self.wait())
        await _timed(answering, lambda seconds: self.pay(seconds * PART))

    def over(self) -> bool:
        return not self.connections and self._due <= time.monotonic()


@types.coroutine
def _timed(coroutine: Coroutine[Any, Any, None], spent: Callable[[float], None]) -> Generator[Any, Any, None]:
    """Run `coroutine` to its end; `spent` is told the seconds that it keeps the loop each time."""
    thrown: BaseException | None = None
    while True:
        begun = time.monotonic()
        try:
            awaited = coroutine.throw(thrown) if thrown else coroutine.send(None)
        except StopIteration:
            return
        finally:
            spent(time.monotonic() - begun)
        thrown = None
        try:
            yield awaited
        except BaseException as e:  # it is cancelled
            thrown = e


class RequestLink(Link):
    """A link to a peer that is not trusted: one request of bounded size in its turn, and none while it is paused.

    What a peer sends meanwhile waits in its own socket, which blocks it in the end. That it has gone is seen later too.
    `laden` is called, where there is one, when the next request carries descriptors, and is left to receive it.
    """

    paused = False

    def __init__(
        self,
        sock: socket.socket,
        handle: Callable[[Message, Fds], None],
        closed: Callable[[str], None],
        laden: Callable[[], None] | None,
    ):
        self._laden = laden
        super().__init__(sock, handle, closed)

    def _readable(self) -> None:
        if self.sock is None or self.paused:
            return
        try:
            if self._laden and messages.carries(self.sock):
                self._laden()
                return
            message, fds = wire.receive(self.sock, bounds=wire.REQUEST)
        except BlockingIOError:
            return
        except (EOFError, OSError, MessageError) as e:
            if isinstance(e, DescriptorsLost):  # the peer did nothing wrong, and should know
                self.tell(Error("full", f"pocketd: {e}"))
            self.close(str(e))
            return
        self._handle(message, fds)

    def pause(self) -> None:
        if self.sock is not None and not self.paused:
            self.paused = True
            asyncio.get_running_loop().remove_reader(self.sock.fileno())

    def resume(self) -> None:
        if self.sock is not None and self.paused:
            self.paused = False
            asyncio.get_running_loop().add_reader(self.sock.fileno(), self._readable)

    def _let_go(self, sock: socket.socket) -> None:
        apart.let_go(sock)

    def tell(self, error: Error) -> None:
        """An error that answers no request, if the peer has room for it."""
        if self.sock is not None:
            with contextlib.suppress(OSError):
                wire.send(self.sock, {"id": None, "error": error.wire()}, flags=socket.MSG_DONTWAIT)


class Connection:
    """One client of the control socket, known by the kernel's word."""

    def __init__(
        self,
        daemon: Daemon,
        sock: socket.socket,
        peer: processes.Peer,
        share: Share,
        gone: Callable[[Connection], None],
    ):
        self.daemon = daemon
        self.peer = peer
        self._share = share
        self.looks = share.looks
        self._gone = gone
        self._tasks: set[asyncio.Task[None]] = set()
        self._rest: asyncio.TimerHandle | None = None  # until its share lets it ask again
        self._silence: asyncio.TimerHandle | None = None
        self._ushered = False  # the next request is received by a child
        share.connections += 1
        self.link = RequestLink(sock, self._handle, self._closed, self._laden if peer.uid else None)
        self._next()

    def _closed(self, reason: str) -> None:
        for timer in (self._rest, self._silence):
            if timer:
                timer.cancel()
        if not self._tasks:
            self._release()

    def _release(self) -> None:
        if self.peer.pidfd >= 0:
            os.close(self.peer.pidfd)
            self.peer = replace(self.peer, pidfd=-1)
            self._share.connections -= 1
            self._gone(self)

    def _next(self) -> None:
        """Hear the next request, unless it has to wait."""
        wait = self._share.wait()
        if wait and not self._rest:
            self._rest = asyncio.get_running_loop().call_later(wait, self._rested)
        if not self._rest and not self._ushered and len(self._tasks) < _PENDING:
            self.link.resume()
        else:
            self.link.pause()
        if self._silence:
            self._silence.cancel()
            self._silence = None
        if not self._tasks:
            self._silence = asyncio.get_running_loop().call_later(SILENCE, self._silent)

    def _silent(self) -> None:
        self.link.tell(Error("idle", f"pocketd ends connections without a request for {SILENCE:g} s; connect again"))
        self.link.close("no request")

    def _rested(self) -> None:
        self._rest = None
        self._next()

    def _handle(self, message: Message, fds: Fds) -> None:
        self._begin(self._answer(message, fds))

    def _laden(self) -> None:
        self._ushered = True
        self._begin(self._usher())

    def _begin(self, answering: Coroutine[Any, Any, None]) -> None:
        self._share.pay(1 / RATE)
        task = asyncio.ensure_future(self._share.serve(answering))
        self._tasks.add(task)
        task.add_done_callback(self._answered)
        self._next()

    async def _usher(self) -> None:
        """The next request and its descriptors, by way of a child, which stays until it is answered."""
        try:
            async with asyncio.timeout(SILENCE):
                await self._share.ushers.acquire()
        except TimeoutError:
            self.link.tell(Error("full", f"{USHERS} requests of yours with descriptors are not over yet"))
            self.link.close("too many descriptors")
            return
        if self.link.sock is None:
            self._share.ushers.release()
            return
        try:
            usher = apart.usher(self.link.sock)
        except OSError as e:
            self._share.ushers.release()
            self.link.tell(Error("full", f"pocketd has no process left for the request: {e.strerror}"))
            self.link.close("no process")
            return
        try:
            try:
                message, fds = await apart.ushered(usher)
            finally:
                self._ushered = False
            self._next()
            await self._answer(message, fds)
        except apart.Refused as e:
            self._next()
            await self._say({"id": e.request.get("id"), "error": e.wire()})
        except (Error, MessageError) as e:
            if isinstance(e, DescriptorsLost):
                self.link.tell(Error("full", f"pocketd: {e}"))
            self.link.close(str(e))
        finally:
            usher.end(self._share.ushers.release)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.link.sock is not None:
            self._next()
        elif not self._tasks:
            self._release()

    async def _answer(self, message: Message, fds: Fds) -> None:
        number = message.get("id")
        op = message.get("op")
        if op != "login":
            fds.close()  # nothing else takes any, and some operations last
        reports: list[asyncio.Task[None]] = []

        def progress(text: str) -> None:
            reports.append(asyncio.ensure_future(self._say({"id": number, "progress": text})))

        with fds:
            try:
                operation = OPERATIONS.get(op) if isinstance(op, str) else None
                if operation is None:
                    raise Error("bad-request", f"there is no operation {str(op)[:40]!r}")
                if type(number) is not int:
                    raise Error("bad-request", "a request has a number as its id")
                name = message.get("name")
                if isinstance(name, str):
                    self.daemon.check_known(name, self.peer)
                result = await operation(self, message, fds, progress)
                reply: Message = {"id": number, "ok": True, **result}
            except Error as e:
                reply = {"id": number, "error": e.wire()}
            except MessageError as e:
                reply = {"id": number, "error": Error("bad-request", str(e)).wire()}
            except (OSError, ConnectionError, TimeoutError) as e:
                reply = {"id": number, "error": self._told("kernel", op, e).wire()}
            except Exception as e:  # a fault of ours ends this request, not the daemon
                reply = {"id": number, "error": self._told("internal", op, e).wire()}
        for report in reports:
            await report
        await self._say(reply)

    def _told(self, code: str, op: object, e: Exception) -> Error:
        """An error nobody wrote words for. What it names may be another's, so the journal and root alone get that."""
        text = f"{type(e).__name__}: {e}"
        events.emit("fault", "error" if code == "internal" else "notice", operation=str(op)[:40], why=text)
        if self.peer.uid:
            said = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else None  # ours may name a path
            text = f"{type(e).__name__}{f': {said}' if said else ''}; pocketd's journal has more of it"
        return Error(code, text)

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
    result = {"problems": [line for line in describe(c.daemon.config.problems).split("\n") if line]}
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
    async with c.looks:
        return await witness.privileges(c.daemon, c.peer, wire.field(message, "name", str))


async def _ps(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    async with c.looks:
        return await observe.ps(c.daemon, c.peer)


async def _logs(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    lines = wire.field(message, "lines", int, 200)
    return {"lines": observe.logs(c.daemon, c.peer, wire.field(message, "name", str), max(1, min(lines, 10000)))}


async def _stop(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    name = wire.field(message, "name", str)
    timeout = wire.field(message, "timeout", int, 10)
    return {"stopped": await c.daemon.stop_sessions(name, c.peer, max(0, min(timeout, 600)))}


async def _warm(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return await warming.warm(c.daemon, c.peer, wire.field(message, "name", str), progress)


async def _cool(c: Connection, message: Message, fds: Fds, progress: Callable[[str], None]) -> Message:
    return warming.cool(c.daemon, c.peer, wire.field(message, "name", str))


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
    "warm": _warm,
    "cool": _cool,
}


class Control:
    """The listening socket. It owns the socket; and its name, unless a socket unit does, which passed it as `given`."""

    def __init__(self, daemon: Daemon, path: str, group: int | None, given: socket.socket | None = None):
        self.daemon = daemon
        self.path = path if given is None else None
        self.connections: set[Any] = set()
        self._shares: dict[int, Share] = {}
        self._resting: asyncio.TimerHandle | None = None
        self._quiet = 0.0
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
        sock.listen(BACKLOG)
        os.rename(temporary, path)  # over the name that an earlier pocketd left
        return sock

    def _accept(self) -> None:
        until = time.monotonic() + _ACCEPTING
        for _ in range(_ACCEPTED):
            if apart.burdened():
                self._rest("those that were refused are not closed yet")
                return
            if time.monotonic() > until:  # what one has sent before is taken out of it when it is refused
                return
            try:
                sock, _ = self.sock.accept()
            except BlockingIOError:
                return
            except OSError as e:
                self._rest(str(e))
                return
            self._take(sock)

    def _take(self, sock: socket.socket) -> None:
        uid = subordinates.owner_of(processes.credentials(sock)[1])
        share = self._share(uid)
        limit = CONNECTIONS if uid == 0 else CONNECTIONS - RESERVED
        if share.full() or share.late() or len(self.connections) >= limit:
            if share.full():
                why = f"you have {SHARE} connections already"
            elif share.late():
                why = f"your requests and connections are {LATE:g} s behind what you may have of them in a second"
            else:
                why = f"pocketd has {limit} connections already"
            self._complain(uid, share.connections)
            _refuse(sock, Error("full", f"{why}; try again later"))
            return
        try:
            peer = processes.peer(sock)
        except (processes.Gone, OSError) as e:
            _refuse(sock, Error("kernel", f"pocketd cannot see who calls: {e}"))
            return
        if uid:
            share.pay(1 / RATE)
        self.connections.add(Connection(self.daemon, sock, peer, share, self.connections.discard))

    def _share(self, uid: int) -> Share:
        if uid not in self._shares:
            self._shares = {known: share for known, share in self._shares.items() if not share.over()}
            self._shares[uid] = Share(uid)
        return self._shares[uid]

    def _complain(self, uid: int, connections: int) -> None:
        """Once in a while: a caller that is refused can come back at once, and shall not fill the journal."""
        now = time.monotonic()
        if now >= self._quiet:
            self._quiet = now + 10.0
            events.emit("too-many-connections", "warning", limit=CONNECTIONS, uid=uid, of_uid=connections)

    def _rest(self, why: str) -> None:
        """There is no room for more, or accept(2) says so: callers wait in its queue; the loop does not spin."""
        events.emit("accept-failed", "warning", why=why)
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
    with contextlib.suppress(OSError):
        wire.send(sock, {"id": None, "error": error.wire()}, flags=socket.MSG_DONTWAIT)
    apart.let_go(sock)
