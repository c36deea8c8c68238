"""Client mode against a real daemon: models of the service's template, the pocket's own module, other namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketd.client import LoginRefused, RemoteError, UnknownModel, WorkerDied, login
from tests.conftest import ROOT, TIMEOUT, Pocketd, service_environment, toml_table, wait_for

DETECTOR = """
import os

def find(image, threshold):
    return {"sum": float(image.sum()), "threshold": threshold, "directory": os.getcwd(), "doubled": image * 2}

def whoami():
    return [os.getuid(), sorted(os.listdir("/pocket")), os.getpid()]

def end(signal):
    os.kill(os.getpid(), signal)
"""


@pytest.fixture(scope="module")
def served(small_model: tuple[Path, list[list[float]]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pocketd]:
    """Services with models: `tensorflow` with two, and a pocket `narrow` that may use one of them."""
    place = tmp_path_factory.mktemp("served")
    directory = place / "narrow"
    directory.mkdir()
    (directory / "detector.py").write_text(DETECTOR)
    daemon = Pocketd(
        place,
        f"""
        [service.tensorflow]
        runtime = "tensorflow"
        env = {toml_table(service_environment())}
        models = {{ small = "{small_model[0]}", counter = "collections:Counter" }}

        [pocket.narrow]
        service = "tensorflow"
        dir = "{directory}"
        allow = {{ models = ["small"] }}
        """,
    )
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "detector.py").write_text(DETECTOR)
    return tmp_path


def test_a_deployed_model_gives_what_it_gives_in_plain_python(served, small_model, app):
    numpy = pytest.importorskip("numpy")
    with login("tensorflow", directory=str(app), runtime_dir=str(served.runtime_dir)) as session:
        image = session.tensor((1, 32, 32, 3), "float32")
        image.numpy()[...] = 1
        scores = session.model("small")(image)
        assert scores.shape == (1, 10)
        assert numpy.allclose(scores.numpy(), small_model[1], atol=1e-6)


def test_a_function_of_the_pocket_runs_beside_its_files(served, app):
    with login("tensorflow", directory=str(app), runtime_dir=str(served.runtime_dir)) as session:
        image = session.tensor((2, 3), "float32")
        image.numpy()[...] = 1
        found = session.call("detector:find", image, threshold=0.25)
        assert (found["sum"], found["threshold"]) == (6.0, 0.25)
        assert (found["doubled"].numpy() == 2).all()
        assert "detector.py" in session.call("detector:whoami")[1]


def test_a_pocket_has_only_the_models_that_it_may_use(served):
    with login("narrow", runtime_dir=str(served.runtime_dir)) as session:
        session.model("small")
        with pytest.raises(UnknownModel):
            session.model("counter")
    kinds = {tuple(t["models"]) for t in served.ps()["templates"]}
    assert ("small",) in kinds  # a template without the other one: it is not in the worker's memory either


def test_a_worker_that_dies_is_a_typed_error(served, app):
    with login("tensorflow", directory=str(app), runtime_dir=str(served.runtime_dir)) as session:
        with pytest.raises(WorkerDied) as caught:
            session.call("detector:end", int(signal.SIGKILL))
        assert caught.value.signal == signal.SIGKILL


def test_an_exception_comes_with_its_traceback(served, app):
    with login("tensorflow", directory=str(app), runtime_dir=str(served.runtime_dir)) as session:
        with pytest.raises(RemoteError, match="detector.py"):
            session.call("detector:find", 1, threshold=0)
        assert session.call("detector:whoami")  # and the session goes on


def test_a_client_that_is_killed_takes_its_worker_along(served, app):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pocketd.client import login\n"
        "s = login('tensorflow', timeout=100); print(s.call('detector:whoami')[2], flush=True); sys.stdin.read()\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=app,
        env=served.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert client.stdout and client.stdout.readline().strip().isdigit()
    pids = [w["pid"] for w in served.workers()]
    assert len(pids) == 1
    worker = os.pidfd_open(pids[0])
    client.kill()
    client.communicate()
    assert wait_for(lambda: not served.leaves())
    with pytest.raises(ProcessLookupError):
        signal.pidfd_send_signal(worker, 0)
    os.close(worker)


ELSEWHERE = """
import os, sys
sys.path.insert(0, {root!r})
from nsutil import clone, mounts, namespaces as n
from pocketd.client import login

child = clone.fork(flags=n.CLONE_NEWNS | n.CLONE_NEWPID)
if child is not None:
    status = os.waitpid(child.pid, 0)[1]
    sys.exit(os.waitstatus_to_exitcode(status))
mounts.private()
mounts.tmpfs("/mnt", size=1 << 20)  # files that exist in this mount namespace alone
os.mkdir("/mnt/app")
with open("/mnt/app/detector.py", "w") as f:
    f.write({detector!r})
os.chdir("/mnt/app")
with login("tensorflow", timeout=100) as session:
    print(os.getpid(), session.call("detector:whoami")[1], session.model("small").name)
"""


def test_it_works_from_another_mount_and_pid_namespace(served):
    assert not os.path.exists("/mnt/app")
    script = ELSEWHERE.format(root=str(ROOT), detector=DETECTOR)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=served.environment, timeout=TIMEOUT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 ['__pycache__', 'detector.py'] small\n", "") or (
        done.returncode,
        done.stdout,
        done.stderr,
    ) == (0, "1 ['detector.py'] small\n", "")


@pytest.mark.parametrize("directory", ["/", "/usr/lib", "/tmp"])
def test_a_system_directory_is_no_pocket(served, directory):
    with pytest.raises(LoginRefused, match="cannot be a pocket's directory"):
        login("tensorflow", directory=directory, runtime_dir=str(served.runtime_dir))


def test_a_name_that_is_none_says_what_there_is(served, app):
    with pytest.raises(LoginRefused, match="services are tensorflow"):
        login("tensroflow", directory=str(app), runtime_dir=str(served.runtime_dir))
