"""A program that is held at its checkpoint: run up to there once, and gone on with by each run (runtime.held).

Arguments, environment, directory, streams and limits are each run's own. What the program printed before its checkpoint
each run prints again.
"""

from __future__ import annotations

import builtins
import contextvars
import ctypes
import functools
import gc
import os
import socket
import sys
import threading
from typing import Any, Callable, Dict, List, Optional

from nsutil import clone, pages, processes
from nsutil.messages import Fds
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import (
    checkpoint,
    cold,
    confinement,
    interface,
    interpreter,
    moments,
    program,
    recorded,
    rehearsal,
    remainder,
    snapshot,
    state,
    threads,
    workingset,
)
from runtime.held import Held, Words

_AT_FIRST = (
    b"PYTHONPATH",
    b"PYTHONPYCACHEPREFIX",
    b"PYTHONWARNINGS",
    b"PYTHONFAULTHANDLER",
)
_AT_PRINTING = (b"PYTHONUNBUFFERED", b"PYTHONIOENCODING", b"PYTHONUTF8")


class Checkpointed(Held):
    """One program, from its first line to the fork that goes on with it."""

    words = Words(
        who="the program",
        before="before its checkpoint",
        at="at its checkpoint",
        instead="put the checkpoint before that",
        later="Open it after that",
    )

    def __init__(self, template: Any, talk: socket.socket, orders: Message, log: int, printed: List[int]):
        super().__init__(template, talk, orders, log, printed)
        self.reached = False
        self.line_held = 0  # of the program's top level, which is executing then
        self.compiled: Any = None  # until it is held
        self.program: str = orders["hold"]["program"]
        self.began_with: Dict[str, str] = {}  # the environment at its first line

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
        if os.path.isdir(self.program) or not self.program.endswith((".py", ".pyw")) and _is_archive(self.program):
            self.fail("a directory or an archive has no place to be held at; name the file in it that is run")
        interpreter.adopt(start, self.streams.take)
        interpreter.tell_libraries(interface.TOLD)  # that the program imports before it is held
        self.began_with = dict(os.environ)
        threads.hint(self.orders.get("threads"))
        alone = cold.set_by_program(self.template.runtime, self.template.begin, start)
        if alone:
            self.fail(f"{alone}, which the service's have gone by: each run is a process of its own")
        setattr(builtins, checkpoint.NAME, self.here)
        sys._pocketd_held = self  # type: ignore[attr-defined]  # for pocketd.checkpoint()
        code = 1
        try:
            code = program.run(start, self.orders, self.compile)
        except recorded.Refused as e:
            if self.child:
                raise
            self.fail(str(e))
        except rehearsal.Over:
            code = 0
        self.report()
        if not self.child:
            self.fail(f"the program ended, with status {code}, before it came to its checkpoint")
        return code

    def compile(self, source: bytes, path: str) -> Any:
        try:
            self.compiled = checkpoint.compile_held(source, path, self.orders["hold"]["checkpoint"])
        except checkpoint.CheckpointError as e:
            raise recorded.Refused(str(e)) from None
        self.begin_watch()
        self.exits = rehearsal.Exits(self.recorder.tops)
        self.exits.begin()
        return self.compiled.code

    # -- the checkpoint

    def here(self) -> None:
        """The call at the checkpoint. It returns in each child; in the template, never."""
        if self.reached:
            return
        if os.getpid() != self.pid:
            self.fail("its checkpoint was reached in a child process of the program, and the program itself is held")
        if threading.current_thread() is not threading.main_thread():
            self.fail("its checkpoint was reached in a thread other than the main one, which alone can be forked")
        self.reached = True
        self.line_held = _top_line(self.program)
        self.arrive()
        setattr(builtins, checkpoint.NAME, nothing)
        self.exits.end()
        try:
            self.look()
            sample = self.orders["hold"]["rehearse"]
            if self.orders["hold"]["trials"]:
                self.rehearse(sample, _program_frame())
            if not self.child:
                self.compiled = None
                self.settle()
                self.serve()
        except Exception as e:  # a fault of ours, not the program's
            self.fail(f"{type(e).__name__}: {e}")
        self.begin()

    def noted(self) -> List[str]:
        return [*moments.taken(self.program, self.line_held, self.recorder.tops), *super().noted()]

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

            def become(words: List[str], out: int, err: int) -> None:
                self.child = True
                os.setsid()
                self.share()
                clone.renew(self.open_files)
                clone.revive()
                self.talk.close()
                self.rehearsing = True
                self.play(words, out, err)
                rehearsal.Until(until).begin()

            # A run of the same sample is the same where something kept its arguments: a cache, a class's attribute.
            # So one without any shows what those of the sample do not, as of libraries' objects. It is tried where it
            # may write nothing, since nobody has said that it may.
            proofs = []
            for words in (sample, []) if sample and not tops else (sample,):
                proof = self.before(places, functools.partial(become, words), bare=words is not sample)
                if self.child:
                    return
                if proof:
                    proofs.append((words, proof))
            before = snapshot.Snapshot(self.recorder.tops, remainder.names(frame), self.seeds.operations)
            if not before.state.whole:
                self.recorder.noted.append(
                    f"it has made more than {state.MOST} objects: what its sample changes in others is not seen"
                )
            contents = [ctypes.string_at(o.range[0], o.range[1] - o.range[0]) for o in self.shared if o.range]
            self.share()
            streams = self.streams.open_ones()
            self.run_here(sample, again, until)
            for mapping, content in zip(self.shared, contents):
                assert mapping.range
                ctypes.memmove(mapping.range[0], content, len(content))
            self.make_private()
            changed = before.restore()
            for name in dict.fromkeys(before.lazy):
                self.recorder.noted.append(
                    f"{name} is loaded at its first use, by each run: do so before the checkpoint"
                )
            if changed:
                raise rehearsal.Failed(f"it changes {changed}, which cannot be put back")
            places.clear()
            self.play([], *(spare := rehearsal.capture()))
            self.streams.open_again(streams)
            for fd in spare:
                os.close(fd)
            self.uncover()
            left = self.left_behind()
            if left:
                raise rehearsal.Failed(f"it leaves behind what a fork cannot carry over: {left}")
            for words, proof in reversed(proofs):
                os.ftruncate(self.reports, 0)
                os.lseek(self.reports, 0, os.SEEK_SET)
                gc.collect()
                pages.trim()  # as each run will find it: what it allocates then lies in the same places
                after = rehearsal.trial(places, functools.partial(become, words))
                if after is None:
                    return
                why = proof.difference(after)
                if why:
                    of = "after the rehearsal" if words is sample else "without arguments after it"
                    raise rehearsal.Failed(f"a run {of} is not as one before it: {why}", unlike=proof.shows_chance)
                if words is sample:
                    self.recorder.noted += filter(None, [proof.left_out(after)])
            self.uncover()
            self.pages = self.take_pages().here()
        except rehearsal.Failed as e:
            self.fail(f"the rehearsal failed: {e}", "unlike" if e.unlike else "rehearsal")

    def before(
        self, places: rehearsal.Places, run: Callable[[int, int], None], bare: bool
    ) -> Optional[rehearsal.Proof]:
        """Run the sample in children, as often as was ordered, before it is rehearsed; None in those. Bare, without
        arguments, None too where that does not end soon, or not twice the same."""
        outcomes: List[rehearsal.Outcome] = []
        endless = rehearsal.Until(self.orders["hold"]["rehearse_until"]).is_a_time
        for _ in range(self.orders["hold"]["trials"]):
            try:
                outcome = rehearsal.trial(places, run, rehearsal.BARE if bare else rehearsal.TIMEOUT)
            except rehearsal.Failed:
                if bare:
                    return None
                raise
            if outcome is None:
                return None
            self.uncover()
            if bare and outcomes and rehearsal.Proof(outcomes[:1], endless).difference(outcome):
                return None
            if outcome.status and not bare:
                said = (outcome.out + outcome.err)[-2000:].decode(errors="replace")
                raise rehearsal.Failed(
                    f"the sample, which has nothing to read, ended with status {outcome.status}:\n{said}"
                )
            outcomes.append(outcome)
        return rehearsal.Proof(outcomes, endless)

    def report(self) -> None:
        """At the end of a run of the sample, and when all of it is gone, which writes too: what it has made its own."""
        if self.child and self.rehearsing:
            workingset.note(self.reports)

    def take_pages(self) -> workingset.WorkingSet:
        found = workingset.WorkingSet.read(self.reports)
        os.close(self.reports)
        self.reports = -1
        self.run_size = found.size
        return found

    def remainder(self, frame: Any) -> Callable[[], object]:
        """What follows the checkpoint, as something that can be called."""
        found = remainder.find(self.compiled.tree, self.compiled.is_at(frame.f_lineno))
        try:
            return remainder.of_frame(found, frame, self.compiled.path, self.compiled.flags)
        except remainder.CannotRepeat as e:
            raise rehearsal.Failed(str(e)) from None

    def run_here(self, sample: List[str], again: Callable[[], object], until: Optional[str]) -> None:
        ends = rehearsal.Until(until)
        out, err = rehearsal.capture()
        self.play(sample, out, err)
        running = set(threading.enumerate())
        self.rehearsing = self.exits.dropping = True
        self.exits.begin()
        self.recorder.begin_rehearsal()
        try:
            ends.begin()
            self.begin()
            contextvars.copy_context().run(again)
            self.end_forked(0)
        except rehearsal.Over:
            self.end_forked(0)
        except SystemExit as e:
            self.end_forked(e.code)
        except BaseException as e:
            self.end_forked(1)
            raise rehearsal.Failed(f"it ended by {type(e).__name__}: {e}") from None
        finally:
            self.recorder.end_rehearsal()
            ends.end()
            self.exits.end()
            self.rehearsing = self.exits.dropping = False
            interpreter.flush_quietly()
        rehearsal.settle_threads(running, self.recorder.tops)
        for fd in (out, err):
            os.close(fd)

    def end_forked(self, code: Any) -> None:
        """Where this is a process that the program has forked, and its part is over: it is no template."""
        if os.getpid() != self.pid:
            interpreter.flush_quietly()
            os._exit(code & 0xFF if isinstance(code, int) else code is not None)

    def play(self, sample: List[str], out: int, err: int) -> None:
        """Be the run of a sample: its arguments, nothing to read, output into two files."""
        nothing, end = os.pipe2(os.O_CLOEXEC)  # which can be waited for, unlike /dev/null
        for fd, number in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(fd, number)
        os.close(nothing)
        os.close(end)
        self.streams.restore()
        self.recorder.fill("argv", [self.program, *sample])
        self.recorder.fill("orig_argv", [sys.executable, self.program, *sample])

    def rehearsed(self) -> None:
        """The program says so (pocketd.rehearsed)."""
        if self.rehearsing and self.orders["hold"]["rehearse_until"] == "rehearsed":
            raise rehearsal.Over

    def uncover(self) -> None:
        """Have init take off the layer that took what the last run wrote. What the program made on its way to the
        checkpoint lies in the first of them: it is made again beneath, in the end where it is to be."""
        if not any(p["writable"] for p in self.orders["mounts"]):
            return
        made = [(path, os.stat(path).st_mode & 0o7777) for path in self.recorder.made if os.path.isdir(path)]
        wire.send(self.talk, {"op": "uncover"})
        while True:
            message, fds = wire.receive(self.talk)
            fds.close()
            if message.get("op") == "uncovered":
                if not message["done"]:
                    raise rehearsal.Failed("what it wrote could not be taken away again")
                break
        for path, mode in made:
            if not os.path.isdir(path):
                os.mkdir(path)
                os.chmod(path, mode)

    # -- in a run

    def differing(self, start: Message, given: Fds) -> Optional[str]:
        if start.get("kind") != "file" or os.fsdecode(wire.field(start, "program", bytes)) != self.program:
            return "it runs another program"
        if start.get("mode") != "program" or start.get("cold") or start.get("listen") or start.get("observe"):
            return "this run is of another kind"
        if any(map(confinement.is_way_out, given)):
            return "a standard stream of it is a directory"
        environment = interpreter.environment(start)
        shown = {os.fsdecode(k): os.fsdecode(v) for k, v in environment.items()}
        name = (
            self.recorder.differing(environment)
            or self.begun_otherwise(environment)
            or cold.differing(shown, self.template.begin["environment"], cold.expression(self.template.runtime))
        )
        return self.saw_otherwise(name) if name else self.elsewhere(start) or self.on_terminal(start, given)

    def on_terminal(self, start: Message, given: Fds) -> Optional[str]:
        """Whether the program asked if a stream is a terminal, and one of this run's is."""
        for n, fd in zip(wire.field(start, "stdio", list, []), given):
            if n in self.recorder.terminal and os.isatty(fd):
                return f"its descriptor {n} is a terminal, for which the program asked before its checkpoint"
        return None

    def begun_otherwise(self, environment: Dict[bytes, bytes]) -> Optional[str]:
        """A variable that Python goes by from its first line on, or in what has been printed by now."""
        names = _AT_FIRST + (_AT_PRINTING if any(map(any, self.streams.printed.values())) else ())
        return next((os.fsdecode(n) for n in names if environment.get(n) != self.environment.get(n)), None)

    def touch(self) -> None:
        said = {"kind": "file", "mode": "program", "program": os.fsencode(self.program), "environment": []}
        self.differing({**said, "directory": os.fsencode(self.orders["directory"])}, Fds())
        self.recorder.fill("argv", [self.program])
        processes.set_command_line([os.fsencode(self.program)])

    def take_over(self, start: Message, given: Fds, sock: socket.socket, output: int) -> None:
        sock.close()
        present, fds = wire.field(start, "stdio", list), given.rest()
        if len(present) != len(fds) or any(n not in (0, 1, 2) for n in present):
            raise Error("bad-request", "the start message does not carry the descriptors that it names")
        for n, fd in zip(present, fds):
            os.dup2(fd, n)
        for fd in fds:
            os.close(fd)
        for n in {0, 1, 2} - set(present):
            os.close(n)
        self.adopt(start)
        self.write_bytecode()
        arguments = [os.fsdecode(a) for a in wire.field(start, "arguments", list, [])]
        self.recorder.fill("argv", [self.program, *arguments])
        self.recorder.fill("orig_argv", [sys.executable, self.program, *arguments])
        processes.set_command_line([os.fsencode(word) for word in sys.orig_argv])
        self.resume(start)
        self.streams.replay()

    def write_bytecode(self) -> None:
        """As its caller's environment says, unless the program has said so itself."""
        here, there = (bool(e.get("PYTHONDONTWRITEBYTECODE")) for e in (os.environ, self.began_with))
        if here != there:
            interpreter.set_flag("dont_write_bytecode", here)
            if sys.dont_write_bytecode == there:
                sys.dont_write_bytecode = here

    def apologize(self, error: Error) -> None:
        os.write(2, f"pocket: {error.message}\n".encode())


def _program_frame() -> Any:
    """The innermost that is the program's, and neither ours nor pocketd.checkpoint()'s."""
    frame: Any = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__") in (__name__, "pocketd"):
        frame = frame.f_back
    return frame


def _top_line(program: str) -> int:
    frame: Any = sys._getframe(1)
    line = 0
    while frame is not None:
        if frame.f_code.co_filename == program:
            line = frame.f_lineno
        frame = frame.f_back
    return line


def _is_archive(path: str) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def nothing() -> None:
    """What a checkpoint is once it was reached."""
