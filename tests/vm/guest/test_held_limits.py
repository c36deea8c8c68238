"""A held pocket that reaches its memory.max: the run that took too much ends, its template and other runs do not."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pocketd.client import errors, login
from tests.conftest import TIMEOUT
from tests.vm.guest.installed import BIN, call, cgroup_of, configure, journal, pocket, ps, settled

pytestmark = pytest.mark.usefixtures("pockets")
SCRATCH = Path("/var/lib/vm-scratch")
LIMIT = 120 << 20
# What is held is a third of the limit; the sums show that a run's copy of it is whole.
PROGRAM = """
import os, sys, time, zlib
held = [os.urandom(4096) * 256 for _ in range(40)]
sums = [zlib.crc32(block) for block in held]

def eat(size):
    more = [bytearray(os.urandom(4096) * 256) for _ in range(size >> 20)]
    return len(more)

def crowd(count, size):
    # processes that have little each, for a while
    children = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            held.clear()
            eat(size)
            time.sleep(5)
            os._exit(0)
        children.append(pid)
    return [os.waitpid(pid, 0)[1] for pid in children]

def check():
    return [zlib.crc32(block) for block in held] == sums

def work():
    print("begun", flush=True)
    for line in sys.stdin:
        print(eat(int(line)) if line.strip() != "0" else check(), flush=True)

if __name__ == "__main__":
    work()
"""
POCKET = """
[pocket.{name}]
service = "plain"
dir = "{place}"
limits = {{ "memory.max" = "120M", "memory.swap.max" = 0, "pids.max" = 100 }}
{keys}
"""
HELD = {
    "kept": 'program = "app.py"\ncheckpoint = "work"',
    "ahead": 'program = "app.py"\ncheckpoint = "work"\nwarm = 1',
    "called": 'preload = ["app"]',
}


@pytest.fixture(scope="module")
def pockets(installed):
    text = []
    for name, keys in HELD.items():
        place = SCRATCH / f"held-{name}"
        place.mkdir(exist_ok=True)
        (place / "app.py").write_text(PROGRAM)
        text.append(POCKET.format(name=name, place=place, keys=keys))
    configure("held-limits", "".join(text))
    call("on", name="plain")
    yield
    for name in HELD:
        pocket("cool", name)
    configure("held-limits", "")


def template(name: str) -> int:
    (row,) = [row for row in ps()["pockets"] if row["name"] == name]
    return int(row["template_pid"])


def ways(name: str) -> list[str]:
    """How each session of a pocket came, by the journal."""
    return re.findall(rf"session-started .*\bpocket={name} .*\bway=(\w+)", journal())


@contextmanager
def started(name: str) -> Iterator[subprocess.Popen[str]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([BIN / "pocket", name], env=environment, text=True, **pipes)
    with process:
        try:
            assert process.stdout and process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


def ask(process: subprocess.Popen[str], what: int) -> str:
    assert process.stdin and process.stdout
    process.stdin.write(f"{what}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("name", ["kept", "ahead"])
def test_a_run_that_takes_too_much_leaves_its_template_and_the_other_runs(name):
    pocket("warm", name)
    held = template(name)
    with started(name) as other:
        assert ask(other, 0) == "True"
        for _ in range(3):
            with started(name) as greedy:
                assert ask(greedy, 200 << 20) == ""
                assert greedy.wait(TIMEOUT) == -9
                assert greedy.stderr
                said = greedy.stderr.read()
            assert f"pocket {name} was ended by its memory.max of 120.0M" in said, said
            assert ask(other, 0) == "True"
        assert template(name) == held
        with started(name) as next:
            assert ask(next, 0) == "True"
    assert set(ways(name)) <= {"held", "slot"} and len(ways(name)) == 5, ways(name)
    pocket("cool", name)
    assert settled(name)


def test_a_client_that_takes_too_much_leaves_its_template_and_the_other_clients():
    pocket("warm", "called")
    held = template("called")
    with login("called", timeout=TIMEOUT) as other:
        for _ in range(3):
            with login("called", timeout=TIMEOUT) as session:
                assert session.call("app:check") is True
                with pytest.raises(errors.OutOfMemory) as caught:
                    session.call("app:eat", 200 << 20)
            assert (caught.value.pocket, caught.value.limit, caught.value.signal) == ("called", LIMIT, 9)
            assert other.call("app:check") is True
        assert template("called") == held
    assert set(ways("called")) == {"held"}
    pocket("cool", "called")
    assert settled("called")


def test_many_small_processes_of_a_run_are_ended_before_its_template():
    """The kernel ends the largest of a cgroup: none of them is larger than the template. That may give way afterwards:
    it has no runs then, and its pocket stalls for memory at its own limit."""
    pocket("warm", "called")
    held, before = template("called"), len(journal())
    with login("called", timeout=TIMEOUT) as session:
        try:
            session.call("app:crowd", 40, 8 << 20)
        except errors.WorkerDied:
            pass
        assert kills("called") > 0
        assert lives(held) or re.search(r'pocket-given-up .*\bpocket=called why="?it stalls', journal()[before:])
        with login("called", timeout=TIMEOUT) as next:
            assert next.call("app:check") is True
    pocket("cool", "called")
    assert settled("called")


def lives(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # none of a process that has ended and is not reaped
    except OSError:
        return False


def kills(name: str) -> int:
    lines = (cgroup_of(name) / "memory.events").read_text().splitlines()
    return int(dict(line.split() for line in lines)["oom_kill"])
