"""TensorFlow in pockets with limits: one service, whose import takes most of a minute on an emulated processor."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from pocketd.client import errors, login
from tests.conftest import ROOT, TIMEOUT, service_environment, toml_table
from tests.vm.guest.installed import call, configure, ps, settled

pytestmark = pytest.mark.usefixtures("pockets")
SCRATCH = Path("/var/lib/vm-scratch")
APP = """
import tensorflow as tf

def multiply(size):
    a = tf.ones((size, size))
    return float(tf.reduce_sum(a @ a))

def large(size):
    held = tf.ones((size, 1 << 18))
    return int(tf.size(held))
"""
LIMITS = {"small": '"memory.max" = "200M", "memory.swap.max" = 0', "one": '"pids.max" = 1', "few": '"pids.max" = 4'}


@pytest.fixture(scope="module")
def pockets(installed):
    service = {"runtime": '"tensorflow"', "python": f'"{ROOT}/.venv/bin/python"', "stop_timeout": "5"}
    service["env"] = toml_table(service_environment())
    text = ["[service.tensorflow]", *(f"{key} = {value}" for key, value in service.items())]
    for name, limits in LIMITS.items():
        place = SCRATCH / f"tensorflow-{name}"
        place.mkdir(exist_ok=True)
        (place / "app.py").write_text(APP)
        text.append(f'[pocket.{name}-tf]\nservice = "tensorflow"\ndir = "{place}"\nlimits = {{ {limits} }}\n')
    configure("tensorflow", "\n".join(text))
    call("on", name="tensorflow")
    yield
    call("off", name="tensorflow")
    configure("tensorflow", "")


@pytest.mark.slow
def test_a_computation_fits_and_a_tensor_that_is_too_large_ends_its_pocket_alone():
    with login("small-tf", timeout=TIMEOUT) as other:
        assert other.call("app:multiply", 64) == 64.0**3
        (worker,) = [w for w in ps()["workers"] if w["pocket"] == "small-tf"]
        charged, shared = worker["charged"] / (1 << 20), worker["shared"] / (1 << 20)
        print(f"a worker that has computed is charged {charged:.1f} MB and shares {shared:.0f} MB with its template")
        with login("small-tf", timeout=TIMEOUT) as session, pytest.raises(errors.OutOfMemory) as caught:
            session.call("app:large", 1 << 10)
        assert (caught.value.pocket, caught.value.limit, caught.value.signal) == ("small-tf", 200 << 20, 9)
        assert "pocket small-tf was ended by its memory.max of 200.0M" in str(caught.value)
    assert settled("small-tf")
    with login("small-tf", timeout=TIMEOUT) as session:  # the template and the service are as they were
        assert session.call("app:multiply", 8) == 8.0**3


def test_pids_max_that_a_workers_threads_do_not_fit_in_is_named():
    with pytest.raises(errors.PocketError) as caught, login("one-tf", timeout=TIMEOUT):
        pass
    assert "pids.max of 1 is too small, for pids.max counts threads" in str(caught.value)
    assert caught.value.detail["limit"] == 1
    assert settled("one-tf")


def test_pids_max_that_tensorflow_reaches_later_is_named():
    """It aborts where it cannot start a thread."""
    with login("few-tf", timeout=TIMEOUT) as session, pytest.raises(errors.WorkerDied) as caught:
        session.call("app:multiply", 512)
    assert caught.value.signal == signal.SIGABRT
    assert caught.value.reason == "pocket few-tf has reached its pids.max of 4, and pids.max counts threads"
    assert settled("few-tf")
