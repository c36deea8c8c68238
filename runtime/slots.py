"""Init's part in slots: workers made ahead of time, which wait for the session that they are for.

pocketd has the other end of the socket on which a slot waits, and gives it its session there. Here a slot is a session
that has no caller yet, until pocketd says whose it is.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Callable, Dict

from nsutil import clone
from nsutil.messages import Fds
from pocketd import wire
from pocketd.wire import Error, Message
from runtime.children import Session, Template, output_pipe

FORK_TIMEOUT = 20.0  # seconds, as for any launch


class Slots:
    """Those methods of Init that are about slots."""

    templates: Dict[int, Template]
    sessions: Dict[str, Session]
    launching: Dict[int, Any]
    pauses: Dict[int, Any]
    launches: int
    watch: Callable[..., None]
    tell: Callable[..., None]
    fail: Callable[[Session, Error], None]
    take_pause: Callable[[], clone.Child]
    refuse_when_stopping: Callable[[], None]
    launch_held: Callable[..., None]
    hear_caller: Callable[[Session], None]
    hear_worker: Callable[[Session], None]
    hand_back: Callable[[Session, Error], None]
    hold_of: Callable[[int], socket.socket]

    def on_slot(self, message: Message, fds: Fds) -> None:
        """Make a worker ahead of time. Answered when it is born."""
        self.refuse_when_stopping()
        t = self.templates.get(message["template"])
        if not t or not t.ready:
            raise Error("no-template", f"template {message['template']} is not ready")
        # From a pocket's template: its leaf again, as the template may have it, in place of orders.
        leaf, waits, orders = fds.take(), fds.take(), fds.take()
        try:
            pause = None if t.kind == "pocket" else self.take_pause()
        except OSError:
            for fd in (leaf, waits, orders):
                os.close(fd)
            raise
        self.launches += 1
        deadline = time.monotonic() + FORK_TIMEOUT
        s = Session(
            message["slot"], message["note"], t.number, pause, None, leaf, message["id"], deadline, self.launches
        )
        self.sessions[s.id] = self.launching[s.launch] = s
        out = -1
        try:
            if pause is None:
                self.launch_held(t, s, orders, waits, message["mode"], slot=True)
                return
            self.pauses[pause.pid] = s
            passed = [leaf, pause.pidfd, waits, orders, *fds]
            if message["mode"] == "client":
                s.output, out = output_pipe()
                self.hear_worker(s)
                passed.insert(4, out)
            request = {"op": "fork", "launch": s.launch, "host_network": message["host_network"]}
            wire.send(t.talk, request, passed)
        except OSError as e:
            self.fail(s, Error("template", f"template {t.number} is gone: {e}"))
        finally:
            for fd in (waits, orders, out):
                if fd >= 0:
                    os.close(fd)

    def on_assign(self, message: Message, fds: Fds) -> None:
        """A slot is a session from now on, with a caller who holds it."""
        hold_fd = fds.take()
        s = self.sessions.get(message["slot"])
        try:
            if not s or not s.pid or s.status is not None or s.hold:
                raise Error("held", "that slot is gone")
            if message["session"] in self.sessions:
                raise Error("bad-request", "there is a session of that name")
            hold = self.hold_of(hold_fd)
        except Error:
            os.close(hold_fd)
            raise
        del self.sessions[s.id]
        s.id, s.note, s.hold, s.started = message["session"], message["note"], hold, time.time()
        self.sessions[s.id] = s
        self.watch(hold.fileno(), lambda: self.hear_caller(s))
        self.tell({"id": message["id"], "ok": True, "pid": s.pid})

    def on_release(self, message: Message, fds: Fds) -> None:
        """A slot that cannot serve the session it was given: that goes another way, and the slot ends."""
        s = self.sessions.get(message["session"])
        if not s or s.status is not None:
            raise Error("held", "that slot is gone")
        s.request = message["id"]
        self.hand_back(s, Error("held", "it is handed back"))
