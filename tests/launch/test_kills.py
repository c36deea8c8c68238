"""kill -9 of each part: who notices, what is said, and that nothing is left."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client import WorkerDied, login
from pocketd.client.control import Control
from pocketd.client.login import open_login
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch.both import ends, read_line

CONFIG = f"""
    [service.plain]
    runtime = "python"
    env = {toml_table(service_environment())}
"""
# Says "ready", then answers each line, so that a test can see it alive; ends with the number that it is given.
ANSWERS = """
import signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("signalled", flush=True))
print("ready", flush=True)
for line in sys.stdin:
    if line.strip().isdigit():
        sys.exit(int(line))
    print("heard", line, end="", flush=True)
"""


@pytest.fixture
def daemon(own_pocketd) -> Pocketd:
    started: Pocketd = own_pocketd(CONFIG)
    return started


def say(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    assert process.stdin and process.stdout
    process.stdin.write(line + b"\n")
    process.stdin.flush()
    return read_line(process.stdout.fileno())


def test_a_program_outlives_pocketd(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    before = daemon.workers()
    daemon.end(signal.SIGKILL)
    assert say(process, b"one") == b"heard one\n"
    process.send_signal(signal.SIGUSR1)
    assert read_line(process.stdout.fileno()) == b"signalled\n"
    daemon.start()
    (worker,) = daemon.workers()
    kept = ("session", "pocket", "service", "pid", "mode", "directory")
    assert {k: worker[k] for k in kept} == {k: before[0][k] for k in kept}
    process.send_signal(signal.SIGUSR1)
    assert read_line(process.stdout.fileno()) == b"signalled\n"
    assert daemon.pocket("run", "-c", "print('new')", cwd=tmp_path).stdout == "new\n"
    say(process, b"42")
    assert process.wait(TIMEOUT) == 42
    assert daemon.settled()


def test_a_program_that_ends_while_pocketd_is_away_keeps_its_status(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    daemon.end(signal.SIGKILL)
    say(process, b"43")
    assert process.wait(TIMEOUT) == 43
    daemon.start()
    assert daemon.settled()
    assert daemon.workers() == []


def test_a_restarted_pocketd_can_end_what_it_found(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    daemon.end(signal.SIGKILL)
    daemon.start()
    (worker,) = daemon.workers()
    daemon.pocket("stop", worker["pocket"])
    assert process.wait(TIMEOUT) == -signal.SIGTERM


def test_a_client_session_outlives_pocketd(daemon, tmp_path):
    (tmp_path / "app.py").write_text("def double(x): return 2 * x\n")
    with login("plain", directory=str(tmp_path), runtime_dir=str(daemon.runtime_dir)) as session:
        daemon.end(signal.SIGKILL)
        assert session.call("app:double", 4) == 8
        daemon.start()
        assert session.call("app:double", 5) == 10
        assert len(daemon.workers()) == 1
    assert daemon.settled()


def test_a_killed_worker_is_reported_by_its_signal(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    (worker,) = daemon.workers()
    os.kill(worker["pid"], signal.SIGKILL)
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert daemon.settled()


def test_a_killed_template_takes_nobody_along_and_is_made_again(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    (template,) = daemon.ps()["templates"]
    os.kill(template["pid"], signal.SIGKILL)
    assert ends(template["pid"])
    assert say(process, b"still") == b"heard still\n"
    assert daemon.pocket("run", "-c", "print('new')", cwd=tmp_path).stdout == "new\n"
    (again,) = daemon.ps()["templates"]
    assert again["pid"] != template["pid"] and again["state"] == "ready"
    say(process, b"7")
    assert process.wait(TIMEOUT) == 7


def test_a_killed_init_ends_its_service_with_a_word(daemon, tmp_path, begun):
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    os.kill(daemon.ps()["services"][0]["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (125, b"pocket: the service ended\n")
    assert wait_for(lambda: daemon.ps()["services"][0]["state"] == "failed")
    assert wait_for(lambda: not list(daemon.cgroup_path.glob("*.scope")))
    assert daemon.pocket("run", "-c", "print('new')", cwd=tmp_path).stdout == "new\n"


def test_a_service_that_is_switched_off_says_so(daemon, tmp_path, begun):
    (tmp_path / "app.py").write_text("import time\ndef nap(): time.sleep(1000)\n")
    process = begun(daemon.command("run", "-c", ANSWERS), env=daemon.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    with login("plain", directory=str(tmp_path), runtime_dir=str(daemon.runtime_dir)) as session:
        daemon.pocket("plain", "off")
        with pytest.raises(WorkerDied):
            session.call("app:nap")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 125
    assert err == b"pocket: the service was switched off\n"
    assert not list(daemon.cgroup_path.glob("*.scope"))


def test_the_same_login_twice_attaches(daemon, tmp_path):
    """What a caller does whose pocketd died before its answer: the program runs once."""
    read, write = os.pipe()
    start = {
        "kind": "code",
        "program": b"import os, time; os.write(1, b'x'); time.sleep(1000)",
        "arguments": [],
        "environment": list(os.environb.items()),
        "directory": os.fsencode(tmp_path),
        "stdio": [1, 2],
    }
    with Control(str(daemon.runtime_dir)) as control:
        made = open_login(control, mode="program", name="plain", directory=str(tmp_path), start=start, fds=[write, 2])
    os.close(write)
    assert os.read(read, 10) == b"x"
    a, b = messages.pair()
    with Control(str(daemon.runtime_dir)) as control:
        reply = control.call(
            "login", [a.fileno(), b.fileno()], session=made.id, mode="program", name="plain", roles=["session", "hold"]
        )
    assert reply["pid"] == made.reply["pid"]
    assert len(daemon.workers()) == 1
    for sock in (a, b, made.session, made.hold):
        sock.close()
    assert os.read(read, 10) == b""  # it was one program, and it has ended with its caller
    os.close(read)
    assert daemon.settled()


def counts(daemon: Pocketd) -> dict[str, object]:
    """What the kernel says there is of ours."""
    shown = daemon.ps()
    assert daemon.process
    pids = {
        "pocketd": daemon.process.pid,
        "init": shown["services"][0]["pid"],
        "template": shown["templates"][0]["pid"],
    }
    found: dict[str, object] = {"host mounts": len(Path("/proc/self/mountinfo").read_text().splitlines())}
    for name, pid in pids.items():
        kinds = Counter()
        for fd in os.listdir(f"/proc/{pid}/fd"):
            try:
                kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{fd}"))] += 1
            except FileNotFoundError:
                pass
        found[f"{name} descriptors"] = dict(kinds)
        found[f"{name} mounts"] = len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    found["children of init"] = len(Path(f"/proc/{pids['init']}/task/{pids['init']}/children").read_text().split())
    found["cgroups"] = sorted(str(p) for p in daemon.cgroup_path.rglob("*") if p.is_dir())
    return found


def test_two_hundred_launches_leave_nothing(daemon, tmp_path):
    """Ends of every kind: good, bad, by signal, killed from outside, its caller killed."""
    (tmp_path / "app.py").write_text(
        "import sys, time\nprint('x', flush=True)\n"
        "if sys.argv[1] == 'wait': time.sleep(1000)\nsys.exit(int(sys.argv[1]))"
    )

    def launch(kind: int) -> None:
        if kind == 0:
            assert daemon.pocket("run", "app.py", "0", cwd=tmp_path).stdout == "x\n"
        elif kind == 1:
            assert daemon.pocket("run", "app.py", "3", cwd=tmp_path, check=False).returncode == 3
        elif kind == 2:
            code = "import os; os.kill(os.getpid(), 11)"
            assert daemon.pocket("run", "-c", code, cwd=tmp_path, check=False).returncode == -11
        else:
            process = daemon.popen(
                "run", "app.py", "wait", cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            assert read_line(process.stdout.fileno()) == b"x\n"
            if kind == 3:
                process.kill()
            else:
                os.kill(daemon.workers()[0]["pid"], signal.SIGKILL)
            process.communicate(timeout=TIMEOUT)
        assert daemon.settled()

    for kind in range(5):  # what is made once, and stays
        launch(kind)
    before = counts(daemon)
    for n in range(200):
        launch(n % 5)
    assert wait_for(lambda: counts(daemon) == before, 20) or counts(daemon) == before


def test_garbage_on_the_control_socket_harms_nobody(daemon, tmp_path):

    path = str(daemon.runtime_dir / "pocketd.sock")
    junk = [
        b"",
        b"\0",
        b"\0\xff" * 100,
        b"\1",
        b"\0" + b"\x91" * 30000,
        os.urandom(4096),
        b"\0\x81\xa1v\x01",
        b"x" * 32000,
    ]
    for data in junk:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(path)
            if data:
                sock.send(data)
                assert select.select([sock], [], [], TIMEOUT)[0]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(path)
        wire.send(sock, {"op": "login", "id": 1, "session": "../../x", "mode": "program", "roles": []})
        message, _ = wire.receive(sock)
        assert message["error"]["code"] == "bad-request"
        socket.send_fds(sock, [b"\0" + wire.pack({"op": "ps", "id": 2})], [0] * 40)
        assert select.select([sock], [], [], TIMEOUT)[0]
    assert daemon.pocket("run", "-c", "print('well')", cwd=tmp_path).stdout == "well\n"
