"""How much one user may have at once, with its subordinate uids; and that a session has its identity alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from nsutil import messages
from pocketd import control, subordinates, wire
from pocketd.client.handshake import Login, open_login
from pocketd.daemon import Daemon
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch.test_wire_limits import NOBODY, OTHERS, START, ask, connect, control_of

SUBORDINATE = 700_000  # the first of a hundred


@pytest.fixture
def started(own_pocketd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Pocketd]:
    """`started(keys)`: a pocketd with these keys of [admission], whose socket and pocket are open for the tests' uids,
    which keep root's group."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "app.py").write_text("")

    def start(keys: str) -> Pocketd:
        daemon: Pocketd = own_pocketd(f"""
            [admission]
            {keys}

            [service.plain]
            runtime = "python"
            env = {toml_table(service_environment())}

            [pocket.open]
            service = "plain"
            dir = "{app}"
            program = "app.py"
            may_run = ["@root"]
        """)
        (daemon.runtime_dir / "pocketd.sock").chmod(0o666)
        monkeypatch.chdir(daemon.runtime_dir)
        daemon.pocket("plain", "on")
        return daemon

    return start


def enter(daemon: Pocketd, uid: int) -> Login:
    """A program that runs until its hold socket is closed."""
    with control_of(daemon, uid) as c, open("/dev/null") as null:
        return open_login(c, mode="program", name="open", directory=None, start=START, fds=[null.fileno(), 2, 2])


def refusal(daemon: Pocketd, uid: int) -> str | None:
    """Why the uid gets no session, if it gets none."""
    try:
        close(enter(daemon, uid))
    except wire.Error as e:
        return f"{e.code}: {e.message}"
    return None


def close(login: Login) -> None:
    login.hold.close()
    login.session.close()


def test_a_user_has_so_many_sessions_and_root_as_many_as_it_likes(started) -> None:
    daemon = started("sessions = 2")
    first, second = (enter(daemon, NOBODY) for _ in range(2))
    others = [enter(daemon, uid) for uid in (0, 0, 0, OTHERS[0])]
    assert (refusal(daemon, NOBODY) or "").startswith("too-many: you have 2 sessions")
    daemon.end(signal.SIGKILL)
    daemon.start()
    (daemon.runtime_dir / "pocketd.sock").chmod(0o666)
    assert "too-many" in (refusal(daemon, NOBODY) or "")
    close(first)
    assert wait_for(lambda: refusal(daemon, NOBODY) is None)
    for login in (second, *others):
        close(login)
    assert daemon.settled()


def test_sessions_of_subordinate_uids_are_their_owners(started, tmp_path: Path, monkeypatch) -> None:
    """pocketd has a mount namespace of its own here, in which /etc/subuid is the test's."""
    if not os.path.exists(subordinates.FILE):
        pytest.skip(f"no {subordinates.FILE} to put another in the place of")
    ranges, python, bin = tmp_path / "subuid", tmp_path / "bin/python", Path(sys.executable).parent
    ranges.write_text(f"nobody:{SUBORDINATE}:100\n")
    python.parent.mkdir()
    mount = f'mount --bind {ranges} {subordinates.FILE} && exec {sys.executable} "$@"'
    python.write_text(f"#!/bin/sh\nexec unshare --mount sh -c '{mount}' sh \"$@\"\n")
    python.chmod(0o755)
    shutil.copy(bin / "pocket", python.parent)
    (python.parent / "pocket-py").symlink_to(bin / "pocket-py")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(python))
        daemon = started("sessions = 2")
    logins = [enter(daemon, SUBORDINATE), enter(daemon, SUBORDINATE + 99)]
    for uid in (NOBODY, SUBORDINATE + 7):
        assert "too-many" in (refusal(daemon, uid) or "")
    assert refusal(daemon, SUBORDINATE + 100) is None
    for login in logins:
        close(login)
    assert daemon.settled()


def test_a_second_login_of_an_identity_is_refused_while_the_first_waits(started) -> None:
    started('reserve = "1000T"\nwait = 3600')
    login = {"name": "open", "session": "a" * 32, "mode": "program", "roles": ["session", "hold"]}
    with contextlib.ExitStack() as stack:
        (session, _), (theirs, hold) = (map(stack.enter_context, messages.pair()) for _ in range(2))
        given = (session.fileno(), hold.fileno())
        one, two = (stack.enter_context(connect()) for _ in range(2))
        wire.send(one, {"op": "login", "id": 1, **login}, given)
        assert "waiting for memory" in wire.receive(one)[0]["progress"]
        assert ask(two, "login", given, **login)["error"]["message"] == "that session is being launched"
        hold.close()
        theirs.close()
        assert wire.receive(one)[0]["error"]["code"] == "gone"


# -- connections


def test_connections_of_subordinate_uids_are_their_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = tmp_path / "subuid"
    monkeypatch.setattr(subordinates, "FILE", str(ranges))
    monkeypatch.setattr(control, "SHARE", 3)
    monkeypatch.chdir(tmp_path)

    def full(uid: int) -> bool:
        with connect(uid) as s:
            s.settimeout(TIMEOUT)
            with contextlib.suppress(OSError):  # it may be closed already
                wire.send(s, {"op": "nothing", "id": 1})
            return bool(wire.receive(s)[0]["error"]["message"].startswith("you have 3 connections"))

    def all_said() -> list[bool]:
        with contextlib.ExitStack() as stack:
            for uid in (NOBODY, SUBORDINATE, SUBORDINATE + 99):
                stack.enter_context(connect(uid))
            said = [full(uid) for uid in (NOBODY, SUBORDINATE + 50, SUBORDINATE + 100)]
            ranges.write_text("")
            return [*said, full(SUBORDINATE + 50)]

    async def listen() -> list[bool]:
        listening = control.Control(cast(Daemon, None), str(tmp_path / "pocketd.sock"), None)
        os.chmod("pocketd.sock", 0o666)
        try:
            return await asyncio.to_thread(all_said)
        finally:
            listening.close()

    ranges.write_text(f"nobody:{SUBORDINATE}:100\n")
    tmp_path.chmod(0o755)
    assert asyncio.run(listen()) == [True, True, False, False]


@pytest.mark.parametrize(
    "text, uid, owner",
    [
        ("60001:700000:10", 700_009, 60001),
        ("60001:700000:10", 700_010, 700_010),
        ("60001:700000:10\n60002:600000:100000\n", 699_999, 60002),
        ("# nothing\nnobody\n:::\n60001:700000:10:\n60001:x:y\n60001:700000:10", 700_001, 60001),
        ("root:700000:10", 700_009, 700_000),  # root itself is counted nowhere
        ("no-such-user:700000:10", 700_009, 700_000),
        ("60001:0:1000", 0, 0),
        ("60001:0:1000", 1, 60001),
        ("", 700_000, 700_000),
        (None, 700_000, 700_000),
    ],
)
def test_a_uid_counts_as_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, uid: int, owner: int
) -> None:
    file = tmp_path / "subuid"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(subordinates, "FILE", str(file))
    assert subordinates.owner_of(uid) == owner
