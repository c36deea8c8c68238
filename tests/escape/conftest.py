"""A pocketd whose template has a thread of ours, pockets in it, and the same program without a pocket around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TIMEOUT, Pocketd, bare_environment, service_environment, toml_table
from tests.escape import kinds
from tests.escape.attempt import NAMESPACES, UID, Attempt, Inside, outcome

PROGRAM = "tests.escape.inside.program"
IN_THE_VM = Path("/run/vm/job").exists()  # made by the VM's initramfs


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "harmful: what its control does would change this host")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("harmful") and not IN_THE_VM:
        pytest.skip("its control would change this host; the VM has one to lose")


def copy_program(place: Path) -> Path:
    """The attempts, as a pocket's own files."""
    target = place / "tests/escape/inside"
    shutil.copytree(ROOT / "tests/escape/inside", target, ignore=shutil.ignore_patterns("__pycache__"))
    return place


@pytest.fixture(scope="session")
def place() -> Iterator[Path]:
    """On a file system that maps ids where the host has one, and open to everybody as far as modes go."""
    made = Path(tempfile.mkdtemp(prefix="escape-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session")
def daemon(place: Path) -> Iterator[Pocketd]:
    """Services `plain`, whose template has tests.escape.inside.resident's thread; pockets of one's own directory."""
    python = place / "env/bin/python"
    made = [sys.executable, "-m", "venv", "--without-pip", str(place / "env")]
    subprocess.run(made, check=True, timeout=TIMEOUT)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    shutil.copy(ROOT / "tests/escape/inside/resident.py", place / "env/lib" / version / "site-packages")
    for name in ("hosted", "writer", "held", "slotted", "called", "early"):
        copy_program(place / name)
    (place / "pocketd").mkdir(mode=0o700)
    daemon = Pocketd(
        place / "pocketd",
        f"""
        [service.programs]
        runtime = "exec"

        [service.plain]
        runtime = "python"
        python = "{python}"
        preload = ["resident"]
        env = {toml_table(service_environment())}

        [pocket.hosted]
        service = "plain"
        dir = "{place}/hosted"
        program = "app.py"
        allow = {{ network = "host" }}

        [pocket.held]
        service = "plain"
        dir = "{place}/held"
        program = "app.py"
        checkpoint = "main"

        [pocket.slotted]
        service = "plain"
        dir = "{place}/slotted"
        program = "app.py"
        checkpoint = "main"
        warm = 1

        [pocket.called]
        service = "plain"
        dir = "{place}/called"
        preload = ["{PROGRAM}"]

        [pocket.early]
        service = "plain"
        dir = "{place}/early"
        program = "app.py"
        checkpoint = "main"
        allow = {{ write = ["out"] }}

        [pocket.writer]
        service = "plain"
        dir = "{place}/writer"
        program = "app.py"
        allow = {{ write = ["out", "deep/out"] }}
        """,
    )
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()
        assert not daemon.cgroup_path.exists(), f"cgroups are left: {daemon.cgroup_path}"


@pytest.fixture(scope="session")
def enter(daemon: Pocketd, place: Path) -> Callable[..., Inside]:
    """A function that runs the program in a pocket: an ad hoc one of a directory of `place`, or a defined one."""

    def start(name: str, *words: str, defined: bool = False, **options: Any) -> Inside:
        directory = place / name
        if not directory.exists():
            copy_program(directory)
        options = {"env": daemon.environment, "cwd": directory, **options}
        if defined:
            return Inside(daemon.command("run", *words, "-p", name), **options)
        return Inside(daemon.command("run", "--service", "plain", *words, "-m", PROGRAM), **options)

    return start


class Kept:
    """Processes that many tests use, started when first asked for, and again after one that did not live."""

    def __init__(self, start: Callable[[str], Any]):
        self._start = start
        self._running: dict[str, Any] = {}

    def __call__(self, kind: str) -> Any:
        found = self._running.get(kind)
        if found is None or not found.alive:
            found = self._running[kind] = self._start(kind)
        return found

    def close(self) -> None:
        for process in self._running.values():
            process.end()


@pytest.fixture(scope="session")
def pockets(enter: Callable[..., Inside]) -> Iterator[Kept]:
    """`pockets(name)`: a worker in a pocket whose directory is of that name."""
    kept = Kept(enter)
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def prisoners(daemon: Pocketd, enter: Callable[..., Inside], place: Path) -> Iterator[Kept]:
    """`prisoners(kind)`: a process of that kind, which makes attempts."""
    kept = Kept(lambda kind: kinds.start(kind, daemon, enter, place, PROGRAM))
    yield kept
    kept.close()


@pytest.fixture(params=kinds.KINDS)
def prisoner(request: pytest.FixtureRequest, prisoners: Kept) -> Any:
    """A process of each kind in its turn."""
    return prisoners(request.param)


def control_command(kind: str, python: str) -> list[str]:
    drop = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    around = {
        "root": [*NAMESPACES],
        "user": [*NAMESPACES, *drop],
        "shell": [*NAMESPACES, *drop[:-1]],
        "host": [],
        "neighbour": drop,
    }[kind]
    return [*around, python, "-m", PROGRAM, "control"]


@pytest.fixture(scope="session")
def controls(place: Path) -> Iterator[Kept]:
    """`controls(kind)`: the same program without a pocket; the kinds are Attempt's; "shell", a user who may gain
    capabilities; and "neighbour", a user's process in the host's namespaces."""
    directory = copy_program(place / "control")
    os.chown(directory, UID, UID)

    def start(kind: str) -> Inside:
        command = control_command(kind, os.path.realpath(sys.executable))
        return Inside(command, env={**bare_environment(), "HOME": "/tmp"}, cwd=directory)

    kept = Kept(start)
    yield kept
    kept.close()


@pytest.fixture(scope="session")
def through(controls: Kept) -> Callable[[Attempt], Any]:
    """What an attempt's control comes to, made once for both threads."""
    known: dict[str, Any] = {}

    def run(attempt: Attempt) -> Any:
        given = attempt.given if attempt.elsewhere is None else attempt.elsewhere
        key = repr((attempt.name, given, attempt.control))
        if key not in known:
            known[key] = outcome(controls(attempt.control).attempt(attempt.name, **given))
        return known[key]

    return run


@pytest.fixture
def refused(pockets: Kept, through: Callable[[Attempt], Any]) -> Callable[..., None]:
    """A function that makes an attempt in the pocket `prisoner` and by its control."""

    def check(attempt: Attempt, thread: str, pocket: str = "prisoner") -> None:
        assert through(attempt) == attempt.through, "the control did not get through, so a refusal would say nothing"
        found = outcome(pockets(pocket).attempt(attempt.name, thread, **attempt.given))
        assert found in attempt.refused

    return check
