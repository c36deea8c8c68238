"""Client mode's loop in a worker: calls come in, results go out, tensors stay in shared memory.

One thread, one call at a time, one recvmsg and one send for each. What the client may send is written down in
pocketd/client/core.py. A call that fails is an error reply and the session goes on; what is no message at all ends it.
"""

from __future__ import annotations

import fcntl
import importlib
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Union

from nsutil import messages, pages
from nsutil.messages import Fds, MessageError
from pocketd import arrays, tensors, wire
from pocketd.arena import Arena, Arenas, Heap
from pocketd.values import Format, of_handle
from pocketd.wire import Error
from runtime import hints
from runtime import models as loading

# fcntl.h, asm-generic: who gets SIGIO; one thread of ours.
F_SETOWN_EX, F_OWNER_TID = 15, 0
CLIENT_PARITY, WORKER_FIRST = 1, 2
CANCEL = struct.Struct("<Q")
MAX_TRACEBACK = 64 * 1024
_HERE = os.path.dirname(__file__)
# struct timeval. The call after that makes its pages anew, which takes as long as a small model's: not for an app that
# asks each second.
_FOREVER, _IDLE = struct.pack("ll", 0, 0), struct.pack("ll", 2, 0)
PROTOCOL = 76  # sysexits.h EX_PROTOCOL: how a worker ends whose client sent garbage


class Cancel(BaseException):
    """Raised in the middle of a call that its client has cancelled."""


def serve(
    sock: socket.socket,
    start: wire.Message,
    runtime: Any,
    models: Dict[str, Any],
    directory: Union[str, bytes],
    orders: Optional[wire.Message] = None,
) -> int:
    """Serve one client until it goes; the worker's exit code. Runs on the main thread. Takes over `sock`, but leaves it
    open for whoever has to tell the client of an error that is raised here: nothing a client does raises one.

    `runtime` and `models` are as runtime.interface says; `directory` is where the pocket's own modules and files are.
    `orders`: pocketd's word about the pocket, for the hint at a failure for want of a right.
    """
    if os.fsdecode(directory) not in sys.path[:1]:
        sys.path.insert(0, os.fsdecode(directory))
    for name in (orders or {}).get("preload", ()):
        try:
            preload(name)
        except (Exception, SystemExit):
            traceback.print_exc()  # into the service's log; what needs it fails by itself, as where it cannot be held
    code = Session(sock, runtime, models, os.fsdecode(directory), orders).run()
    sock.close()
    return code


class Session:
    """The state of the one session of this process."""

    def __init__(
        self,
        sock: socket.socket,
        runtime: Any,
        models: Dict[str, Any],
        directory: str,
        orders: Optional[wire.Message] = None,
    ):
        self._sock = sock
        self._orders = orders
        self._runtime = runtime
        self._directory = directory
        self._models: List[Tuple[str, Any]] = list(models.items())
        self._functions: Dict[str, Callable[..., Any]] = {}
        self._heap = Heap(WORKER_FIRST, renewable=True)
        self._theirs = Arenas(CLIENT_PARITY, renewable=True)
        self._lent: List[Tuple[Arena, tensors.Handle, Any]] = []  # arrays of the present call
        self._format = Format(self._export, self._resolve)
        self._exported: List[tensors.Handle] = []
        self._cancel: Optional[int] = None
        self._cancelled: Set[int] = set()
        self._current = 0
        self._resting = True

    def run(self) -> int:
        described = [self._describe(n) for n in range(len(self._models))]
        try:
            wire.send(
                self._sock, {"op": "ready", "runtime": self._runtime.__name__.rpartition(".")[2], "models": described}
            )
            while True:
                try:
                    body, fds = messages.receive(self._sock)
                except BlockingIOError:  # SO_RCVTIMEO, socket(7): it costs a busy session nothing
                    pages.trim()  # what the last call left in the allocator goes back, when none comes for a while
                    self._heap.relax(0.0)
                    self._wait_for(_FOREVER)
                    continue
                if self._resting:
                    self._wait_for(_IDLE)
                if fds is not messages.NONE:
                    with fds:
                        self._receive_fds(self._format.unpack(body), fds)
                    continue
                self._handle(self._format.unpack(body))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return 0
        except MessageError as e:
            with suppress(OSError):
                failed = {"op": "failed", "error": Error("protocol", f"the client broke the protocol: {e}").wire()}
                wire.send(self._sock, failed, flags=socket.MSG_DONTWAIT)
            return PROTOCOL

    def _wait_for(self, limit: bytes) -> None:
        self._resting = limit == _FOREVER
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    # Requests

    def _receive_fds(self, message: wire.Message, fds: Fds) -> None:
        """The two messages that carry a descriptor; each carries one."""
        op, number = message.get("op"), message.get("arena")
        if len(fds) != 1 or op not in ("hello", "arena"):
            raise MessageError(f"{len(fds)} descriptors where none belong")
        if op == "arena":
            if type(number) is not int:
                raise MessageError("an arena without a number")
            try:
                self._theirs.receive(number, next(iter(fds)))
            except tensors.BadTensor as e:
                raise MessageError(e.message) from None
        elif self._cancel is None:
            self._listen(fds.take())

    def _handle(self, message: wire.Message) -> None:
        id = message.get("id")
        if type(id) is not int or id <= 0:
            raise MessageError("a request without an id")
        try:
            if "free" in message:
                for arena, offset in message["free"]:
                    self._heap.free(arena, offset)
            if "drop" in message:
                for arena in message["drop"]:
                    self._theirs.drop(arena)
        except (TypeError, ValueError, tensors.BadTensor):
            raise MessageError("a list of freed ranges that is none") from None
        reply = self._answer(id, message)
        del message  # tensors of the call are views of the client's memory: let go before the client may reuse it
        if self._lent:
            reply = self._part(id, reply)
        if self._heap.fresh:
            self._announce()
        messages.send(self._sock, reply)

    def _announce(self) -> None:
        while self._heap.fresh:
            number, fd = self._heap.fresh.pop(0)
            announcement = self._format.pack({"v": wire.OLDEST, "op": "arena", "arena": number})
            try:
                messages.send(self._sock, announcement, [fd])
            finally:
                os.close(fd)

    def _answer(self, id: int, message: wire.Message) -> bytes:
        """Do what is asked; the packed reply. Whatever goes wrong in a call is a reply too."""
        if self._exported:
            self._exported = []
        try:
            if self._format.faults:
                raise self._format.faults[0]
            self._current = id
            if id in self._cancelled:
                raise Cancel
            value = self._do(message)
            self._current = 0  # what is cancelled from here on could not be given back
            reply = {"v": wire.OLDEST, "id": id, "ok": True, "value": value}
            dropped = len(self._heap.dropped)  # by the time that it is packed there may be more
            if dropped:
                reply["drop"] = self._heap.dropped[:dropped]
            packed = self._format.pack(reply)
            if len(packed) > messages.MAX_BODY:
                size = f"{len(packed)} bytes; at most {messages.MAX_BODY} travel"
                raise Error("bad-value", f"the result takes {size}, more as an array")
            if dropped:
                del self._heap.dropped[:dropped]
            return packed
        except BaseException as e:
            self._current = 0
            return self._failed(id, e if issubclass(type(e), Error) else self._error(e))  # type: ignore[arg-type]

    def _failed(self, id: int, error: Error) -> bytes:
        for handle in self._exported:  # a result that was packed in part only
            self._heap.free(handle.arena, handle.offset)
        self._exported = []
        return self._format.pack({"v": wire.OLDEST, "id": id, "error": error.wire()})

    def _part(self, id: int, reply: bytes) -> bytes:
        """Give the call's arrays back. One that is still referred to, by a model's variable or in a list of a program,
        keeps what it holds, as it would anywhere: its pages become this process's own, and later calls see the arena in
        another place. The reply to send."""
        try:
            while self._lent:
                arena, handle, array = self._lent.pop()
                if sys.getrefcount(array) > _ALONE:
                    place = handle.offset, handle.offset + array.nbytes
                    # First the other place: without, later calls would see pages that nobody else writes to.
                    (self._theirs if arena.id % 2 == CLIENT_PARITY else self._heap).renew(arena)
                    arena.own(*(tensors.extent(handle) if handle.strides else place))
            return reply
        except OSError as e:
            self._lent = []
            why = f"the arrays that were kept of its calls' arguments cannot be: {e.strerror}; keep copies of them"
            return self._failed(id, Error("bad-tensor", why))

    def _do(self, message: wire.Message) -> Any:
        op = message.get("op")
        if op == "call":
            target = message.get("target")
            function = (type(target) is str and self._functions.get(target)) or self._find(target)
        elif op == "model":
            model, method = self._model(message.get("model")), message.get("method")
            function = model if method is None else model.method(wire.field(message, "method", str))
        elif op == "load":
            return self._load(wire.field(message, "path", str))
        else:
            raise Error("bad-request", f"there is no operation {str(op)[:40]!r} in a session")
        args, kwargs = message.get("args"), message.get("kwargs")
        if type(args) is not list or type(kwargs) is not dict or (kwargs and not all(type(k) is str for k in kwargs)):
            raise Error("bad-request", "args must be a list and kwargs a map with string keys")
        return function(*args, **kwargs)

    def _find(self, target: Any) -> Callable[..., Any]:
        function = self._functions[target] = find(target)
        return function

    def _load(self, path: str) -> wire.Message:
        self._models.append((path, loading.load_beneath(self._runtime, self._directory, path)))
        return self._describe(len(self._models) - 1)

    def _model(self, key: Any) -> Any:
        if type(key) is int and 0 <= key < len(self._models):
            return self._models[key][1]
        raise Error("unknown-model", "the session has no model of that number")

    def _describe(self, number: int) -> wire.Message:
        name, model = self._models[number]
        return {"name": name, "number": number, "inputs": getattr(model, "inputs", None)}

    # Tensors in values

    def _resolve(self, data: bytes) -> Any:
        """A numpy array (a memoryview where there is no numpy) over the memory that a checked handle names."""
        handle = tensors.decode(data)
        ours = self._heap.arenas.get(handle.arena)
        if ours is None:
            arena, size = self._theirs.find(handle)
        else:
            arena, size = ours, tensors.check(handle, ours.size)
        np = tensors.numpy()
        if np is not None:
            array = arrays.view(np, arena, handle.offset, handle.dtype, handle.shape, handle.strides)
            if array.nbytes:
                self._lent.append((arena, handle, array))
            return array
        if handle.strides is not None:
            raise tensors.BadTensor("a tensor with strides needs numpy in the service")
        return tensors.buffer(memoryview(arena.map)[handle.offset : handle.offset + size], handle.dtype, handle.shape)

    def _export(self, value: Any) -> Any:
        """A result's array or tensor, copied once into our arena."""
        found = arrays.scalar(value)
        if found is value and not arrays.is_array(value):
            made = self._runtime.arrays(value)
            found = value if made is None else made
        found = arrays.words(found)
        if isinstance(found, (int, float, str, bytes, list)):
            return found
        handle = arrays.store(self._heap, found)
        if handle is None:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise TypeError(f"the result holds a {kind}, which is neither a plain value nor a tensor")
        self._exported.append(handle)
        return of_handle(tensors.encode(handle))

    # Errors and cancellation

    def _error(self, e: BaseException) -> Error:
        if type(e) is Cancel:
            return Error("cancelled", "the call was cancelled")
        # An exception is the app's object: what is asked of it may raise whatever there is, and hold what is no text.
        tb = BaseException.__dict__["__traceback__"].__get__(e)
        while tb is not None and os.path.dirname(tb.tb_frame.f_code.co_filename) == _HERE:
            tb = tb.tb_next  # no frame of ours above the app's
        said = _told(lambda: str(e), "(its message cannot be shown)")
        text = _told(
            lambda: "".join(traceback.format_exception(type(e), e, tb)),
            f"{''.join(traceback.format_tb(tb))}(the exception cannot be shown)\n",
        )
        missing = _told(lambda: hints.hint(e, self._orders) or "" if self._orders else "", "")
        if missing:
            text += f"{missing}\n"
        name = _told(lambda: type.__dict__["__name__"].__get__(type(e)), "Exception")
        return Error("remote", said[:MAX_TRACEBACK], type=name, traceback=text[-MAX_TRACEBACK:])

    def _listen(self, pipe: int) -> None:
        """Have the kernel interrupt this thread, by SIGIO, when the client writes the number of a cancelled call.

        A second thread would cost every call; the signal costs those that are cancelled. fcntl(2), F_SETOWN_EX.
        """
        self._cancel = pipe
        os.set_blocking(pipe, False)
        signal.signal(signal.SIGIO, self._interrupt)
        fcntl.fcntl(pipe, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
        self._interrupt(signal.SIGIO, None)  # what was written before

    def _interrupt(self, number: int, frame: Optional[FrameType]) -> None:
        with suppress(BlockingIOError):
            while self._cancel is not None:
                data = os.read(self._cancel, 4096)
                if not data:
                    break
                self._cancelled.update([id for (id,) in CANCEL.iter_unpack(data[: len(data) // 8 * 8])])
        current = self._current
        if current in self._cancelled:
            self._current = 0
            raise Cancel
        if not current:
            return
        # Another one may come between any two lines here: what it adds must stay.
        self._cancelled.difference_update([id for id in tuple(self._cancelled) if id <= current])


def _alone() -> int:
    """What getrefcount says of an object that nobody else refers to, asked as `Session._part` does."""
    kept = [(0, 0, object())]
    _, _, array = kept.pop()
    return sys.getrefcount(array)


_ALONE = _alone()


def _told(ask: Callable[[], str], otherwise: str) -> str:
    try:
        return str.__str__(ask()).encode("utf-8", "backslashreplace").decode()
    except BaseException:
        return otherwise


def preload(name: str) -> None:
    """Import a module, or call a "module:function" without arguments."""
    if ":" in name:
        find(name)()
    else:
        importlib.import_module(name)


def find(target: Any) -> Callable[..., Any]:
    """The function "module:function", imported from the pocket's directory first, with which sys.path begins."""
    module, _, attribute = target.partition(":") if type(target) is str else ("", "", "")
    if not module or not attribute:
        raise Error("bad-request", f"{str(target)[:80]!r} names no function; write module:function")
    found: Any = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    if not callable(found):
        raise TypeError(f"{target} is not callable")
    function: Callable[..., Any] = found
    return function
