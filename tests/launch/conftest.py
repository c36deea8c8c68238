"""Fixtures that run a program in a pocket, beside plain Python."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Pocketd
from tests.launch.both import Both, read_line

# What these say of the command holds of both: of `pocket`, in C, and of the whole command in Python.
ON_BOTH_FRONTS = {
    f"test_{name}.py"
    for name in ("program", "streams", "signals", "terminal", "environment", "ends", "pockets", "users", "front")
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.name in ON_BOTH_FRONTS and {"pocketd", "own_pocketd"} & set(metafunc.fixturenames):
        metafunc.parametrize("front", ["c", "python"], indirect=True)


@pytest.fixture(autouse=True)
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which command the test's pocketd is talked to by."""
    monkeypatch.setattr(Pocketd, "front", getattr(request, "param", Pocketd.front))
    return Pocketd.front


@pytest.fixture
def both(pocketd: Pocketd, tmp_path: Path) -> Both:
    return Both(pocketd, tmp_path)


@pytest.fixture
def tensorflow(pocketd: Pocketd, tmp_path: Path) -> Both:
    return Both(pocketd, tmp_path, "tensorflow")


@pytest.fixture
def programs(pocketd: Pocketd, tmp_path: Path) -> Both:
    return Both(pocketd, tmp_path, "programs")


@pytest.fixture
def begun() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command and waits for its first line of output, which says that it is where the test wants it."""
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str | bytes], first: bytes = b"ready\n", **options: Any) -> subprocess.Popen[bytes]:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen(command, **options)
        started.append(process)
        assert process.stdout
        line = read_line(process.stdout.fileno())
        assert line == first, (line, process.poll())
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
