"""How sessions end: workers, clients and pocketd that die, logins that are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pocketd.client import (
    LoginRefused,
    NotRunning,
    OutOfMemory,
    ServiceFailed,
    Session,
    Timeout,
    WorkerDied,
    login,
)

Open = Callable[..., Session]


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process ends in time; a zombie has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def test_a_worker_that_is_killed_is_named_with_its_signal(open_session: Open) -> None:
    session = open_session()
    with pytest.raises(WorkerDied, match="signal 9") as caught:
        session.call("detector:die", signal.SIGKILL)
    assert (caught.value.signal, caught.value.exit_code, caught.value.reason) == (signal.SIGKILL, None, None)
    with pytest.raises(WorkerDied, match="signal 9"):
        session.call("detector:pid")


def test_a_worker_that_exits_is_named_with_its_code(open_session: Open) -> None:
    with pytest.raises(WorkerDied, match="exit code 42") as caught:
        open_session().call("detector:exit", 42)
    assert (caught.value.signal, caught.value.exit_code) == (None, 42)


def test_a_worker_that_dies_between_calls_is_named_too(open_session: Open) -> None:
    session = open_session()
    assert session.pid
    os.kill(session.pid, signal.SIGTERM)
    assert gone(session.pid)
    with pytest.raises(WorkerDied, match="signal 15"):
        session.call("detector:pid")


def test_the_limit_that_killed_a_worker_is_the_reason(open_session: Open) -> None:
    session = open_session("limited")
    for _ in range(2):  # in the call and later
        with pytest.raises(OutOfMemory, match="memory.max of 800M") as caught:
            session.call("detector:die", signal.SIGKILL)
        error = caught.value
        assert isinstance(error, WorkerDied) and error.code == "memory"
        assert error.reason == "memory.max of 800M was reached" and error.signal == signal.SIGKILL
        assert (error.pocket, error.limit, error.peak) == ("limited", 800 << 20, None)


def test_closing_a_session_ends_its_worker(open_session: Open) -> None:
    session = open_session()
    pid = session.pid
    assert pid and not gone(pid, 0.05)
    session.close()
    assert gone(pid)


def test_closing_ends_the_worker_also_when_a_forked_child_holds_the_session(open_session: Open) -> None:
    session = open_session()
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        session.close()
        assert session.pid and gone(session.pid)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_dropped_session_ends_its_worker(service: str, pocket: Path) -> None:
    pid = login("python", directory=str(pocket), runtime_dir=service).pid
    assert pid and gone(pid)


def test_a_killed_client_ends_its_worker_even_in_mid_call(service: str, pocket: Path) -> None:
    code = f"""
from pocketd.client import login
session = login("python", directory={str(pocket)!r}, runtime_dir={service!r})
print(session.pid, flush=True)
session.call("detector:stubborn", 60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        pid = int(client.stdout.readline())
        assert not gone(pid, 0.2)
        client.kill()
        assert gone(pid)


def test_no_pocketd_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match=r"no socket at .*pocketd.sock.*start it"):
        login("python", runtime_dir=str(tmp_path))
    with pytest.raises(NotRunning):
        login("python", runtime_dir=str(tmp_path / "absent"))
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "pocketd.sock"))
    with pytest.raises(NotRunning, match="nobody listens"):
        login("python", runtime_dir=str(tmp_path))


def test_the_runtime_directory_may_come_from_the_environment(
    service: str, pocket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETD_RUNTIME_DIR", service)
    with login("python", directory=str(pocket)) as session:
        assert session.call("detector:add", 1, 1) == 2


def test_a_refused_login_says_what_pocketd_says(open_session: Open) -> None:
    with pytest.raises(LoginRefused, match="there is no service or pocket 'missing'") as caught:
        open_session("missing")
    assert caught.value.code == "unknown-name"


def test_a_worker_that_cannot_start_says_why(open_session: Open) -> None:
    with pytest.raises(ServiceFailed, match="cannot be attached"):
        open_session("broken")


def test_a_login_outlives_a_pocketd_that_dies_before_its_reply(open_session: Open) -> None:
    assert open_session("lost").call("detector:add", 1, 1) == 2


def test_a_login_has_a_time_limit(service: str, pocket: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Timeout):
        login("silent", directory=str(pocket), runtime_dir=service, timeout=0.3)
    assert time.monotonic() - began < 0.8
    time.sleep(1)


def test_progress_is_passed_on(open_session: Open) -> None:
    lines: list[str] = []
    open_session(progress=lines.append)
    assert lines == ["starting"]


def test_a_directory_that_is_not_there_is_an_error(service: str) -> None:
    with pytest.raises(FileNotFoundError):
        login("python", directory="/nowhere", runtime_dir=service)


def test_logins_leave_no_descriptor_behind(service: str, pocket: Path) -> None:
    def once(name: str) -> None:
        try:
            with login(name, directory=str(pocket), runtime_dir=service, timeout=20) as session:
                session.call("detector:add", 1, 1)
        except (LoginRefused, ServiceFailed):
            pass

    once("python")
    before = sorted(os.listdir("/proc/self/fd"))
    for name in ("python", "missing", "broken", "lost", "python") * 3:
        once(name)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_it_works_from_another_mount_and_pid_namespace(service: str, pocket: Path) -> None:
    """Only descriptors and names travel, so an app's own container can be anything that sees the socket."""
    code = f"""
import os
from pocketd.client import login
with login("python", directory={str(pocket)!r}, runtime_dir={service!r}) as session:
    a = session.tensor((1000,), "float32")
    a.buffer()[0] = 5
    assert session.call("detector:add", a, 1).tolist()[0] == 6
    print(os.getpid(), os.getcwd())
"""
    command = ["unshare", "--mount", "--pid", "--fork", "--map-root-user", sys.executable, "-c", code]
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--map-root-user", "true"], capture_output=True)
    if probe.returncode:
        pytest.skip(f"no namespaces for a test here: {probe.stderr.decode().strip()}")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "1"
