"""Sessions of both modes through a restart of pocketd, and when their service is switched off."""

from __future__ import annotations

import signal
import subprocess

import pytest

from pocketd.client import WorkerDied, login
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table

CONFIG = f"""
    [service.plain]
    runtime = "python"
    env = {toml_table(service_environment())}
"""
HOLD = "import sys; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def daemon(own_pocketd) -> Pocketd:
    started: Pocketd = own_pocketd(CONFIG)
    return started


def test_a_client_session_outlives_pocketd(daemon, tmp_path):
    (tmp_path / "app.py").write_text("def double(x): return 2 * x\n")
    with login("plain", directory=str(tmp_path), runtime_dir=str(daemon.runtime_dir)) as session:
        daemon.end(signal.SIGKILL)
        assert session.call("app:double", 4) == 8
        daemon.start()
        assert session.call("app:double", 5) == 10
        assert len(daemon.workers()) == 1
    assert daemon.settled()


def test_a_service_that_is_switched_off_says_so(daemon, tmp_path, begun):
    (tmp_path / "app.py").write_text("import time\ndef nap(): time.sleep(1000)\n")
    process = begun(daemon.command("run", "-c", HOLD), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    with login("plain", directory=str(tmp_path), runtime_dir=str(daemon.runtime_dir)) as session:
        daemon.pocket("plain", "off")
        with pytest.raises(WorkerDied):
            session.call("app:nap")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM
    assert err == b"pocket: the service was switched off\n"
    assert not list(daemon.cgroup_path.glob("*.scope"))
