"""The same attempts from every kind of process that runs a pocket's code: a worker of its template, a slot, a session
with modules preloaded, and its template itself, which is its program up to its checkpoint."""

from __future__ import annotations

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
from tests.escape.test_modes import CALLS, MODES, has
from tests.escape.test_processes import LIMITS, ON_PID_1, RANK
from tests.escape.test_talking import ABIS, FAMILIES, NETWORK, PAIRS

ASKED = """
import json
from tests.escape.inside import program

with open("asked.json") as file:
    requests = json.load(file)
print(json.dumps([program.answer(request) for request in requests]))

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
        mark = daemon.log.stat().st_size
        done = subprocess.run(daemon.command("early"), env=daemon.environment, cwd=directory, capture_output=True)
        assert wait_for(lambda: re.search(rb"pocket=early .*way=held", daemon.log.read_bytes()[mark:]), 20)
        return json.loads(done.stdout)  # what was printed before the checkpoint

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
    assert proven > len(requests) // 2


def test_a_template_sets_no_setuid_bit(asked: Any, place: Path) -> None:
    """In what it may write, whose files are shown as its own."""
    out = place / "early/out"
    ways = [how for how in CALLS if has(how)]
    requests = [
        {"attempt": "files.set_bits", "thread": thread, "given": {"how": how, "mode": mode, "directory": str(out)}}
        for how in ways
        for mode in MODES.values()
        for thread in THREADS
    ]
    plain = {"attempt": "files.set_bits", "thread": "main", "given": {"how": "openat", "mode": 0o755}}
    plain["given"]["directory"] = str(out)  # type: ignore[index]
    first, *answers = asked("template", [plain, *requests])
    assert first == {"value": 0}
    for request, reply in zip(requests, answers, strict=True):
        assert outcome(reply) in ("EPERM", "ENOSYS"), (request, reply)
    for path in out.iterdir():
        assert not (path.is_file() and path.lstat().st_mode & 0o6000), path
