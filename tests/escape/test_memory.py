"""A worker's memory holds nothing of others, and what it writes there reaches nobody else; arenas keep their size."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from pocketd.client import login
from tests.conftest import TIMEOUT
from tests.escape.attempt import THREADS
from tests.escape.conftest import copy_program

PARTS = ["unmis", "takable"]
SECRET = "unmis" + "takable~"


@pytest.fixture(scope="module")
def others(daemon, place, enter):
    """Pockets with secrets in their arguments, environment, orders (the directory's name), input and tensors: some that
    have ended, one that runs on, and a session that is open."""
    holder = copy_program(place / f"{SECRET}place")
    (holder / "app.py").write_text("import sys; sys.stdin.read()")
    (holder / "calls.py").write_text("def total(data): return sum(bytes(data))\n")
    env = {**daemon.environment, "SECRET": f"{SECRET}environment"}
    words = daemon.command("run", "--service", "plain", "app.py", f"{SECRET}argument")
    for _ in range(3):
        subprocess.run(words, input=f"{SECRET}input".encode(), env=env, cwd=holder, check=True, timeout=TIMEOUT)
    running = enter(holder.name, env=env)
    with login("plain", directory=str(holder), runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT) as session:
        text = np.frombuffer(f"{SECRET}tensor".encode() * 1000, np.uint8)
        tensor = session.tensor(text.shape, "uint8")
        tensor.numpy()[...] = text
        assert session.call("calls:total", tensor) == int(text.sum())
        yield
    running.end()


@pytest.mark.parametrize("thread", THREADS)
def test_nothing_of_others_is_in_its_memory(others, enter, daemon, place, thread):
    looker = enter("looker")
    own = enter("looker", env={**daemon.environment, "OWN": f"{SECRET}own"})
    try:
        assert own.attempt("memory.count", thread, parts=PARTS)["value"] > 0  # so what there is it finds
        assert looker.attempt("memory.count", thread, parts=PARTS) == {"value": 0}
    finally:
        looker.end(), own.end()


@pytest.mark.parametrize("thread", THREADS)
def test_nor_in_that_of_any_kind(others, prisoner, thread):
    assert prisoner.attempt("memory.count", thread, parts=PARTS) == {"value": 0}


@pytest.mark.parametrize("thread", THREADS)
def test_weights_that_it_changes_are_changed_for_itself_alone(daemon, enter, thread):
    """/proc/self/mem writes what a mapping's protection forbids: the pages are copied all the same."""
    writer, other = enter("weights"), enter("weights")
    try:
        at = writer.attempt("memory.change_weights", thread)["value"]
        assert writer.attempt("memory.weights", thread) == {"value": "changed-"}
        assert other.attempt("memory.weights", thread) == {"value": "weight--"}
        (template,) = [t for t in daemon.ps()["templates"] if t["service"] == "plain"]
        with open(f"/proc/{template['pid']}/mem", "rb", buffering=0) as memory:
            memory.seek(at)
            assert memory.read(8) == b"weight--"
    finally:
        writer.end(), other.end()


@pytest.mark.parametrize("thread", THREADS)
def test_arenas_keep_their_size_and_their_seals(daemon, place, thread):
    directory = place / "arenas"
    if not directory.exists():
        copy_program(directory)
    module = "tests.escape.inside.arena"
    with login("plain", directory=str(directory), runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT) as session:
        tensor = session.tensor((1000,), "uint8")
        tensor.numpy()[...] = 7
        found = session.call(f"{module}:change", tensor, thread)
        assert found and all(errors == ["EPERM"] * 4 for errors in found), found
        assert session.call(f"{module}:control") == ["done"] * 4
        assert bytes(tensor.numpy()[:2]) == b"\x07\x07"  # and no SIGBUS here
