"""A client that speaks the protocol wrongly, by a raw socket: a clear error each, and what can go on goes on."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest

from nsutil import memory, messages
from pocketd import tensors, wire
from pocketd.client.control import Control
from pocketd.client.handshake import Login, open_login

PAGE = 1 << 16


class Raw:
    """A logged-in client without any manners."""

    def __init__(self, login: Login):
        self.sock, self.hold = login.session, login.hold
        self.sock.settimeout(10)
        self.last = 0

    def send(self, message: dict[str, Any], *fds: int) -> None:
        messages.send(self.sock, msgpack.packb({"v": 1, **message}), fds)

    def receive(self) -> dict[str, Any]:
        while True:
            body, fds = messages.receive(self.sock)
            fds.close()
            message = msgpack.unpackb(body, strict_map_key=False)
            if message.get("op") != "arena":
                return message

    def ask(self, target: str, *args: Any, **more: Any) -> Any:
        """The error's code, or the value."""
        self.last += 1
        self.send({"op": "call", "id": self.last, "target": target, "args": args, "kwargs": {}, **more})
        reply = self.receive()
        assert reply["id"] == self.last, reply
        return (reply["error"]["code"], reply["error"]["message"]) if "error" in reply else reply["value"]

    def arena(self, number: int = 1, size: int = PAGE, seals: int = memory.ARENA_SEALS) -> None:
        fd = os.memfd_create("raw", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, memory.F_ADD_SEALS, seals)
        self.send({"op": "arena", "arena": number}, fd)
        os.close(fd)

    def end(self) -> tuple[dict[str, Any], int]:
        """The worker's last words and its exit code."""
        said = self.receive()
        with pytest.raises((EOFError, ConnectionResetError)):
            self.receive()
        self.hold.settimeout(10)
        message, _ = wire.receive(self.hold)
        return said, os.waitstatus_to_exitcode(message["status"])


@pytest.fixture
def raw(service: str, pocket: Path) -> Iterator[Raw]:
    with ExitStack() as stack:
        control = stack.enter_context(Control(service, 10))
        login = open_login(control, mode="client", name="python", directory=str(pocket), start={}, timeout=10)
        client = Raw(login)
        stack.callback(login.hold.close)
        stack.callback(login.session.close)
        assert client.receive()["op"] == "ready"
        yield client


def handle(*fields: Any) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(fields))


GOOD = (1, 64, "uint8", (16,), None)


def test_the_good_case_is_good(raw: Raw) -> None:
    raw.arena()
    assert raw.ask("detector:total", handle(*GOOD)) == 0.0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((1, PAGE, "uint8", (1,), None), "does not lie within"),
        ((1, PAGE - 64, "uint8", (65,), None), "does not lie within"),
        ((1, 0, "float64", (PAGE // 8 + 1,), None), "does not lie within"),
        ((1, 0, "uint8", (2**32, 2**32), None), "does not lie within"),
        ((1, 0, "uint8", (2**63, 2), None), "does not lie within"),
        ((1, 2**64 - 64, "uint8", (64,), None), "does not lie within"),
        ((1, PAGE + 64, "uint8", (0,), None), "does not lie within"),
        ((1, 0, "uint8", (16, 16), (2**40, 1)), "does not lie within"),
        ((1, 0, "uint8", (16,), (-1,)), "does not lie within"),
        ((1, 0, "float32", (4, 4), (2, 4)), "stride of 2"),
        ((1, 0, "uint8", (16,), (1, 1)), "as many as"),
        ((1, 4, "uint8", (16,), None), "not a multiple of 64"),
        ((1, -64, "uint8", (16,), None), "not a multiple of 64"),
        ((1, 0, "float31", (16,), None), "float31"),
        ((1, 0, 5, (16,), None), "dtype"),
        ((1, 0, "uint8", (-1,), None), "-1 is not the length"),
        ((1, 0, "uint8", (1.5,), None), "1.5 is not the length"),
        ((1, 0, "uint8", (True,), None), "True is not the length"),
        ((1, 0, "uint8", (1,) * 33, None), "33 dimensions"),
        ((3, 0, "uint8", (1,), None), "not one of this session"),
        ((2, 0, "uint8", (1,), None), "not one of this session"),
        (("1", 0, "uint8", (1,), None), "wrong type"),
        ((1, 0, "uint8"), "must be an array of"),
    ],
)
def test_a_handle_that_lies_is_refused_and_the_session_goes_on(raw: Raw, fields: tuple, said: str) -> None:
    raw.arena()
    code, message = raw.ask("detector:echo", handle(*fields))
    assert code == "bad-tensor" and said in message, message
    assert "0x" not in message
    assert raw.ask("detector:total", handle(*GOOD)) == 0.0


def test_a_handle_of_garbage_is_refused(raw: Raw) -> None:
    for data in (b"", b"\xc1", b"\x95\x01", msgpack.packb({"arena": 1}), b"\x91" * 2000):
        assert raw.ask("detector:echo", msgpack.ExtType(1, data))[0] == "bad-tensor"
    assert raw.ask("detector:add", 1, 2) == 3


@pytest.mark.parametrize("seals", [0, memory.F_SEAL_SHRINK, memory.ARENA_SEALS & ~memory.F_SEAL_SHRINK])
def test_an_arena_without_seals_is_never_mapped(raw: Raw, seals: int) -> None:
    raw.arena(seals=seals)
    code, message = raw.ask("detector:echo", handle(*GOOD))
    assert code == "bad-tensor" and "not sealed" in message
    raw.arena()  # the same number, sealed this time
    assert raw.ask("detector:total", handle(*GOOD)) == 0.0


def test_an_arena_that_is_no_memfd_is_refused(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * PAGE)
    for fd in (os.open(tmp_path / "file", os.O_RDWR), os.open("/dev/zero", os.O_RDWR), socket.socket().detach()):
        raw.send({"op": "arena", "arena": 1}, fd)
        os.close(fd)
        code, message = raw.ask("detector:echo", handle(*GOOD))
        assert code == "bad-tensor" and "arena is refused" in message, message
    assert raw.ask("detector:add", 1, 2) == 3


def test_an_arena_that_cannot_be_written_or_is_empty_is_refused(raw: Raw) -> None:
    raw.arena(seals=memory.MESSAGE_SEALS)
    assert raw.ask("detector:echo", handle(*GOOD))[0] == "bad-tensor"
    raw.arena(number=3, size=0)
    assert raw.ask("detector:echo", handle(3, 0, "uint8", (0,), None))[0] == "bad-tensor"
    assert raw.ask("detector:add", 1, 2) == 3


def test_the_worker_keeps_no_descriptor_of_what_it_refused(raw: Raw) -> None:
    raw.arena(seals=0)
    before = raw.ask("detector:status")[0]
    for _ in range(200):
        raw.arena(seals=0)
    assert raw.ask("detector:status")[0] <= before


@pytest.mark.parametrize(
    "message",
    [
        {"op": "dance"},
        {"op": "call"},
        {"op": "call", "target": 5, "args": [], "kwargs": {}},
        {"op": "call", "target": "detector:pid", "args": {}, "kwargs": {}},
        {"op": "call", "target": "detector:pid", "args": [], "kwargs": {1: 2}},
        {"op": "call", "target": "detector", "args": [], "kwargs": {}},
        {"op": "model", "model": 99, "args": [], "kwargs": {}},
        {"op": "model", "model": "counter", "args": [], "kwargs": {}},
        {"op": "model", "model": 0, "method": 7, "args": [], "kwargs": {}},
        {"op": "load", "path": 7},
        {"op": "load", "path": "../../etc/passwd"},
    ],
)
def test_a_request_of_the_wrong_form_is_an_error(raw: Raw, message: dict[str, Any]) -> None:
    raw.send({**message, "id": 1})
    assert raw.receive()["error"]["code"] in ("bad-request", "unknown-model")
    raw.last = 1
    assert raw.ask("detector:add", 1, 2) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"garbage",
        b"",
        msgpack.packb([1, 2]),
        msgpack.packb({"op": "call", "id": 1}),
        msgpack.packb({"v": 99, "op": "call", "id": 1}),
        msgpack.packb({"v": [], "op": "call", "id": 1}),
        msgpack.packb({"v": 1, "op": "call"}),
        msgpack.packb({"v": 1, "op": "call", "id": "1"}),
        msgpack.packb({"v": 1, "op": "call", "id": 1, "free": 5}),
        msgpack.packb({"v": 1, "op": "call", "id": 1, "free": [[2, 0]]}),
        msgpack.packb({"v": 1, "op": "call", "id": 1, "free": [[[], 0]]}),
        msgpack.packb({"v": 1, "op": "call", "id": 1, "drop": 5}),
        msgpack.packb({"v": 1, "op": "call", "id": 1, "args": [msgpack.ExtType(9, b"")]}),
        msgpack.packb({"v": 1, "op": "arena", "arena": 1}),
        b"\x91" * 5000,
        b"\xdd\xff\xff\xff\xff",
    ],
    ids=repr,
)
def test_garbage_ends_that_session_with_a_word(raw: Raw, body: bytes) -> None:
    messages.send(raw.sock, body)
    said, code = raw.end()
    assert said["op"] == "failed" and said["error"]["code"] == "protocol" and code == 76


def test_nested_tuples_do_not_overflow_the_workers_stack(raw: Raw) -> None:
    data = msgpack.packb([])
    for _ in range(3000):
        data = msgpack.packb([msgpack.ExtType(2, data)])
    raw.send({"op": "call", "id": 1, "target": "detector:echo", "args": [msgpack.ExtType(2, data)], "kwargs": {}})
    _, code = raw.end()
    assert code == 76


def test_a_datagram_without_our_framing_ends_the_session(raw: Raw) -> None:
    raw.sock.send(b"\2hello")
    assert raw.end()[1] == 76


def test_descriptors_that_do_not_belong_end_the_session(raw: Raw) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    raw.send({"op": "call", "id": 1, "target": "detector:pid", "args": [], "kwargs": {}}, null)
    os.close(null)
    assert raw.end()[1] == 76


def test_two_descriptors_for_one_arena_end_the_session(raw: Raw) -> None:
    fd = memory.create(PAGE, "raw")
    raw.send({"op": "arena", "arena": 1}, fd, fd)
    os.close(fd)
    assert raw.end()[1] == 76


@pytest.mark.parametrize("number", [0, 2, -1, "1"])
def test_an_arena_number_that_is_not_the_clients_ends_the_session(raw: Raw, number: Any) -> None:
    raw.arena(number)
    assert raw.end()[1] == 76


def test_too_many_arenas_end_the_session(raw: Raw) -> None:
    for n in range(1, 300, 2):
        try:
            raw.arena(n)
        except OSError:
            break
    assert raw.end()[1] == 76


def test_an_unsealed_message_body_ends_the_session(raw: Raw) -> None:
    fd = os.memfd_create("body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, b"x" * 100)
    raw.sock.sendmsg([b"\1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))])
    os.close(fd)
    assert raw.end()[1] == 76


def test_checks_agree_with_numpy_on_random_handles() -> None:
    """Whatever passes the check lies within the arena, by numpy's own account of it."""
    import random

    np = pytest.importorskip("numpy")
    chance, size, passed = random.Random(1), 4096, 0
    memory_ = np.zeros(size, np.uint8)
    for _ in range(20_000):
        rank = chance.randrange(4)
        shape = tuple(chance.choice((0, 1, 2, 3, 8, 64, 600)) for _ in range(rank))
        strides = (
            tuple(chance.choice((-64, -8, 0, 4, 8, 64, 1024)) for _ in range(rank)) if chance.random() < 0.7 else None
        )
        given = tensors.Handle(1, chance.choice((0, 64, 1024, 4032, 4096)), "float32", shape, strides)
        try:
            tensors.check(given, size)
        except tensors.BadTensor:
            continue
        passed += 1
        made = np.ndarray(shape, np.float32, memory_, given.offset, strides)
        low, high = np.lib.array_utils.byte_bounds(made) if made.size else (memory_.ctypes.data,) * 2
        assert memory_.ctypes.data <= low and high <= memory_.ctypes.data + size
    assert passed > 1000
