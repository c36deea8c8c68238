"""Fixtures that run a program in a pocket, beside plain Python."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Pocketd, service_environment
from tests.launch import fuse
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


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[fuse.Silent]:
    place = tmp_path / "silent"
    place.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(fuse.mounted(place))
        except OSError as e:
            pytest.skip(f"no FUSE here: {e}")
        yield mounted


MODEL = """
import sys
import tensorflow as tf
tf.keras.utils.set_random_seed(7)
image = tf.keras.Input((32, 32, 3))
hidden = tf.keras.layers.Conv2D(8, 3, activation="relu")(image)
scores = tf.keras.layers.Dense(10, activation="softmax")(tf.keras.layers.GlobalAveragePooling2D()(hidden))
tf.keras.Model(image, scores).save(sys.argv[1])
import numpy as np
print(tf.keras.models.load_model(sys.argv[1])(np.ones((1, 32, 32, 3), "float32")).numpy().tolist())
"""


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[float]]]:
    """A Keras model's file, and what it says of a picture of ones when plain Python runs it."""
    path = tmp_path_factory.mktemp("models") / "small.keras"
    env = {**os.environ, **service_environment(), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", MODEL, path], capture_output=True, text=True, env=env, check=True)
    return path, json.loads(done.stdout.splitlines()[-1])
