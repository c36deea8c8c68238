"""Every kind of process that runs a pocket's code: a worker of the service's template, of the pocket's own, a slot, a
session with modules preloaded, and a pocket's template itself, which is its program up to its checkpoint."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pocketd.client import login
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.escape.attempt import Inside

KINDS = ("root", "held", "slot", "preloaded", "template")
HELD = """
from tests.escape.inside import program

def main():
    program.main()

if __name__ == "__main__":
    main()
"""
# A file that Python opens for writing would be a reason not to hold it.
ASKED = """
import ctypes, json, os, signal
from tests.escape.inside import program

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for processes.kill_own_group
with open("asked.json") as file:
    requests = json.load(file)
answers = json.dumps([program.answer(request) for request in requests]).encode()
libc = ctypes.CDLL(None)
fd = libc.open(b"out/answers.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
assert libc.write(fd, answers, len(answers)) == len(answers), "out/answers.json is not to be written"
libc.close(fd)

def main():
    pass

main()
"""
Answers = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class Prisoner:
    """One of them. `answers`: what comes of requests (tests.escape.inside.program); `directory`: its pocket's."""

    shares = False  # its pid namespace is that of its pocket's template

    def __init__(self, directory: Path, answers: Answers, stack: ExitStack, alive: Callable[[], bool]):
        self.directory, self.answers, self._stack, self._alive = directory, answers, stack, alive

    def attempt(self, name: str, /, thread: str = "main", **given: Any) -> dict[str, Any]:
        (reply,) = self.answers([{"attempt": name, "thread": thread, "given": given}])
        assert "failed" not in reply, reply["failed"]
        return reply

    @property
    def alive(self) -> bool:
        return self._alive()

    def end(self) -> None:
        self._stack.close()


def start(kind: str, daemon: Pocketd, enter: Callable[..., Inside], place: Path, program: str) -> Prisoner:
    """`place` has directories for the pockets of tests.escape.conftest."""
    if kind == "template":
        return _template(daemon, place / "early")
    if kind == "root":
        return _program(enter("prisoner"), place / "prisoner")
    made = _session(daemon, place / "called", program) if kind == "preloaded" else _held(kind, daemon, enter, place)
    made.shares = True
    return made


def _held(kind: str, daemon: Pocketd, enter: Callable[..., Inside], place: Path) -> Prisoner:
    name = {"held": "held", "slot": "slotted"}[kind]
    (place / name / "app.py").write_text(HELD)
    pocket(daemon, "warm", name)
    mark = daemon.log.stat().st_size
    inside = enter(name, defined=True)
    came(daemon, mark, name, kind)
    return _program(inside, place / name)


def pocket(daemon: Pocketd, *words: str) -> None:
    done = subprocess.run(
        daemon.command(*words), env=daemon.environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def came(daemon: Pocketd, mark: int, name: str, way: str) -> None:
    """By pocketd's own word, since `mark` in its log."""
    said = re.compile(rb"session-started .*pocket=%s .*way=%s" % (name.encode(), way.encode()))
    assert wait_for(lambda: said.search(daemon.log.read_bytes()[mark:]), 20)


def _program(inside: Inside, directory: Path) -> Prisoner:
    stack = ExitStack()
    stack.callback(inside.end)

    def answers(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [inside.attempt(r["attempt"], r["thread"], **r["given"]) for r in requests]

    return Prisoner(directory, answers, stack, lambda: inside.alive)


def _session(daemon: Pocketd, directory: Path, program: str) -> Prisoner:
    stack = ExitStack()
    pocket(daemon, "warm", "called")
    mark = daemon.log.stat().st_size
    session = stack.enter_context(login("called", runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT))
    came(daemon, mark, "called", "held")
    session.call("signal:signal", int(signal.SIGUSR1), int(signal.SIG_IGN))  # for processes.kill_own_group
    alive = Path(f"/proc/{session.pid}").exists
    return Prisoner(directory, lambda asked: [session.call(f"{program}:answer", r) for r in asked], stack, alive)


def _template(daemon: Pocketd, directory: Path) -> Prisoner:
    """It is made anew for each lot of requests."""
    (directory / "app.py").write_text(ASKED)
    (directory / "out").mkdir(exist_ok=True)
    (directory / "out").chmod(0o777)  # where the file system maps no ids, the pocket's user is nobody in particular

    def answers(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (directory / "asked.json").write_text(json.dumps(requests))
        pocket(daemon, "cool", "early")
        pocket(daemon, "warm", "early")
        found: list[dict[str, Any]] = json.loads((directory / "out/answers.json").read_text())
        return found

    return Prisoner(directory, answers, ExitStack(), lambda: True)
