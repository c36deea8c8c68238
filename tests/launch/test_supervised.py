"""What a service manager gives a program: its notification socket, its watchdog, its sockets, its credentials."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import open_login
from tests.conftest import TIMEOUT
from tests.launch.test_isolation import holds

# What a program does with what it was given, without any library: sd_notify(3), sd_listen_fds(3).
NOTIFY = """
    import os, socket, sys
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.connect(os.environ["NOTIFY_SOCKET"])
    s.send(b"READY=1\\nSTATUS=" + os.environ["NOTIFY_SOCKET"].encode())
    print(os.environ.get("WATCHDOG_PID") == str(os.getpid()), os.environ.get("WATCHDOG_PID"))
"""


@pytest.fixture
def run():
    """A directory beneath /run, as systemd's own are."""
    place = Path(f"/run/pocketd-test-{os.getpid()}")
    place.mkdir()
    yield place
    shutil.rmtree(place)


@pytest.fixture
def notify(run):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(run / "notify"))
        os.chmod(run / "notify", 0o777)
        listening.settimeout(TIMEOUT)
        yield listening


def as_own(variables: str) -> tuple[str, ...]:
    """A shell's words that set variables to the pid that the command behind them will have."""
    return ("sh", "-c", f'export {variables}; exec "$@"', "sh")


def started(both, prefix, *words, options=(), env=None, **others):
    """The end of the pocket command, executed by a shell that sets it up as a service manager does."""
    command = [*prefix, *both.pocket_command(*words, options=options)]
    done = subprocess.run(
        command, env=both.environment(env), cwd=both.place, capture_output=True, timeout=TIMEOUT, **others
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["forked", "cold"])
def test_a_program_says_that_it_is_ready(both, run, notify, options):
    both.write("app.py", NOTIFY)
    env = {"NOTIFY_SOCKET": str(run / "notify")}
    found = started(both, as_own("WATCHDOG_PID=$$"), "app.py", options=options, env=env)
    assert found == (0, "True 2\n", "")
    assert notify.recv(1000) == f"READY=1\nSTATUS={run}/notify".encode()


def test_another_process_watchdog_stays_anothers(both, run, notify):
    both.write("app.py", NOTIFY)
    env = {"NOTIFY_SOCKET": str(run / "notify"), "WATCHDOG_PID": "1"}
    assert started(both, (), "app.py", env=env) == (0, "False 1\n", "")


def test_nothing_but_the_socket_is_shown_beneath_run(both, run, notify):
    (run / "beside").write_text("secret")
    both.write("app.py", f"import os; print(os.listdir('{run}'), os.access('{run}', os.W_OK))")
    env = {"NOTIFY_SOCKET": str(run / "notify")}
    assert started(both, (), "app.py", env=env)[1] == "['notify'] False\n"
    assert started(both, (), "-c", f"import os; print(os.path.exists('{run}'))")[1] == "False\n"


def test_a_link_on_the_way_to_the_socket_is_followed(both, run, notify, tmp_path):
    both.write("app.py", NOTIFY)
    (tmp_path / "link").symlink_to(run)
    env = {"NOTIFY_SOCKET": str(tmp_path / "link/notify")}
    assert started(both, (), "app.py", env=env) == (0, "False None\n", "")
    assert notify.recv(1000).endswith(f"STATUS={run}/notify".encode())


@pytest.mark.parametrize(
    ("name", "said"), [("@abstract", "an abstract socket stays in its network"), ("{place}/notify", "beneath /run")]
)
def test_a_socket_that_the_program_cannot_reach_is_said_in_one_line(both, tmp_path, name, said):
    name = name.format(place=tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        if name.startswith("/"):
            listening.bind(name)
        status, out, err = started(both, (), "-c", "print(1)", env={"NOTIFY_SOCKET": name})
    assert (status, out) == (0, "1\n")
    assert said in err and name in err and err.count("\n") == 1


def test_a_file_in_a_sockets_place_is_not_passed(both, run):
    (run / "notify").write_text("secret")
    code = f"import os; print(os.path.exists('{run}/notify'))"
    assert started(both, (), "-c", code, env={"NOTIFY_SOCKET": str(run / "notify")}) == (0, "False\n", "")


# -- requests that a caller could make by itself


def refused(daemon, directory, role, fd, **fields):
    with Control(str(daemon.runtime_dir)) as control, pytest.raises(Exception) as caught:
        open_login(
            control, mode="program", name="plain", directory=str(directory), start={}, shared=[(role, fd)], **fields
        )
    return str(caught.value)


WRONG = ["/etc/passwd", "/run/../etc/passwd", "/run", "/run/pocketd/lib", "run/x", "/run/x/"]


@pytest.mark.parametrize("target", WRONG)
def test_what_was_given_goes_beneath_run_and_nowhere_else(pocketd, tmp_path, run, notify, target):
    fd = os.open(run / "notify", os.O_PATH)
    try:
        for role in ("notify", "credentials"):
            said = refused(pocketd, tmp_path, role, fd, **{role: target.encode()})
            assert "must be beneath /run" in said or "cannot be" in said
    finally:
        os.close(fd)


def test_what_is_no_socket_is_refused(pocketd, tmp_path):
    fd = os.open("/etc/shadow", os.O_PATH)
    try:
        assert "is not a socket" in refused(pocketd, tmp_path, "notify", fd, notify=b"/run/notify")
    finally:
        os.close(fd)


def test_a_directory_is_no_credentials(pocketd, both, tmp_path):
    """A worker that read it would read it as root: what travels is a copy, made by the caller with its own rights."""
    fd = os.open("/etc", os.O_PATH | os.O_DIRECTORY)
    try:
        with Control(str(pocketd.runtime_dir)) as control:
            login = open_login(
                control, mode="program", name="plain", directory=str(tmp_path), shared=[("credentials", fd)],
                credentials=b"/run/credentials", start={"kind": "code", "program": b"print(1)", "stdio": []},
            )  # fmt: skip
            with login.session, login.hold:
                login.session.settimeout(TIMEOUT)
                message, none = wire.receive(login.session)
                none.close()
                assert "not a memfd" in message["error"]["message"]
    finally:
        os.close(fd)


# -- credentials


SHOW = """
    import json, os
    place = os.environ["CREDENTIALS_DIRECTORY"]
    found = {n: [open(f"{place}/{n}").read(), oct(os.stat(f"{place}/{n}").st_mode)] for n in sorted(os.listdir(place))}
    refused = []
    for action in (lambda: open(f"{place}/new", "w"), lambda: os.unlink(f"{place}/token"),
                   lambda: os.chmod(f"{place}/token", 0o644)):
        try: action()
        except OSError as e: refused.append(e.strerror)
    s = os.stat(place)
    print(json.dumps([found, refused, s.st_uid == os.getuid(), oct(s.st_mode)]))
"""


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["forked", "cold"])
def test_credentials_are_at_their_path_for_the_worker_alone(both, run, options):
    place = run / "credentials/app.service"
    place.mkdir(parents=True)
    (place / "token").write_text("a secret")
    (place / "key").write_text("another")
    (place / "link").symlink_to("/etc/shadow")
    (place / "directory").mkdir()
    for name in ("token", "key"):
        (place / name).chmod(0o400)
    place.chmod(0o500)
    both.write("app.py", SHOW)
    status, out, err = started(both, (), "app.py", env={"CREDENTIALS_DIRECTORY": str(place)}, options=options)
    assert (status, err) == (0, "")
    files, refusals, own, mode = json.loads(out)
    assert files == {"key": ["another", "0o100400"], "token": ["a secret", "0o100400"]}
    assert refusals == ["Read-only file system"] * 3
    assert (own, mode) == (True, "0o40500")
    assert not (place / "new").exists()


def test_credentials_pass_through_no_memory_of_ours(both, run, pocketd):
    secret = os.urandom(16).hex()
    place = run / "credentials"
    place.mkdir()
    (place / "token").write_text(secret)
    code = "import os; print(open(os.environ['CREDENTIALS_DIRECTORY'] + '/token').read())"
    assert started(both, (), "-c", code, env={"CREDENTIALS_DIRECTORY": str(place)}) == (0, secret + "\n", "")
    pids = [t["pid"] for t in pocketd.ps()["templates"]] + [s["pid"] for s in pocketd.ps()["services"] if s["pid"]]
    for pid in [*pids, pocketd.process.pid]:
        assert not holds(pid, secret.encode()), pid
    assert holds(os.getpid(), secret.encode())


def test_more_credentials_than_systemd_allows_are_refused(both, run):
    place = run / "credentials"
    place.mkdir()
    (place / "whole").write_bytes(b"x" * (1 << 20))
    code = "import os; print(os.path.getsize(os.environ['CREDENTIALS_DIRECTORY'] + '/whole'))"
    assert started(both, (), "-c", code, env={"CREDENTIALS_DIRECTORY": str(place)}) == (0, f"{1 << 20}\n", "")
    (place / "more").write_bytes(b"x")
    status, _, err = started(both, (), "-c", code, env={"CREDENTIALS_DIRECTORY": str(place)})
    assert status == 125 and "holds more than" in err


# -- sockets


LISTEN = """
    import os, socket
    assert os.environ["LISTEN_PID"] == str(os.getpid()), os.environ["LISTEN_PID"]
    assert "LISTEN_PIDFDID" not in os.environ
    print(os.environ["LISTEN_FDS"], os.environ["LISTEN_FDNAMES"], sorted(map(int, os.listdir("/proc/self/fd")))[:-1])
    for n in range(int(os.environ["LISTEN_FDS"])):
        listening = socket.socket(fileno=3 + n)
        peer, _ = listening.accept()
        peer.sendall(b"from %d" % (3 + n))
        peer.close()
"""

# Executes what follows with descriptors 3 and up as sd_listen_fds(3) has them.
ACTIVATE = """
import fcntl, os, sys
count = int(sys.argv[1])
high = [fcntl.fcntl(int(n), fcntl.F_DUPFD, 100) for n in sys.argv[2 : 2 + count]]  # out of the way
for place, fd in enumerate(high, 3):
    os.dup2(fd, place)
os.closerange(3 + count, 1 << 10)
env = {**os.environ, "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), "LISTEN_PIDFDID": "1"}
env["LISTEN_FDNAMES"] = ":".join(f"name{n}" for n in range(count))
os.execve(sys.argv[2 + count], sys.argv[2 + count:], {**env, **({"LISTEN_PID": "1"} if "OTHER" in env else {})})
"""


def activated(both, sockets, *words, options=(), env=None):
    numbers = [str(s.fileno()) for s in sockets]
    prefix = [sys.executable, "-I", "-c", ACTIVATE, str(len(sockets)), *numbers]
    return subprocess.Popen(
        [*prefix, *both.pocket_command(*words, options=options)],
        env=both.environment(env), cwd=both.place, pass_fds=[s.fileno() for s in sockets],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture
def sockets():
    """One TCP and one unix socket that listen in the host's network."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0pocketd-test-{os.getpid()}")
        unix.listen()
        yield [tcp, unix]


def said(listening):
    with socket.socket(listening.family) as s:
        s.settimeout(TIMEOUT)
        s.connect(listening.getsockname())
        return s.makefile().read()


def check_activated(both, sockets, *words, options=()):
    process = activated(both, sockets, *words, options=options)
    assert [said(s) for s in sockets] == ["from 3", "from 4"]
    out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out, err) == (0, b"2 name0:name1 [0, 1, 2, 3, 4]\n", b"")


@pytest.mark.parametrize("options", [(), ("--cold",)], ids=["forked", "cold"])
def test_a_program_serves_sockets_that_were_opened_for_it(both, sockets, options):
    """Without a network of its own: a socket belongs to where it was made."""
    both.write("app.py", LISTEN)
    check_activated(both, sockets, "app.py", options=options)


def test_a_program_with_tensorflow_serves_them_too(tensorflow, sockets):
    tensorflow.write("app.py", LISTEN)
    check_activated(tensorflow, sockets, "app.py")


def test_an_executed_program_serves_them_too(programs, sockets):
    programs.write("app.py", LISTEN)
    check_activated(programs, sockets, "python3", "app.py")


def test_the_most_sockets_that_can_be_passed(both):
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1] == list(range(31)))"
    pairs = [socket.socketpair() for _ in range(15)]
    every = [s for pair in pairs for s in pair]
    try:
        process = activated(both, every[:28], "-c", code, env={"LONG": "x" * 40000})  # a start message in a memfd
        assert process.communicate(timeout=TIMEOUT) == (b"True\n", b"")
        process = activated(both, every[:29], "-c", code)
        assert b"at most 28" in process.communicate(timeout=TIMEOUT)[1]
    finally:
        for s in every:
            s.close()


def test_a_connection_that_was_passed_is_closed_when_the_program_closes_it(both):
    """The command keeps none of them."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = activated(both, [theirs], "-c", "import os, signal; os.close(3); signal.pause()")
        ours.settimeout(TIMEOUT)
        assert ours.recv(1) == b""
        process.kill()
        process.communicate(timeout=TIMEOUT)


def test_sockets_of_another_process_are_not_passed(both, sockets):
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd')))[:-1], os.environ['LISTEN_PID'])"
    process = activated(both, sockets, "-c", code, env={"OTHER": "1"})
    assert process.communicate(timeout=TIMEOUT) == (b"[0, 1, 2] 1\n", b"")


def test_listen_fds_that_are_not_there_are_said(both):
    status, _, err = started(both, as_own("LISTEN_PID=$$ LISTEN_FDS=7"), "-c", "")
    assert status == 125 and "LISTEN_FDS" in err
