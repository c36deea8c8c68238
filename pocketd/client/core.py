"""A session's client side without any waiting: what to send, and what a received message means.

The blocking form (session.py) and the asyncio form (aio.py) differ in how they wait and in nothing else. `Core` reads
and writes no socket.

The session's protocol. Client to worker, after `start`:
    hello   once, with the read end of a pipe: numbers of cancelled calls, 8 bytes each
    arena   {arena: number} with one memfd; no reply
    call    {id, target: "module:function", args, kwargs}
    model   {id, model: number or name, method: name or None, args, kwargs}
    load    {id, path}                        reply value: a model's description
Each of the last three may carry `free` ([[arena, offset], ...]: the worker's ranges that are no longer used here) and
`drop` (the client's arenas that it gave up). Worker to client: `ready` or `failed` once, `arena`, and replies: {id, ok,
value} or {id, error}, with `drop` for the worker's arenas.
"""

from __future__ import annotations

import collections
import os
import struct
import sys
from contextlib import suppress
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

from nsutil import messages
from nsutil.messages import Fds, MessageError
from pocketd import arrays, tensors, wire
from pocketd.arena import RESTING, Arenas, Heap
from pocketd.client import errors
from pocketd.client.tensor import Block, Tensor, view_of
from pocketd.values import Format, of_handle

CLIENT_PARITY, WORKER_PARITY = 1, 0
CANCEL = struct.Struct("<Q")
LONGEST = 2_000_000.0  # seconds
_NOTHING: List[Any] = []


def limited(timeout: Optional[float]) -> Optional[float]:
    """A time-out as it can be waited for: one beyond poll(2)'s longest, of 24 days, is none. Raises ValueError."""
    if timeout is None or timeout > LONGEST:
        return None
    if timeout != timeout:
        raise ValueError("the time-out is not a number")
    return timeout


Outgoing = Tuple[bytes, Optional[int]]
"""A packed message and its descriptor, which whoever sends it closes."""

Reply = Tuple[int, Any, Optional[errors.PocketError]]
"""The end of one call: its number, its value, and its error, which is None when it went well."""


class Core:
    """State of one session: its arenas, its calls in flight, its models. Not for two threads at once.

    Tensors may be dropped by any thread at any time; everything else is called by one thread at a time.
    """

    def __init__(self, login: Optional[Dict[str, Any]] = None) -> None:
        """`login`: pocketd's reply to it."""
        self._login = login or {}
        self.ready: Optional[Dict[str, Any]] = None
        self.pid = os.getpid()
        self._heap = Heap(CLIENT_PARITY)
        self._theirs = Arenas(WORKER_PARITY)
        self._freed: Deque[Tuple[int, int]] = collections.deque()
        self._format = Format(self._export, self._resolve)
        # What a call refers to stays allocated until the worker has answered, also when nobody waits any more.
        self._calls: Dict[int, List[Any]] = {}
        self._abandoned: Dict[int, bool] = {}
        self._last = 0
        self._closed = False
        self._keep: List[Any] = _NOTHING

    # Sending

    def request(self, message: Dict[str, Any]) -> Tuple[int, List[Outgoing]]:
        """Number a request, which this takes over: its number, and the messages to send in order. Raises
        errors.PocketError."""
        self._check_process()
        frees = self._collect() if self._freed else []
        if self._heap.resting >= RESTING:
            self._heap.relax()
        self._last = id = self._last + 1
        message["v"] = wire.OLDEST
        message["id"] = id
        if frees:
            message["free"] = frees
        if self._heap.dropped:
            message["drop"], self._heap.dropped = self._heap.dropped, []
        keep: List[Any] = []
        self._keep = keep
        try:
            body = self._format.pack(message)
            if len(body) > messages.MAX_BODY:
                raise errors.BadValue(
                    f"the call's values take {len(body)} bytes; at most {messages.MAX_BODY} travel, more as a tensor"
                )
        except BaseException as e:
            # Nothing was sent, so the worker still holds what it was to be told of.
            self._freed.extend((a, o) for a, o in frees)
            self._heap.dropped[:0] = message.get("drop", ())
            raise errors.of(e) if isinstance(e, wire.Error) else e from None
        finally:
            self._keep = _NOTHING
        self._calls[id] = keep
        if not self._heap.fresh:
            return id, [(body, None)]
        announced, self._heap.fresh = self._heap.fresh, []
        named = ({"v": wire.OLDEST, "op": "arena", "arena": number} for number, _ in announced)
        arenas: List[Outgoing] = [(self._format.pack(m), fd) for m, (_, fd) in zip(named, announced)]
        return id, [*arenas, (body, None)]

    def models(self) -> Tuple[str, ...]:
        """Names of the models that this session may use."""
        return tuple(m["name"] for m in (self.ready or {}).get("models", ()))

    def model(self, name: str) -> Dict[str, Any]:
        """The description of a model that this session may use. Raises errors.UnknownModel."""
        for description in (self.ready or {}).get("models", ()):
            if description["name"] == name:
                return dict(description)
        known = ", ".join(self.models()) or "none"
        if name in self._login.get("models", ()):
            pocket = self._login.get("pocket")
            raise errors.UnknownModel(
                f"pocket {pocket} may not use model {name!r} of its service; models here: {known}; "
                f"to allow it, as root: pocket allow {pocket} model={name}",
                model=name,
            )
        raise errors.UnknownModel(f"no model {name!r} in this session; models here: {known}", model=name)

    def tensor(self, shape: Sequence[Any], dtype: Any) -> Tensor:
        """A new tensor in our own arena, its contents undefined; a shape and a dtype may be numpy's. Raises
        errors.BadTensor."""
        self._check_process()
        if self._closed:
            raise errors.SessionClosed("the session is closed")
        if not isinstance(dtype, str) and tensors.numpy() is not None:
            with suppress(TypeError):
                dtype = tensors.numpy().dtype(dtype).name
        shape = tuple(n.__index__() if hasattr(n, "__index__") and type(n) is not bool else n for n in shape)
        try:
            size = tensors.nbytes(dtype, shape)
            self._return_own()
            arena, offset = self._heap.allocate(size)
        except tensors.BadTensor as e:
            raise errors.of(e) from None
        return Tensor(Block(arena, offset, self._freed), dtype, shape, size)

    def _check_process(self) -> None:
        if os.getpid() != self.pid:
            raise errors.SessionClosed(
                "this session belongs to the process that this one was forked from; log in again"
            )

    # Receiving

    def feed(self, body: bytes, fds: Fds) -> Optional[Reply]:
        """Take in one message; the reply that it is, if somebody still waits for it.

        `fds` are consumed. Raises errors.ProtocolError for what the worker must not send (the session is then over),
        and the error with which the worker reports that it failed to start.
        """
        try:
            message = self._format.unpack(body)
            id = message.get("id")
            if id in self._calls and fds is messages.NONE:
                return self._finish(id, message)
            self._notice(message, fds)
            return None
        except MessageError as e:
            raise errors.ProtocolError(f"the worker sent what is no message: {e}") from None
        finally:
            if fds is not messages.NONE:
                fds.close()

    def _notice(self, message: Dict[str, Any], fds: Fds) -> None:
        """A message that is no reply."""
        op = message.get("op")
        if op == "arena" and type(message.get("arena")) is int and len(fds) == 1:
            try:
                self._theirs.receive(message["arena"], next(iter(fds)))
            except tensors.BadTensor as e:
                raise errors.ProtocolError(f"the worker announced an arena wrongly: {e.message}") from None
        elif op == "ready" and self.ready is None:
            self.ready = message
        elif op == "failed":
            raise errors.of(wire.Error.unwire(message.get("error")), errors.ServiceFailed)
        else:
            raise errors.ProtocolError("the worker sent a message that is none of this protocol")

    def _finish(self, id: int, message: Dict[str, Any]) -> Optional[Reply]:
        del self._calls[id]
        faults = self._format.faults
        if "drop" in message:
            for dropped in message["drop"]:
                self._theirs.drop(dropped)
        if self._abandoned and self._abandoned.pop(id, False):
            return None  # its tensors, if any, die with `message`
        if faults:
            raise errors.ProtocolError(f"the worker's reply names a tensor that cannot be used: {faults[0].message}")
        if "error" in message:
            return id, None, errors.of(wire.Error.unwire(message["error"]))
        return id, message.get("value"), None

    def abandon(self, id: int) -> Optional[bytes]:
        """Nobody waits for this call any more: its late reply will be dropped, and what it holds given back then.

        Returns what to write to the cancel pipe, or None when the call is over already.
        """
        if id not in self._calls or id in self._abandoned:
            return None
        self._abandoned[id] = True
        return CANCEL.pack(id)

    def close(self) -> None:
        """The session is over. Tensors that live on keep their memory."""
        self._closed = True
        self._heap.close()
        self._theirs.close()
        self._calls.clear()

    # Tensors in values

    def _collect(self) -> List[Tuple[int, int]]:
        """Take back our own freed ranges; the worker's, to be told it."""
        theirs: List[Tuple[int, int]] = []
        freed = self._freed
        while freed:
            place = freed.popleft()
            if place[0] % 2 == CLIENT_PARITY:
                self._heap.free(*place)
            else:
                theirs.append(place)
        return theirs

    def _return_own(self) -> None:
        self._freed.extend(self._collect())

    def _export(self, value: Any) -> Any:
        """The handle of a tensor or of anything array-like, which is copied into our arena unless it lies there."""
        if type(value) is Tensor:
            block = value._block
            if block._freed is not self._freed:
                raise errors.BadTensor("the tensor belongs to another session; pass it as numpy array to copy it")
            self._keep.append(block)
            return of_handle(value.handle())
        value = arrays.scalar(value)
        np = sys.modules.get("numpy")
        if np is not None:
            if not isinstance(value, np.ndarray) and (
                hasattr(value, "__array__") or hasattr(value, "__array_interface__")
            ):
                value = np.asarray(value)
            handle = view_of(value, self._heap.arenas.values()) if isinstance(value, np.ndarray) else None
            if handle is not None:
                self._keep.append(value)  # its base keeps the block
                return of_handle(tensors.encode(handle))
        value = arrays.words(value)
        handle = arrays.store(self._heap, value)
        if handle is None:
            if not isinstance(value, (int, float, str, bytes, list)):
                raise TypeError(f"a {type(value).__name__} is neither a plain value nor a tensor")
            return value
        self._keep.append(Block(self._heap.arenas[handle.arena], handle.offset, self._freed))
        return of_handle(tensors.encode(handle))

    def _resolve(self, data: bytes) -> Tensor:
        """The tensor of a handle in a reply. It owns the range: a handle must be sent for one range only once."""
        handle = tensors.decode(data)
        arena, size = self._theirs.find(handle)
        if handle.strides is not None:
            raise tensors.BadTensor("a result is always in C order")
        return Tensor(Block(arena, handle.offset, self._freed), handle.dtype, handle.shape, size, data)
