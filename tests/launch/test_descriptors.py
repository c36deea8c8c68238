"""Descriptors that make whoever closes or looks at them wait, sent by somebody who may connect: nobody else waits."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsutil import messages
from pocketd import apart, control, wire
from pocketd.client.handshake import Login, open_login
from tests.conftest import ROOT, TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch import fuse
from tests.launch.test_faults import children
from tests.launch.test_wire_limits import NOBODY, START, ask, connect, control_of, program

PROMPT = 5.0  # seconds: a request is answered in some milliseconds, and apart.ANSWER is 10


@pytest.fixture
def daemon(own_pocketd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pocketd]:
    (tmp_path / "app").mkdir()
    found: Pocketd = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.open]
        service = "plain"
        dir = "{tmp_path / "app"}"
        program = "app.py"
        may_run = ["nobody"]
    """)
    (found.runtime_dir / "pocketd.sock").chmod(0o666)
    monkeypatch.chdir(found.runtime_dir)
    found.pocket("plain", "on")
    yield found


Make = Callable[[], int]
"""A new descriptor that makes others wait. Those of FUSE stay open here: the test could not close them either."""


@contextlib.contextmanager
def file(silent: fuse.Silent) -> Iterator[Make]:
    """A file whose close waits for the answer to a FLUSH."""
    fd = os.open(silent.place / "file", os.O_RDWR | os.O_CLOEXEC)
    silent.silence()
    yield lambda: fd
    silent.end()
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def directory(silent: fuse.Silent) -> Iterator[Make]:
    """Opened as a pocket's directory is: close does not wait, but fstat does."""
    fd = os.open(silent.place, os.O_PATH | os.O_CLOEXEC)
    silent.silence()
    yield lambda: fd
    os.close(fd)


@contextlib.contextmanager
def lingering(silent: fuse.Silent) -> Iterator[Make]:
    """A TCP socket whose last close waits until its peer, which does not, has read all."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def make() -> int:
            client = socket.create_connection(server.getsockname())
            stack.enter_context(server.accept()[0])
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    client.send(b"x" * 65536)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 1000))
            client.setblocking(True)
            return client.detach()

        yield make


@contextlib.contextmanager
def laden(silent: fuse.Silent) -> Iterator[Make]:
    """A unix socket like any other, with such a TCP socket in its queue."""
    with lingering(silent) as make_one:

        def make() -> int:
            ours, theirs = messages.pair()
            with ours:
                fd = make_one()
                messages.send(ours, b"", [fd])
                os.close(fd)
            return theirs.detach()

        yield make


KINDS = [file, directory, lingering, laden]


@pytest.fixture(params=KINDS, ids=[kind.__name__ for kind in KINDS])
def make(request: pytest.FixtureRequest, silent: fuse.Silent) -> Iterator[Make]:
    with request.param(silent) as made:
        yield made


def gone(s: socket.socket, fd: int) -> None:
    """The caller goes, and so does its descriptor: pocketd is the last that has it."""
    s.close()
    if not os.readlink(f"/proc/self/fd/{fd}").startswith("/"):
        closing = threading.Thread(target=os.close, args=[fd], daemon=True)  # waits where nobody else had it any more
        closing.start()
        closing.join(0.05)


def prompt(*others: int) -> None:
    """Others are served at once, again and again."""
    for uid in others or (0, NOBODY, 0):
        began = time.monotonic()
        with connect(uid) as s:
            s.settimeout(PROMPT)
            assert "services" in ask(s, "ps")
        assert time.monotonic() - began < PROMPT


def held(daemon: Pocketd) -> int:
    """How many descriptors pocketd has."""
    return len(os.listdir(f"/proc/{daemon.process.pid}/fd"))


def send(s: socket.socket, fds: list[int], **fields: Any) -> None:
    wire.send(s, {"id": 1, **fields}, fds)


def start_by(daemon: Pocketd, uid: int, name: str) -> Login:
    """A program that runs until its hold socket is closed."""
    with control_of(daemon, uid) as c, open("/dev/null") as null:
        directory = "/var/lib/dpkg" if name == "plain" else None
        fds = [null.fileno(), 2, 2]
        return open_login(c, mode="program", name=name, directory=directory, start=START, fds=fds)


SENT: list[Callable[[socket.socket, int], Any]] = [
    lambda s, fd: send(s, [fd], op="ps"),
    lambda s, fd: send(s, [fd], op="login", session="a" * 32, mode="client", roles=[]),
    lambda s, fd: messages.send(s, b"?", [fd]),
    lambda s, fd: socket.send_fds(s, [b""], [fd]),
    lambda s, fd: socket.send_fds(s, [b"\0"], [fd] * 253),
    lambda s, fd: socket.send_fds(s, [b"\0" * 100_000], [fd]),
    lambda s, fd: send(s, [fd] * 31, op="ps"),
    lambda s, fd: [s.send(b""), socket.send_fds(s, [b"\0"], [fd])],
]


def test_nobody_waits_for_a_descriptor_that_was_sent(daemon: Pocketd, silent: fuse.Silent, make: Make) -> None:
    before = held(daemon)
    for how in SENT:
        fd, s = make(), connect(NOBODY)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it ended the connection by what came before
            how(s, fd)
        prompt()
        gone(s, fd)
        prompt()
    silent.end()
    assert wait_for(lambda: held(daemon) <= before, 30)


def test_nor_for_one_in_a_connection_that_is_refused(daemon: Pocketd, make: Make) -> None:
    """What nobody has read goes with the socket."""
    assert daemon.process
    with contextlib.ExitStack() as stack:
        for _ in range(control.SHARE):
            stack.enter_context(connect(NOBODY))
        prompt(0)
        daemon.process.send_signal(signal.SIGSTOP)
        fd, s = make(), connect(NOBODY)
        s.send(b"")  # which looks like the end
        send(s, [fd], op="ps")
        gone(s, fd)
        daemon.process.send_signal(signal.SIGCONT)
        prompt(0)
        time.sleep(2 * apart.AGAIN)
        prompt(0)


def in_a_process(name: str) -> str:
    """What a function of letting_go says in a process of its own: pocketd's children are forks of a process without
    other threads, and pytest's has some."""
    command = [sys.executable, "-c", f"from tests.launch import letting_go; print(letting_go.{name}())"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_connections_that_are_let_go_together_cost_one_child() -> None:
    """A child is a fork of pocketd, which takes its time from everybody."""
    assert in_a_process("most_children") == "1\n"


def test_no_more_are_accepted_than_can_be_let_go() -> None:
    """Where every child that could close them waits for somebody, connections wait before pocketd, not in it."""
    assert in_a_process("accepted") == "20\n"


ROLES = ["session", "hold", "dir", "notify", "credentials", "mount"]


@pytest.mark.parametrize("name", ["plain", "open"])
def test_nor_for_one_in_a_logins_place(
    daemon: Pocketd, silent: fuse.Silent, make: Make, tmp_path: Path, name: str
) -> None:
    for usual in ("plain", "open"):  # what pocketd keeps of any launch (id maps), it has then
        start_by(daemon, 0, usual)[1].close()
    assert daemon.settled()
    before = held(daemon)
    for n, role in enumerate(ROLES):
        ours = [messages.pair() for _ in range(2)]
        place = os.open("/var/lib/dpkg", os.O_PATH)
        wire.send(ours[0][0], {"op": "start", "mode": "program", **START}, [2, 2, 2])
        right = {"session": ours[0][1].fileno(), "hold": ours[1][1].fileno(), "dir": place}
        fd, s = make(), connect(NOBODY)
        roles = [*(r for r in right if r != role), role]
        mount = {"target": b"/srv/other", "writable": False}
        words = {"notify": b"/run/notify", "credentials": b"/run/credentials", "mounts": [mount], "path": "/srv/app"}
        login = {"name": name, "session": f"{n:032x}", "mode": "program", "roles": roles}
        send(s, [*(right[r] for r in roles[:-1]), fd], op="login", **login, **words)
        prompt()
        for pair in ours:
            pair[0].close()
            pair[1].close()
        os.close(place)
        gone(s, fd)
        prompt()
    with program(daemon, tmp_path):
        prompt()
    silent.end()
    assert wait_for(lambda: held(daemon) <= before, 30)
    assert daemon.settled()


def test_no_template_is_the_last_that_closes_one(daemon: Pocketd, silent: fuse.Silent, tmp_path: Path) -> None:
    """The caller goes while the template has not even begun to fork for it."""
    [template], [service] = daemon.ps()["templates"], daemon.ps()["services"]
    before = children(service["pid"])
    with laden(silent) as make:
        session, s = make(), connect(NOBODY)
        ours, theirs = messages.pair()
        os.kill(template["pid"], signal.SIGSTOP)
        try:
            login = {"name": "open", "session": "a" * 32, "mode": "program", "roles": ["session", "hold"]}
            send(s, [session, theirs.fileno()], op="login", **login)
            assert wait_for(lambda: daemon.leaves())
            ours.close()
            theirs.close()
            gone(s, session)
            pauses = before - {template["pid"]}
            assert wait_for(lambda: not children(service["pid"]) & pauses)
            prompt()
        finally:
            os.kill(template["pid"], signal.SIGCONT)
        with program(daemon, tmp_path):
            prompt()
    assert [t["pid"] for t in daemon.ps()["templates"]] == [template["pid"]]
    assert daemon.settled()


def test_nor_for_one_on_a_hold_socket(daemon: Pocketd, silent: fuse.Silent, make: Make, tmp_path: Path) -> None:
    """Init's loop is every session's of its service: another's launch and signal go on."""
    for closes_first in (False, True):
        login = start_by(daemon, NOBODY, "plain")
        fd = make()
        if closes_first:
            os.kill(login.reply["pid"], signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the session ends by the first
            for _ in range(2):
                send(login.hold, [fd], op="signal", signal=signal.SIGTERM)
        gone(login.hold, fd)
        login.session.close()
        began = time.monotonic()
        with program(daemon, tmp_path) as other:
            wire.send(other.hold, {"op": "signal", "signal": 15})
            assert wire.receive(other.hold)[0] == {"v": 1, "op": "exit", "status": 15}
        assert time.monotonic() - began < PROMPT
    assert daemon.settled()
