"""Init's part in templates: made as pocketd asks, heard, and ended. Pockets' own are told of in runtime.holding."""

from __future__ import annotations

import os
import select
import signal
import socket
from typing import Any, Callable, Dict

from nsutil import messages
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime.children import Session, Template, output_pipe, start_template
from runtime.log import Log

LAST = 8192  # bytes of what a program printed that are told with an error
_ENDING = 20  # milliseconds from a process's last word to its end


def last(fd: int) -> bytes:
    """The end of a file, whatever its offset is."""
    return os.pread(fd, LAST, max(0, os.fstat(fd).st_size - LAST))


class Templates:
    """Those methods of Init that are about templates."""

    log: Log
    templates: Dict[int, Template]
    sessions: Dict[str, Session]
    launching: Dict[int, Any]
    watch: Callable[..., None]
    unwatch: Callable[[int], None]
    tell: Callable[..., None]
    fail: Callable[[Session, Error], None]
    born: Callable[[Session, int, int], None]
    over: Callable[[Session], None]
    hear_errors: Callable[[Template], None]
    drain_all: Callable[[Template], None]
    end_held: Callable[[Template], None]
    refuse_when_stopping: Callable[[], None]
    reap: Callable[[], None]

    def on_template(self, message: Message, fds: Fds) -> None:
        """Make a template: `command` is executed (a root template), or `parent` is forked (a models template)."""
        self.refuse_when_stopping()
        number = message["template"]
        leaf = fds.take()
        ours, theirs = messages.pair()
        out, err = output_pipe()
        t = Template(number, message["kind"], message.get("note", {}), ours, out, message["id"])
        try:
            begin = {**message["begin"], "op": "begin", "template": number}
            if message.get("parent") is not None:
                parent = self.templates.get(message["parent"])
                if not parent or not parent.ready:
                    raise Error("no-template", f"template {message['parent']} is not ready")
                wire.send(parent.talk, {"op": "template", "template": number}, [leaf, theirs.fileno(), err])
            else:
                t.pid = start_template(message.get("command"), message.get("environment", {}), theirs, err, leaf)
            wire.send(ours, begin)
        except BaseException:
            ours.close()
            os.close(out)
            raise
        finally:
            theirs.close()
            os.close(err)
            os.close(leaf)
        self.templates[number] = t
        self.watch(ours.fileno(), lambda: self.hear_template(t))
        self.hear_errors(t)

    def hear_template(self, t: Template) -> None:
        try:
            message, fds = wire.receive(t.talk, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return  # its number was another's when this was told of
        except (EOFError, OSError, MessageError):
            self.lose(t)
            return
        with fds:
            operation = message.get("op")
            if operation == "progress" and t.request is not None:
                self.tell({"id": t.request, "progress": message.get("text", "")})
            elif operation == "ready" and t.ready is None:
                t.ready = {k: v for k, v in message.items() if k not in ("v", "op")}
                t.files = fds.take() if len(fds) else -1
                head = (
                    {"op": "template-ready", "template": t.number}
                    if t.request is None
                    else {"id": t.request, "ok": True}
                )
                self.tell({**head, "pid": t.pid, **t.ready}, [t.files] if t.files >= 0 else [])
                t.request = None
            elif operation == "failed" and t.ready is None:
                self.refuse_template(t, message.get("error"))
            elif operation == "forked" and "template" in message:
                child = self.templates.get(message["template"])
                if child:
                    child.pid = message["pid"]
            elif operation in ("forked", "refused"):
                session = self.launching.pop(message.get("launch", 0), None)
                if isinstance(session, Template):
                    if session.number not in self.templates:
                        pass  # it was given up meanwhile, and ends with its pause
                    elif operation == "forked":
                        session.pid = message["pid"]
                    else:
                        self.refuse_template(session, message.get("error"))
                elif session and session.vacant:
                    self.over(session)
                elif session and session.id in self.sessions:
                    if operation == "forked":
                        self.born(session, message["pid"], fds.take())
                    else:
                        self.fail(session, Error.unwire(message.get("error")))

    def refuse_template(self, t: Template, error: Any) -> None:
        """A template that does not get ready: what it said, and its own standard error."""
        self.drain_all(t)
        e = Error.unwire(error)
        e.detail["stderr"] = "\n".join(line.decode(errors="replace") for line in t.tail)
        if t.printed and not e.detail.get("output"):
            e.detail["output"] = b"".join(last(fd) for fd in t.printed)[-LAST:].decode(errors="replace")
        self.tell({"id": t.request, "error": e.wire()})
        t.request = None

    def on_retire(self, message: Message, fds: Fds) -> None:
        """A template is not needed any more: it serves what was asked of it and ends, as at a closed socket."""
        t = self.templates.get(message["template"])
        if t and t.kind == "pocket":
            self.end_held(t)
        elif t:
            t.talk.shutdown(socket.SHUT_WR)
        else:  # one that was never made, or has ended
            self.tell({"op": "template-ended", "template": message["template"]})

    def on_files(self, message: Message, fds: Fds) -> None:
        """Which files a template is made of (runtime.imported), asked by a pocketd that was not there when it began."""
        t = self.templates.get(message["template"])
        self.tell({"id": message["id"], "ok": True}, [t.files] if t and t.files >= 0 else [])

    def how_it_ended(self, t: Template) -> str:
        """ " by SIGSEGV", where that is known by now: it closes its socket a moment before it can be waited for."""
        if t.pid:
            pidfd = os.pidfd_open(t.pid)  # not reaped yet, so it is no other's pid
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            poll.poll(_ENDING)
            os.close(pidfd)
            self.reap()
        if t.status is None:
            return ""
        if os.WIFSIGNALED(t.status):
            number = os.WTERMSIG(t.status)
            return f" by {signal.Signals(number).name if number in map(int, signal.Signals) else f'signal {number}'}"
        return f" with status {os.WEXITSTATUS(t.status)}"

    def lose(self, t: Template) -> None:
        """A template has ended. Its workers live on; launches that wait for it fail."""
        if t.request is not None:
            how = self.how_it_ended(t)
            self.refuse_template(t, Error("template", f"the template ended{how} before it was ready").wire())
        self.unwatch(t.talk.fileno())
        t.talk.close()
        self.unwatch(t.stderr)
        os.close(t.stderr)
        if t.files >= 0:
            os.close(t.files)
        self.templates.pop(t.number, None)
        if t.kind == "pocket":
            self.end_held(t)
        for s in [s for s in self.sessions.values() if s.template == t.number and not s.pid]:
            self.fail(s, Error("template", f"template {t.number} ended during the launch"))
        self.tell({"op": "template-ended", "template": t.number, "kind": t.kind})
        self.log.write("init", f"template {t.number} ({t.kind}) ended\n".encode())
