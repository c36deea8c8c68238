"""PID 1 of a service container: parent and reaper of all in it, and the standing end of every session.

It outlives pocketd: it listens on a named socket in the runtime directory, and a new pocketd connects and asks for what
is there (`hello`). From pocketd come templates to make and launches; from each session's caller, on its *hold* socket,
signals to pass on. When the caller goes the session ends; when the worker ends its status goes to the caller at once,
and is kept for pocketd. One thread, one epoll, no time-out without a deadline that somebody set.

Processes:  template --clone3(CLONE_PARENT)--> worker, which is therefore init's child, in the pid namespace of a pause
process that is init's child too. A worker is reaped before its pause is waited for: an unreaped worker pins its pause
(zap_pid_ns_processes), and waiting the other way round is a deadlock.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
import traceback
from contextlib import suppress
from typing import Any, Callable, Dict, Optional

from nsutil import clone, messages, namespaces
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import oom
from runtime.children import NEVER, Session, Template, by_default, cgroup_of, is_stopped, output_pipe
from runtime.holding import Holding
from runtime.log import Log
from runtime.output import Output
from runtime.slots import Slots
from runtime.sockets import check_socket, credentials, hold_socket, let_go, readable
from runtime.template import OF_PAUSE
from runtime.templates import Templates

WALL = 0x40000000  # wait4(2): children whose exit signal is not SIGCHLD too
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
HELD_FORK_TIMEOUT = 3.0  # seconds for a pocket's own: the launch goes another way then
FORK_TIMEOUT = 20.0  # seconds that a template may take to fork before it is ended and the launch given up
_REAPED = 64  # children in one turn
STOP_TIMEOUT = 10.0  # seconds that sessions may take to end after SIGTERM, where pocketd has said nothing else


class Init(Templates, Holding, Slots, Output):
    def __init__(self, listener: socket.socket, log_fd: int):
        self.listener = listener
        self.log = Log(log_fd)
        self.epoll = select.epoll()
        self.handlers: Dict[int, Callable[[], object]] = {}
        self.daemon: Optional[socket.socket] = None
        self.sessions: Dict[str, Session] = {}
        self.templates: Dict[int, Template] = {}
        self.pauses: Dict[int, Any] = {}  # of sessions, and of pockets' templates
        self.unclaimed: Dict[int, int] = {}  # of which waitid told before a template named the pid
        self.launches = 0  # numbers, since a template must not learn a session's name
        self.launching: Dict[int, Any] = {}  # sessions, and pockets' templates
        self.ended: Dict[str, Message] = {}  # what pocketd has not acknowledged yet
        self.said: Dict[int, float] = {}  # by uid, when all that it wrote would have been written at LOG_RATE
        self.spare: Optional[clone.Child] = None  # the next session's pause
        self.kept: Any = None
        self.waker: Any = None  # what is written there makes for another turn
        self.running = True
        self.stop_timeout = STOP_TIMEOUT
        self.stopping: Optional[float] = None  # when the sessions that are left are ended
        self.why: Optional[Message] = None  # what callers are told then, besides their worker's status

    # -- the loop

    def watch(self, fd: int, handler: Callable[[], object], events: int = select.EPOLLIN) -> None:
        self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        if self.handlers.pop(fd, None):
            self.epoll.unregister(fd)

    def run(self) -> None:
        wake, waker = socket.socketpair()
        for s in (wake, waker):
            s.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        self.waker = waker
        self.watch(wake.fileno(), lambda: self.awake(wake))
        self.listener.listen(16)  # again, so that SO_PEERCRED of who connects names this process
        self.listener.setblocking(False)
        self.watch(self.listener.fileno(), self.accept)
        self.make_spare()
        while self.running:
            for fd, _ in self.epoll.poll(self.patience()):
                handler = self.handlers.get(fd)
                if handler:
                    try:
                        handler()
                    except Exception:
                        self.blame(fd)
            try:
                self.expire()
            except Exception:
                self.log.write("init", traceback.format_exc().encode())

    def blame(self, fd: int) -> None:
        """A fault of ours in hearing somebody: it costs that one what it has here, and nobody else anything."""
        self.log.write("init", traceback.format_exc().encode())
        for s in list(self.sessions.values()):
            if fd in (s.hold.fileno() if s.hold else -1, s.events, s.output):
                with suppress(Exception):
                    self.unwatch(fd)
                with suppress(Exception):
                    self.kill(s)
        for t in list(self.templates.values()):
            if fd in (t.talk.fileno(), t.stderr):
                with suppress(Exception):
                    self.lose(t)
        if self.daemon and fd == self.daemon.fileno():
            self.forget_daemon()  # it connects anew

    def patience(self) -> float:
        waiting = [s.deadline for s in self.sessions.values() if not s.pid and s.deadline < NEVER]
        waiting += [s.resting for s in self.sessions.values() if s.resting < NEVER]
        waiting += [t.resting for t in self.templates.values() if t.resting < NEVER]
        if self.stopping is not None:
            waiting.append(self.stopping)
        return max(0.0, min(waiting) - time.monotonic()) if waiting else -1

    def expire(self) -> None:
        now = time.monotonic()
        for s in [s for s in self.sessions.values() if s.resting <= now]:
            self.hear_worker(s)
        for t in [t for t in self.templates.values() if t.resting <= now]:
            self.hear_errors(t)
        late = [s for s in self.sessions.values() if not s.pid and s.deadline <= now]
        for s in [s for s in late if s.ended and s.request is None and s.events >= 0]:
            self.linger(s)
            late.remove(s)
        for number in {s.template for s in late}:
            self.end_template(number)
        for s in late:
            why = f"template {s.template} did not fork within {FORK_TIMEOUT:.0f} s; it was ended, and is made again"
            s.deadline = NEVER
            self.fail(s, Error("launch", why))
        if self.stopping is not None and self.stopping <= now:
            self.stopping = now + STOP_TIMEOUT
            for s in self.sessions.values():
                self.kill(s)
        if self.stopping is not None and not self.sessions:
            self.running = False

    def end_template(self, number: int) -> None:
        """End a template that hangs: in a lock that its fork took, or stopped. What it cloned ends with its pause."""
        t = self.templates.get(number)
        if t and t.pid:
            self.log.write("init", f"template {number} ({t.kind}) hangs in a fork and is ended\n".encode())
            os.kill(t.pid, signal.SIGKILL)  # not reaped yet, so it is no other's pid

    def awake(self, wake: socket.socket) -> None:
        """A signal came: its number is what Python wrote (signal.set_wakeup_fd)."""
        numbers = b""
        try:
            while part := wake.recv(4096):
                numbers += part
        except BlockingIOError:
            pass
        if signal.SIGTERM in numbers and self.stopping is None:
            self.stop_in_order()
        self.reap()

    def wake(self) -> None:
        with suppress(BlockingIOError):  # it is full of what wakes as well
            self.waker.send(b"\0")

    def stop_in_order(self) -> None:
        """SIGTERM: systemd stops the scope (at power-off, say) and has told every process of it, workers too; or
        `stop`. No more launches.

        Each caller gets its worker's status; those that do not end in time are ended.
        """
        self.log.write("init", f"stopping: {len(self.sessions)} sessions have {self.stop_timeout:g} s\n".encode())
        self.stopping = time.monotonic() + self.stop_timeout

    # -- pocketd

    def accept(self) -> None:
        sock, _ = self.listener.accept()
        _, uid, _ = credentials(sock)
        if uid != 0:
            sock.close()
            return
        if self.daemon:  # a new pocketd takes the place of one that died
            self.forget_daemon()
        for s in self.sessions.values():
            s.request = None  # the ids of requests are the new one's own
        for t in self.templates.values():
            t.request = None
        self.daemon = sock
        self.watch(sock.fileno(), self.hear_daemon)

    def forget_daemon(self) -> None:
        if self.daemon:
            self.unwatch(self.daemon.fileno())
            self.daemon.close()
            self.daemon = None

    def tell(self, message: Message, fds: Any = ()) -> None:
        if self.daemon:
            try:
                wire.send(self.daemon, message, fds)
            except OSError:
                self.forget_daemon()

    def hear_daemon(self) -> None:
        assert self.daemon
        try:
            message, fds = wire.receive(self.daemon, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # told of before somebody else here has read it (`died`)
        except (EOFError, OSError, MessageError):
            self.forget_daemon()
            return
        with fds:
            try:
                operation = getattr(self, "on_" + str(message.get("op")).replace("-", "_"), None)
                if not operation:
                    raise Error("bad-request", f"init knows no operation {message.get('op')!r}")
                operation(message, fds)
            except Error as e:
                self.tell({"id": message.get("id"), "error": e.wire()})
            except OSError as e:
                self.tell({"id": message.get("id"), "error": Error("kernel", str(e)).wire()})
            except Exception as e:  # one request's fault
                self.log.write("init", traceback.format_exc().encode())
                self.tell({"id": message.get("id"), "error": Error("init", f"{type(e).__name__}: {e}").wire()})

    def on_hello(self, message: Message, fds: Fds) -> None:
        """What is here. Ended sessions stay listed until `forget` names them.

        `keep` is pocketd's own word about the service (its definition), given back from then on.
        """
        self.kept = message.get("keep") or self.kept
        timeout = message.get("stop_timeout")
        if isinstance(timeout, (int, float)) and timeout >= 0:
            self.stop_timeout = float(timeout)
        self.tell(
            {
                "id": message["id"],
                "ok": True,
                "kept": self.kept,
                "sessions": [s.summary() for s in self.sessions.values()],
                "templates": [t.summary() for t in self.templates.values()],
                "ended": list(self.ended.values()),
            }
        )

    def on_forget(self, message: Message, fds: Fds) -> None:
        self.ended.pop(message.get("session", ""), None)

    def on_end(self, message: Message, fds: Fds) -> None:
        """End a session: first a signal, if asked for, else at once and for good."""
        session = self.sessions.get(message.get("session", ""))
        if not session:
            raise Error("no-session", "there is no such session")
        number = message.get("signal")
        if number and session.pid:
            self.signal(session, number, False)
        else:
            self.kill(session)  # its caller hears how its worker ended
        self.tell({"id": message["id"], "ok": True})

    def on_stop(self, message: Message, fds: Fds) -> None:
        """End the service: SIGTERM for each worker, and when all have ended, or their time is up, for good.

        The kernel ends every process of the pid namespace with PID 1.
        """
        self.why = Error("service-off", "the service was switched off").wire()
        self.tell({"id": message["id"], "ok": True})
        if self.stopping is None:
            self.stop_in_order()
        for s in self.sessions.values():
            if s.pid and s.status is None:
                self.signal(s, signal.SIGTERM, False)

    # -- sessions

    def refuse_when_stopping(self) -> None:
        if self.stopping is not None:
            raise Error("stopping", "the service is being stopped")

    def on_launch(self, message: Message, fds: Fds) -> None:
        """A worker: a pause process first, then the template forks into its pid namespace."""
        identity = message["session"]
        if identity in self.sessions:  # asked again by a caller whose pocketd died in between
            s = self.sessions[identity]
            if s.note.get("slot") or s.note.get("caller") != message["note"].get("caller"):
                raise Error("bad-request", "that session is not yours")
            self.tell({"id": message["id"], "ok": True, "attached": True, "pid": s.pid})
            return
        self.refuse_when_stopping()
        t = self.templates.get(message["template"])
        if not t or not t.ready:
            raise Error("no-template", f"template {message['template']} is not ready")
        # From a pocket's template: its leaf again, as the template may have it, in place of orders.
        leaf, session_fd, hold_fd, orders = fds.take(), fds.take(), fds.take(), fds.take()
        held = t.kind == "pocket"
        try:
            hold = hold_socket(hold_fd)
            check_socket(session_fd)
        except Error:
            for fd in (leaf, session_fd, hold_fd, orders):
                os.close(fd)
            raise
        try:
            pause = None if held else self.take_pause()
        except OSError:
            hold.close()
            for fd in (leaf, session_fd, orders):
                os.close(fd)
            raise
        deadline = time.monotonic() + (HELD_FORK_TIMEOUT if held else FORK_TIMEOUT)
        self.launches += 1
        s = Session(
            identity, message.get("note", {}), t.number, pause, hold, leaf, message["id"], deadline, self.launches
        )
        if s.note.get("adopted") is True:  # one of our own is used once
            s.oom_kills = oom.kills(leaf)
        self.sessions[identity] = self.launching[s.launch] = s
        self.watch(hold.fileno(), lambda: self.hear_caller(s))
        if pause is None:
            marks = marked(message, "init asks the pocket's template")
            self.launch_held(t, s, orders, session_fd, message["mode"], marks)
            os.close(session_fd)
            os.close(orders)
            return
        self.pauses[pause.pid] = s
        passed = [leaf, pause.pidfd, session_fd, orders, *fds]
        out = None
        if message["mode"] == "client":
            s.output, out = output_pipe()
            self.hear_worker(s)
            passed.insert(4, out)
        try:
            request = {"op": "fork", "launch": s.launch, "host_network": message["host_network"]}
            wire.send(t.talk, {**request, "marks": marked(message, "init has a pause and asks the template")}, passed)
        except (OSError, ValueError) as e:
            self.fail(s, Error("template", f"template {t.number} does not take a launch: {e}"))
        finally:
            os.close(session_fd)
            os.close(orders)
            if out is not None:
                os.close(out)

    def hold_of(self, fd: int) -> socket.socket:
        return hold_socket(fd)

    def take_pause(self) -> clone.Child:
        """A pause process, made ahead of time where there is one: a launch need not wait for it, nor for namespaces.

        It stays in init's own cgroup: it holds those and nothing that could be charged to a pocket.
        """
        pause, self.spare = self.spare, None
        return pause or clone.pause(flags=namespaces.CLONE_NEWPID | OF_PAUSE)

    def make_spare(self) -> None:
        if self.spare is None:
            try:
                self.spare = clone.pause(flags=namespaces.CLONE_NEWPID | OF_PAUSE)
            except OSError:
                pass  # the next launch makes its own, or says why it cannot

    def born(self, s: Session, pid: int, pidfd: int) -> None:
        s.pid, s.pidfd, s.started = pid, pidfd, time.time()
        head = {"op": "session-born", "session": s.id} if s.request is None else {"id": s.request, "ok": True}
        self.tell({**head, "pid": pid}, [pidfd] if pidfd >= 0 else [])
        s.request = None
        status = self.unclaimed.pop(pid, None)  # it ended, or stopped itself, before its template said that it was born
        if status is not None and (is_stopped(pid) if os.WIFSTOPPED(status) else pidfd >= 0 and readable(pidfd)):
            self.changed(s, status)  # and it was no other's, that had its pid before
        if s.pause:
            self.make_spare()

    def fail(self, s: Session, error: Error) -> None:
        """A launch that did not come to a worker."""
        if s.events >= 0 and s.request is not None:
            self.hand_back(s, error)
            return
        self.launching.pop(s.launch, None)
        if s.request is not None:
            self.tell({"id": s.request, "error": error.wire()})
        s.request = None
        self.say(s, {"op": "exit", "error": error.wire()})
        self.finish(s)
        if s.vacant:
            self.over(s)

    def say(self, s: Session, message: Message) -> None:
        if s.hold:
            try:
                wire.send(s.hold, message, flags=socket.MSG_DONTWAIT)
            except OSError:
                pass

    def hear_caller(self, s: Session) -> None:
        assert s.hold
        try:
            if messages.carries(s.hold):  # left where they are: to close them may be to wait (pocketd.apart)
                raise MessageError("descriptors")
            message, fds = wire.receive(s.hold, socket.MSG_DONTWAIT, wire.SIGNAL)
            if fds.rest():  # its caller, whose socket this is too, has taken what was looked at; not closed, see above
                raise MessageError("descriptors")
        except BlockingIOError:
            return
        except (EOFError, OSError, MessageError):
            self.finish(s)  # the caller is gone, or talks nonsense: its worker ends
            return
        number = message.get("signal")
        if message.get("op") == "signal" and isinstance(number, int) and s.pid and s.status is None:
            self.signal(s, number, message.get("group") is True)

    def signal(self, s: Session, number: int, group: bool) -> None:
        """Pass a signal on: to the worker, or, when a terminal sent it, to its whole process group."""
        if not 0 < number <= signal.SIGRTMAX:
            return
        if number in _STOPS and by_default(s.pid, number):
            number = signal.SIGSTOP  # a session without a terminal ignores the others by default (orphaned group)
        try:
            if group:
                os.killpg(s.pid, number)  # it called setsid; its pid is not reused before it is reaped here
            else:
                signal.pidfd_send_signal(s.pidfd, number)
        except (OSError, ValueError):
            pass

    def finish(self, s: Session) -> None:
        """End whatever is left in the session's pid namespace; the rest follows when the pause is reaped."""
        self.close_hold(s)
        self.kill(s)

    def kill(self, s: Session) -> None:
        s.ended = True
        if s.pause is None:
            self.kill_leaf(s)
            return
        try:
            signal.pidfd_send_signal(s.pause.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def close_hold(self, s: Session) -> None:
        if s.hold:
            self.unwatch(s.hold.fileno())
            let_go(s.hold, s.note.get("caller") == 0)
            s.hold = None

    # -- reaping

    def reap(self) -> None:
        by_pid = {s.pid: s for s in self.sessions.values() if s.pid and s.status is None}
        templates = {t.pid: t for t in self.templates.values()}
        for _ in range(_REAPED):
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WALL)
                if ended is None:
                    break
                cgroup = cgroup_of(ended.si_pid) if self.held_waits() else None  # as long as it is not reaped
                pid, status = os.waitpid(ended.si_pid, os.WNOHANG | os.WUNTRACED | WALL)
            except ChildProcessError:
                break
            if not pid:
                break
            if pid in by_pid:
                self.changed(by_pid[pid], status)
            elif os.WIFSTOPPED(status):
                if any(not s.pid for s in self.sessions.values()):
                    self.unclaimed[pid] = status
            elif pid in self.pauses:
                owner = self.pauses.pop(pid)
                self.over(owner) if isinstance(owner, Session) else self.pause_over(owner)
            elif pid in templates:
                templates[pid].pid, templates[pid].status = 0, status  # its socket tells the rest
            elif self.spare and pid == self.spare.pid:
                os.close(self.spare.pidfd)
                self.spare = None
            elif not self.claim(pid, status, cgroup) and any(not s.pid for s in self.sessions.values()):
                self.unclaimed[pid] = status
        else:
            self.wake()  # for more, in a turn of its own: pockets' processes may stop and go on without end
        if not any(not s.pid for s in self.sessions.values()):
            self.unclaimed.clear()  # strangers, made our children by CLONE_PARENT: reaped, nothing kept

    def changed(self, s: Session, status: int) -> None:
        """The worker has ended, or stopped itself: its caller stops too then, so that a shell sees it."""
        if s.note.get("slot") and not s.hold:  # it may have had a session, of which pocketd told us before it
            while self.daemon and readable(self.daemon.fileno()):
                self.hear_daemon()
        if os.WIFSTOPPED(status):
            self.say(s, {"op": "stopped"})
        else:
            self.died(s, status)

    def died(self, s: Session, status: int) -> None:
        """The worker has ended: its caller hears at once; what it left behind ends now."""
        s.status = status
        message: Message = {"op": "exit", "status": status}
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and not s.ended
        if killed and oom.kills(s.leaf) > s.oom_kills:
            message["error"] = s.error = oom.error(s.leaf, s.note).wire()
        elif self.why:
            message["error"] = self.why
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT:
            reached = oom.threads(s.leaf, s.note)
            if reached:
                message["error"] = reached.wire()
        self.say(s, message)
        self.finish(s)

    def over(self, s: Session) -> None:
        """The session's pid namespace is empty."""
        if s.pause and not s.pid and s.launch in self.launching:
            # The template may have the caller's sockets still, and must not be the last that closes them: who keeps
            # them open (pocketd.apart) does so until pocketd has its answer.
            s.vacant = True
            return
        if s.status is None and s.request is None and s.pid:
            try:
                _, s.status = os.waitpid(s.pid, os.WNOHANG | WALL)
            except ChildProcessError:
                s.status = signal.SIGKILL
        if not s.pid and s.request is not None:  # its pause was killed, or its caller went, in the midst of the launch
            error = Error("launch", "the session ended before its worker was born").wire()
            self.tell({"id": s.request, "error": error})
            self.say(s, {"op": "exit", "error": error})
            s.request = None
        self.close_hold(s)
        if s.output is not None:
            self.last_words(s)
            self.unwatch(s.output)
            os.close(s.output)
        for fd in (s.pidfd, s.pause.pidfd if s.pause else -1, s.leaf):
            if fd >= 0:
                os.close(fd)
        self.sessions.pop(s.id, None)
        if s.pause is None:
            self.held_over(s)
        self.launching.pop(s.launch, None)
        ended: Message = {"session": s.id, "note": s.note, "status": s.status}
        if s.error:
            ended["error"] = s.error
        self.ended[s.id] = ended
        while len(self.ended) > 1000:
            self.ended.pop(next(iter(self.ended)))
        self.tell({"op": "session-ended", **ended})


def marked(message: Message, done: str) -> Any:
    """The marks of a launch (runtime.trace) and ours."""
    return [*message.get("marks", ()), (done, time.monotonic())]


def main(listener: socket.socket, log_fd: int) -> None:
    Init(listener, log_fd).run()
