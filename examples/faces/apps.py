"""The app, run as a process and held at its result so that its memory can be read there."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
from measure import Memory
from own_pocketd import STOPS, Trouble

PATIENCE = 180  # seconds for one result; ten monoliths on one slow core take their time


@dataclass
class Run:
    """One run of the app: seconds since its command was started, what it found, and the memory that it held then."""

    first_line: float
    first_result: float
    faces: list[dict[str, Any]]
    memory: Memory | None = None


@dataclass(frozen=True)
class Batch:
    """Apps that held their results at the same time, and what stood beside them for all of them (bytes)."""

    runs: list[Run]
    standing: Memory

    @property
    def pss(self) -> int:
        return self.standing.pss + sum(run.memory.pss for run in self.runs if run.memory)


class App:
    """The app as a process that says on stderr when it was where, prints its faces, and stays until its stdin ends.
    Made while signals are `held_back`, until it is known to whoever ends it."""

    def __init__(self, command: Sequence[str], directory: Path, environment: dict[str, str]):
        self.command = " ".join(command)
        self.out, self.err = b"", b""
        self.began = time.clock_gettime(time.CLOCK_MONOTONIC)
        self.process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS),
        )

    def until_result(self) -> Run:
        """Read both pipes until the line of faces is there (so that neither can fill up). Raises Trouble."""
        assert self.process.stdout and self.process.stderr
        deadline = self.began + PATIENCE
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ, "out")
            selector.register(self.process.stderr, selectors.EVENT_READ, "err")
            while b"\n" not in self.out:
                ready = selector.select(max(0.0, deadline - time.clock_gettime(time.CLOCK_MONOTONIC)))
                if not ready:
                    raise Trouble(f"`{self.command}` has no result after {PATIENCE} s; it said:\n{self.said()}")
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    if not chunk:
                        selector.unregister(key.fileobj)
                    setattr(self, key.data, getattr(self, key.data) + chunk)
                if not selector.get_map():
                    status = self.process.wait()
                    raise Trouble(
                        f"`{self.command}` ended with status {status} before a result; it said:\n{self.said()}"
                    )
        times = [
            json.loads(line)["monotonic"] - self.began
            for line in self.err.decode(errors="replace").splitlines()
            if line.startswith('{"event"')
        ]
        if len(times) != 2:
            raise Trouble(f"`{self.command}` logged {len(times)} times in place of 2; it said:\n{self.said()}")
        if b"running it cold" in self.err:
            raise Trouble(f"`{self.command}` was not served warm, so its times mean nothing here:\n{self.said()}")
        return Run(times[0], times[1], json.loads(self.out))

    def said(self) -> str:
        return "\n".join("  " + line for line in self.err.decode(errors="replace").splitlines()[-20:])

    def release(self) -> None:
        """Let it end by itself, and see that it ends well."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, rest = self.process.communicate(timeout=30)
            self.err += rest
        if self.process.returncode != 0:
            raise Trouble(
                f"`{self.command}` ended with status {self.process.returncode} after its result:\n{self.said()}"
            )

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """A signal that ends us is heard afterwards: between a fork and the note of it, it would leave a process behind."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def together(
    apps: Sequence[Callable[[], App]],
    processes: Callable[[Sequence[App]], list[list[int]]],
    standing: Callable[[], list[int]] = list,
) -> Batch:
    """Start all apps at once and hold each at its result. `processes` then names the pids of each, `standing` those
    that serve all of them; their memory is read before any is let go."""
    with contextlib.ExitStack() as stack:
        started: list[App] = []
        for start in apps:
            with held_back():
                started.append(start())
                stack.callback(started[-1].end)
        runs = [app.until_result() for app in started]
        for run, pids in zip(runs, processes(started), strict=True):
            run.memory = measure.memory(pids)
        batch = Batch(runs, measure.memory(standing()))
        for app in started:
            app.release()
    return batch
