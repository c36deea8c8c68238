"""Ten pockets with one deployed model of 60 million parameters, in the memory of one; and each charged to its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from nsutil import processes
from pocketd.client import login
from tests.conftest import service_environment, toml_table, wait_for

SAVE = "import sys, keras; m = keras.applications.ResNet152(weights=None); m.save(sys.argv[1]); print(m.count_params())"
MONOLITH = """
import sys
import numpy as np
import tensorflow as tf
model = tf.keras.models.load_model(sys.argv[1], compile=False)
run = tf.function(lambda x: model(x, training=False))
run(np.zeros((1, 224, 224, 3), "float32"))
print("ready", flush=True)
sys.stdin.read()
"""
COUNT = 10


def proportional(pids: list[int]) -> int:
    return sum(processes.memory(pid).proportional for pid in pids)


def test_ten_pockets_hold_at_most_a_fifth_of_what_ten_monoliths_hold(own_pocketd, tmp_path: Path, capsys):
    env = {**os.environ, **service_environment(), "TF_CPP_MIN_LOG_LEVEL": "3"}
    saved = tmp_path / "resnet152.keras"
    done = subprocess.run([sys.executable, "-c", SAVE, saved], env=env, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 60_000_000

    monoliths: list[subprocess.Popen[str]] = []
    sums = []
    try:
        for _ in range(2):
            p = subprocess.Popen(
                [sys.executable, "-c", MONOLITH, saved],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            monoliths.append(p)
            assert p.stdout and p.stdout.readline() == "ready\n"
            sums.append(proportional([p.pid for p in monoliths]))
    finally:
        for p in monoliths:
            p.kill()
            p.communicate()
    # Each more adds what the second one did. (`python -m bench --only memory` really starts ten.)
    apart = sums[0] + (COUNT - 1) * (sums[1] - sums[0])

    daemon = own_pocketd(f"""
        [service.tensorflow]
        runtime = "tensorflow"
        env = {toml_table(service_environment())}
        models = {{ resnet = "{saved}" }}
    """)
    sessions = []
    try:
        for _ in range(COUNT):
            session = login("tensorflow", directory=str(tmp_path), runtime_dir=str(daemon.runtime_dir))
            sessions.append(session)
            image = session.tensor((1, 224, 224, 3), "float32")
            session.model("resnet")(image)
        scope = next(daemon.cgroup_path.glob("*.scope"))
        pids = [int(p) for f in scope.rglob("cgroup.procs") for p in f.read_text().split()]
        assert len(daemon.workers()) == COUNT
        # Workers, pauses, templates, init; once each worker rests, which gives back what its call left free.
        wait_for(lambda: proportional(pids) * 5 <= apart, timeout=10)
        together = proportional(pids)
        cpu = [w["cpu"] for w in daemon.workers()]
    finally:
        for session in sessions:
            session.close()
    assert min(cpu) > 0.01, f"each is charged its own computation: {cpu}"
    with capsys.disabled():
        said = f"{COUNT} monoliths {apart >> 20} MB, {COUNT} pockets and templates {together >> 20} MB"
        print(f"\n{said}: {apart / together:.1f}x")
    assert together * 5 <= apart
    assert wait_for(lambda: not daemon.leaves())
