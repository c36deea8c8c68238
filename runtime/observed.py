"""`pocket suggest`: a program run once under observation, and where it could be held.

The place is the last one before the program first looks at what each run has of its own: its arguments, standard input,
its environment as a whole, a file that its arguments name; or before it does what cannot be carried over: a connection,
a file that it writes.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import os
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from types import CodeType, FrameType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from nsutil import obstacles
from pocketd import wire
from pocketd.wire import Message
from runtime import checkpoint, program, recorded, remainder

_WORTH = 0.05  # of the time until the first look: what a simpler place may lose against the last one
_LEAST = 0.01  # seconds that are worth a checkpoint
_TALKS = ("socket.connect", "socket.bind", "socket.getaddrinfo")
_NEW, _HERE = "<new>", "<here>"  # names that no program has
_COROUTINE = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def run(sock: socket.socket, start: Message, orders: Message) -> int:
    """Run the program of `start` under observation, and say on the session's socket what was seen. Its exit status."""
    directory = orders["directory"]
    tops = tuple(f"{top}/" for top in {directory, os.path.realpath(directory), "/pocket"})
    arguments = [os.fsdecode(a) for a in wire.field(start, "arguments", list, [])]

    def say_early() -> None:
        """For it may be ended by a signal, or end by os._exit."""
        with suppress(OSError):
            wire.send(sock, {"op": "observed", "status": None, **observer.proposal(None)}, flags=socket.MSG_DONTWAIT)

    observer = Observer(arguments, tops, say_early)
    code = program.run(start, orders, observer.compile)
    with suppress(OSError):
        wire.send(sock, {"op": "observed", "status": code, **observer.proposal(code)}, flags=socket.MSG_DONTWAIT)
    sock.close()
    return code


def run_cold(sock: socket.socket, reason: str) -> None:
    """The program will be executed as a process of its own, of which nothing is seen. `reason`: as `cold` says it."""
    why = nowhere(f"each run is a process of its own: {reason or 'its definition or its service says so'}")
    wire.send(sock, {"op": "observed", **why})
    sock.close()


def nowhere(why: str) -> Message:
    return {"checkpoint": None, "why": why}


class Look(NamedTuple):
    """What the program looked at first, when, and where it was in its own file then, outermost first."""

    what: str
    when: float
    places: Tuple[Tuple[CodeType, int], ...]  # what was running, and the line that it was in
    line: str  # for people: FILE, line N
    looping: bool  # an event loop ran, further in than all `places`


class Offer(NamedTuple):
    """A checkpoint, what it should mean, and whether what follows can be rehearsed."""

    where: str
    body: checkpoint.Body
    at: int
    rehearsed: bool


class Observer:
    """Watches one run of a program with these arguments, from when it is compiled. `tops`: where the pocket's own files
    are; `told`: called once it has looked."""

    def __init__(self, arguments: List[str], tops: Tuple[str, ...], told: Callable[[], None]):
        self.path = ""
        self.source = b""
        self.tops = tops
        self.named = {os.path.realpath(a) for a in arguments if a}
        self.begun = 0.0
        self.failed: Optional[str] = None  # why it was not compiled
        self.look: Optional[Look] = None
        self.input = False  # it has read some
        self._written: List[Tuple[str, Look]] = []  # files elsewhere that it has opened for writing
        self._told = told
        self._reached: Dict[int, float] = {}  # each statement's first line, when it was reached first
        self._new: List[bool] = []  # which lines are not reached yet

    def compile(self, source: bytes, path: str) -> Any:
        try:
            code = self._watched(source, path)
        except (SyntaxError, ValueError) as e:
            self.failed = f"{type(e).__name__}: {e}"
            raise
        self.source, self.path = source, path
        self.begin()
        return code

    def begin(self) -> None:
        sys.addaudithook(self._heard)
        for name in ("argv", "orig_argv"):
            setattr(sys, name, _Arguments(getattr(sys, name), self))
        for mapping in (os.environ, os.environb):
            watched: Any = _watched(type(mapping), self)
            mapping.__class__ = watched
        self._watch_input()
        self.begun = time.monotonic()

    # -- statements of the program's own file

    def _watched(self, source: bytes, path: str) -> Any:
        """Its code, in which each statement says when it is reached first. sys.settrace would take ten times as long
        as a loop itself does."""
        tree = ast.parse(source, path)
        for body in _of_its_own(tree):
            statements = list(body)
            body.clear()
            for n, statement in enumerate(statements):
                if not (n == 0 and _is_text(statement)) and not _is_from_the_future(statement):
                    body.append(ast.fix_missing_locations(_probe(statement)))
                body.append(statement)
        self._new = [True] * (len(source.splitlines()) + 2)
        setattr(builtins, _NEW, self._new)
        setattr(builtins, _HERE, self._here)
        return compile(tree, path, "exec", dont_inherit=True)

    def _here(self, line: int) -> None:
        self._new[line] = False
        self._reached[line] = time.monotonic()

    # -- the first look

    def looked(self, what: str, near: bool = False) -> None:
        """`near`: it counts only where a line of the pocket's own does so itself."""
        if self.look is not None or not self.begun:
            return
        look = self._seen(what, near, sys._getframe(1))
        if look is None:
            return
        self.look = next((opened for name, opened in self._written if _is_written(name)), look)
        self._told()

    def _seen(self, what: str, near: bool, here: FrameType) -> Optional[Look]:
        own = recorded.own_frame(here, self.tops, near)
        if own is None:
            return None
        frames = list(_outwards(here))
        places: List[Tuple[CodeType, int]] = []
        loop = next((n for n, f in enumerate(reversed(frames)) if _loops(f.f_code)), None)
        for frame in frames[::-1][:loop]:
            if frame.f_code.co_filename == self.path:
                places.append((frame.f_code, frame.f_lineno))
        line = f"{os.path.basename(own.f_code.co_filename)}, line {own.f_lineno}"
        return Look(what, time.monotonic(), tuple(places), line, loop is not None)

    def _heard(self, event: str, arguments: Tuple[Any, ...]) -> None:
        if self.look is not None:
            return
        if event in _TALKS:
            self.looked("a connection")
        elif event == "builtins.input":
            self.looked("standard input")
        elif event == "open":
            path, _, flags = arguments
            if recorded.is_input(path):
                self.looked("standard input")
            elif isinstance(path, (str, bytes)):
                self._opened(os.path.realpath(os.fsdecode(path)), flags if isinstance(flags, int) else 0)

    def _opened(self, name: str, flags: int) -> None:
        if flags & os.O_ACCMODE != os.O_RDONLY and name.startswith(self.tops):
            self.looked(f"a file that it writes, {os.path.basename(name)}")
        elif flags & os.O_ACCMODE != os.O_RDONLY:  # it may be closed again before its first look
            opened = self._seen(f"a file that stays open for writing, {name},", True, sys._getframe(1))
            self._written += [(name, opened)] if opened and len(self._written) < 100 else []
        elif name in self.named:
            self.looked(f"the file {os.path.basename(name)}, which its arguments name")

    def _watch_input(self) -> None:
        """What Python reads by sys.stdin, however it does, comes through its lowest layer."""
        raw: Any = getattr(getattr(sys.stdin, "buffer", None), "raw", None)
        for name in ("read", "readall", "readinto"):
            if hasattr(raw, name):
                setattr(raw, name, partial(self._reads, getattr(raw, name)))
        module: Any = os
        module.read = partial(self._reads_descriptor, os.read)

    def _reads(self, plain: Any, *args: Any) -> Any:
        self.looked("standard input")
        self.input = True
        return plain(*args)

    def _reads_descriptor(self, plain: Any, fd: int, size: int) -> Any:
        if fd == 0:
            self.looked("standard input")
            self.input = True
        return plain(fd, size)

    # -- the proposal

    def proposal(self, status: Optional[int]) -> Message:
        """What to write into the definition, and what it saves: seconds of the whole run's. `status`: None while it
        runs."""
        whole = time.monotonic() - self.begun
        if self.failed:
            return nowhere(f"it is no program that Python runs: {self.failed}")
        if not self.begun:
            return nowhere("it is not one file of Python source that can be read, and nothing else is held")
        if self.look is None:
            ended = f"it ended, with status {status}, before it" if status else "it never"
            return nowhere(f"{ended} looked at anything that is a run's own")
        tree = ast.parse(self.source)
        reached = [(offer, self._reached_by(offer, tree)) for offer in self._offers(tree)]
        found = [(offer, when - self.begun) for offer, when in reached if when is not None]
        # The simplest place that loses little: the rest of the top level, or a function, can be rehearsed too.
        best = max((saved for _, saved in found), default=0.0)
        if best < _LEAST:
            return nowhere(self._too_late(bool(found)))
        offer, saved = next(pair for pair in found if pair[1] >= best * (1 - _WORTH))
        return {
            "checkpoint": offer.where,
            "rehearse": offer.rehearsed and status == 0 and not self.input,
            "saves": saved,
            "whole": whole if status is not None else None,
            "looked": self.look.what,
            "at": self.look.line,
        }

    def _too_late(self, found: bool) -> str:
        assert self.look
        said = f"it looks at {self.look.what} in {self.look.line}"
        if self.look.looping:
            return f"{said}, in an event loop, which cannot be held, and before that begins nothing takes time"
        if not found:
            return f"{said}, in a thread or by no line of {self.path}"
        if self.look.when - self.begun < _LEAST:
            return f"{said}, at once"
        return f"{said}, and what takes time before that is in the same statement"

    def _offers(self, tree: ast.Module) -> Iterator[Offer]:
        """Places in which it was at its first look, the simplest first."""
        assert self.look
        file, places = os.path.basename(self.path), self.look.places
        if not places or places[0][0].co_name != "<module>":
            return
        for code, _ in places[1:2]:
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and checkpoint.first_line(node) == code.co_firstlineno:
                    yield Offer(node.name, *checkpoint.in_function(node), True)
        for at, statement in enumerate(tree.body):
            if _holds(statement, places[0][1]):
                for where in self._beginnings(statement):
                    yield Offer(where, tree.body, at, True)
                yield Offer(f"{file}:{checkpoint.first_line(statement)}", tree.body, at, True)
        for _, line in places:
            for body in checkpoint.bodies(tree):
                for at, statement in enumerate(body):
                    if body is not tree.body and _holds(statement, line) and not isinstance(statement, _DEFINITIONS):
                        again = remainder.find(tree, partial(operator.is_, statement)) is not None
                        yield Offer(f"{file}:{checkpoint.first_line(statement)}", body, at, again)

    def _beginnings(self, statement: ast.stmt) -> Iterator[str]:
        """Of its first line, the shortest first."""
        text = checkpoint.text_of(statement, self.source.splitlines(keepends=True)).splitlines()[0]
        for end in [n + 1 for n, c in enumerate(text) if c in " (=:,."] + [len(text)]:
            if len(text[:end].rstrip()) > 3:
                yield text[:end].rstrip()

    def _reached_by(self, offer: Offer, tree: ast.Module) -> Optional[float]:
        """When the place was reached first. None where it never was, or where its name means another."""
        with suppress(checkpoint.CheckpointError):
            body, at = checkpoint.find(tree, self.source, self.path, offer.where)
            statement = body[at]
            if body is offer.body and at == offer.at:
                lines = range(checkpoint.first_line(statement), (statement.end_lineno or statement.lineno) + 1)
                return min((self._reached[line] for line in lines if line in self._reached), default=None)
        return None


def _of_its_own(tree: ast.Module) -> List[checkpoint.Body]:
    """Bodies but those of functions that others may compile or take apart, since they would find more in them than its
    author wrote: of decorated ones (numba's), and of those that are handed on by their names (joblib's)."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    given = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}
    left = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.decorator_list or node.name in given)
    ]
    theirs = {id(body) for node in left for body in checkpoint.bodies(node)}
    return [body for body in checkpoint.bodies(tree) if id(body) not in theirs]


def _probe(statement: ast.stmt) -> ast.stmt:
    """In another process, to which an object with methods has been pickled, it does nothing."""
    line = checkpoint.first_line(statement)
    probe = ast.parse(f"try:\n if new[{line}]: here({line})\nexcept NameError: pass").body[0]
    for node in ast.walk(probe):
        if isinstance(node, ast.Name):
            node.id = {"new": _NEW, "here": _HERE}.get(node.id, node.id)
        if hasattr(node, "lineno"):
            node.lineno = node.end_lineno = line  # type: ignore[attr-defined]
    return probe


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_from_the_future(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _is_written(name: str) -> bool:
    """Whether a descriptor of this process is of that file, and open for writing."""
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}") == name and obstacles.is_written(int(fd)):
                return True
    return False


def _outwards(frame: Optional[FrameType]) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _loops(code: CodeType) -> bool:
    """Whether what is below it runs in an event loop."""
    return bool(code.co_flags & _COROUTINE) or os.path.basename(os.path.dirname(code.co_filename)) == "asyncio"


def _holds(statement: ast.stmt, line: int) -> bool:
    return checkpoint.first_line(statement) <= line <= (statement.end_lineno or statement.lineno)


class _Arguments(list):  # type: ignore[type-arg]
    """sys.argv, whose reader is noted; the program's own name may be asked for."""

    def __init__(self, words: List[str], observer: Observer):
        super().__init__(words)
        self._observer = observer

    def __getitem__(self, key: Any) -> Any:
        if key != 0:
            self._observer.looked("its arguments")
        return super().__getitem__(key)

    def __reduce_ex__(self, protocol: Any) -> Any:  # multiprocessing sends it
        return list, (list.copy(self),)

    __hash__ = None


def _looking(plain: Any) -> Any:
    def method(self: _Arguments, *args: Any, **kwargs: Any) -> Any:
        self._observer.looked("its arguments")
        return plain(self, *args, **kwargs)

    return method


for _name in recorded.LOOKS:
    setattr(_Arguments, _name, _looking(getattr(list, _name)))


def _watched(plain: Any, observer: Observer) -> Any:
    class Environment(plain):  # type: ignore[misc]
        pass

    def looking(name: str) -> Any:
        def method(self: Any) -> Any:
            observer.looked("its whole environment", near=True)
            return getattr(plain, name)(self)

        return method

    for name in ("__iter__", "__len__", "__repr__", "copy"):
        setattr(Environment, name, looking(name))
    Environment.__name__ = plain.__name__
    Environment.__qualname__ = plain.__qualname__
    return Environment
