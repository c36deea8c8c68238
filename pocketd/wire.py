"""The format of every message: a msgpack map with a version, an operation and an id.

Requests are {"v", "op", "id", ...}; a reply repeats the id and has either "ok": True with results or "error": {"code",
"message", "detail"}. Errors of this shape become `Error` and travel in both directions. Nothing received is unpickled
or evaluated; maps have string keys, nesting and lengths are bounded, and unknown keys are left alone so that a newer
peer can say more. Strings carry paths too, whatever their bytes are (PEP 383).

Used by the daemon, the client library and what runs inside services: standard library and msgpack only.
"""

from __future__ import annotations

import socket
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import msgpack

from nsutil import messages
from nsutil.messages import Fds, MessageError

# What this side understands. A message says by "v" which version it takes to understand it, the lowest that does: so
# the pocketd, command and client library of one version serve the inits, templates and workers of the one before, which
# go on when another is installed over them, and are served by it.
VERSION = 1
OLDEST = 1

Message = Dict[str, Any]


class Bounds(NamedTuple):
    """What is taken from a peer that is not trusted: bytes of a body, how deep it may be nested, how much it may hold.

    Sixteen megabytes of empty maps unpack to a gigabyte, so who serves more than one peer takes small messages alone.
    Without bounds a body has messages.MAX_BODY bytes and msgpack's own depth (1024 or less), whose cost is the
    receiver's alone: a worker's or a client's.
    """

    body: int
    depth: int
    items: int


# To pocketd, the longest being a login with two dozen mounts; and on a hold socket, to an init.
REQUEST = Bounds(128 * 1024, 8, 1000)
SIGNAL = Bounds(1024, 4, 32)


class Error(Exception):
    """A failure that travels: a code for programs, a message for people, details for both."""

    def __init__(self, code: str, message: str, /, **detail: Any):
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail: Dict[str, Any] = detail

    def wire(self) -> Message:
        return {"code": self.code, "message": self.message, "detail": self.detail}

    @classmethod
    def unwire(cls, value: Any) -> Error:
        if not isinstance(value, dict):
            return cls("protocol", "the peer sent an error of an unknown form")
        detail = value.get("detail")
        detail = {k: v for k, v in detail.items() if isinstance(k, str)} if isinstance(detail, dict) else {}
        for name in ("self", "code", "message"):
            detail.pop(name, None)
        code, message = value.get("code"), value.get("message")
        return cls(code if isinstance(code, str) else "unknown", message if isinstance(message, str) else "", **detail)


def pack(message: Message) -> bytes:
    packed: bytes = msgpack.packb({"v": OLDEST, **message}, use_bin_type=True, unicode_errors="surrogateescape")
    return packed


def unpack(body: bytes, bounds: Optional[Bounds] = None) -> Message:
    """The message in `body`. Raises MessageError when it is none, is too much, or of a version not spoken here."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0, unicode_errors="surrogateescape")
    except Exception as e:  # msgpack raises ValueError, its own types, and RecursionError in its Python form
        raise MessageError(f"not msgpack: {type(e).__name__}: {e}") from None
    if not isinstance(message, dict) or not all(isinstance(k, str) for k in message):
        raise MessageError("not a map with string keys")
    if bounds and not _within(message, bounds):
        raise MessageError(f"nested more than {bounds.depth} deep, or of more than {bounds.items} items")
    version = message.get("v")
    if type(version) is not int:
        raise MessageError("no version of the protocol")
    if not OLDEST <= version <= VERSION:
        raise MessageError(f"version {version} of the protocol; this side understands {OLDEST} to {VERSION}")
    return message


def _within(message: Message, bounds: Bounds) -> bool:
    level: List[Any] = [message]
    items = 0
    for _ in range(bounds.depth):
        items += sum(map(len, level))
        if items > bounds.items:
            return False
        inner = [value.values() if type(value) is dict else value for value in level]
        level = [value for values in inner for value in values if type(value) in (dict, list)]
        if not level:
            return True
    return False


def send(sock: socket.socket, message: Message, fds: Iterable[int] = (), flags: int = 0) -> None:
    """Send one message; descriptors stay the caller's."""
    messages.send(sock, pack(message), fds, flags)


def receive(sock: socket.socket, flags: int = 0, bounds: Optional[Bounds] = None) -> Tuple[Message, Fds]:
    """Receive one message and its descriptors, which the caller owns. Raises EOFError, MessageError, OSError."""
    body, fds = messages.receive(sock, flags, bounds.body if bounds else messages.MAX_BODY)
    try:
        return unpack(body, bounds), fds
    except BaseException:
        fds.close()
        raise


def field(message: Message, key: str, kind: type, default: Optional[Any] = ...) -> Any:
    """message[key], which must be of type `kind`. Raises Error("bad-request") naming the key otherwise."""
    value = message.get(key, default)
    if value is ...:
        raise Error("bad-request", f"the request has no {key!r}")
    if value is default:
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Error("bad-request", f"{key!r} must be {kind.__name__}, not {type(value).__name__}")
    return value
