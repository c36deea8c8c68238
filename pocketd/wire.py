"""The format of every message: a msgpack map with a version, an operation and an id.

Requests are {"v", "op", "id", ...}; a reply repeats the id and has either "ok": True with results or "error": {"code",
"message", "detail"}. Errors of this shape become `Error` and travel in both directions. Nothing received is unpickled
or evaluated; maps have string keys, nesting and lengths are bounded, and unknown keys are left alone so that a newer
peer can say more. Strings carry paths too, whatever their bytes are (PEP 383).

Used by the daemon, the client library and what runs inside services: standard library and msgpack only.
"""

from __future__ import annotations

import socket
from typing import Any, Dict, Iterable, Optional, Tuple

import msgpack

from nsutil import messages
from nsutil.messages import Fds, MessageError

# What this side understands. A message says by "v" which version it takes to understand it, the lowest that does: so
# the pocketd, command and client library of one version serve the inits, templates and workers of the one before, which
# go on when another is installed over them, and are served by it.
VERSION = 1
OLDEST = 1

Message = Dict[str, Any]


class Error(Exception):
    """A failure that travels: a code for programs, a message for people, details for both."""

    def __init__(self, code: str, message: str, **detail: Any):
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
        detail.pop("code", None), detail.pop("message", None)
        return cls(str(value.get("code", "unknown")), str(value.get("message", "")), **detail)


def pack(message: Message) -> bytes:
    packed: bytes = msgpack.packb({"v": OLDEST, **message}, use_bin_type=True, unicode_errors="surrogateescape")
    return packed


def unpack(body: bytes) -> Message:
    """The message in `body`. Raises MessageError when it is none, or of a version that is not spoken here."""
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0, unicode_errors="surrogateescape")
    except Exception as e:  # msgpack raises ValueError, its own types, and RecursionError in its Python form
        raise MessageError(f"not msgpack: {type(e).__name__}: {e}") from None
    if not isinstance(message, dict) or not all(isinstance(k, str) for k in message):
        raise MessageError("not a map with string keys")
    version = message.get("v")
    if not isinstance(version, int) or not OLDEST <= version <= VERSION:
        raise MessageError(f"version {version!r} of the protocol; this side understands {OLDEST} to {VERSION}")
    return message


def send(sock: socket.socket, message: Message, fds: Iterable[int] = (), flags: int = 0) -> None:
    """Send one message; descriptors stay the caller's."""
    messages.send(sock, pack(message), fds, flags)


def receive(sock: socket.socket, flags: int = 0) -> Tuple[Message, Fds]:
    """Receive one message and its descriptors, which the caller owns. Raises EOFError, MessageError, OSError."""
    body, fds = messages.receive(sock, flags)
    try:
        return unpack(body), fds
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
