"""The floor of a round trip: a bare msgpack echo on SEQPACKET between two processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack

from nsutil import messages

# What a call of a session that has no arguments sends and gets.
REQUEST = {"v": 1, "op": "call", "id": 1, "target": "null:null", "args": [], "kwargs": {}}
REPLY = {"v": 1, "id": 1, "ok": True, "value": None}
_START = "import socket; from bench import echo; echo.serve(socket.socket(fileno={fd}))"


@contextmanager
def echo() -> Iterator[Callable[[], Any]]:
    """A function that makes one round trip to another process."""
    ours, theirs = messages.pair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _START.format(fd=theirs.fileno())],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            pack, unpack, send, receive = msgpack.packb, msgpack.unpackb, ours.send, ours.recv

            def trip() -> Any:
                send(pack(REQUEST))
                return unpack(receive(65536))

            trip()
            yield trip
        finally:
            ours.close()
            process.wait(30)


def serve(sock: socket.socket) -> None:
    pack, unpack, send, receive = msgpack.packb, msgpack.unpackb, sock.send, sock.recv
    while body := receive(65536):
        unpack(body)
        send(pack(REPLY))
