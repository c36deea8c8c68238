"""Modules of a pocket, imported and made warm once, from where each of its client sessions goes on (runtime.held).

They are found as a session's calls find them, and what they leave in themselves is in every session. Environment,
directory and output are each session's own. What they print meanwhile stands in the service's log once.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from contextlib import suppress
from typing import Optional

from nsutil import pages, processes
from nsutil.messages import Fds
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import hints, interpreter, models, program, recorded, session, workingset
from runtime.held import FAILED, Held, Words


class Preloaded(Held):
    """What a pocket's definition names by `preload`, from the first import to the fork that serves a client."""

    is_program = False
    words = Words(
        who="the pocket's code",
        before="while it is preloaded",
        at="once it is preloaded",
        instead="do that in a function that sessions call",
        later="Open it in a function that sessions call, or in one of pocketd.on_start",
    )
    sock: socket.socket  # in a child, its session's

    def run(self) -> int:
        """Import and call what the definition names. Returns a session's exit status, in a child."""
        directory = self.orders["directory"]
        interpreter.adopt(
            {"environment": list(self.environment.items()), "directory": os.fsencode(directory)}, self.streams.take
        )
        sys._pocketd_held = self  # type: ignore[attr-defined]  # for pocketd.on_start()
        self.name_process("template")
        sys.path.insert(0, directory)
        self.begin_watch()
        for name in self.orders["hold"]["preload"]:
            self.preload(name)
        self.arrive()
        try:
            self.look()
            self.settle()
            self.serve()
        except Exception as e:  # a fault of ours, not the pocket's
            self.fail(f"{type(e).__name__}: {e}")
        t = self.template
        try:
            return session.serve(self.sock, self.start, t.runtime, t.models, directory, self.orders)
        except Exception as e:
            self.apologize(Error("launch", f"{type(e).__name__}: {e}"))
            return FAILED

    def pages_of_a_run(self) -> workingset.WorkingSet:
        """Of the service's models: what a session calls of the pocket's own nobody knows yet."""
        pages.prepare_heap()
        return models.pages_of_first_calls(self.template.models, self.open_files)

    def preload(self, name: str) -> None:
        try:
            session.preload(name)
        except recorded.Refused as e:
            self.fail(f"{name}: {e}")
        except BaseException as e:
            program.report(e)
            missing = hints.hint(e, self.orders)
            if missing:
                interpreter.complain(f"{missing}\n")
            self.fail(f"{name} failed: {shown(e)}")

    def name_process(self, what: str) -> None:
        processes.set_command_line([f"pocketd: {what} of".encode(), self.orders["hostname"].encode()])

    # -- pocketd's functions for programs, which mean nothing here

    def here(self) -> None:
        """pocketd.checkpoint()"""

    def rehearsed(self) -> None:
        """pocketd.rehearsed()"""

    # -- in a session

    def differing(self, start: Message, given: Fds) -> Optional[str]:
        if start.get("mode") != "client":
            return "this login is of another kind"
        name = self.recorder.differing(interpreter.environment(start))
        return self.saw_otherwise(name) if name else self.elsewhere(start)

    def touch(self) -> None:
        self.differing({"mode": "client", "environment": []}, Fds())

    def take_over(self, start: Message, given: Fds, sock: socket.socket, output: int) -> None:
        given.close()
        self.start, self.sock = start, sock
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for fd, number in ((null, 0), (output, 1), (output, 2)):
            os.dup2(fd, number)
        os.close(null)
        self.adopt(start)
        self.name_process("worker")
        self.resume(start)
        try:
            self.begin()
        except BaseException as e:
            program.report(e)
            raise Error(
                "launch", f"a function of pocketd.on_start failed: {shown(e)}; the service's log has more"
            ) from e

    def apologize(self, error: Error) -> None:
        with suppress(OSError):
            wire.send(self.sock, {"op": "failed", "error": error.wire()}, flags=socket.MSG_DONTWAIT)


def shown(e: BaseException) -> str:
    """An exception's last line, as a traceback has it."""
    return traceback.format_exception_only(type(e), e)[-1].rstrip("\n")
