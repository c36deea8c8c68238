"""The same attempts from every kind of process that runs a pocket's code: a worker of its template, a slot, a session
with modules preloaded, and its template itself, which is its program up to its checkpoint."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pocketd.client import login
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.escape.attempt import THREADS, Attempt, Inside, outcome
from tests.escape.conftest import PROGRAM
from tests.escape.test_calls import FILTERED, ROOTS
from tests.escape.test_files import KERNELS
from tests.escape.test_held import APP, CLONE3
from tests.escape.test_modes import CALLS, MODES, STRIPPED, has
from tests.escape.test_processes import LIMITS, ON_PID_1, RANK
from tests.escape.test_talking import ABIS, FAMILIES, NETWORK, PAIRS

ASKED = """
import ctypes, json, os
from tests.escape.inside import program

with open("asked.json") as file:
    requests = json.load(file)
answers = json.dumps([program.answer(request) for request in requests]).encode()
libc = ctypes.CDLL(None)  # a file that Python opens for writing would be a reason not to hold it
fd = libc.open(b"out/answers.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
libc.write(fd, answers, len(answers))
libc.close(fd)

def main():
    pass

main()
"""
TABLES = {
    "calls that a filter stops": {name: attempt for name, attempt in FILTERED.items() if "clone3" not in name},
    "calls that root may make": ROOTS,
    "namespaces by clone3": CLONE3,
    "the kernel's files": KERNELS,
    "PID 1": ON_PID_1,
    "rank": RANK,
    "limits": LIMITS,
    "the network": NETWORK,
    "families": FAMILIES,
    "pairs": PAIRS,
    "i386": ABIS,
}
KINDS = ("held", "slot", "preloaded", "template")


def pocket(daemon: Pocketd, *words: str) -> None:
    done = subprocess.run(
        daemon.command(*words), env=daemon.environment, timeout=TIMEOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def asked(daemon: Pocketd, enter: Callable[..., Inside], place: Path) -> Any:
    """`asked(kind, requests)`: the answers of a process of that kind."""
    stack = ExitStack()
    running: dict[str, Any] = {}

    def of_program(name: str, way: str) -> Callable[[Any], Any]:
        (place / name / "app.py").write_text(APP)
        pocket(daemon, "warm", name)
        mark = daemon.log.stat().st_size
        inside = enter(name, defined=True)
        stack.callback(inside.end)
        said = re.compile(rb"session-started .*pocket=%s .*way=%s" % (name.encode(), way.encode()))
        assert wait_for(lambda: said.search(daemon.log.read_bytes()[mark:]), 20)
        return lambda requests: [inside.attempt(r["attempt"], r["thread"], **r["given"]) for r in requests]

    def of_session() -> Callable[[Any], Any]:
        pocket(daemon, "warm", "called")
        mark = daemon.log.stat().st_size
        session = stack.enter_context(login("called", runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT))
        assert wait_for(lambda: re.search(rb"pocket=called .*way=held", daemon.log.read_bytes()[mark:]), 20)
        return lambda requests: [session.call(f"{PROGRAM}:answer", request) for request in requests]

    def of_template(requests: Any) -> Any:
        directory = place / "early"
        (directory / "app.py").write_text(ASKED)
        (directory / "out").mkdir(exist_ok=True)
        (directory / "asked.json").write_text(json.dumps(requests))
        pocket(daemon, "cool", "early")
        pocket(daemon, "warm", "early")
        return json.loads((directory / "out/answers.json").read_text())

    def ask(kind: str, requests: Any) -> Any:
        if kind == "template":
            return of_template(requests)
        if kind not in running:
            make = {
                "held": lambda: of_program("held", "held"),
                "slot": lambda: of_program("slotted", "slot"),
                "preloaded": of_session,
            }[kind]
            running[kind] = make()
        return running[kind](requests)

    yield ask
    stack.close()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_gets_no_further(asked: Any, through: Callable[[Attempt], Any], kind: str, table: str) -> None:
    attempts = TABLES[table]
    requests = [
        {"attempt": attempt.name, "thread": thread, "given": attempt.given}
        for attempt in attempts.values()
        for thread in THREADS
    ]
    names = [(name, thread) for name in attempts for thread in THREADS]
    wrong, proven = {}, 0
    for (name, thread), reply in zip(names, asked(kind, requests), strict=True):
        assert "failed" not in reply, (name, reply["failed"])
        proven += through(attempts[name]) == attempts[name].through  # else this host lacks what it is about
        if outcome(reply) not in attempts[name].refused:
            wrong[name, thread] = reply
    assert not wrong
    if table not in ("limits", "families"):  # of which many hosts lack some; each has a test of its own
        assert proven > len(requests) // 2


def test_a_template_sets_no_setuid_bit(asked: Any, place: Path) -> None:
    """In what it may write, whose files are shown as its own."""
    out = place / "early/out"
    ways = [how for how in CALLS if has(how)]
    wanted = [("openat", 0o755, "main"), *itertools.product(ways, MODES.values(), THREADS)]
    requests = []
    for number, (how, mode, thread) in enumerate(wanted):
        directory = out / f"{number}"
        directory.mkdir(parents=True)
        given = {"how": how, "mode": mode, "directory": str(directory)}
        requests.append({"attempt": "files.set_bits", "thread": thread, "given": given})
    first, *answers = asked("template", requests)
    assert first == {"value": 0}
    for (how, mode, thread), reply in zip(wanted[1:], answers, strict=True):
        expected = ("EPERM", "ENOSYS", 0) if how in STRIPPED else ("EPERM", "ENOSYS")
        assert outcome(reply) in expected, (how, mode, thread, reply)
    for path in out.rglob("*"):
        assert not (path.is_file() and path.lstat().st_mode & 0o6000), path
