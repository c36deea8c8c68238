"""Sessions: a worker of a service to call, blocking form."""

from __future__ import annotations

import collections
import math
import os
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Any, Callable, Deque, Dict, Optional, Sequence, SupportsIndex, Tuple

from nsutil import messages
from nsutil.messages import MessageError
from pocketd import wire
from pocketd.client import errors
from pocketd.client.control import Control
from pocketd.client.core import Core, Outgoing, Reply, limited
from pocketd.client.handshake import Login, environment, open_login
from pocketd.client.model import Model
from pocketd.client.tensor import Tensor

# After the session's socket has ended, init reports the worker's end at once; this is for an init that died too.
REPORT = 5.0
# For so long a reply alone is waited for, which is a system call less than to wait for whatever else may happen too.
SOON = struct.pack("ll", 0, 20_000)  # struct timeval: SO_RCVTIMEO, socket(7)
_DONTWAIT = int(socket.MSG_DONTWAIT)


def login(
    name: Optional[str] = None,
    *,
    directory: str = ".",
    runtime_dir: Optional[str] = None,
    timeout: Optional[float] = None,
    call_timeout: Optional[float] = None,
    progress: Optional[Callable[[str], None]] = None,
    **fields: Any,
) -> Session:
    """Log in and wait until the worker is ready.

    `name` is a service, for an ad hoc pocket of `directory`; or a pocket that has a definition; or None, where pocketd
    knows by itself who asks (in an app's container). `timeout` is for the login, in seconds; `call_timeout` for each
    call that names none. `progress` gets lines of text while a service starts. `fields` go to pocketd as they are.

    Raises NotRunning, LoginRefused, ServiceFailed, WorkerDied, Timeout (all PocketError).
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    wake, cancel = os.pipe()
    try:
        with Control(runtime_dir, timeout) as control:
            made = open_login(control, **request(name, directory, wake, progress, timeout), **fields)
    except BaseException:
        os.close(cancel)
        raise
    finally:
        os.close(wake)
    session = Session(made, cancel, call_timeout)
    try:
        session.wait_ready(deadline)
    except BaseException:
        session.close()
        raise
    return session


def request(
    name: Optional[str], directory: str, cancel: int, progress: Any, timeout: Optional[float]
) -> Dict[str, Any]:
    """The arguments of `open_login` for client mode; `cancel` is the worker's end of the cancel pipe."""
    return {
        "mode": "client",
        "name": name,
        "directory": directory,
        "start": {"environment": environment(), "directory": os.fsencode(os.getcwd())},
        "after": [({"op": "hello"}, [cancel])],
        "progress": progress,
        "timeout": timeout,
    }


class Session:
    """One login. Calls go to the worker one after another; threads may share a session and wait for each other.

    Closing it (or leaving its `with` block) ends the worker. Tensors stay valid after that.
    """

    def __init__(self, login: Login, cancel: int, call_timeout: Optional[float] = None):
        """Takes over the login's sockets and `cancel`, the write end of the cancel pipe. Use `login()` to make one."""
        self.call_timeout = call_timeout
        self.service: Optional[str] = login.reply.get("service")
        self.pocket: Optional[str] = login.reply.get("pocket")
        self.pid: Optional[int] = login.reply.get("pid")
        self._sock, self._hold, self._cancel = login.session, login.hold, cancel
        self._fd = login.session.fileno()
        self._core = Core(login.reply)
        self._lock = threading.RLock()
        self._current: Optional[int] = None
        self._cancelled: Optional[int] = None  # the call that was in progress when somebody cancelled
        self._unsent: Deque[Outgoing] = collections.deque()
        self._woken, self._waker = os.pipe()
        for fd in (self._cancel, self._waker, self._woken):
            os.set_blocking(fd, False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SOON)
        self._poll = select.poll()
        for source in (self._sock, self._hold, self._woken):
            self._poll.register(source, select.POLLIN)
        self._over: Optional[errors.PocketError] = None

    # What an app uses

    @property
    def models(self) -> Tuple[str, ...]:
        """Names of the models that this session may use."""
        return self._core.models()

    def model(self, name: str) -> Model:
        """A model deployed with the service. Raises UnknownModel."""
        return Model(self, self._core.model(name))

    def load(self, path: str, timeout: Optional[float] = None) -> Model:
        """Load a model from a file of the pocket, in this session's worker. Raises UnknownModel, RemoteError."""
        return Model(self, self._request({"op": "load", "path": path}, timeout))

    def tensor(self, shape: Sequence[SupportsIndex], dtype: Any = "float32") -> Tensor:
        """A new tensor in shared memory, 64-byte aligned, its contents undefined. `dtype` is a name, or what numpy
        takes. Raises BadTensor."""
        with self._lock:
            return self._core.tensor(shape, dtype)

    def call(self, target: str, /, *args: Any, timeout: Optional[float] = None, **kwargs: Any) -> Any:
        """Call "module:function" of the pocket's own code in the worker and return its result.

        Tensors and arrays arrive there as numpy arrays in shared memory, and arrays in the result come back as tensors;
        arrays of words are lists of them. `timeout` is the call's own: a function gets none by that name.
        Raises RemoteError for an exception there, Timeout, Cancelled, BadTensor, BadValue, WorkerDied.
        """
        return self._request({"op": "call", "target": target, "args": list(args), "kwargs": kwargs}, timeout)

    def cancel(self) -> None:
        """Cancel the call in progress, from another thread than the one that waits for it, which gets Cancelled."""
        with suppress(BlockingIOError):
            current = self._current
            if current is not None:
                self._cancelled = current
                os.write(self._waker, b"\0")

    def close(self) -> None:
        """End the session and its worker. May be called twice, by another thread than the one that waits for a call,
        which gets SessionClosed, and in a forked child without harm to the parent."""
        if self._over is None:
            self._over = errors.SessionClosed("the session is closed")
        if os.getpid() != self._core.pid:
            self._let_go()
            return
        # A forked child may hold these too: shutdown ends the connection itself. Who waits for it wakes, and lets go of
        # what is closed then: its number might be another's by the time that it looks.
        for sock in (self._sock, self._hold):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._let_go()

    def _let_go(self) -> None:
        self._sock.close()
        self._hold.close()
        for name in ("_cancel", "_woken", "_waker"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)
        while self._unsent:
            _, unsent = self._unsent.popleft()
            if unsent is not None:
                os.close(unsent)
        self._core.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self.close()

    # The wire

    def wait_ready(self, deadline: Optional[float]) -> None:
        """Wait for the worker's first message. `login()` does it."""
        with self._lock:
            while self._core.ready is None:
                self._receive(deadline, "the worker was not ready in time")

    def invoke(self, model: Any, method: Optional[str], args: Any, kwargs: Any, timeout: Optional[float]) -> Any:
        """Run a model; `Model` calls it."""
        message = {"op": "model", "model": model, "method": method, "args": list(args), "kwargs": kwargs}
        return self._request(message, timeout)

    def _request(self, message: Dict[str, Any], timeout: Optional[float]) -> Any:
        timeout = limited(self.call_timeout if timeout is None else timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._lock.acquire(True, -1 if timeout is None else timeout):
            raise errors.Timeout(f"another thread's call took the {timeout:g} s of this one")
        try:
            if self._over is not None:
                raise self._over
            if self._current is not None:
                raise errors.PocketError("this thread is in the middle of a call of this session", "busy")
            id, outgoing = self._core.request(message)
            self._current = id
            late = "" if timeout is None else f"no reply within {timeout:g} s"
            try:
                self._send(outgoing, deadline, late)
                while True:
                    reply = self._receive(deadline, late)
                    if reply is not None and reply[0] == id:
                        break
                if self._cancelled == id:  # while the reply alone was waited for
                    raise errors.Cancelled("the call was cancelled")
            except BaseException as e:
                self._abandon(id)
                if isinstance(e, OSError) and self._over is not None:  # closed in a signal's handler meanwhile
                    raise self._over from None
                raise
            finally:
                self._current = None
        finally:
            self._lock.release()
        _, value, error = reply
        if error is not None:
            raise error
        return value

    def _send(self, outgoing: Sequence[Outgoing], deadline: Optional[float], late: str) -> None:
        """Send these after what an earlier call could not; what does not fit in time is left to the next call."""
        unsent = self._unsent
        if not unsent and len(outgoing) == 1:
            try:
                messages.send(self._sock, outgoing[0][0], (), _DONTWAIT)
                return
            except OSError:
                pass  # it is told below, or fits in then
        unsent.extend(outgoing)
        while unsent:
            body, fd = unsent[0]
            try:
                messages.send(self._sock, body, (fd,) if fd is not None else (), _DONTWAIT)
            except BlockingIOError:
                self._make_room(deadline, late)
                continue
            except (BrokenPipeError, ConnectionResetError):
                raise self._last_words() from None
            unsent.popleft()
            if fd is not None:
                os.close(fd)

    def _make_room(self, deadline: Optional[float], late: str) -> None:
        """Wait until the socket takes more, and read meanwhile: the worker may be waiting for us to do so."""
        self._poll.modify(self._sock, select.POLLIN | select.POLLOUT)
        try:
            ready = self._poll.poll(_milliseconds(deadline))
        finally:
            self._poll.modify(self._sock, select.POLLIN)
        if not ready:
            raise errors.Timeout(late)
        if any(event & ~select.POLLOUT for _, event in ready):
            self._receive(deadline, late)

    def _receive(self, deadline: Optional[float], late: str) -> Optional[Reply]:
        """One message, or errors: Timeout, Cancelled, WorkerDied, ProtocolError."""
        if deadline is None:
            try:
                return self._take()
            except BlockingIOError:  # not SOON
                pass
        self._wait(deadline, late)
        return self._take()

    def _take(self) -> Optional[Reply]:
        try:
            return self._core.feed(*messages.receive(self._sock))
        except (EOFError, ConnectionError):
            raise self._died() from None
        except MessageError as e:
            raise self._fail(errors.ProtocolError(f"the worker sent what is no message: {e}")) from None
        except errors.PocketError as e:
            raise self._fail(e) from None

    def _wait(self, deadline: Optional[float], late: str) -> None:
        """Until there is something to receive, or an error."""
        while True:
            ready = self._poll.poll(None if deadline is None else _milliseconds(deadline))
            if not ready:
                raise errors.Timeout(late)
            if ready[0][0] == self._fd:
                return
            if not any(fd == self._woken for fd, _ in ready):
                raise self._died()
            os.read(self._woken, 4096)
            if self._cancelled == self._current:  # else it was an earlier call, which is over
                raise errors.Cancelled("the call was cancelled")

    def _last_words(self) -> errors.PocketError:
        """Why the worker ended, by what it had still said, or else by what its init reports."""
        try:
            while True:
                self._core.feed(*messages.receive(self._sock, _DONTWAIT))
        except errors.PocketError as e:
            return self._fail(e)
        except (EOFError, OSError, MessageError):
            return self._died()

    def _abandon(self, id: int) -> None:
        told = self._core.abandon(id)
        if told and self._over is None:
            with suppress(OSError):  # a full pipe, or a worker that has ended: then nothing is there to interrupt
                os.write(self._cancel, told)

    def _died(self) -> errors.PocketError:
        return self._over or self._fail(died(self._hold))

    def _fail(self, error: errors.PocketError) -> errors.PocketError:
        """Why the session is over: closed by another thread meanwhile, it is for that."""
        self._over = self._over or error
        return self._over


def _milliseconds(deadline: Optional[float]) -> Optional[float]:
    """For poll(2), rounded up so that no loop spins through the last millisecond."""
    return None if deadline is None else max(0.0, math.ceil((deadline - time.monotonic()) * 1000))


def died(hold: socket.socket) -> errors.PocketError:
    """How the worker ended, as its init reports on the hold socket. Waits at most REPORT seconds."""
    with suppress(EOFError, OSError, MessageError):
        hold.settimeout(REPORT)
        while True:
            message, fds = wire.receive(hold)
            fds.close()
            if message.get("op") == "exit" and type(message.get("status")) is int:
                return _ended(message["status"], message.get("error"))
    return errors.WorkerDied("the worker ended, and its service's init with it or before it; nothing is known of why")


def _ended(status: int, error: Any) -> errors.PocketError:
    cause = wire.Error.unwire(error) if error is not None else None
    reason = cause.message if cause else None
    kind = errors.OutOfMemory if cause and cause.code == errors.OutOfMemory.default_code else errors.WorkerDied
    detail = {k: v for k, v in cause.detail.items() if k not in ("exit_code", "signal", "reason")} if cause else {}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        said = f"the worker was killed by signal {number}"
        return kind(said + (f": {reason}" if reason else ""), None, number, reason, **detail)
    code = os.WEXITSTATUS(status)
    said = f"the worker ended with exit code {code}"
    return kind(said + (f": {reason}" if reason else ""), code, None, reason, **detail)
