"""The floor of a launch: a process that is what a root template is, forked with nothing around it.

Run as a program with a SEQPACKET socket as descriptor 3 it goes through runtime.template's own steps, with the same
environment as a template of the service, to where a template waits for its first fork. There it waits for us instead.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsutil import clone, messages, namespaces
from pocketd import wire
from runtime import template

_NAMESPACES = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWNET
_TIME = struct.Struct("d")


class Floor:
    """A handle to that process."""

    def __init__(self, talk: socket.socket):
        self._talk = talk

    def _hear(self, op: str) -> Any:
        while True:
            message, fds = wire.receive(self._talk)
            fds.close()
            if message.get("op") == "failed":
                raise RuntimeError(f"the floor's template failed: {message['error']}")
            if message.get("op") == op:
                return message

    def begin(self, environment: dict[str, str]) -> None:
        begin = {"op": "begin", "runtime": "tensorflow", "preload": [], "environment": environment}
        wire.send(self._talk, begin)
        self._hear("ready")

    def _call(self, op: str, **fields: Any) -> float:
        wire.send(self._talk, {"op": op, **fields})
        return float(self._hear("done")["seconds"])

    def fork(self) -> float:
        """Seconds from before os.fork() to the child's first instruction in Python. OpenBLAS ends its threads before
        a fork (pthread_atfork), so that this process has none afterwards: for `live_fork` take another."""
        return self._call("fork")

    def live_fork(self, parent: Path) -> float:
        """The same of a live fork into a cgroup of its own beneath `parent` and all namespaces of a worker. The cgroup
        and the pid namespace are there already: others make them."""
        leaf = parent / "floor"
        leaf.mkdir()
        try:
            return self._call("live-fork", leaf=str(leaf))
        finally:
            leaf.rmdir()


@contextmanager
def floor(of: int) -> Iterator[Floor]:
    """A process as the root template with pid `of` is one, of the `tensorflow` runtime; ended afterwards."""
    variables = Path(f"/proc/{of}/environ").read_bytes().split(b"\0")
    environment = dict(os.fsdecode(v).split("=", 1) for v in variables if v)
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    ours, theirs = messages.pair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-s", "-c", _START.format(fd=theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # TensorFlow's own; what fails is said on the socket
                pass_fds=[theirs.fileno()],
            )
        try:
            made = Floor(ours)
            made.begin(environment)
            yield made
        finally:
            ours.close()
            process.wait(30)


_START = "import socket; from bench import floor; floor.main(socket.socket(fileno={fd}))"


def main(talk: socket.socket) -> None:
    setattr(template, "serve", serve)  # noqa: B010  # where it would wait for init
    template.main(talk)


def serve(own: Any) -> None:
    """In place of a template's loop: fork as asked and say how long it took; ends when the socket does."""
    first, last = os.pipe()
    while True:
        try:
            message, fds = wire.receive(own.talk)
        except EOFError:
            return None
        fds.close()
        seconds = _fork(first, last) if message["op"] == "fork" else _live_fork(first, last, message["leaf"])
        wire.send(own.talk, {"op": "done", "seconds": seconds})


def _fork(first: int, last: int) -> float:
    clock = time.monotonic
    began = clock()
    pid = os.fork()
    if not pid:
        os.write(last, _TIME.pack(clock()))
        os._exit(0)
    there = _TIME.unpack(os.read(first, _TIME.size))[0]
    os.waitpid(pid, 0)
    return float(there) - began


def _live_fork(first: int, last: int, leaf: str) -> float:
    clock = time.monotonic
    directory = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    pause = clone.pause(flags=namespaces.CLONE_NEWPID, cgroup=directory)
    numbers = [clone.free_pid([os.getpid()])]
    began = clock()
    child = clone.live_fork(flags=_NAMESPACES, cgroup=directory, pid_namespace=pause.pidfd, set_tid=numbers)
    if child is None:
        os.write(last, _TIME.pack(clock()))
        os._exit(0)
    there = _TIME.unpack(os.read(first, _TIME.size))[0]
    os.waitpid(child.pid, 0)
    signal.pidfd_send_signal(pause.pidfd, signal.SIGKILL)
    os.waitpid(pause.pid, 0)
    for fd in (child.pidfd, pause.pidfd, directory):
        os.close(fd)
    return float(there) - began
