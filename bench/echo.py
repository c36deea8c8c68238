"""The floor of a round trip: a bare msgpack echo on SEQPACKET between two processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack

from bench.partner import partner

# What a call of a session that has no arguments sends and gets.
REQUEST = {"v": 1, "op": "call", "id": 1, "target": "null:null", "args": [], "kwargs": {}}
REPLY = {"v": 1, "id": 1, "ok": True, "value": None}


@contextmanager
def echo() -> Iterator[Callable[[], Any]]:
    """A function that makes one round trip to another process."""
    with partner("echo") as (ours, _):
        pack, unpack, send, receive = msgpack.packb, msgpack.unpackb, ours.send, ours.recv

        def trip() -> Any:
            send(pack(REQUEST))
            return unpack(receive(65536))

        trip()
        yield trip


def serve(sock: socket.socket) -> None:
    pack, unpack, send, receive = msgpack.packb, msgpack.unpackb, sock.send, sock.recv
    while body := receive(65536):
        unpack(body)
        send(pack(REPLY))
