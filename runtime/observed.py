"""`pocket suggest`: a program run once under observation, and where it could be held.

The place is the last one before the program first looks at what each run has of its own: its arguments, standard input,
a file that its arguments name; or before it does what cannot be carried over: a connection, a file that it writes.
"""

from __future__ import annotations

import ast
import os
import socket
import sys
import time
from types import FrameType
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from pocketd import wire
from pocketd.wire import Message
from runtime import checkpoint, program

_WORTH = 0.05  # of the time until the first look: what a simpler place may lose against the last one
_LEAST = 0.01  # seconds that are worth a checkpoint
_FILES = ("open",)
_TALKS = ("socket.connect", "socket.bind", "socket.getaddrinfo")


def run(sock: socket.socket, start: Message, orders: Message) -> int:
    """Run the program of `start` under observation, and say on the session's socket what was seen. Its exit status."""
    directory = orders["directory"]
    tops = tuple(f"{top}/" for top in {directory, os.path.realpath(directory), "/pocket"})
    arguments = [os.fsdecode(a) for a in wire.field(start, "arguments", list, [])]
    observer = Observer(arguments, tops)
    code = program.run(start, orders, observer.compile)
    sys.settrace(None)
    wire.send(sock, {"op": "observed", "status": code, **observer.proposal()})
    sock.close()
    return code


class Look(NamedTuple):
    """What the program looked at first, when, and where it was in its own file then, outermost first."""

    what: str
    when: float
    lines: Tuple[Tuple[str, int, float], ...]  # (function, line, when that line was begun)
    line: str  # for people: FILE, line N


class Observer:
    """Watches one run of a program with these arguments, from when it is compiled. `tops`: where the pocket's own files
    are."""

    def __init__(self, arguments: List[str], tops: Tuple[str, ...]):
        self.path = ""
        self.source = b""
        self.tops = tops
        self.named = {os.path.realpath(a) for a in arguments if a}
        self.begun = 0.0
        self.look: Optional[Look] = None
        self._starts: Dict[int, Tuple[str, int, float]] = {}  # by frame: the line that it is in

    def compile(self, source: bytes, path: str) -> Any:
        self.source = source
        code = compile(source, path, "exec", dont_inherit=True)
        self.path = path
        self.begin()
        return code

    def begin(self) -> None:
        sys.addaudithook(self._heard)
        for name in ("argv", "orig_argv"):
            setattr(sys, name, _Arguments(getattr(sys, name), self))
        for method in ("read", "readline", "readlines"):
            self._tap(sys.stdin, method)
        self.begun = time.monotonic()
        sys.settrace(self._called)

    # -- lines of the program's own file

    def _called(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename == self.path and self.look is None else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self._starts[id(frame)] = (frame.f_code.co_name, frame.f_lineno, time.monotonic())
        elif event == "return":
            self._starts.pop(id(frame), None)
        return self._line

    # -- the first look

    def looked(self, what: str) -> None:
        if self.look is not None or not self.begun:
            return
        frame: Optional[FrameType] = sys._getframe(1)
        lines: List[Tuple[str, int, float]] = []
        shown = ""
        while frame is not None:
            if id(frame) in self._starts and frame.f_code.co_filename == self.path:
                lines.append(self._starts[id(frame)])
            if not shown and frame.f_code.co_filename.startswith(self.tops):
                shown = f"{os.path.basename(frame.f_code.co_filename)}, line {frame.f_lineno}"
            frame = frame.f_back
        if shown:
            self.look = Look(what, time.monotonic(), tuple(reversed(lines)), shown)
            sys.settrace(None)

    def _heard(self, event: str, arguments: Tuple[Any, ...]) -> None:
        if self.look is not None:
            return
        if event in _TALKS:
            self.looked("a connection")
        elif event in _FILES:
            path, _, flags = arguments
            if not isinstance(path, (str, bytes)):
                return
            name = os.path.realpath(os.fsdecode(path))
            if isinstance(flags, int) and flags & os.O_ACCMODE != os.O_RDONLY and name.startswith(self.tops):
                self.looked(f"a file that it writes, {os.path.basename(name)}")
            elif name in self.named:
                self.looked(f"the file {os.path.basename(name)}, which its arguments name")

    def _tap(self, stream: Any, method: str) -> None:
        if stream is None:
            return
        plain = getattr(stream, method)

        def read(*args: Any, **kwargs: Any) -> Any:
            self.looked("standard input")
            return plain(*args, **kwargs)

        setattr(stream, method, read)

    # -- the proposal

    def proposal(self) -> Message:
        """What to write into the definition, and what it saves: seconds of the whole run's."""
        end = time.monotonic()
        whole = end - self.begun
        if self.look is None:
            return {"checkpoint": None, "whole": whole, "why": "it never looked at anything that is a run's own"}
        found = self._places()
        if not found:
            return {"checkpoint": None, "whole": whole, "why": f"it looked at {self.look.what} outside of {self.path}"}
        # The simplest place that loses little: the rest of the top level, or a function, can be rehearsed too.
        best = max(when for _, when, _ in found) - self.begun
        if best < _LEAST:
            why = f"it looks at {self.look.what} at once, in {self.look.line}"
            return {"checkpoint": None, "whole": whole, "why": why}
        where, when, rehearsed = next(place for place in found if place[1] - self.begun >= best * (1 - _WORTH))
        return {
            "checkpoint": where,
            "rehearse": rehearsed,
            "saves": when - self.begun,
            "whole": whole,
            "looked": self.look.what,
            "at": self.look.line,
        }

    def _places(self) -> List[Tuple[str, float, bool]]:
        """(checkpoint, when it was reached, whether what follows can be rehearsed), the simplest first."""
        assert self.look
        tree = ast.parse(self.source)
        found: List[Tuple[str, float, bool]] = []
        lines = self.look.lines
        if not lines or lines[0][0] != "<module>":
            return []
        for name, _, _ in lines[1:2]:
            # Held at its beginning: it was called from the top level and is a plain function of it.
            if any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body):
                found.append((name, lines[0][2], True))
        top = next((i for i, s in enumerate(tree.body) if self._holds(s, lines[0][1])), None)
        if top is not None:
            prefix = self._prefix(tree, top)
            if prefix:
                found.append((prefix, lines[0][2], True))
        for _, line, when in lines[1:]:
            if any(checkpoint.first_line(s) == line for body in checkpoint.bodies(tree) for s in body):
                found.append((f"{os.path.basename(self.path)}:{line}", when, False))
        return found

    @staticmethod
    def _holds(statement: ast.stmt, line: int) -> bool:
        return checkpoint.first_line(statement) <= line <= (statement.end_lineno or statement.lineno)

    def _prefix(self, tree: ast.Module, index: int) -> Optional[str]:
        """The shortest beginning of a statement's first line that no other top-level statement has."""
        lines = self.source.splitlines(keepends=True)
        text = checkpoint.text_of(tree.body[index], lines).splitlines()[0]
        others = [checkpoint.squeeze(checkpoint.text_of(s, lines)) for n, s in enumerate(tree.body) if n != index]
        ends = [n + 1 for n, c in enumerate(text) if c in " (=:,."] + [len(text)]
        for end in ends:
            prefix = text[:end].rstrip()
            if len(prefix) > 3 and not any(other.startswith(checkpoint.squeeze(prefix)) for other in others):
                return prefix
        return None


class _Arguments(list):  # type: ignore[type-arg]
    """sys.argv, whose reader is noted; the program's own name may be asked for."""

    def __init__(self, words: List[str], observer: Observer):
        super().__init__(words)
        self._observer = observer

    def __getitem__(self, key: Any) -> Any:
        if key != 0:
            self._observer.looked("its arguments")
        return super().__getitem__(key)

    def __iter__(self) -> Any:
        self._observer.looked("its arguments")
        return super().__iter__()

    def __len__(self) -> int:
        self._observer.looked("its arguments")
        return super().__len__()

    def __contains__(self, item: object) -> bool:
        self._observer.looked("its arguments")
        return super().__contains__(item)
