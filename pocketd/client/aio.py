"""The client for asyncio: the same sessions, models and tensors, with calls that are awaited.

    from pocketd.client import aio
    async with aio.login("tensorflow") as session:
        scores = await session.model("mobilenet")(image)

Several calls may be in flight; the worker does them one after another. Cancelling a task cancels its call.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Any, Callable, Dict, Generator, List, Optional, Sequence, SupportsIndex, Tuple

from nsutil import messages
from nsutil.messages import MessageError
from pocketd.client import errors
from pocketd.client.control import Control
from pocketd.client.core import Core, Outgoing, limited
from pocketd.client.handshake import Login, open_login
from pocketd.client.model import Model
from pocketd.client.session import died, request
from pocketd.client.tensor import Tensor


class login:
    """Log in and wait until the worker is ready; arguments and errors are those of `pocketd.client.login`."""

    def __init__(
        self,
        name: Optional[str] = None,
        *,
        directory: str = ".",
        runtime_dir: Optional[str] = None,
        timeout: Optional[float] = None,
        call_timeout: Optional[float] = None,
        progress: Optional[Callable[[str], None]] = None,
        **fields: Any,
    ):
        self._name, self._directory, self._runtime_dir = name, directory, runtime_dir
        self._timeout, self._call_timeout, self._progress, self._fields = timeout, call_timeout, progress, fields
        self._session: Optional[Session] = None

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def __aenter__(self) -> Session:
        self._session = await self._open()
        return self._session

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            self._session.close()

    async def _open(self) -> Session:
        try:
            return await asyncio.wait_for(self._login(), self._timeout)
        except asyncio.TimeoutError:
            raise errors.Timeout(f"the login took more than {self._timeout:g} s") from None

    async def _login(self) -> Session:
        loop = asyncio.get_running_loop()
        wake, cancel = os.pipe()
        # pocketd's own answer can take as long as a service takes to start, so it is waited for in a thread.
        asked = loop.run_in_executor(None, self._ask, wake)
        try:
            made = await asyncio.shield(asked)
        except BaseException:
            asked.add_done_callback(_give_back)
            os.close(cancel)
            raise
        session = Session(made, cancel, self._call_timeout)
        try:
            await session.wait_ready()
        except BaseException:
            session.close()
            raise
        return session

    def _ask(self, wake: int) -> Login:
        try:
            with Control(self._runtime_dir, self._timeout) as control:
                arguments = request(self._name, self._directory, wake, self._progress, self._timeout)
                return open_login(control, **arguments, **self._fields)
        finally:
            os.close(wake)


def _give_back(asked: asyncio.Future[Login]) -> None:
    """A login that was answered after its task had gone."""
    if not asked.cancelled() and asked.exception() is None:
        asked.result().session.close()
        asked.result().hold.close()


class Session:
    """One login, for one event loop. `call`, `load` and models are awaited; the rest does not wait."""

    def __init__(self, login: Login, cancel: int, call_timeout: Optional[float] = None):
        """Takes over the login's sockets and `cancel`. Use `login()` to make one."""
        self.call_timeout = call_timeout
        self.service: Optional[str] = login.reply.get("service")
        self.pocket: Optional[str] = login.reply.get("pocket")
        self.pid: Optional[int] = login.reply.get("pid")
        self._sock, self._hold, self._cancel = login.session, login.hold, cancel
        self._core = Core(login.reply)
        self._loop = asyncio.get_running_loop()
        self._waiting: Dict[int, asyncio.Future[Any]] = {}
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._queue: List[Outgoing] = []
        self._over: Optional[errors.PocketError] = None
        self._draining = False
        for source in (self._sock, self._hold):
            source.setblocking(False)
        os.set_blocking(cancel, False)
        self._loop.add_reader(self._sock, self._readable)
        self._loop.add_reader(self._hold, self._ended)

    # What an app uses

    @property
    def models(self) -> Tuple[str, ...]:
        """Names of the models that this session may use."""
        return self._core.models()

    def model(self, name: str) -> Model:
        """A model deployed with the service; calling it gives an awaitable. Raises UnknownModel."""
        return Model(self, self._core.model(name))

    async def load(self, path: str, timeout: Optional[float] = None) -> Model:
        """Load a model from a file of the pocket, in this session's worker. Raises UnknownModel, RemoteError."""
        return Model(self, await self._request({"op": "load", "path": path}, timeout))

    def tensor(self, shape: Sequence[SupportsIndex], dtype: Any = "float32") -> Tensor:
        """A new tensor in shared memory, 64-byte aligned, its contents undefined. `dtype` is a name, or what numpy
        takes. Raises BadTensor."""
        return self._core.tensor(shape, dtype)

    async def call(self, target: str, /, *args: Any, timeout: Optional[float] = None, **kwargs: Any) -> Any:
        """Call "module:function" of the pocket's own code in the worker; see the blocking form."""
        return await self._request({"op": "call", "target": target, "args": list(args), "kwargs": kwargs}, timeout)

    def close(self) -> None:
        """End the session and its worker. Calls still in flight get SessionClosed."""
        self._end(errors.SessionClosed("the session is closed"))
        own = os.getpid() == self._core.pid
        for sock in (self._sock, self._hold):
            with suppress(OSError):
                if own:
                    sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        if self._cancel >= 0:
            os.close(self._cancel)
            self._cancel = -1
        self._core.close()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    # The wire

    async def wait_ready(self) -> None:
        """Wait for the worker's first message. `login()` does it."""
        await self._ready

    def invoke(self, model: Any, method: Optional[str], args: Any, kwargs: Any, timeout: Optional[float]) -> Any:
        """Run a model; `Model` calls it."""
        return self._request(
            {"op": "model", "model": model, "method": method, "args": list(args), "kwargs": kwargs}, timeout
        )

    async def _request(self, message: Dict[str, Any], timeout: Optional[float]) -> Any:
        if self._over is not None:
            raise self._over
        timeout = limited(self.call_timeout if timeout is None else timeout)
        id, outgoing = self._core.request(message)
        waiting: asyncio.Future[Any] = self._loop.create_future()
        self._waiting[id] = waiting
        self._send(outgoing)
        try:
            return await (waiting if timeout is None else asyncio.wait_for(waiting, timeout))
        except asyncio.TimeoutError:
            self._abandon(id)
            raise errors.Timeout(f"no reply within {timeout:g} s") from None
        except asyncio.CancelledError:
            self._abandon(id)
            raise
        finally:
            self._waiting.pop(id, None)

    def _abandon(self, id: int) -> None:
        told = self._core.abandon(id)
        if told and self._cancel >= 0:
            with suppress(OSError):
                os.write(self._cancel, told)

    def _send(self, outgoing: Sequence[Outgoing]) -> None:
        """Send now what the socket takes, the rest when it takes more."""
        waited = bool(self._queue)
        self._queue.extend(outgoing)
        if not waited:
            self._writable()
            if self._queue and self._over is None:
                self._loop.add_writer(self._sock, self._writable)

    def _writable(self) -> None:
        while self._queue:
            body, fd = self._queue[0]
            try:
                messages.send(self._sock, body, () if fd is None else (fd,))
            except BlockingIOError:
                return
            except OSError:
                self._ended()
                return
            self._queue.pop(0)
            if fd is not None:
                os.close(fd)
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        try:
            while self._over is None:
                reply = self._core.feed(*messages.receive(self._sock))
                if self._core.ready is not None and not self._ready.done():
                    self._ready.set_result(None)
                if reply is None:
                    continue
                id, value, error = reply
                waiting = self._waiting.get(id)
                if waiting and not waiting.done():
                    waiting.set_result(value) if error is None else waiting.set_exception(error)
        except BlockingIOError:
            return
        except (EOFError, OSError):
            self._ended()
        except MessageError as e:
            self._end(errors.ProtocolError(f"the worker sent what is no message: {e}"))
        except errors.PocketError as e:
            self._end(e)

    def _ended(self) -> None:
        """The worker, or its init, has gone: learn why without blocking the loop, then tell everybody who waits."""
        if self._over is None and not self._draining:
            self._draining = True
            self._readable()  # its last words come first
        if self._over is None:
            self._silence()
            self._over = errors.WorkerDied("the worker ended")
            self._loop.run_in_executor(None, died, self._hold).add_done_callback(self._learned)

    def _learned(self, report: asyncio.Future[errors.PocketError]) -> None:
        self._over = None
        self._end(errors.WorkerDied("the worker ended") if report.exception() else report.result())

    def _end(self, error: errors.PocketError) -> None:
        if self._over is not None:
            return
        self._over = error
        self._silence()
        for waiting in (self._ready, *self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(error)
        self._ready.exception() if self._ready.done() and not self._ready.cancelled() else None

    def _silence(self) -> None:
        for sock in (self._sock, self._hold):
            if sock.fileno() >= 0:
                self._loop.remove_reader(sock)
                self._loop.remove_writer(sock)
        for _, fd in self._queue:
            if fd is not None:
                os.close(fd)
        self._queue.clear()
