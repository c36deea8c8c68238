"""A worker's side of a slot: all is done but what is its caller's own, and it waits for the session it will serve."""

from __future__ import annotations

import os
import socket

from nsutil.messages import MessageError
from pocketd import wire
from runtime.trace import Trace


def wait(sock: socket.socket, trace: Trace) -> socket.socket:
    """Say that we wait, and wait. Returns the session's socket; `sock` stays open, for the answer. Ends the process
    when nobody will come."""
    try:
        wire.send(sock, {"op": "waiting"})
        message, fds = wire.receive(sock)
        trace.mark("the slot has its session")
        trace.take(message.get("marks"))
    except (EOFError, OSError, MessageError):
        os._exit(0)
    return socket.socket(fileno=fds.take())
