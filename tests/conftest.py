"""Fixtures for every test: a real pocketd of the tests' own, with its own directories and cgroup subtree."""

from __future__ import annotations

import contextlib
import fnmatch
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from cgroup.hierarchy import Hierarchy
from runtime import cold, tensorflow

ROOT = Path(__file__).parent.parent
TIMEOUT = float(os.environ.get("TEST_TIMEOUT", 120))  # seconds: hangs, not speed, and an emulated processor is slow


def service_environment() -> dict[str, str]:
    """Variables that TensorFlow reads at import and this host sets: a service with the same ones runs nothing cold."""
    return {k: v for k, v in os.environ.items() if cold.compiled(tensorflow.VARIABLES).match(k)}


def bare_environment() -> dict[str, str]:
    """The tests' environment without what makes a run cold or a Python different."""
    drop = ("PYTHON*", "LD_*", "POCKETD_*", "MALLOC_*", "GLIBC_*")
    return {k: v for k, v in os.environ.items() if not any(fnmatch.fnmatchcase(k, p) for p in drop)}


_made = itertools.count(1)


class Pocketd:
    """One pocketd in directories of its own. `config` is TOML text."""

    front = "c"  # of the command: or "python", for all of it

    def __init__(self, place: Path, config: str):
        self.place = place
        self.config = place / "pocketd.conf"
        self.config.write_text(config)
        self.runtime_dir = place / "run"
        self.state_dir = place / "state"
        self.cgroup = f"pocketd-test-{os.getpid()}-{next(_made)}-{place.name}"  # several are there at once
        self.log = place / "pocketd.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until its socket answers (sd_notify's READY=1)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, open(self.log, "ab") as log:
            path = str(self.place / "notify")
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            notify.bind(path)
            command = [sys.executable, "-m", "pocketd.daemon", *self.flags()]
            env = {**bare_environment(), "PYTHONPATH": str(ROOT), "NOTIFY_SOCKET": path}
            self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            pidfd = os.pidfd_open(self.process.pid)
            try:
                ready, _, _ = select.select([notify.fileno(), pidfd], [], [], TIMEOUT)
            finally:
                os.close(pidfd)
            if notify.fileno() not in ready:
                raise AssertionError(f"pocketd did not start:\n{self.log.read_text()}")

    def flags(self) -> list[str]:
        return [
            *("--config", str(self.config), "--runtime-dir", str(self.runtime_dir)),
            *("--state-dir", str(self.state_dir), "--cgroup", self.cgroup),
        ]

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process:
            self.process.send_signal(how)
            self.process.wait(TIMEOUT)
            self.process = None

    def close(self) -> None:
        """Switch every service off and end."""
        if self.process is None:
            self.start()
        for service in self.ps()["services"]:
            if service["state"] != "off":
                self.pocket(service["name"], "off")
        self.end()

    @property
    def environment(self) -> dict[str, str]:
        return {**bare_environment(), "POCKETD_RUNTIME_DIR": str(self.runtime_dir)}

    def command(self, *words: str | bytes) -> list[str | bytes]:
        """The `pocket` command of this checkout. That in Python leaves no trace in what it passes on."""
        if self.front == "c":
            return [str(Path(sys.executable).parent / "pocket"), *words]
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pocketd.command.main import main; main()"
        return [sys.executable, "-I", "-c", code, *words]

    def pocket(self, *words: str | bytes, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `pocket WORDS...` to its end, its output as text unless `text=False`."""
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": self.environment, **options}
        done = subprocess.run(self.command(*words), **options)
        if check and done.returncode:
            raise AssertionError(f"pocket {words} ended with {done.returncode}:\n{done.stderr}\n{self.log.read_text()}")
        return done

    def popen(self, *words: str | bytes, **options: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.command(*words), **{"env": self.environment, **options})

    def ps(self) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(self.pocket("ps", "--json").stdout)
        return reply

    def workers(self) -> list[dict[str, Any]]:
        return list(self.ps()["workers"])

    @property
    def cgroup_path(self) -> Path:
        with Hierarchy.find() as hierarchy:
            return Path(hierarchy.mount.path) / self.cgroup

    def leaves(self) -> list[str]:
        """The cgroups of sessions that there are, by the kernel."""
        return sorted(str(p) for p in self.cgroup_path.glob("*.scope/service/pockets/*") if p.is_dir())

    def settled(self) -> bool:
        """Wait until no session has a cgroup any more; False when that does not come within the time-out."""
        return wait_for(lambda: not self.leaves())


def wait_for(condition: Any, timeout: float = TIMEOUT) -> bool:
    """Wait for a state of the kernel's that no descriptor tells of."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def toml_table(values: dict[str, str]) -> str:
    return "{ " + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in values.items()) + " }"


CONFIG = f"""
[service.tensorflow]
runtime = "tensorflow"
env = {toml_table(service_environment())}

[service.plain]
runtime = "python"
env = {toml_table(service_environment())}

[service.programs]
runtime = "exec"
"""


@pytest.fixture(scope="session")
def pocketd():
    """A daemon for all tests that do not kill it: services tensorflow, plain (Python with nothing loaded), programs."""
    place = Path(tempfile.mkdtemp(prefix="pocketd-test-"))
    daemon = Pocketd(place, CONFIG)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(place)
        assert not daemon.cgroup_path.exists(), f"cgroups are left: {daemon.cgroup_path}"


@pytest.fixture
def own_pocketd(tmp_path: Path):
    """A function that starts a daemon of the test's own with the given configuration."""
    started: list[Pocketd] = []

    def make(config: str) -> Pocketd:
        place = tmp_path / f"pocketd-{len(started)}"
        place.mkdir()
        daemon = Pocketd(place, config)
        started.append(daemon)
        daemon.start()
        return daemon

    yield make
    for daemon in started:
        daemon.close()
