"""Init's part in pockets' templates, which are not trusted: what one says is a hint, and the kernel says what is.

A pocket's template is born as a worker is, in a pid namespace of its own, and forks there by itself. So a session that
comes from it has no pause: it ends with the processes of its leaf. A child of such a template is init's too; it is
known by its cgroup, whatever was said of it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, Optional

from nsutil import clone, messages, mounts, namespaces
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime.children import Session, Template, is_child, output_pipe, processes_of
from runtime.held import OVERDUE

WALL = 0x40000000  # wait4(2)
_COARSE = 5  # CLOCK_REALTIME_COARSE, of which files' times are taken
_LINGER = 0.5  # seconds after which it is looked whether a leaf is empty
_WORDS = 64  # messages of an ended worker's template that are heard for its sake
# What a template says of itself when it is ready: for people.
_FACTS = ("seconds", "threads", "variables", "files", "unsure", "noted", "working_set", "run")
# What a template may say: bounded, since its program says it.
WORDS = wire.Bounds(32 * 1024, 4, 400)


class Holding:
    """Those methods of Init that are about pockets' templates."""

    templates: Dict[int, Template]
    sessions: Dict[str, Session]
    launching: Dict[int, Any]
    pauses: Dict[int, Any]
    launches: int
    watch: Callable[..., None]
    unwatch: Callable[[int], None]
    hear_worker: Callable[[Session], None]
    tell: Callable[..., None]
    fail: Callable[[Session, Error], None]
    kill: Callable[[Session], None]
    born: Callable[[Session, int, int], None]
    over: Callable[[Session], None]
    died: Callable[[Session, int], None]
    reap: Callable[[], None]
    take_pause: Callable[[], clone.Child]
    refuse_when_stopping: Callable[[], None]
    hear_errors: Callable[[Template], None]
    refuse_template: Callable[[Template, Any], None]
    lose: Callable[[Template], None]

    # -- a template

    def on_hold(self, message: Message, fds: Fds) -> None:
        """Make a pocket's template: a worker of template `parent`, in which its pocket's code is held."""
        self.refuse_when_stopping()
        parent = self.templates.get(message["parent"])
        if not parent or not parent.ready:
            raise Error("no-template", f"template {message['parent']} is not ready")
        leaf, orders = fds.take(), fds.take()
        ours, theirs = messages.pair()
        out, err = output_pipe()
        t = Template(message["template"], "pocket", message.get("note", {}), ours, out, message["id"])
        try:
            t.pause = self.take_pause()
            self.launches += 1
            self.launching[self.launches] = t
            request = {"op": "fork", "launch": self.launches, "host_network": message["host_network"]}
            wire.send(parent.talk, request, [leaf, t.pause.pidfd, theirs.fileno(), orders, err, *fds])
        except BaseException:
            ours.close()
            os.close(out)
            self.launching.pop(self.launches, None)
            self.end_pause(t)
            self.pause_over(t)
            raise
        finally:
            theirs.close()
            for fd in (err, leaf, orders):
                os.close(fd)
        ours.setblocking(False)  # it may not read
        self.templates[t.number] = self.pauses[t.pause.pid] = t
        self.hear_errors(t)
        self.watch(ours.fileno(), lambda: self.hear_held(t))

    def hear_held(self, t: Template) -> bool:
        """One message of a pocket's template, or of a child that it has just made. False when there is none."""
        try:
            if t.namespace < 0:
                return self.hear_of_layers(t)
            if messages.carries(t.talk):
                raise MessageError("a pocket's template sends no descriptors")
            message, fds = wire.receive(t.talk, socket.MSG_DONTWAIT, WORDS)
            fds.rest()
        except BlockingIOError:
            return False
        except (EOFError, OSError, MessageError):
            self.lose(t)
            return False
        operation = message.get("op")
        if operation == "ready" and t.ready is None:
            t.ready = {key: message.get(key) for key in _FACTS}
            self.tell({"id": t.request, "ok": True, "pid": t.pid, **t.ready})
            t.request = None
            for fd in t.printed:
                os.close(fd)
            t.printed = []
        elif operation == "failed" and t.ready is None and t.request is not None:
            self.refuse_template(t, message.get("error"))
        elif operation == "uncover" and t.layers:
            self.uncover(t)
        elif operation in ("forked", "refused"):
            number = message.get("launch")
            session = self.launching.get(number) if isinstance(number, int) else None
            if isinstance(session, Session) and session.template == t.number:
                del self.launching[session.launch]
                if operation == "forked":
                    self.look_for(session)
                else:
                    session.early = None
                    said = Error.unwire(message.get("error"))
                    code = "outdated" if said.code == "outdated" else "held"
                    self.fail(session, Error(code, said.message[:1000]))
        return True

    def hear_of_layers(self, t: Template) -> bool:
        """Up to its namespace it is our own code that speaks, before it gives up its privileges (worker.lay_over)."""
        message, fds = wire.receive(t.talk, socket.MSG_DONTWAIT, WORDS)
        with fds:
            operation = message.get("op")
            if operation == "failed":
                self.refuse_template(t, message.get("error"))
            elif operation == "printed":
                t.printed = fds.rest()
            elif operation == "layer":
                t.layers.append(fds.rest())
            else:
                t.namespace = fds.take()
        return True

    def on_overdue(self, message: Message, fds: Fds) -> None:
        """Ask a template that takes too long where it is; it says so as it fails (runtime.held)."""
        t = self.templates.get(message["template"])
        if t and t.kind == "pocket" and t.pid and t.request is not None:
            os.kill(t.pid, OVERDUE)  # not reaped yet, so it is no other's pid

    def uncover(self, t: Template) -> None:
        """Take off the topmost layer of what a template's rehearsals have written, in its mount namespace."""
        layer = t.layers.pop()
        child = clone.fork()
        if child is None:
            try:
                namespaces.setns(t.namespace, namespaces.CLONE_NEWNS)
                for fd in layer:
                    os.fchdir(fd)  # by no path: those are its program's
                    mounts.unmount(".")
                os._exit(0)
            finally:
                os._exit(1)
        for fd in layer:
            os.close(fd)
        os.close(child.pidfd)
        done = os.waitpid(child.pid, WALL)[1] == 0
        try:
            wire.send(t.talk, {"op": "uncovered", "done": done})
        except OSError:
            self.lose(t)

    def end_held(self, t: Template) -> None:
        """A pocket's template is not to be any more; one that broke the protocol does not end by itself."""
        if t.pid:
            os.kill(t.pid, signal.SIGKILL)  # not reaped yet, so it is no other's pid
        self.end_pause(t)

    def end_pause(self, t: Template) -> None:
        """End a template's pid namespace, once nothing of its sessions is in it."""
        if t.pause and not t.pause_ended and not any(s.template == t.number for s in self.sessions.values()):
            t.pause_ended = True
            try:
                signal.pidfd_send_signal(t.pause.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def pause_over(self, t: Template) -> None:
        for fd in (*(fd for layer in t.layers for fd in layer), *t.printed, t.namespace):
            if fd >= 0:
                os.close(fd)
        t.layers, t.printed, t.namespace = [], [], -1
        if t.pause:
            os.close(t.pause.pidfd)
            t.pause = None

    # -- its sessions

    def launch_held(
        self, t: Template, s: Session, shown: int, session_fd: int, mode: str, marks: Any = (), slot: bool = False
    ) -> None:
        """Have a pocket's template make a worker, or a slot, whose socket is `session_fd`. `shown` is the session's
        leaf as the template may have it. In client mode it prints into a pipe of ours."""
        s.events = os.open("cgroup.events", os.O_RDONLY | os.O_CLOEXEC, dir_fd=s.leaf)
        populated(s)  # from here on a change is told
        self.watch(s.events, lambda: self.leaf_changed(s), select.EPOLLPRI)
        passed, out = [shown, session_fd], -1
        try:
            if mode == "client":
                s.output, out = output_pipe()
                self.hear_worker(s)
                passed.append(out)
            wire.send(t.talk, {"op": "fork", "launch": s.launch, "slot": slot, "marks": marks}, passed)
        except OSError as e:
            self.fail(s, Error("held", f"template {t.number} does not take a launch: {e}"))
        finally:
            if out >= 0:
                os.close(out)

    def hand_back(self, s: Session, error: Error) -> None:
        """A pocket's template has made no worker for a launch: pocketd has the caller's sockets still and goes another
        way, so the caller hears nothing, and the session's id is free at once."""
        code = "outdated" if error.code == "outdated" else "held"
        self.tell({"id": s.request, "error": Error(code, error.message).wire()})
        s.request = None
        if s.hold:
            self.unwatch(s.hold.fileno())
            s.hold.close()  # not shut down, and not the last
            s.hold = None
        self.launching.pop(s.launch, None)
        del self.sessions[s.id]
        s.id = f"{s.id}-{s.launch}"
        self.sessions[s.id] = s
        s.deadline = time.monotonic() + _LINGER
        self.kill(s)

    def linger(self, s: Session) -> None:
        """One handed back is not over yet: of a leaf that pocketd has removed meanwhile nothing may be told."""
        s.deadline = time.monotonic() + _LINGER
        self.leaf_changed(s)

    def look_for(self, s: Session) -> None:
        """A template says that it has forked: the child of ours in the session's leaf, if there is one."""
        if not s.early:
            for pid in processes_of(s.leaf):
                if is_child(pid):
                    self.born(s, pid, os.pidfd_open(pid))
                    return
            self.reap()  # it may have ended already
        self.born_early(s)

    def born_early(self, s: Session) -> None:
        if s.early:
            pid, status = s.early
            self.born(s, pid, -1)
            self.died(s, status)
        elif not s.pid and not populated(s):
            self.fail(s, Error("held", f"template {s.template} said that it had forked, and had not"))
        # Else it is about to end, and is in no list any more, nor to be reaped yet: `claim` or `leaf_changed` follows.

    def held_waits(self) -> bool:
        """Whether a session waits for a worker of a pocket's template, so that strangers' cgroups are of interest."""
        return any(s.events >= 0 and not s.pid for s in self.sessions.values())

    def claim(self, pid: int, status: int, cgroup: Optional[str]) -> bool:
        """A child of ours that is nobody's yet has ended: is it the worker of a session that is being launched?"""
        for s in list(self.sessions.values()):
            if s.events >= 0 and not s.pid and s.note.get("leaf") == cgroup:
                s.early = pid, status
                t = self.templates.get(s.template)
                for _ in range(_WORDS):  # what it said before it ended; it may say more without end
                    if not (t and s.launch in self.launching and self.hear_held(t)):
                        break
                if self.launching.pop(s.launch, None):
                    self.fail(s, Error("held", "its worker ended before the session went on"))
                elif not s.pid and not s.ended:
                    self.born_early(s)
                return True
        return False

    def leaf_changed(self, s: Session) -> None:
        """The leaf of a session without a pause has become empty, or is not any more."""
        if populated(s):
            return
        if s.pid and s.status is None:
            self.reap()  # its worker was the last
            if s.status is None:
                return  # it leaves its cgroup before it can be reaped (do_exit): SIGCHLD follows
        elif not s.pid and not s.ended and s.launch not in self.launching:
            self.reap()
            if not s.ended:
                self.born_early(s)
        if s.id in self.sessions and s.launch not in self.launching:
            self.over(s)

    def kill_leaf(self, s: Session) -> None:
        with suppress(OSError):  # pocketd has removed it, since it was empty
            fd = os.open("cgroup.kill", os.O_WRONLY | os.O_CLOEXEC, dir_fd=s.leaf)
            os.write(fd, b"1")
            os.close(fd)
        if not populated(s):
            self.leaf_changed(s)

    def held_over(self, s: Session) -> None:
        """A session without a pause is over."""
        self.unwatch(s.events)
        os.close(s.events)
        s.events = -1
        for t in held_templates(self.pauses.values()):
            if t.number == s.template and t.number not in self.templates:
                self.end_pause(t)
            elif t.number == s.template and not any(runs(other, t) for other in self.sessions.values()):
                # A slot may be given a session just now: what that writes is not older than this tick of the clock.
                now = time.clock_gettime(_COARSE)
                with suppress(OSError):  # one that does not read is found out by its next launch
                    wire.send(t.talk, {"op": "tidy", "until": now})


def runs(s: Session, t: Template) -> bool:
    """Whether a session is a run from this template, and no slot that waits for one."""
    return s.template == t.number and not s.note.get("slot")


def held_templates(holders: Iterable[Any]) -> Iterable[Template]:
    return [t for t in holders if isinstance(t, Template)]


def populated(s: Session) -> bool:
    try:
        return b"populated 1" in os.pread(s.events, 4096, 0).splitlines()
    except OSError:
        return False  # removed
