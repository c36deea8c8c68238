"""One run of an app, in whatever way it was started: when it was over, what it wrote, and what it used."""

from __future__ import annotations

import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.launch import Failed
from bench.usage import Used

PATIENCE = 300.0  # seconds; twenty monoliths at once on two slow processors take their time


@dataclass(frozen=True)
class Ended:
    began: float  # CLOCK_MONOTONIC, as `end`
    end: float
    status: int
    out: bytes
    err: bytes
    used: Used  # of its process, and of those that this one waited for

    @property
    def seconds(self) -> float:
        return self.end - self.began


class Started:
    """`over` becomes readable when it has ended, and `reap` then gives its exit status and what it used. What it writes
    goes to files in memory, so that nobody has to read along."""

    def __init__(self, what: str, began: float, over: int, reap: Callable[[], tuple[int, Used]], out: int, err: int):
        self.what = what
        self.began = began
        self.over = over
        self.end = 0.0
        self._reap, self._out, self._err = reap, out, err

    def ended(self) -> Ended:
        status, used = self._reap()
        found = []
        for fd in (self._out, self._err):
            found.append(os.pread(fd, os.fstat(fd).st_size, 0))
            os.close(fd)
        os.close(self.over)
        return Ended(self.began, self.end, status, found[0], found[1], used)


def files() -> tuple[int, int]:
    """For what it writes to its two streams."""
    return os.memfd_create("stdout", os.MFD_CLOEXEC), os.memfd_create("stderr", os.MFD_CLOEXEC)


def process(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    before: Callable[[], object] | None = None,
) -> Started:
    """A command, from just before its process is made; `before` is called in there, before the command is executed."""
    out, err = files()
    began = time.monotonic()
    made = subprocess.Popen(
        command,
        cwd=directory,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        preexec_fn=before,
    )

    def reap() -> tuple[int, Used]:
        _, status, usage = os.wait4(made.pid, 0)
        made.returncode = os.waitstatus_to_exitcode(status)
        return made.returncode, Used(usage.ru_utime + usage.ru_stime, usage.ru_minflt)

    return Started(" ".join(command), began, os.pidfd_open(made.pid), reap, out, err)


def together(starts: Sequence[Callable[[], Started]]) -> list[Ended]:
    """Start them all, one after the other, and wait for all. Raises Failed over one that did not end well."""
    runs = [start() for start in starts]
    waiting = {run.over: run for run in runs}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting:
        ready = poll.poll(PATIENCE * 1000)
        now = time.monotonic()
        if not ready:
            raise Failed(f"`{next(iter(waiting.values())).what}` has not ended after {PATIENCE:g} s")
        for fd, _ in ready:
            poll.unregister(fd)
            waiting.pop(fd).end = now
    found = []
    for run in runs:
        ended = run.ended()
        if ended.status or b"running it cold" in ended.err:
            said = (ended.out + ended.err).decode(errors="replace")[-2000:]
            raise Failed(f"`{run.what}` ended with status {ended.status} and said:\n{said}")
        found.append(ended)
    return found
