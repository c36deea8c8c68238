"""A pocketd of one's own: its places in a temporary directory and a cgroup of its own, so that one that is installed on
this host is never disturbed; stopped with all that it started, however the program ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
START = 120.0  # seconds, which an emulated machine may need
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Trouble(Exception):
    """Something that ends the main job, in words for the one who runs it."""


class OwnPocketd:
    """`with OwnPocketd(directory, config) as pocketd:` a daemon that answers; its `environment` leads clients to it."""

    def __init__(self, directory: Path, config: Path):
        self.log = directory / "pocketd.log"
        # Not beneath `directory`, which may be deep: the address of a socket has 108 bytes (unix(7)).
        self.runtime = Path(f"/run/pocketd-example-{os.getpid()}")
        self.cgroup = f"pocketd-example-{os.getpid()}"
        self.environment = {**os.environ, "POCKETD_RUNTIME_DIR": str(self.runtime)}
        self._places = {
            "--config": config,
            "--runtime-dir": self.runtime,
            "--state-dir": directory / "state",
            "--cgroup": self.cgroup,
        }
        self._daemon: subprocess.Popen[bytes] | None = None
        self._on: list[str] = []

    def __enter__(self) -> OwnPocketd:
        if not (BIN / "pocketd").exists():
            raise Trouble(f"pocketd is not installed in {BIN}: `make run` sets everything up")
        flags = [str(word) for place in self._places.items() for word in place]
        with open(self.log, "wb") as log:
            # A session of its own: Ctrl-C reaches this program alone, which then stops things in their order.
            self._daemon = subprocess.Popen(
                [str(BIN / "pocketd"), *flags], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_it_answers(self) -> None:
        assert self._daemon
        deadline = time.monotonic() + START
        while self.command("ps", "--json", check=False).returncode != 0:
            if self._daemon.poll() is not None:
                raise Trouble(f"pocketd ended with status {self._daemon.returncode}; it said:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise Trouble(f"pocketd does not answer after {START:g} s; it said:\n{self.last_words()}")
            time.sleep(0.05)

    def command(self, *words: str, check: bool = True, show: bool = False) -> subprocess.CompletedProcess[str]:
        """Run `pocket WORDS`; its progress goes to our stderr when `show`."""
        done = subprocess.run(
            [str(BIN / "pocket"), *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if show else subprocess.PIPE,
            text=True,
            timeout=300,
        )
        if check and done.returncode != 0:
            said = (done.stderr or "").strip()
            raise Trouble(
                f"`pocket {' '.join(words)}` ended with status {done.returncode}. {said}\n{self.last_words()}"
            )
        return done

    def turn_on(self, service: str) -> None:
        self._on.append(service)
        self.command(service, "on", show=True)

    @property
    def pid(self) -> int:
        assert self._daemon
        return self._daemon.pid

    def ps(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.command("ps", "--json").stdout)
        return answer

    def last_words(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join("  " + line for line in self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def close(self) -> None:
        """Services off, then the daemon; then look whether anything is left in the cgroup, and end that too."""
        daemon, self._daemon = self._daemon, None
        if daemon is None:
            return
        with uninterrupted():
            for service in self._on:
                with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                    if (done := self.command(service, "off", check=False)).returncode != 0:
                        print(f"pocket {service} off: {done.stderr.strip()}", file=sys.stderr)
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            self._sweep()
            shutil.rmtree(self.runtime, ignore_errors=True)

    def _sweep(self) -> None:
        top = cgroup2() / self.cgroup
        if not top.exists():
            return
        print(f"pocketd left the cgroup {top}; removing it", file=sys.stderr)
        (top / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + 10
        while "populated 1" in (top / "cgroup.events").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        for directory, _, _ in os.walk(top, topdown=False):
            os.rmdir(directory)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the stopping."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def cgroup2() -> Path:
    """Where cgroup v2 is mounted (proc_pid_mountinfo(5): fields after the hyphen are type, source, options)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" ")
        if fields[fields.index("-") + 1] == "cgroup2":
            return Path(fields[4])
    raise Trouble("no cgroup v2 hierarchy is mounted on this host")
