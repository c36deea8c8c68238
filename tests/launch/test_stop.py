"""A service's init at SIGTERM, as systemd sends it to all of the scope at power-off; and a template that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import service_environment, toml_table, wait_for
from tests.launch.both import Both, Ended, ends, finish, read_line

CONFIG = f"""
[service.plain]
runtime = "python"
env = {toml_table(service_environment())}
stop_timeout = 2

[service.programs]
runtime = "exec"
"""

# At its SIGTERM it takes until its standard input ends.
SLOW = """
    import signal, sys, time
    def end(*_):
        print("told", flush=True)
        sys.stdin.read()
        sys.exit(7)
    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    while True: time.sleep(0.1)
"""
DEAF = """
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    while True: signal.pause()
"""


@pytest.fixture
def daemon(own_pocketd):
    return own_pocketd(CONFIG)


@pytest.fixture
def own(daemon, tmp_path):
    both = Both(daemon, tmp_path / "pocket")
    both.place.mkdir()
    return both


def start(begun, both, program):
    both.write("app.py", program)
    return begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place, stdin=subprocess.PIPE)


def init(daemon, name="plain"):
    return next(s["pid"] for s in daemon.ps()["services"] if s["name"] == name)


def test_init_ends_at_once_when_it_has_no_session(daemon, own):
    own.pocket("-c", "")
    pid = init(daemon)
    assert daemon.settled()
    assert wait_for(lambda: daemon.workers() == [])
    os.kill(pid, signal.SIGTERM)
    assert ends(pid, 5)
    assert own.pocket("-c", "print(1)").out == b"1\n"  # by the next one


def test_init_waits_for_its_sessions_and_each_caller_gets_its_status(daemon, own, begun):
    process = start(begun, own, SLOW)
    pid, worker = init(daemon), daemon.workers()[0]["pid"]
    os.kill(pid, signal.SIGTERM)
    os.kill(worker, signal.SIGTERM)
    assert read_line(process.stdout.fileno()) == b"told\n"
    ended = own.pocket("-c", "print(1)")
    assert ended.status == 125 and b"is being stopped" in ended.err, ended.shown()
    process.stdin.close()
    process.stdin = None
    assert finish(process) == Ended(7, b"", b"")
    assert ends(pid, 5)
    assert daemon.settled()


def test_a_session_that_does_not_end_in_time_is_ended(daemon, own, begun):
    process = start(begun, own, DEAF)
    pid, worker = init(daemon), daemon.workers()[0]["pid"]
    os.kill(pid, signal.SIGTERM)
    os.kill(worker, signal.SIGTERM)
    assert not ends(pid, 1)  # of the two seconds of this service
    assert finish(process) == Ended(-signal.SIGKILL, b"", b"")
    assert ends(pid, 5)
    assert daemon.settled()


@pytest.mark.parametrize("service", ["plain", "programs"])
def test_a_template_ends_at_sigterm(daemon, tmp_path, service):
    Both(daemon, tmp_path, service).pocket("true")
    (template,) = [t for t in daemon.ps()["templates"] if t["service"] == service]
    os.kill(template["pid"], signal.SIGTERM)
    assert ends(template["pid"], 5)


def test_a_template_that_holds_tensorflow_ends_at_sigterm(pocketd, tensorflow):
    tensorflow.pocket("-c", "")
    (template,) = [t for t in pocketd.ps()["templates"] if t["service"] == "tensorflow"]
    os.kill(template["pid"], signal.SIGTERM)
    assert ends(template["pid"], 5)
    assert tensorflow.pocket("-c", "print(1)").out == b"1\n"


def test_a_template_that_hangs_in_a_fork_is_ended_and_made_again(daemon, own):
    own.pocket("-c", "")
    (template,) = daemon.ps()["templates"]
    os.kill(template["pid"], signal.SIGSTOP)
    ended = own.pocket("-c", "print(1)")
    assert ended.status == 125 and b"did not fork within 20 s; it was ended" in ended.err, ended.shown()
    assert ends(template["pid"], 5)
    assert own.pocket("-c", "print(1)") == Ended(0, b"1\n", b"")
    lines = json.loads(daemon.pocket("logs", "plain", "--json").stdout)["lines"]
    assert any("hangs in a fork and is ended" in line for line in lines), lines
    assert daemon.settled()


def test_a_worker_has_the_usual_oom_score_whatever_its_template_has(daemon, own):
    """pocketd's unit has a lower one, so that workers go first; to raise it here takes no privilege."""
    own.pocket("-c", "")
    (template,) = daemon.ps()["templates"]
    Path(f"/proc/{template['pid']}/oom_score_adj").write_text("500")
    assert own.pocket("-c", "print(open('/proc/self/oom_score_adj').read(), end='')").out == b"0\n"
