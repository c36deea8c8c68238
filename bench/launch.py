"""Launches, timed from the outside: a program in a worker by the control socket, and as a process of its own.

All times are CLOCK_MONOTONIC, which the processes of a host have in common, whatever namespaces they are in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import open_login

PROGRAMS = Path(__file__).resolve().parent / "programs"
# Of programs in workers and of monoliths alike: nothing that would have a worker run cold.
ENVIRONMENT = {"PATH": os.environ.get("PATH", os.defpath), "HOME": "/tmp", "LANG": "C.UTF-8"}


class Failed(Exception):
    """A run that cannot be used, with what it said."""


@dataclass(frozen=True)
class Run:
    """Seconds since the request, or since the process was started."""

    line: float  # to the program's first line with TensorFlow imported
    result: float | None  # to what it says is its result
    end: float  # to its exit status in our hands
    said: dict[str, Any]  # what it printed
    cpu: float | None = None  # seconds that it computed; None for a worker


@contextmanager
def undisturbed() -> Iterator[bool]:
    """What is started from here on runs before what else runs on this machine (SCHED_RR, sched(7)); False where that is
    not granted. A busy machine otherwise hits whichever side has more processes to wake."""
    before, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, before, parameter)


@contextmanager
def one_processor() -> Iterator[int]:
    """This process, and what it starts from here on, stay on one processor. Gives its number."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield min(before)
    finally:
        os.sched_setaffinity(0, before)


class Service:
    """A service that is on, as its cgroups and `ps` show it."""

    def __init__(self, runtime_dir: Path, name: str, runtime: str, scope: Path, daemon: int):
        self.runtime_dir = str(runtime_dir)
        self.name = name
        self.runtime = runtime
        self.scope = scope / "service"  # limits and processes are there; SCOPE itself is its manager's
        self.daemon = daemon

    @contextmanager
    def control(self) -> Iterator[Control]:
        with Control(self.runtime_dir, timeout=60) as control:
            yield control

    def template(self, kind: str = "root") -> int:
        """The pid of its template of that kind, as this host counts."""
        with self.control() as control:
            shown = control.call("ps")
        return next(int(t["pid"]) for t in shown["templates"] if t["service"] == self.name and t["kind"] == kind)

    def processes(self) -> list[int]:
        """Everything in its container: init, templates, pauses, workers."""
        return [int(pid) for path in self.scope.rglob("cgroup.procs") for pid in path.read_text().split()]

    def settle(self, timeout: float = 30.0) -> None:
        """Wait until no session has a cgroup any more; there is nothing to poll."""
        end = time.monotonic() + timeout
        while any(path.is_dir() for path in (self.scope / "pockets").iterdir()):
            if time.monotonic() > end:
                raise Failed(f"sessions are left in {self.scope} after {timeout:g} s")
            time.sleep(0.005)

    def cpu(self) -> dict[str, float]:
        """Seconds that each part has computed so far. Workers that have ended are in it (cgroup-v2.rst, cpu.stat)."""
        part = {"daemon": int(Path(f"/proc/{self.daemon}/schedstat").read_text().split()[0]) / 1e9}
        for name, directory in (("init", "init"), ("templates", "templates"), ("workers", "pockets")):
            part[name] = int((self.scope / directory / "cpu.stat").read_text().split()[1]) / 1e6
        return part


def in_worker(
    control: Control,
    service: str,
    program: str,
    *arguments: str,
    directory: Path = PROGRAMS,
    pocket: str | None = None,
) -> Run:
    """Run a program of `directory` in a worker, timed from its request on the control socket; `pocket`: which has it by
    its definition. Raises Failed."""
    with ExitStack() as stack:
        out, theirs = os.pipe()
        stack.callback(os.close, out)
        with ExitStack() as until_sent:
            until_sent.callback(os.close, theirs)
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            until_sent.callback(os.close, null)
            start = {
                "kind": "file",
                "program": os.fsencode(directory / program if pocket else program),
                "arguments": [os.fsencode(a) for a in arguments],
                "environment": [(os.fsencode(k), os.fsencode(v)) for k, v in ENVIRONMENT.items()],
                "directory": os.fsencode(directory),
                "umask": 0o022,
                "stdio": [0, 1, 2],
            }
            login = open_login(
                control,
                mode="program",
                name=pocket or service,
                directory=None if pocket else str(directory),
                start=start,
                fds=[null, theirs, theirs],
                mounts=[],
            )
        stack.enter_context(login.session)
        stack.enter_context(login.hold)
        text = read_to_end(out)
        while True:
            message, fds = wire.receive(login.hold)
            fds.close()
            if message.get("op") == "exit":
                break
        return understood(text, login.asked, time.monotonic(), message.get("status"), f"worker of {program}")


def as_process(command: Sequence[str], directory: Path = PROGRAMS, environment: Any = None) -> Run:
    """Run a command that ends by running a program, from just before its process is made. Raises Failed."""
    began = time.monotonic()
    process = subprocess.Popen(
        list(command),
        cwd=directory,
        env=ENVIRONMENT if environment is None else environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    with process.stdout as out, process.stderr as err:
        text = out.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        end = time.monotonic()
        said = err.read()
    if b"running it cold" in said:
        text += said
    elif status:
        text = said
    run = understood(text, began, end, status, " ".join(command))
    return Run(run.line, run.result, run.end, run.said, usage.ru_utime + usage.ru_stime)


def monolith(program: str, *arguments: str) -> Run:
    """The same program by a Python of its own."""
    return as_process([sys.executable, str(PROGRAMS / program), *arguments])


def understood(text: bytes, began: float, end: float, status: Any, what: str) -> Run:
    if status != 0 or b"running it cold" in text:
        raise Failed(f"{what} ended with status {status} and said:\n{text.decode(errors='replace')}")
    try:
        said = json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed(f"{what} said what is not its times:\n{text.decode(errors='replace')}") from None
    result = said["result"] - began if "result" in said else None
    return Run(said["line"] - began, result, end - began, said)


def read_to_end(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 65536):
        parts.append(part)
    return b"".join(parts)
