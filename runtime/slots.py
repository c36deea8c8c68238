"""Init's part in slots: workers made ahead of time, which wait for the session that they are for.

A slot has all that a worker has but what is its caller's own. It listens on a socket whose other end is here; the
session's socket is sent to it there, once, and it never serves a second one.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any, Callable, Dict

from nsutil import clone, messages
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime.children import Session, Template

WORDS = wire.Bounds(4 * 1024, 4, 32)


class Slots:
    """Those methods of Init that are about slots. A slot is a session whose `waits` is our end of its socket."""

    templates: Dict[int, Template]
    sessions: Dict[str, Session]
    launching: Dict[int, Any]
    pauses: Dict[int, Any]
    launches: int
    watch: Callable[..., None]
    unwatch: Callable[[int], None]
    tell: Callable[..., None]
    fail: Callable[[Session, Error], None]
    kill: Callable[[Session], None]
    take_pause: Callable[[], clone.Child]
    refuse_when_stopping: Callable[[], None]
    launch_held: Callable[[Template, Session, int, int], None]
    hear_caller: Callable[[Session], None]
    hold_of: Callable[[int], socket.socket]

    def on_slot(self, message: Message, fds: Fds) -> None:
        """Make a worker ahead of time. Answered when it is born; `slot-ready` follows when it waits."""
        self.refuse_when_stopping()
        t = self.templates.get(message["template"])
        if not t or not t.ready:
            raise Error("no-template", f"template {message['template']} is not ready")
        leaf, orders = fds.take(), fds.take()  # from a pocket's template: the leaf again, as that may have it
        held = t.kind == "pocket"
        try:
            pause = None if held else self.take_pause()
        except OSError:
            os.close(leaf)
            os.close(orders)
            raise
        ours, theirs = messages.pair()
        self.launches += 1
        deadline = time.monotonic() + message["timeout_s"]
        s = Session(
            message["slot"], message["note"], t.number, pause, None, leaf, message["id"], deadline, self.launches
        )
        s.waits = ours
        ours.setblocking(False)
        self.sessions[s.id] = self.launching[s.launch] = s
        self.watch(ours.fileno(), lambda: self.hear_slot(s))
        try:
            if pause is None:
                self.launch_held(t, s, orders, theirs.fileno())
                return
            self.pauses[pause.pid] = s
            request = {"op": "fork", "launch": s.launch, "host_network": message["host_network"]}
            wire.send(t.talk, request, [leaf, pause.pidfd, theirs.fileno(), orders, *fds])
        except OSError as e:
            self.fail(s, Error("template", f"template {t.number} is gone: {e}"))
        finally:
            theirs.close()
            os.close(orders)

    def hear_slot(self, s: Session) -> None:
        """What a worker says that waits, or has just been given its session: a few words of no consequence."""
        assert s.waits
        try:
            if messages.carries(s.waits):
                raise MessageError("a slot sends no descriptors")
            message, fds = wire.receive(s.waits, socket.MSG_DONTWAIT, WORDS)
            fds.rest()
        except BlockingIOError:
            return
        except (EOFError, OSError, MessageError):
            self.drop_waits(s)
            if s.request is not None:
                self.answer(s, Error("held", "it ended while it waited"))
            self.kill(s)
            return
        operation = message.get("op")
        if operation == "waiting":
            self.tell({"op": "slot-ready", "session": s.id})
        elif operation == "failed" and s.request is not None:
            self.answer(s, Error.unwire(message.get("error")))
        elif operation == "taken":
            self.drop_waits(s)
            self.answer(s, None)
        elif operation == "refused":
            self.drop_waits(s)
            self.answer(s, Error("held", Error.unwire(message.get("error")).message[:1000]))
            self.kill(s)

    def answer(self, s: Session, error: Any) -> None:
        """Answer the request for which this worker was given a session."""
        if s.request is not None:
            self.tell(
                {"id": s.request, "error": error.wire()} if error else {"id": s.request, "ok": True, "pid": s.pid}
            )
            s.request = None

    def drop_waits(self, s: Session) -> None:
        if s.waits:
            self.unwatch(s.waits.fileno())
            s.waits.close()
            s.waits = None

    def on_assign(self, message: Message, fds: Fds) -> None:
        """Give a waiting worker its session, whose id it has from now on."""
        session_fd, hold_fd = fds.take(), fds.take()
        s = self.sessions.get(message["slot"])
        try:
            if not s or not s.waits or not s.pid or s.status is not None or s.request is not None:
                raise Error("held", "that slot is gone")
            hold = self.hold_of(hold_fd)
            hold_fd = -1
            del self.sessions[s.id]
            s.id, s.note, s.hold, s.started = message["session"], message["note"], hold, time.time()
            self.sessions[s.id] = s
            self.watch(hold.fileno(), lambda: self.hear_caller(s))
            s.request = message["id"]
            try:
                wire.send(s.waits, {"op": "session"}, [session_fd])
            except OSError as e:
                self.drop_waits(s)
                self.answer(s, Error("held", f"that slot is gone: {e}"))
                self.kill(s)
        finally:
            os.close(session_fd)
            if hold_fd >= 0:
                os.close(hold_fd)
