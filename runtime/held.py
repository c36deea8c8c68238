"""A pocket's template: its program, run up to its checkpoint in the pocket's own sandbox, and forked from there.

It is untrusted from its first line on: what it says, init believes no more than the kernel confirms. Each child is born
in a leaf of its session and takes over what is its caller's alone: arguments, environment, directory, streams, limits.
What the program printed before its checkpoint each child prints again.
"""

from __future__ import annotations

import builtins
import fcntl
import gc
import io
import os
import signal
import socket
import sys
import threading
import time
import types
from contextlib import suppress
from typing import Any, Callable, Dict, List, NoReturn, Optional, Tuple

from nsutil import clone, memory, processes
from nsutil.messages import MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import (
    carried,
    checkpoint,
    cold,
    interpreter,
    program,
    randomness,
    recorded,
    rehearsal,
    seeds,
    slot,
    workingset,
)
from runtime.trace import Trace

FAILED = 125  # pocketd's own failure, as podman's
PRINTED = 1 << 20  # bytes that a program may print before its checkpoint, to each stream
_VARARGS, _VARKEYWORDS = 0x4, 0x8  # of a code object: inspect.CO_VARARGS, CO_VARKEYWORDS
_AT_FIRST = (
    b"PYTHONPATH",
    b"PYTHONPYCACHEPREFIX",
    b"PYTHONDONTWRITEBYTECODE",
    b"PYTHONWARNINGS",
    b"PYTHONFAULTHANDLER",
)
_AT_PRINTING = (b"PYTHONUNBUFFERED", b"PYTHONIOENCODING", b"PYTHONUTF8")
_STREAMS = ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w"))


class Held:
    """One program, from its first line to the fork that goes on with it."""

    def __init__(self, template: Any, talk: socket.socket, orders: Message, log: int):
        self.template = template
        self.talk = talk
        self.orders = orders
        self.log = log  # the service's log, where standard error went until the program began
        self.begun = time.monotonic()
        self.reached = False
        self.child = False
        self.start: Message = {}
        self.printed: Dict[int, Tuple[bytes, bytes]] = {}  # what had been written, and what a buffer held
        self.on_start: List[Callable[[], object]] = []
        self.open_files: Tuple[int, ...] = ()
        tops = tuple(f"{top}/" for top in {orders["directory"], os.path.realpath(orders["directory"]), "/pocket"})
        self.recorder = recorded.Recorder(tops)
        self.seeds = seeds.Seeds()
        self.streams: Dict[str, Tuple[Any, Any]] = {}
        self.files: Dict[int, int] = {}  # inodes of what 0, 1 and 2 are up to the checkpoint
        self.compiled: Any = None
        self.rehearsing = False
        self.reports = -1  # where a run of the sample writes which pages it made its own
        self.pages = workingset.WorkingSet()
        self.run_size = 0  # bytes that a run of the sample had of its own
        self.changed: Optional[str] = None  # a file of the service's that is not any more what was imported
        self.collecting = True
        hold = orders["hold"]
        self.program: str = hold["program"]
        self.environment: Dict[bytes, bytes] = {k.encode(): v.encode() for k, v in hold["environment"].items()}

    # -- up to the checkpoint

    def run(self) -> int:
        """Run the program. Returns its exit status, in a child; a template ends in here."""
        hold = self.orders["hold"]
        start: Message = {
            "kind": "file",
            "program": os.fsencode(self.program),
            "environment": list(self.environment.items()),
            "directory": os.fsencode(self.orders["directory"]),
        }
        if hold.get("packages"):
            start["packages"] = hold["packages"]
        interpreter.adopt(start, self.take_streams)
        setattr(builtins, checkpoint.NAME, self.here)
        sys._pocketd_held = self  # type: ignore[attr-defined]  # for pocketd.checkpoint()
        code = 1
        try:
            code = program.run(start, self.orders, self.compile)
        except recorded.Refused as e:
            self.fail(str(e))
        except rehearsal.Over:
            code = 0
        if self.child and self.rehearsing:
            self.report_pages()
        if not self.child:
            self.fail(f"the program ended, with status {code}, before it came to its checkpoint")
        return code

    def compile(self, source: bytes, path: str) -> Any:
        try:
            self.compiled = checkpoint.compile_held(source, path, self.orders["hold"]["checkpoint"])
        except checkpoint.CheckpointError as e:
            raise recorded.Refused(str(e)) from None
        self.carried = carried.Carried()
        self.recorder.begin()
        self.seeds.begin()
        self.exits = rehearsal.Exits(self.recorder.tops)
        self.exits.begin()
        return self.compiled.code

    def take_streams(self) -> None:
        """Nothing to read, and output into files that each child prints again."""
        for number, name, mode in _STREAMS:
            fd = os.memfd_create(name, os.MFD_CLOEXEC)
            if mode == "r":
                os.write(fd, b"\n")  # so that whoever reads moves the offset
                os.lseek(fd, 0, os.SEEK_SET)
            os.dup2(fd, number)
            os.close(fd)
            self.files[number] = os.fstat(number).st_ino
        interpreter.set_streams()
        for _, name, _ in _STREAMS:
            stream: Any = getattr(sys, name)
            self.streams[name] = (stream, stream.buffer)

    def fail(self, why: str, code: str = "hold") -> NoReturn:
        """Say why it cannot be held, with what the program printed, and end."""
        self.end_watch()
        interpreter.flush_quietly()
        shown = b"".join(self.read_printed(fd) for fd in (1, 2))[-8192:]
        os.write(self.log, shown + f"pocket: {why}\n".encode())
        error = Error(code, why, output=shown.decode(errors="replace"))
        try:
            wire.send(self.talk, {"op": "failed", "error": error.wire()})
        except OSError:
            pass
        os._exit(1)

    def end_watch(self) -> None:
        self.seeds.end()
        self.recorder.end()

    def read_printed(self, fd: int) -> bytes:
        try:
            return os.pread(fd, PRINTED + 1, 0)
        except OSError:
            return b""  # the program closed it

    # -- the checkpoint

    def here(self) -> None:
        """The call at the checkpoint. It returns in each child; in the template, never."""
        if self.reached:
            return
        if threading.current_thread() is not threading.main_thread():
            self.fail("its checkpoint was reached in a thread other than the main one, which alone can be forked")
        self.reached = True
        self.end_watch()
        self.carried.end()
        if self.recorder.refused:  # and the program caught what was raised
            self.fail(self.recorder.refused)
        setattr(builtins, checkpoint.NAME, nothing)
        self.exits.end()
        try:
            self.look()
            sample = self.orders["hold"]["rehearse"]
            if sample is not None:
                self.rehearse(sample, sys._getframe(1))
            if not self.child:
                self.settle()
                self.serve()
        except Exception as e:  # a fault of ours, not the program's
            self.fail(f"{type(e).__name__}: {e}")

    def look(self) -> None:
        """What the program has printed, and whether it holds what a fork cannot carry over."""
        written = {fd: len(self.read_printed(fd)) for fd in (1, 2)}
        interpreter.flush_quietly()
        for text, buffer in self.streams.values():
            for stream in (text, buffer):  # either may be beneath another by now
                with suppress(OSError, ValueError):
                    stream.flush()
        for fd, size in written.items():
            printed = self.read_printed(fd)
            self.printed[fd] = printed[:size], printed[size:]
            if len(printed) > PRINTED:
                self.fail(f"the program prints more than {PRINTED >> 20} MiB before its checkpoint")
        for fd, inode in self.files.items():
            if not interpreter.is_open(fd) or os.fstat(fd).st_ino != inode:
                self.fail(f"it closes or replaces descriptor {fd} before its checkpoint, and each run has its own")
        if os.lseek(0, 0, os.SEEK_CUR):
            self.fail("it reads standard input before its checkpoint, and each run has its own")
        self.refuse_what_is_left_behind()

    def settle(self) -> None:
        """Be ready to be forked: no garbage, and pages that stay shared."""
        try:
            privatized = clone.privatize_shared_mappings()
        except clone.CloneError as e:
            self.fail(f"the program holds what a fork cannot carry over: {e.strerror}")
        self.seeds.find()
        self.scratch = rehearsal.Places(("/tmp", "/dev/shm", *self.orders["homes"]))
        self.collecting = gc.isenabled()
        gc.collect()
        memory.trim()
        gc.freeze()
        gc.disable()
        self.try_fork()
        self.say_ready(privatized)

    def try_fork(self) -> None:
        """Whether it can be forked shows now, not in each run."""
        try:
            child = clone.live_fork()
        except clone.CloneError as e:
            self.fail(f"at its checkpoint the program cannot be forked: {e.strerror}")
        if child is None:
            os._exit(0)
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)

    def refuse_what_is_left_behind(self) -> None:
        left = self.left_behind()
        if left:
            self.fail(f"at its checkpoint the program holds what a fork cannot carry over: {left}. Open it after that")

    def left_behind(self) -> str:
        """What cannot be carried over, in words. Notes what has to be opened again in each child."""
        if "asyncio" in sys.modules and sys.modules["asyncio"]._get_running_loop() is not None:
            return "a running asyncio loop"
        if has_children():
            return f"child processes ({children()})"
        if any(signal.getitimer(which)[0] for which in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)):
            return "a running timer (setitimer, alarm)"
        found = clone.inspect({0, 1, 2, self.talk.fileno(), self.log, self.reports})
        refused = [str(o) for o in found if o.remedy == "refuse"]
        for o in found:
            if o.remedy == "reopen" and o.fd is not None and is_written(o.fd):
                refused.append(f"{o}, open for writing")
        self.open_files = tuple(o.fd for o in found if o.remedy == "reopen" and o.fd is not None)
        return "; ".join(refused)

    def say_ready(self, privatized: List[str]) -> None:
        r = self.recorder
        os.write(self.log, b"".join(part for parts in self.printed.values() for part in parts))
        said = {
            "op": "ready",
            "seconds": time.monotonic() - self.begun,
            "threads": len(os.listdir("/proc/self/task")),
            "privatized": privatized[:32],
            "variables": sorted(os.fsdecode(name) for name in r.variables)[:100],
            "files": len(r.files),
            "unsure": self.seeds.unsure[:8],
            "working_set": self.pages.size,
            "run": self.run_size,
        }
        wire.send(self.talk, said)

    # -- the rehearsal

    def rehearse(self, sample: List[str], frame: Any) -> None:
        """Run what follows the checkpoint once, and make sure that it left no trace. It returns in the children that
        run the sample too, for good."""
        orders = self.orders
        tops = [p["target"] for p in orders["mounts"] if p["writable"]]
        places = rehearsal.Places(("/tmp", "/dev/shm", *orders["homes"], *tops))
        until = orders["hold"]["rehearse_until"]
        self.reports = os.memfd_create("pages", os.MFD_CLOEXEC)
        try:
            again = self.remainder(frame)
            snapshot = rehearsal.Snapshot(self.recorder.tops)

            def become(out: int, err: int) -> None:
                self.child = True
                os.setsid()
                clone.revive()
                self.talk.close()
                self.rehearsing = True
                self.play(sample, out, err)
                rehearsal.Until(until).begin()

            before = rehearsal.trial(places, become)
            if before is None:
                return
            if before.status:
                said = (before.out + before.err)[-2000:].decode(errors="replace")
                raise rehearsal.Failed(f"the sample ended with status {before.status}:\n{said}")
            self.uncover()
            self.run_here(sample, again, until)
            snapshot.restore()
            places.clear()
            self.play([], *(spare := rehearsal.capture()))
            for fd in spare:
                os.close(fd)
            self.uncover()
            left = self.left_behind()
            if left:
                raise rehearsal.Failed(f"it leaves behind what a fork cannot carry over: {left}")
            after = rehearsal.trial(places, become)
            if after is None:
                return
            why = rehearsal.difference(before, after)
            if why:
                raise rehearsal.Failed(f"a run after the rehearsal is not as one before it: {why}")
            self.uncover()
            self.pages = self.take_pages().here()
        except rehearsal.Failed as e:
            self.fail(f"the rehearsal failed: {e}", "rehearsal")

    def report_pages(self) -> None:
        """At the end of a run of the sample: what it has made its own."""
        interpreter.flush_quietly()
        try:
            os.pwrite(self.reports, workingset.measure().pack(), 0)
        except OSError:
            pass  # then slots are not filled ahead of time

    def take_pages(self) -> workingset.WorkingSet:
        size = os.fstat(self.reports).st_size
        found = workingset.WorkingSet.unpack(os.pread(self.reports, size, 0))
        os.close(self.reports)
        self.reports = -1
        self.run_size = found.size
        return found

    def remainder(self, frame: Any) -> Callable[[], object]:
        """What follows the checkpoint, as something that can be called."""
        code, there = frame.f_code, dict(frame.f_locals)
        if self.compiled.rest is not None and code.co_name == "<module>":
            rest, names = self.compiled.rest, frame.f_globals
            return lambda: exec(rest, names)
        if not self.compiled.function or code.co_freevars:
            raise rehearsal.Failed(
                "only what follows a top-level statement or the beginning of a function can be rehearsed"
            )
        count = code.co_argcount
        given = [there[name] for name in code.co_varnames[:count]]
        named = {name: there[name] for name in code.co_varnames[count : count + code.co_kwonlyargcount]}
        at = count + code.co_kwonlyargcount
        if code.co_flags & _VARARGS:
            given += there[code.co_varnames[at]]
            at += 1
        if code.co_flags & _VARKEYWORDS:
            named.update(there[code.co_varnames[at]])
        function = types.FunctionType(code, frame.f_globals, code.co_name)
        return lambda: function(*given, **named)

    def run_here(self, sample: List[str], again: Callable[[], object], until: Optional[str]) -> None:
        ends = rehearsal.Until(until)
        out, err = rehearsal.capture()
        self.play(sample, out, err)
        self.rehearsing = self.exits.dropping = True
        self.exits.begin()
        try:
            ends.begin()
            again()
        except (rehearsal.Over, SystemExit):
            pass
        except BaseException as e:
            raise rehearsal.Failed(f"it ended by {type(e).__name__}: {e}") from None
        finally:
            ends.end()
            self.exits.end()
            self.rehearsing = self.exits.dropping = False
            interpreter.flush_quietly()
        rehearsal.settle_threads()
        for fd in (out, err):
            os.close(fd)

    def play(self, sample: List[str], out: int, err: int) -> None:
        """Be the run of a sample: its arguments, nothing to read, output into two files."""
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        for fd, number in ((null, 0), (out, 1), (err, 2)):
            os.dup2(fd, number)
        os.close(null)
        self.restore_streams()
        self.recorder.fill("argv", [self.program, *sample])
        self.recorder.fill("orig_argv", [sys.executable, self.program, *sample])

    def rehearsed(self) -> None:
        """The program says so (pocketd.rehearsed)."""
        if self.rehearsing and self.orders["hold"]["rehearse_until"] == "rehearsed":
            raise rehearsal.Over

    def uncover(self) -> None:
        """Have init take off the layer that took what the last run wrote."""
        if not any(p["writable"] for p in self.orders["mounts"]):
            return
        wire.send(self.talk, {"op": "uncover"})
        while True:
            message, fds = wire.receive(self.talk)
            fds.close()
            if message.get("op") == "uncovered":
                if not message["done"]:
                    raise rehearsal.Failed("what it wrote could not be taken away again")
                return

    # -- forks

    def serve(self) -> None:
        """Fork as asked. Returns in each child, when it is its caller's program."""
        avoid = (*self.template.ancestors, os.getpid())
        while True:
            try:
                message, fds = wire.receive(self.talk)
            except (EOFError, OSError, MessageError):
                os._exit(0)
            with fds:
                if message["op"] == "tidy":  # no run is there any more: the next one finds no files of those before
                    self.scratch.clear(message["until"])
                    continue
                leaf, session = fds.take(), fds.take()
                try:
                    self.fork(message, leaf, session, avoid)
                finally:
                    os.close(leaf)
                    os.close(session)
                if self.child:
                    return

    def fork(self, message: Message, leaf: int, session: int, avoid: Tuple[int, ...]) -> None:
        launch, trace = message["launch"], Trace(message.get("marks"))
        trace.mark("the pocket's template has the request")
        changed = self.outdated()
        if changed:
            self.refuse(launch, changed, "outdated")
            return
        try:
            child = clone.live_fork(cgroup=leaf, parent=True)
        except OSError as e:
            self.refuse(launch, f"the template could not fork: {e}")
            return
        if child is not None:
            os.close(child.pidfd)
            self.changed = self.recorder.libraries_outdated()
            return
        try:
            trace.mark("the worker is born")
            self.become(message, session, avoid, trace)
        except BaseException as e:
            error = e if isinstance(e, Error) else Error("launch", f"{type(e).__name__}: {e}")
            if self.child:  # its caller's start is taken
                os.write(2, f"pocket: {error.message}\n".encode())
            else:
                wire.send(self.talk, {"op": "refused", "launch": launch, "error": error.wire()})
            os._exit(FAILED)

    def refuse(self, launch: int, why: str, code: str = "held") -> None:
        """Refuse one run; "outdated": and all that follow, so that pocketd makes another template."""
        error = Error(code, why)
        wire.send(self.talk, {"op": "refused", "launch": launch, "error": error.wire()})

    # -- in a child

    def become(self, message: Message, session: int, avoid: Tuple[int, ...], trace: Trace) -> None:
        """Be the process of one run, or say why this run cannot come from here and end: nothing of its caller's has
        been taken from the session's socket then."""
        launch = message["launch"]
        os.setsid()
        set_oom_score()
        clone.revive()
        trace.mark("its threads are back")
        if os.getpid() in avoid:
            self.refuse(launch, "its pid would be that of one of its templates")
            os._exit(0)
        sock = socket.socket(fileno=os.dup(session))
        answers, words = self.talk, {"launch": launch}
        if message.get("slot"):
            wire.send(self.talk, {"op": "forked", "launch": launch})
            for fd in self.open_files:
                clone.reopen(fd)
            self.prepare()
            answers, words = sock, {}
            sock = slot.wait(sock, trace)
        peeked, given = wire.receive(sock, socket.MSG_PEEK)
        with given:
            changed = self.outdated()
            why = changed or self.differing(peeked) or self.on_terminal(peeked, given.rest())
        if why:
            error = Error("outdated" if changed else "held", why)
            wire.send(answers, {"op": "refused", **words, "error": error.wire()})
            if message.get("slot"):
                answers.recv(1)  # until init knows: it tells the caller of a session how its worker ends
            os._exit(0)
        if not message.get("slot"):
            for fd in self.open_files:
                clone.reopen(fd)
        wire.send(answers, {"op": "taken" if message.get("slot") else "forked", **words})
        start, given = wire.receive(sock)
        trace.mark("it has its caller's start")
        self.child = interpreter.frozen = True
        answers.close()
        self.talk.close()
        sock.close()
        os.close(self.log)
        if not message.get("slot"):
            self.renew()
        self.take_over(start, given.rest())
        trace.mark("environment, directory, streams, random state are its caller's")
        trace.print(start.get("trace"))

    def outdated(self) -> Optional[str]:
        changed = self.changed or self.recorder.outdated()
        return f"{changed} has changed since the program read it" if changed else None

    def differing(self, start: Message) -> Optional[str]:
        """Why a run with this start cannot go on from here, or None."""
        r, begin = self.recorder, self.template.begin
        if start.get("kind") != "file" or os.fsdecode(wire.field(start, "program", bytes)) != self.program:
            return "it runs another program"
        if start.get("mode") != "program" or start.get("cold") or start.get("listen") or start.get("observe"):
            return "this run is of another kind"
        environment = interpreter.environment(start)
        shown = {os.fsdecode(k): os.fsdecode(v) for k, v in environment.items()}
        name = (
            r.differing(environment)
            or self.begun_otherwise(environment)
            or cold.differing(shown, begin["environment"], cold.expression(self.template.runtime))
        )
        if name:
            return f"{name} is not what the program saw before its checkpoint; env in its definition makes it the same"
        here = os.fsencode(self.orders["directory"])
        if r.directory and start.get("directory") not in (here, b"/pocket"):
            started = os.fsdecode(start["directory"])
            return f"it was started in {started}, and the program looked at its directory before its checkpoint"
        return None

    def on_terminal(self, start: Message, fds: List[int]) -> Optional[str]:
        """Whether the program asked if a stream is a terminal, and one of this run's is. Closes `fds`."""
        found = None
        for n, fd in zip(wire.field(start, "stdio", list), fds):
            if n in self.recorder.terminal and os.isatty(fd):
                found = f"its descriptor {n} is a terminal, for which the program asked before its checkpoint"
        for fd in fds:
            os.close(fd)
        return found

    def begun_otherwise(self, environment: Dict[bytes, bytes]) -> Optional[str]:
        """A variable that Python goes by from its first line on, or in what has been printed by now."""
        names = _AT_FIRST + (_AT_PRINTING if any(map(any, self.printed.values())) else ())
        return next((os.fsdecode(n) for n in names if environment.get(n) != self.environment.get(n)), None)

    def prepare(self) -> None:
        """In a slot: do what can be done before it is known for whom, and go through the rest once."""
        self.pages.make()
        self.renew()
        interpreter.touch(self.restore_streams)
        self.differing({"kind": "file", "mode": "program", "program": os.fsencode(self.program), "environment": []})
        self.recorder.fill("argv", [self.program])
        if self.collecting:
            gc.enable()

    def renew(self) -> None:
        randomness.renew(self.seeds.kept)
        self.seeds.renew()

    def take_over(self, start: Message, fds: List[int]) -> None:
        self.start = start
        present = wire.field(start, "stdio", list)
        if len(present) != len(fds) or any(n not in (0, 1, 2) for n in present):
            raise Error("bad-request", "the start message does not carry the descriptors that it names")
        for n, fd in zip(present, fds):
            os.dup2(fd, n)
        for fd in fds:
            os.close(fd)
        for n in {0, 1, 2} - set(present):
            os.close(n)
        interpreter.adopt(start, self.restore_streams)
        for name, value in self.recorder.changes.items():
            if value is None:
                os.environb.pop(name, None)
            else:
                os.environb[name] = value
        arguments = [os.fsdecode(a) for a in wire.field(start, "arguments", list, [])]
        self.recorder.fill("argv", [self.program, *arguments])
        self.recorder.fill("orig_argv", [sys.executable, self.program, *arguments])
        processes.set_command_line([os.fsencode(word) for word in sys.orig_argv])
        signal.pthread_sigmask(signal.SIG_SETMASK, interpreter.blocked(start))
        self.carried.put_back()
        if self.collecting:
            gc.enable()
        self.replay()
        for function in self.on_start:
            function()

    def restore_streams(self) -> None:
        """The same stream objects, which the program may have kept, made anew over the caller's descriptors."""
        for fd, name, mode in _STREAMS:
            text, buffer = self.streams[name]
            if not interpreter.is_open(fd):
                for holder in (name, f"__{name}__"):
                    if getattr(sys, holder) is text:
                        setattr(sys, holder, None)
                continue
            try:
                below = text.buffer
            except ValueError:
                below = None
            if below is None:  # detached: another has been made of its buffer
                if not buffer.closed:
                    buffer.__init__(io.FileIO(fd, mode + "b", closefd=False))
            elif not below.closed:
                interpreter.open_stream(text, buffer, fd, name, mode)
                for how in self.recorder.reconfigured.get(name, ()):
                    text.reconfigure(**how)

    def replay(self) -> None:
        for name, fd in (("stdout", 1), ("stderr", 2)):
            written, held = self.printed[fd]
            text, buffer = self.streams[name]
            try:
                while written:
                    written = written[os.write(fd, written) :]
                if not held:
                    continue
                if buffer.closed or os.environ.get("PYTHONUNBUFFERED"):
                    os.write(fd, held)
                else:
                    buffer.write(held)
                    if text is getattr(sys, name) and text.line_buffering:
                        buffer.flush()
            except (OSError, ValueError):
                pass  # nobody takes it


def nothing() -> None:
    """What a checkpoint is once it was reached."""


def is_written(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def children() -> str:
    """The command lines of this process's children, shortened."""
    names = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as f:
                pids = f.read().split()
        except OSError:
            continue
        for pid in pids:
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    names.append(f.read(200).replace(b"\0", b" ").decode(errors="replace").strip() or pid)
            except OSError:
                pass
    return "; ".join(names)[:400] or "ended, and not waited for"


def set_oom_score() -> None:
    """A template may have been made one that the kernel kills last; its workers go first."""
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    except OSError:
        pass
