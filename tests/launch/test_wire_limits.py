"""Peers that send too much, too often, half of it or nothing; and what errors tell those who may not know."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgpack
import pytest

from nsutil import memory, messages
from nsutil.syscalls import SYS_SETRESUID, syscall
from pocketd import control, wire
from pocketd.client.handshake import Login, open_login
from pocketd.daemon import Daemon
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch.both import Both

NOBODY, OTHERS = 65534, (60001, 60002, 60003)
START = {
    "kind": "code",
    "program": b"import time; print(1, flush=True); time.sleep(1000)",
    "arguments": [],
    "stdio": [0, 1, 2],
}


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("apps")
    for name in ("open", "shut"):
        (place / name).mkdir()
        (place / name / "app.py").write_text("print(1)")
    return place


@pytest.fixture
def daemon(own_pocketd: Any, apps: Path, monkeypatch: pytest.MonkeyPatch) -> Pocketd:
    """A pocketd whose socket is open for all, and the tests' directory beside it: names above are root's alone."""
    found: Pocketd = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.open]
        service = "plain"
        dir = "{apps / "open"}"
        program = "app.py"
        may_run = ["nobody"]

        [pocket.shut]
        service = "plain"
        dir = "{apps / "shut"}"
        program = "app.py"

        [pocket.broken]
        service = "plain"
        dir = "{apps / "shut"}"
        program = 7
    """)
    (found.runtime_dir / "pocketd.sock").chmod(0o666)
    monkeypatch.chdir(found.runtime_dir)
    return found


def connect(uid: int = 0) -> socket.socket:
    """A connection as `uid`, which is what the kernel takes down when connect(2) is called (unix(7), SO_PEERCRED). This
    thread's alone: by the C library it would be that of one that serves here, too."""
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    keep = ctypes.c_uint(-1)
    syscall(SYS_SETRESUID, keep, uid, keep, call="setresuid")
    try:
        s.connect("pocketd.sock")
    finally:
        syscall(SYS_SETRESUID, keep, 0, keep, call="setresuid")
    s.settimeout(TIMEOUT)  # not before: a full queue would be an error then (unix(7))
    return s


def ask(s: socket.socket, op: str, fds: tuple[int, ...] = (), **fields: Any) -> wire.Message:
    with contextlib.suppress(BrokenPipeError):  # refused, and told so
        wire.send(s, {"op": op, "id": 1, **fields}, fds)
    while True:
        message, received = wire.receive(s)
        received.close()
        if "progress" not in message:
            return message


def served() -> bool:
    with connect() as s:
        return "services" in ask(s, "ps")


def peak(pid: int) -> int:
    """VmHWM in bytes: the most memory that a process has had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def bomb(size: int = messages.MAX_BODY) -> bytes:
    """A message that unpacks to sixty times its size: an array of empty maps."""
    count = size - 32
    head = {"v": 1, "op": "signal", "id": 1, "signal": []}
    return msgpack.packb(head)[:-1] + b"\xdd" + count.to_bytes(4, "big") + b"\x80" * count


@contextlib.contextmanager
def program(daemon: Pocketd, place: Path, text: bytes = b"") -> Iterator[Login]:
    """A program that runs, and its hold socket in the test's hands. `text`: another that prints 1."""
    start = {**START, "program": text} if text else START
    read, write = os.pipe()
    with open("/dev/null") as null, control_of(daemon) as c:
        stdio = [null.fileno(), write, 2]
        login = open_login(c, mode="program", name="plain", directory=str(place), start=start, fds=stdio)
    os.close(write)
    with login.session, login.hold, open(read, "rb", 0) as output:
        assert output.read(2) == b"1\n"
        yield login


def control_of(daemon: Pocketd, uid: int = 0) -> Any:
    from pocketd.client.control import Control

    os.seteuid(uid)
    try:
        return Control("." if uid else str(daemon.runtime_dir), TIMEOUT)
    finally:
        os.seteuid(0)


# -- size, depth, items


@pytest.mark.parametrize(
    "body",
    [
        bomb(),
        bomb(wire.REQUEST.body),
        msgpack.packb({"v": 1, "op": "ps", "id": 1, "pad": "x" * wire.REQUEST.body}),
        msgpack.packb({"v": 1, "op": "ps", "id": 1, "pad": list(range(wire.REQUEST.items))}),
        msgpack.packb({"v": 1, "op": "ps", "id": 1, "pad": [[i] for i in range(wire.REQUEST.items // 2)]}),
        msgpack.packb({"v": 1, "op": "ps", "id": 1})[:-1] + b"\x91" * wire.REQUEST.depth + b"\1",
        msgpack.packb({"v": 1, "op": "ps", "id": 1})[:-1] + b"\x91" * 20_000 + b"\1",
    ],
    ids=["a bomb", "a small bomb", "a long text", "many items", "many lists", "nested", "nested much"],
)
def test_a_request_that_is_too_much_ends_its_connection_and_costs_nothing(daemon: Pocketd, body: bytes) -> None:
    assert daemon.process and served()
    with connect(NOBODY) as s:
        before = peak(daemon.process.pid)
        messages.send(s, body)
        assert s.recv(1000) == b""
    assert peak(daemon.process.pid) - before < 32 << 20
    assert served()


def test_a_request_at_the_limits_is_heard(daemon: Pocketd) -> None:
    nested: Any = 1
    for _ in range(wire.REQUEST.depth - 1):
        nested = [nested]
    with connect(NOBODY) as s:
        assert "services" in ask(s, "ps", pad=nested)
        assert "services" in ask(s, "ps", pad=list(range(wire.REQUEST.items - 10)))
        assert "services" in ask(s, "ps", pad=b"x" * (wire.REQUEST.body - 100))


def test_a_signal_that_is_too_much_ends_its_own_session(daemon: Pocketd, tmp_path: Path) -> None:
    """One init serves many pockets: what one of them sends it must not grow it."""
    with program(daemon, tmp_path) as mine, program(daemon, tmp_path) as other:
        init = daemon.ps()["services"][0]["pid"]
        before = peak(init)
        messages.send(mine.hold, bomb())
        with contextlib.suppress(ConnectionResetError):  # unread: it is in a memfd, and init takes no descriptor
            assert mine.hold.recv(1000) == b""
        assert peak(init) - before < 32 << 20
        wire.send(other.hold, {"op": "signal", "signal": 15})
        assert wire.receive(other.hold)[0] == {"v": 1, "op": "exit", "status": 15}
    assert daemon.settled()


# -- descriptors


def test_a_hold_socket_of_another_kind_is_refused_and_not_kept(daemon: Pocketd, tmp_path: Path) -> None:
    """One with an error queue is readable for ever, and nothing can be read from it: init would only turn."""
    with program(daemon, tmp_path):
        init = daemon.ps()["services"][0]["pid"]
        before = descriptors(init)
        others = [
            os.memfd_create("none"),
            os.open(tmp_path, os.O_PATH),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(),
        ]
        ours, theirs = messages.pair()
        directory = os.open(tmp_path, os.O_PATH)
        with ours, theirs, connect() as s:
            for n, fd in enumerate(others):
                given = (theirs.fileno(), fd, directory)
                login = {"session": f"{n:032x}", "mode": "program", "name": "plain", "path": str(tmp_path)}
                reply = ask(s, "login", given, roles=["session", "hold", "dir"], **login)
                assert reply["error"]["code"] == "bad-request" and "hold socket" in reply["error"]["message"], reply
        for fd in (*others, directory):
            os.close(fd)
        assert wait_for(lambda: len(daemon.leaves()) == 1, 10)
        assert descriptors(init) == before
    assert daemon.settled()


def test_a_session_of_anothers_cannot_be_asked_for_again(daemon: Pocketd, tmp_path: Path) -> None:
    """A login is repeated by who made it, when pocketd died; the ids of sessions can be read in cgroupfs by all."""
    with program(daemon, tmp_path):
        (worker,) = daemon.workers()
        ours, theirs = messages.pair()
        with ours, theirs:
            login = {"session": worker["session"], "mode": "program", "name": "plain", "roles": ["session", "hold"]}
            for uid, known in ((NOBODY, False), (0, True)):
                with connect(uid) as s:
                    reply = ask(s, "login", (theirs.fileno(), theirs.fileno()), **login)
                assert (reply.get("pid") == worker["pid"]) == known, reply
                assert known or reply["error"]["message"] == "that session is not yours"


def test_a_request_that_lasts_keeps_no_descriptors(daemon: Pocketd, tmp_path: Path) -> None:
    assert daemon.process
    with program(daemon, tmp_path) as mine, connect() as s:
        wire.send(mine.hold, {"op": "signal", "signal": 19, "group": True})  # stopped: it does not hear its SIGTERM
        assert wire.receive(mine.hold)[0]["op"] == "stopped"
        before = descriptors(daemon.process.pid)
        with open("/dev/null") as null:
            wire.send(s, {"op": "stop", "id": 1, "name": mine.id, "timeout": 1}, [null.fileno()] * 30)
        assert served()  # so that one was read before
        assert wait_for(lambda: descriptors(daemon.process.pid) <= before + 2, 30)
        assert wire.receive(s)[0]["stopped"] == 1


# -- connections


def test_no_uid_takes_anothers_connections(daemon: Pocketd) -> None:
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(connect(NOBODY)) for _ in range(control.SHARE)]
        assert "services" in ask(mine[-1], "ps")
        for _ in range(500):
            with connect(NOBODY) as s:
                reply = ask(s, "ps")
                assert reply["id"] is None and reply["error"]["code"] == "full"
                assert f"you have {control.SHARE} connections" in reply["error"]["message"]
        other = stack.enter_context(connect(OTHERS[0]))
        assert "services" in ask(other, "ps")
        mine.pop().close()
        assert wait_for(lambda: "services" in ask(stack.enter_context(connect(NOBODY)), "ps"), 10)


def test_who_connects_too_often_is_refused_and_nobody_else_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection ends at once, so that there are never many: what takes pocketd's time is that they come."""
    monkeypatch.setattr(control, "RATE", 1.0)
    monkeypatch.setattr(control, "BURST", 10)
    monkeypatch.chdir(tmp_path)

    def said(uid: int) -> str | None:
        with connect(uid) as s:
            s.settimeout(0.2)
            try:
                return str(wire.receive(s)[0]["error"]["message"])
            except TimeoutError:
                return None

    def all_said() -> list[str | None]:
        for _ in range(30):
            connect(NOBODY).close()
        return [said(uid) for uid in (NOBODY, OTHERS[0], 0)]

    async def listen() -> list[str | None]:
        listening = control.Control(cast(Daemon, None), str(tmp_path / "pocketd.sock"), None)
        os.chmod("pocketd.sock", 0o666)
        try:
            return await asyncio.to_thread(all_said)
        finally:
            listening.close()

    tmp_path.chmod(0o755)
    nobody, other, root = asyncio.run(listen())
    assert nobody and "behind" in nobody
    assert other is root is None


def test_root_gets_in_when_all_others_are_there(daemon: Pocketd) -> None:
    with contextlib.ExitStack() as stack:
        for uid in (NOBODY, *OTHERS):
            for _ in range(control.SHARE):
                s = stack.enter_context(connect(uid))
        reply = ask(s, "ps")
        assert reply["error"]["code"] == "full" and "pocketd has" in reply["error"]["message"]
        assert served()


def test_a_peer_that_says_nothing_is_told_why_its_connection_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The socket as pocketd has it, with less patience; one that says half of a message has said nothing."""
    monkeypatch.setattr(control, "SILENCE", 0.2)
    path = str(tmp_path / "pocketd.sock")

    async def silent() -> tuple[wire.Message, bytes]:
        listening = control.Control(cast(Daemon, None), path, None)
        s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        s.settimeout(TIMEOUT)
        s.connect(path)
        with s:
            said = (await asyncio.to_thread(wire.receive, s))[0]
            last = await asyncio.to_thread(s.recv, 1000)
        assert not listening.connections
        listening.close()
        return said, last

    said, last = asyncio.run(silent())
    assert said["id"] is None and said["error"]["code"] == "idle" and last == b""


def test_a_peer_whose_request_is_answered_late_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SILENCE", 0.2)

    async def slow(*_: Any) -> wire.Message:
        await asyncio.sleep(1.0)
        return {}

    monkeypatch.setitem(control.OPERATIONS, "ps", slow)
    path = str(tmp_path / "pocketd.sock")

    async def waits() -> wire.Message:
        listening = control.Control(cast(Daemon, None), path, None)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(TIMEOUT)
            s.connect(path)
            reply = await asyncio.to_thread(ask, s, "ps")
        listening.close()
        return reply

    assert asyncio.run(waits())["ok"] is True


# -- rate


def test_requests_beyond_the_rate_wait_and_nobody_else_does(daemon: Pocketd) -> None:
    count = control.BURST + 100
    with connect(NOBODY) as s:
        began = time.monotonic()
        sent = answered = 0
        late: list[float] = []
        while answered < count:
            if sent < count:
                with contextlib.suppress(BlockingIOError):
                    wire.send(s, {"op": "describe", "id": sent, "name": "plain"}, flags=socket.MSG_DONTWAIT)
                    sent += 1
            while select.select([s], [], [], 0 if sent < count else TIMEOUT)[0]:
                reply, _ = wire.receive(s)
                assert reply["id"] == answered and reply["ok"]
                answered += 1
                if answered == count:
                    break
                if answered % 50 == 0:
                    at = time.monotonic()
                    assert served()
                    late.append(time.monotonic() - at)
        assert time.monotonic() - began > 0.9 * 100 / control.RATE
        assert max(late) < 5


def test_another_connection_does_not_get_round_the_rate(daemon: Pocketd) -> None:
    began = time.monotonic()
    for _ in range(control.BURST + 100):
        with connect(NOBODY) as s:
            assert ask(s, "describe", name="plain")["ok"]
    assert time.monotonic() - began > 0.9 * 100 / control.RATE


def test_a_peer_that_does_not_read_is_dropped_and_nobody_waits_for_it(daemon: Pocketd) -> None:
    assert daemon.process and served()
    before = peak(daemon.process.pid)
    with connect() as s:
        s.setblocking(False)
        poll = select.poll()
        poll.register(s, select.POLLOUT)
        dropped = False
        until = time.monotonic() + TIMEOUT
        while not dropped and time.monotonic() < until:
            try:
                wire.send(s, {"op": "ps", "id": 1})
            except BlockingIOError:
                assert served()
                poll.poll(500)
            except OSError as e:
                assert e.errno in (errno.EPIPE, errno.ECONNRESET)
                dropped = True
        assert dropped
    assert served()
    assert peak(daemon.process.pid) - before < 32 << 20


def test_a_flood_of_signals_is_its_own_sessions_matter(daemon: Pocketd, tmp_path: Path) -> None:
    both = Both(daemon, tmp_path)
    with program(daemon, tmp_path) as mine:
        enough = threading.Event()

        def flood() -> None:
            while not enough.is_set():
                wire.send(mine.hold, {"op": "signal", "signal": 18})

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            assert both.pocket("-c", "print(1)").out == b"1\n"
        finally:
            enough.set()
            flooding.join()
        wire.send(mine.hold, {"op": "signal", "signal": 9})
        assert wire.receive(mine.hold)[0]["op"] == "exit"


# -- what errors say


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("describe", {}),
    ("inspect", {}),
    ("privileges", {}),
    ("logs", {}),
    ("stop", {}),
    ("login", {"session": "a" * 32, "mode": "client", "roles": []}),
]


@pytest.mark.parametrize(("op", "fields"), REQUESTS, ids=[op for op, _ in REQUESTS])
def test_nobody_finds_out_by_asking_which_pockets_there_are(
    daemon: Pocketd, tmp_path: Path, op: str, fields: dict[str, Any]
) -> None:
    with program(daemon, tmp_path) as mine, connect(NOBODY) as s:
        running = mine.reply["pocket"]
        said = {name: ask(s, op, name=name, **fields)["error"] for name in ("shut", "broken", mine.id, running, "none")}
        words = {(e["code"], e["message"].replace(name, "NAME"), str(e["detail"])) for name, e in said.items()}
        assert len(words) == 1, said
        assert ask(s, op, name="open", **fields).get("error", {}).get("code") != words.pop()[0]


def test_ps_lists_what_its_caller_may_know(daemon: Pocketd, tmp_path: Path) -> None:
    with program(daemon, tmp_path) as mine, connect(NOBODY) as s:
        shown = ask(s, "ps")
        assert [p["name"] for p in shown["pockets"]] == ["open"] and shown["workers"] == []
        assert mine.id not in str(shown) and "shut" not in str(shown)


def test_an_error_of_the_kernels_names_no_path_to_others(daemon: Pocketd, apps: Path) -> None:
    (apps / "open").rename(apps / "away")
    try:
        sockets = [*messages.pair(), *messages.pair()]
        login = {"session": "b" * 32, "mode": "program", "name": "open", "roles": ["session", "hold"]}
        with connect(NOBODY) as s:
            reply = ask(s, "login", (sockets[1].fileno(), sockets[3].fileno()), **login)
        for each in sockets:
            each.close()
    finally:
        (apps / "away").rename(apps / "open")
    assert reply["error"]["code"] == "kernel" and str(apps) not in reply["error"]["message"], reply
    assert str(apps) in daemon.log.read_text()


def test_roles_that_are_no_words_are_refused(daemon: Pocketd) -> None:
    fds = tuple(os.memfd_create("x", memory.F_SEAL_SEAL) for _ in range(2))
    login = {"session": "c" * 32, "mode": "program", "name": "plain", "roles": [{}, {}]}
    with connect(0) as s:
        error = ask(s, "login", fds, **login)["error"]
    assert error["code"] == "bad-request" and "are words" in error["message"], error
    for fd in fds:
        os.close(fd)
