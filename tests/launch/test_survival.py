"""What dies, and who notices: pocketd, a worker, a client, a template, a service's init. Nothing is left behind."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import msgpack
import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import open_login
from tests.conftest import TIMEOUT, service_environment, toml_table, wait_for
from tests.launch.both import Both, Ended, ends, finish, read_line

CONFIG = f"""
[service.plain]
runtime = "python"
env = {toml_table(service_environment())}
"""

# A thread waits for the signal: a handler of Python's runs late when its signal comes just before read(2) is called.
LOOP = """
    import os, signal, sys, threading
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    def hear():
        while signal.sigwait([signal.SIGUSR1]): os.write(1, b"heard\\n")
    threading.Thread(target=hear, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        print("got", line, end="", flush=True)
    sys.exit(42)
"""


@pytest.fixture
def daemon(own_pocketd):
    return own_pocketd(CONFIG)


@pytest.fixture
def own(daemon, tmp_path):
    both = Both(daemon, tmp_path / "pocket")
    both.write("app.py", LOOP)
    return both


@pytest.fixture
def running(own, begun):
    """A program that waits, with both its ends in the test's hands."""
    return begun(own.pocket_command("app.py"), env=own.environment(None), cwd=own.place, stdin=subprocess.PIPE)


def say(process, text):
    process.stdin.write(text)
    process.stdin.flush()
    return read_line(process.stdout.fileno())


# -- pocketd


def test_pocketd_killed_during_a_program(daemon, own, running):
    """Output, input, signals and the exit code go on; the next pocketd knows the session, and new logins work."""
    before = daemon.workers()[0]
    daemon.end(signal.SIGKILL)
    assert say(running, b"one\n") == b"got one\n"
    running.send_signal(signal.SIGUSR1)
    assert read_line(running.stdout.fileno()) == b"heard\n"
    daemon.start()
    after = daemon.workers()[0]
    for key in ("session", "pid", "pocket", "directory", "service", "mode"):
        assert after[key] == before[key], key
    assert own.pocket("-c", "print(1)").out == b"1\n"
    assert say(running, b"two\n") == b"got two\n"
    running.stdin.close()
    running.stdin = None
    assert finish(running) == Ended(42, b"", b"")
    assert wait_for(lambda: daemon.workers() == [])
    assert daemon.settled()


def test_a_program_that_ends_without_a_pocketd(daemon, own, running):
    daemon.end(signal.SIGKILL)
    running.stdin.close()
    running.stdin = None
    assert finish(running) == Ended(42, b"", b"")
    daemon.start()
    assert wait_for(lambda: daemon.workers() == [])
    assert daemon.settled()


def test_a_session_found_again_can_be_stopped(daemon, own, running):
    daemon.end(signal.SIGKILL)
    daemon.start()
    session = daemon.workers()[0]["session"]
    reply = json.loads(daemon.pocket("stop", session, "--json").stdout)
    assert reply == {"name": session, "stopped": 1}
    assert finish(running).status == -signal.SIGTERM
    assert daemon.settled()


def test_a_program_that_ignores_its_stop_is_ended_for_good(daemon, own, begun):
    own.write(
        "app.py",
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True); signal.pause()",
    )
    process = begun(own.pocket_command("app.py"), env=own.environment(None), cwd=own.place)
    with connect(daemon) as s:
        wire.send(s, {"id": 1, "op": "stop", "name": daemon.workers()[0]["session"], "timeout": 1})
        assert wire.receive(s)[0]["stopped"] == 1
    assert finish(process).status == -signal.SIGKILL


def test_pocketd_stopped_and_started_in_good_order_leaves_all_running(daemon, own, running):
    daemon.end(signal.SIGTERM)
    assert say(running, b"one\n") == b"got one\n"
    daemon.start()
    assert len(daemon.workers()) == 1
    running.stdin.close()
    running.stdin = None
    assert finish(running).status == 42


def test_without_pocketd_a_login_says_so(daemon, own):
    daemon.end()
    ended = own.pocket("app.py")
    assert (
        ended.status == 125
        and ended.err.startswith(b"pocket: pocketd is not running")
        and b"Traceback" not in ended.err
    )
    daemon.start()


def test_many_kills_of_pocketd_in_a_row(daemon, own, running):
    for n in range(3):
        daemon.end(signal.SIGKILL)
        daemon.start()
        assert own.pocket("-c", "print(1)").out == b"1\n"
        assert say(running, b"%d\n" % n) == b"got %d\n" % n
    assert len(daemon.workers()) == 1
    running.stdin.close()
    running.stdin = None
    assert finish(running).status == 42
    assert daemon.settled()


def test_the_same_session_id_attaches_and_does_not_run_twice(daemon, own):
    """A caller whose pocketd died before it answered asks the next one again."""
    own.write("app.py", "open('runs', 'a').write('x'); print('ready', flush=True); input()")
    read, write = os.pipe()
    stdin_read, stdin_write = os.pipe()
    start = {
        "kind": "file", "program": b"app.py", "arguments": [], "environment": list(os.environb.items()),
        "directory": os.fsencode(own.place), "stdio": [0, 1, 2],
    }  # fmt: skip
    try:
        with Control(str(daemon.runtime_dir)) as control:
            login = open_login(
                control, mode="program", name="plain", directory=str(own.place), start=start, fds=[stdin_read, write, 2]
            )
        assert read_line(read) == b"ready\n"
        daemon.end(signal.SIGKILL)
        daemon.start()
        ours, theirs = messages.pair()
        hold, hold_theirs = messages.pair()
        directory = os.open(own.place, os.O_PATH)
        with Control(str(daemon.runtime_dir)) as control:
            roles = ["session", "hold", "dir"]
            fds = [theirs.fileno(), hold_theirs.fileno(), directory]
            again = control.call(
                "login", fds, session=login.id, mode="program", name="plain", path=str(own.place), roles=roles
            )
        os.close(directory)
        for s in (ours, theirs, hold, hold_theirs):
            s.close()
        assert again["pid"] == login.reply["pid"]
        assert len(daemon.workers()) == 1
        os.write(stdin_write, b"\n")
        message, _ = wire.receive(login.hold)
        assert message["op"] == "exit" and message["status"] == 0
        assert (own.place / "runs").read_text() == "x"
        login.session.close()
        login.hold.close()
    finally:
        for fd in (read, write, stdin_read, stdin_write):
            os.close(fd)


# -- a worker, a client


def test_a_worker_killed_is_a_signal_to_its_caller_alone(daemon, own, running, begun):
    other = begun(own.pocket_command("app.py"), env=own.environment(None), cwd=own.place, stdin=subprocess.PIPE)
    workers = {w["session"]: w for w in daemon.workers()}
    assert len(workers) == 2
    os.kill(min(workers.values(), key=lambda w: -w["age"])["pid"], signal.SIGKILL)
    assert finish(running) == Ended(-signal.SIGKILL, b"", b"")
    assert say(other, b"on\n") == b"got on\n"
    other.stdin.close()
    other.stdin = None
    assert finish(other).status == 42
    assert daemon.settled()


def test_a_client_killed_in_mid_login_leaves_nothing(daemon, own):
    """At many points of its way: each is killed a little later than the one before."""
    for n in range(20):
        process = subprocess.Popen(
            own.pocket_command("-c", "import time; time.sleep(1000)"),
            env=own.environment(None), cwd=own.place, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: False, timeout=0.02 + n * 0.008)
        process.kill()
        process.wait(TIMEOUT)
    assert daemon.settled()
    assert wait_for(lambda: daemon.workers() == [])
    assert own.pocket("-c", "print(1)").out == b"1\n"


# -- a template, init


def test_a_template_killed_is_made_again_without_a_login(daemon, own):
    own.pocket("-c", "")
    before = daemon.ps()["templates"][0]
    os.kill(before["pid"], signal.SIGKILL)
    assert wait_for(
        lambda: [t["pid"] for t in daemon.ps()["templates"] if t["state"] == "ready"] not in ([], [before["pid"]])
    )


def test_a_template_killed_while_no_pocketd_runs(daemon, own, running):
    before = daemon.ps()["templates"][0]
    daemon.end(signal.SIGKILL)
    os.kill(before["pid"], signal.SIGKILL)
    assert ends(before["pid"])
    daemon.start()
    assert own.pocket("-c", "print(1)") == Ended(0, b"1\n", b"")
    assert say(running, b"one\n") == b"got one\n"


def test_an_init_killed_while_no_pocketd_runs(daemon, own, running):
    pid = daemon.ps()["services"][0]["pid"]
    daemon.end(signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    assert finish(running).status == 125
    daemon.start()
    assert own.pocket("-c", "print(1)").out == b"1\n"
    assert daemon.settled()


# -- nothing is left behind


def descriptors(pid):
    """How many descriptors of each kind a process holds."""
    kinds: collections.Counter[str] = collections.Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            kinds[re.sub(r"\d+", "N", os.readlink(f"/proc/{pid}/fd/{name}").split(":")[0])] += 1
        except FileNotFoundError:
            pass
    assert kinds.pop("user", 0) <= 256  # id maps, of which pocketd keeps so many
    return kinds


def children(pid):
    found = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found += path.read_text().rpartition(")")[2].split()[1] == str(pid)
        except OSError:
            pass
    return found


def state(daemon):
    ps = daemon.ps()
    init, templates = ps["services"][0]["pid"], [t["pid"] for t in ps["templates"]]
    return {
        "cgroups": sorted(str(p) for p in daemon.cgroup_path.rglob("*") if p.is_dir()),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "mounts of init": Path(f"/proc/{init}/mountinfo").read_text(),
        "pocketd": descriptors(daemon.process.pid),
        "init": descriptors(init),
        "templates": [descriptors(pid) for pid in templates],
        "children of init": children(init),
        "children of pocketd": children(daemon.process.pid),
        "ipc": [len(Path(f"/proc/sysvipc/{kind}").read_text().splitlines()) for kind in ("shm", "msg", "sem")],
        "shm": sorted(os.listdir("/dev/shm")),
    }


WAYS = [
    "pass", "import sys; sys.exit(3)", "1/0", "import os; os.kill(os.getpid(), 9)", "import os; os.abort()",
    "import os; os.fork(); os.fork()", "import subprocess; subprocess.Popen(['sleep', '1000'], start_new_session=True)",
    "import tempfile; tempfile.NamedTemporaryFile(delete=False).write(b'x' * 100000)",
    "import os; os.memfd_create('kept'); open('/dev/shm/kept', 'w').write('x')",
    "import socket; s = socket.socket(socket.AF_UNIX); s.bind('\\0name'); s.listen()",
]  # fmt: skip


def test_nothing_is_left_behind_after_200_launches(daemon, own):
    for _ in range(10):  # what is made once and kept
        own.pocket("-c", "pass")
    assert daemon.settled()
    before = state(daemon)
    for n in range(0, 200, 4):
        processes = []
        for k in range(4):
            way = (
                WAYS[(n + k) % len(WAYS)]
                if (n + k) % 5
                else "import time; print('ready', flush=True); time.sleep(1000)"
            )
            process = subprocess.Popen(
                own.pocket_command("-c", way), env=own.environment(None), cwd=own.place,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            processes.append((process, "ready" in way))
        for process, waits in processes:
            if waits:
                assert read_line(process.stdout.fileno()) == b"ready\n"
                process.kill()
            process.communicate(timeout=TIMEOUT)
    assert daemon.settled()
    assert wait_for(lambda: difference(state(daemon), before) == {}, 20), difference(state(daemon), before)


def difference(now, before):
    changed = {key: (before[key], now[key]) for key in now if now[key] != before[key]}
    return {
        k: (dict(a - b), dict(b - a)) if isinstance(a, collections.Counter) else (a, b) for k, (a, b) in changed.items()
    }


# -- bad input


def connect(daemon):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.connect(str(daemon.runtime_dir / "pocketd.sock"))
    s.settimeout(TIMEOUT)
    return s


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "no msgpack": b"\0\xc1",
    "a list": b"\0" + msgpack.packb([1, 2]),
    "a map with other keys": b"\0" + msgpack.packb({1: 2}),
    "another version": b"\0" + msgpack.packb({"v": 99, "op": "ps", "id": 1}),
    "nesting": b"\0" + b"\x91" * 30000,
    "an ext type": b"\0\x81\xa1v\xc7\x05\x01hello",
    "a memfd without one": b"\1",
    "a large map header": b"\0\xdf\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_on_the_socket_loses_its_connection_alone(daemon, own, name):
    with connect(daemon) as s, Control(str(daemon.runtime_dir)) as bystander:
        if GARBAGE[name]:
            s.send(GARBAGE[name])
        else:
            s.shutdown(socket.SHUT_WR)
        assert s.recv(100) in (b"",) or name == "another version"
        assert bystander.call("ps")["services"][0]["name"] == "plain"
    assert daemon.process.poll() is None


def test_an_oversized_datagram(daemon):
    with connect(daemon) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        s.send(b"\0" * 150_000)
        assert s.recv(100) == b""
    assert daemon.ps()["services"]


def test_too_many_descriptors(daemon):
    daemon.ps()
    before = descriptors(daemon.process.pid)
    null = os.open("/dev/null", os.O_RDONLY)
    with connect(daemon) as s:
        socket.send_fds(s, [b"\0" + wire.pack({"op": "ps", "id": 1})], [null] * 250)
        assert s.recv(100) == b""
    os.close(null)
    daemon.ps()
    assert wait_for(lambda: descriptors(daemon.process.pid) == before, 10), descriptors(daemon.process.pid) - before


def test_descriptors_that_nobody_asked_for_are_closed(daemon):
    daemon.ps()
    before = descriptors(daemon.process.pid)
    null = os.open("/dev/null", os.O_RDONLY)
    with Control(str(daemon.runtime_dir)) as control:
        assert control.call("ps", [null] * 5)["services"]
    os.close(null)
    assert wait_for(lambda: descriptors(daemon.process.pid) == before, 10)


REQUESTS: dict[str, dict[str, Any]] = {
    "no operation": {},
    "an unknown operation": {"op": "nothing-of-that-name"},
    "an operation of another type": {"op": 7},
    "a login of nothing": {"op": "login"},
    "a login with a wrong id": {"op": "login", "session": "../x", "mode": "program", "name": "plain", "roles": []},
    "a login without descriptors": {
        "op": "login", "session": "a" * 32, "mode": "program", "name": "plain", "roles": ["session", "hold", "dir"],
    },
    "a login without roles": {"op": "login", "session": "a" * 32, "mode": "program", "name": "plain", "roles": []},
    "a login to nobody": {"op": "login", "session": "a" * 32, "mode": "program", "name": "nobody", "roles": []},
    "an unknown mode": {"op": "login", "session": "a" * 32, "mode": "x", "name": "plain", "roles": []},
    "a name of another type": {"op": "on", "name": ["plain"]},
    "an unknown service": {"op": "on", "name": "nobody"},
    "no session of that name": {"op": "stop", "name": "nobody"},
    "logs of nothing": {"op": "logs", "name": "../../etc/passwd"},
}  # fmt: skip


@pytest.mark.parametrize("name", REQUESTS)
def test_a_wrong_request_gets_an_error_in_words(daemon, name):
    with connect(daemon) as s:
        wire.send(s, {"id": 1, **REQUESTS[name]})
        reply, _ = wire.receive(s)
        while "progress" in reply:
            reply, _ = wire.receive(s)
        assert reply["id"] == 1 and reply["error"]["message"] and reply["error"]["code"] != "internal", reply
        wire.send(s, {"id": 2, "op": "ps"})
        assert wire.receive(s)[0]["id"] == 2
    assert not daemon.leaves()


def test_a_start_message_that_is_none(daemon, own):
    """The worker reads it, and says what is wrong with it; the daemon never sees it."""
    with Control(str(daemon.runtime_dir)) as control:
        for start, fds in (
            ({}, []),
            ({"kind": "file", "program": b"x", "stdio": [0, 1, 2]}, [0]),
            ({"kind": "nonsense", "program": b"x", "stdio": []}, []),
            ({"kind": "file", "program": 7, "stdio": []}, []),
            ({"kind": "file", "program": b"x", "stdio": [9]}, [0]),
            ({"kind": "file", "program": b"x", "stdio": [], "environment": 3}, []),
        ):
            login = open_login(control, mode="program", name="plain", directory=str(own.place), start=start, fds=fds)
            message, _ = wire.receive(login.hold)
            assert message["op"] == "exit" and os.waitstatus_to_exitcode(message["status"]) != 0, (start, message)
            login.session.close()
            login.hold.close()
    assert daemon.settled()
    assert own.pocket("-c", "print(1)").out == b"1\n"
