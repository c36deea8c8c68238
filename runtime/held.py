"""A pocket's template: the pocket's own code, run so far in the pocket's own sandbox, and forked from there.

It is untrusted from its first line on: what it says, init believes no more than the kernel confirms. Each child is born
in a leaf of its session and takes over what is its caller's alone. What runs before the fork, and what after it, is a
subclass's matter: runtime.checkpointed, runtime.preloaded.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time
from typing import Any, Callable, Dict, List, NamedTuple, NoReturn, Optional, Tuple

from nsutil import clone, pages
from nsutil.messages import Fds, MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import (
    carried,
    interpreter,
    leftbehind,
    randomness,
    recorded,
    rehearsal,
    seeds,
    slot,
    streams,
    threads,
    workingset,
)
from runtime.trace import Trace

_SHARED = 64 << 20  # bytes of it that are made anew in each run
OVERDUE = signal.SIGRTMIN + 11  # what init says to one that takes too long
FAILED = 125  # pocketd's own failure, as podman's


class Words(NamedTuple):
    """What a refusal calls things, for the author of the code."""

    who: str
    before: str  # "before its checkpoint"
    at: str
    instead: str  # what to do, where it does something too early
    later: str  # the same, where it holds something


class Held:
    """One process, from the first line of the pocket's code to the forks that go on with it."""

    words: Words
    is_program = True  # with arguments and an input that are each run's own
    rehearsing = False  # this is a run of the sample
    arrived = False  # at where it is held

    def __init__(self, template: Any, talk: socket.socket, orders: Message, log: int, printed: List[int]):
        self.template = template
        self.talk = talk
        self.orders = orders
        self.log = log  # the service's log, where standard error went until the pocket's code began
        self.begun = self.came = time.monotonic()
        self.child = False
        self.on_start: List[Callable[[], object]] = []
        self.open_files: Tuple[int, ...] = ()
        self.shared: List[clone.Obstacle] = []  # memory that the program's processes share, each run's its own
        tops = tuple(f"{top}/" for top in {orders["directory"], os.path.realpath(orders["directory"]), "/pocket"})
        scratch = tuple(f"{top}/" for top in ("/tmp", "/dev/shm", *orders["homes"]))
        shown = *tops, *(f"{place['target']}/" for place in orders["mounts"])
        written = tuple(
            f"{name}/" for place in orders["mounts"] if place["writable"] for name in (place["target"], place["alias"])
        )
        advice = f"{self.words.before}; {self.words.instead}"
        self.recorder = recorded.Recorder(tops, scratch, shown, written, advice, self.is_program)
        self.pid = os.getpid()
        self.seeds = seeds.Seeds()
        self.streams = streams.Streams(printed, self.recorder.reconfigured, self.is_program)
        self.reports = -1  # where a run of the sample writes which pages it made its own
        self.pages = workingset.WorkingSet()
        self.run_size = 0  # bytes that a run of the sample had of its own
        self.changed: Optional[str] = None  # a file of the service's that is not any more what was imported
        self.collecting = True
        self.environment: Dict[bytes, bytes] = {
            k.encode(): v.encode() for k, v in orders["hold"]["environment"].items()
        }

    # -- of a subclass

    def run(self) -> int:
        """Run the pocket's code. Returns its exit status, in a child; a template ends in here."""
        raise NotImplementedError

    def differing(self, start: Message, given: Fds) -> Optional[str]:
        """Why a session with this start cannot go on from here, or None. `given`: its descriptors, to look at."""
        raise NotImplementedError

    def touch(self) -> None:
        """In a slot: go once through what will be done with a session's start."""
        raise NotImplementedError

    def take_over(self, start: Message, given: Fds, sock: socket.socket, output: int) -> None:
        """Be the process of this session's caller. Takes over `sock`, the session's socket. `output`: where a client's
        session prints, -1 for a program, which has its streams in `given`."""
        raise NotImplementedError

    def report(self) -> None:
        """At the very end of a child."""

    def apologize(self, error: Error) -> None:
        """Tell a caller, whose process this is already, that it will not go on."""
        raise NotImplementedError

    # -- up to the fork

    def begin_watch(self) -> None:
        signal.signal(OVERDUE, self.overdue)
        self.carried = carried.Carried()
        self.recorder.begin()
        self.seeds.begin()

    def end_watch(self) -> None:
        self.seeds.end()
        self.recorder.end()

    def overdue(self, _: int, frame: Any) -> None:
        """It took too long, says init: say where it is."""
        hold = self.orders["hold"]
        if os.getpid() != self.pid or self.child or self.arrived and time.monotonic() - self.begun < hold["patience"]:
            return
        own = next((f for f in rehearsal.frames(frame) if f.f_code.co_filename.startswith(self.recorder.tops)), frame)
        where = f"{own.f_code.co_filename}, line {own.f_lineno}, in {own.f_code.co_name}"
        if self.arrived:
            self.fail(f"the rehearsal failed: it does not end, and is at {where}", "rehearsal")
        self.fail(f"after {hold['timeout']:.0f} s it is still at {where}")

    def fail(self, why: str, code: str = "hold") -> NoReturn:
        """Say why it cannot be held, with what was printed, and end."""
        self.end_watch()
        interpreter.flush_quietly()
        shown = b"".join(self.streams.read(fd) for fd in (1, 2))[-8192:]
        os.write(self.log, shown + f"pocket: {why}\n".encode())
        error = Error(code, why, output=shown.decode(errors="replace"))
        try:
            wire.send(self.talk, {"op": "failed", "error": error.wire()})
        except OSError:
            pass
        os._exit(1)

    def arrive(self) -> None:
        """It has come to where it is held: no more is noted, and what it holds is looked at."""
        self.arrived = True
        self.came = time.monotonic()
        self.end_watch()
        self.carried.end()
        if self.recorder.refused:  # and what was raised was caught
            self.fail(self.recorder.refused)

    def look(self) -> None:
        """What was printed, and whether there is what a fork cannot carry over."""
        who, before = self.words.who, self.words.before
        self.streams.keep()
        if self.streams.too_much():
            self.fail(f"{who} prints more than {streams.PRINTED >> 20} MiB {before}")
        replaced = self.streams.replaced()
        if replaced is not None:
            self.fail(f"it closes or replaces descriptor {replaced} {before}, and each run has its own")
        if self.streams.is_read():
            self.fail(f"it reads standard input {before}, and each run has its own")
        temporary = self.recorder.left_temporary()
        if temporary:
            self.fail(f"it makes {temporary} {before}, and each run has its own; {self.words.instead}")
        left = self.left_behind()
        if left:
            self.fail(f"{self.words.at} {who} holds what a fork cannot carry over: {left}. {self.words.later}")
        shared = [o for o in clone.shared_mappings() if o.range]
        self.make_private()
        size = sum(o.range[1] - o.range[0] for o in shared if o.range)
        if size > _SHARED:
            self.fail(
                f"{who} has {size >> 20} MiB of shared memory {before}, and each run has at most {_SHARED >> 20} of "
                f"its own; {self.words.instead}"
            )
        self.shared = shared

    def make_private(self) -> List[str]:
        """Nothing that is written from now on reaches another process. Returns the names of what was shared."""
        try:
            return clone.privatize_shared_mappings()
        except clone.CloneError as e:
            self.fail(f"{self.words.who} holds what a fork cannot carry over: {e.strerror}")

    def share(self) -> None:
        """Let what was shared be shared again, by this process and those that it makes."""
        for mapping in self.shared:
            assert mapping.range
            pages.share(*mapping.range, mapping.protection)

    def left_behind(self) -> str:
        """What cannot be carried over, in words. Notes what has to be opened again in each child."""
        left, self.open_files = leftbehind.find({0, 1, 2, self.talk.fileno(), self.log, self.reports})
        return left

    def settle(self) -> None:
        """Be ready to be forked: no garbage, and pages that stay shared."""
        if self.orders.get("threads"):
            threads.limit(self.orders["threads"], threads.find())  # of libraries that its program has loaded
        if signal.getsignal(OVERDUE) == self.overdue:
            signal.signal(OVERDUE, signal.SIG_DFL)
        privatized = self.make_private()  # what a rehearsal has left
        self.seeds.find()
        self.scratch = rehearsal.Places(("/tmp", "/dev/shm", *self.orders["homes"]))
        self.collecting = gc.isenabled()
        gc.collect()
        pages.trim()
        pages.unmap_files()
        self.pages = self.pages_of_a_run().on_huge_pages()
        gc.freeze()
        gc.disable()
        self.try_fork()
        self.say_ready(privatized)

    def pages_of_a_run(self) -> workingset.WorkingSet:
        return self.pages

    def try_fork(self) -> None:
        """Whether it can be forked shows now, not in each run."""
        noticed = rehearsal.unnoticed()
        try:
            clone.attempt()
        except clone.CloneError as e:
            self.fail(f"{self.words.at} {self.words.who} cannot be forked: {e.strerror}")
        noticed()

    def say_ready(self, privatized: List[str]) -> None:
        r = self.recorder
        os.write(self.log, b"".join(part for parts in self.streams.printed.values() for part in parts))
        said = {
            "op": "ready",
            "seconds": self.came - self.begun,
            "threads": len(os.listdir("/proc/self/task")),
            "privatized": privatized[:32],
            "variables": sorted(os.fsdecode(name) for name in r.variables)[:100],
            "files": len(r.files),
            "unsure": self.seeds.unsure[:8],
            "noted": self.noted()[:8],
            "working_set": self.pages.size,
            "run": self.run_size,
        }
        wire.send(self.talk, said)

    def noted(self) -> List[str]:
        """What each run would have found otherwise, perhaps, and does not."""
        return list(dict.fromkeys(self.recorder.noted))

    # -- forks

    def serve(self) -> None:
        """Fork as asked. Returns in each child, when it is its caller's process."""
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
                output = fds.take() if len(fds) else -1
                try:
                    self.fork(message, leaf, session, avoid, output)
                finally:
                    for fd in (leaf, session, output):
                        if fd >= 0:
                            os.close(fd)
                if self.child:
                    return

    def fork(self, message: Message, leaf: int, session: int, avoid: Tuple[int, ...], output: int) -> None:
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
            self.become(message, session, avoid, output, trace)
        except BaseException as e:
            error = e if isinstance(e, Error) else Error("launch", f"{type(e).__name__}: {e}")
            if self.child:  # its caller's start is taken
                self.apologize(error)
            else:
                wire.send(self.talk, {"op": "refused", "launch": launch, "error": error.wire()})
            os._exit(FAILED)

    def refuse(self, launch: int, why: str, code: str = "held") -> None:
        """Refuse one run; "outdated": and all that follow, so that pocketd makes another template."""
        error = Error(code, why)
        wire.send(self.talk, {"op": "refused", "launch": launch, "error": error.wire()})

    # -- in a child

    def become(self, message: Message, session: int, avoid: Tuple[int, ...], output: int, trace: Trace) -> None:
        """Be the process of one run, or say why this run cannot come from here and end: nothing of its caller's has
        been taken from the session's socket then."""
        launch = message["launch"]
        os.setsid()
        self.share()
        clone.renew(self.open_files)
        clone.revive()
        trace.mark("its threads are back")
        if os.getpid() in avoid:
            self.refuse(launch, "its pid would be that of one of its templates")
            os._exit(0)
        sock = socket.socket(fileno=os.dup(session))
        answers, words = self.talk, {"launch": launch}
        if message.get("slot"):
            wire.send(self.talk, {"op": "forked", "launch": launch})
            self.prepare()
            answers, words = sock, {}
            sock = slot.wait(sock, trace)
        peeked, given = wire.receive(sock, socket.MSG_PEEK)
        with given:
            changed = self.outdated()
            why = changed or self.differing(peeked, given)
        if why:
            error = Error("outdated" if changed else "held", why)
            wire.send(answers, {"op": "refused", **words, "error": error.wire()})
            if message.get("slot"):
                answers.recv(1)  # until init knows: it tells the caller of a session how its worker ends
            os._exit(0)
        wire.send(answers, {"op": "taken" if message.get("slot") else "forked", **words})
        start, given = wire.receive(sock)
        trace.mark("it has its caller's start")
        self.child = interpreter.frozen = True
        answers.close()
        self.talk.close()
        os.close(self.log)
        if not message.get("slot"):
            self.renew()
        self.take_over(start, given, sock, output)
        trace.mark("environment, directory, streams, random state are its caller's")
        trace.print(start.get("trace"))

    def outdated(self) -> Optional[str]:
        changed = self.changed or self.recorder.outdated()
        return f"{changed} has changed since {self.words.who} read it" if changed else None

    def saw_otherwise(self, name: str) -> str:
        who, before = self.words.who, self.words.before
        return f"{name} is not what {who} saw {before}; env in its definition makes it the same"

    def elsewhere(self, start: Message) -> Optional[str]:
        """Whether the directory was looked at, and is another one in this run. One that is not there becomes the
        pocket's (interpreter.change_directory)."""
        started = wire.field(start, "directory", bytes, b"/pocket")
        here = os.fsencode(self.orders["directory"]), b"/pocket"
        if not self.recorder.directory or started in here or not os.path.isdir(started):
            return None
        where = os.fsdecode(started)
        return f"it was started in {where}, and {self.words.who} looked at its directory {self.words.before}"

    def prepare(self) -> None:
        """In a slot: do what can be done before it is known for whom, and go through the rest once."""
        self.pages.make()
        self.renew()
        interpreter.touch(self.streams.restore)
        self.touch()
        if self.collecting:
            gc.enable()

    def renew(self) -> None:
        randomness.renew(self.seeds.kept)
        self.seeds.renew()

    def adopt(self, start: Message) -> None:
        """Its caller's environment, directory and streams, and in the environment what the pocket's code changed."""
        interpreter.adopt(start, self.streams.restore)
        threads.hint(self.orders.get("threads"))
        for name, value in self.recorder.changes.items():
            if value is None:
                os.environb.pop(name, None)
            else:
                os.environb[name] = value

    def resume(self, start: Message) -> None:
        """Its caller's blocked signals, and on top of all that is the caller's what the pocket's code set."""
        interpreter.block(start)
        self.carried.put_back()
        if self.collecting:
            gc.enable()

    def begin(self) -> None:
        """What each run is to do first (pocketd.on_start)."""
        for function in self.on_start:
            function()
