"""What is fuzzed: for each format valid inputs to begin with, and a function that raises what a reader never may.

A target takes bytes. It lets pass the errors that its reader promises, and checks what was accepted.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack

from nsutil import memory, messages
from nsutil.messages import MessageError
from nsutil.syscalls import syscall
from pocketd import config, tensors, values, wire
from pocketd.arena import Arena, Arenas
from pocketd.definitions import Config, Service
from pocketd.identities import COUNT, FIRST, Identities


class Target(NamedTuple):
    corpus: list[bytes]
    check: Callable[[bytes], None]
    share: int  # of a hundred inputs of `make fuzz`


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


_REQUESTS = [
    {"v": 1, "op": "ps", "id": 1},
    {"v": 1, "op": "login", "id": 2, "session": "a" * 32, "mode": "client", "name": "plain", "path": "/x",
     "roles": ["session", "hold", "dir"], "mounts": [{"target": b"/a/b", "writable": True}]},
    {"v": 1, "op": "stop", "id": 3, "name": "run-0123456789ab", "timeout": 10},
    {"v": 1, "op": "set", "id": 4, "name": "p", "limits": {"memory.max": "1G"}, "persist": False},
    {"v": 1, "op": "allow", "id": 5, "name": "p", "what": ["write:data"], "allow": True},
    {"v": 1, "op": "signal", "signal": 15, "group": True},
    {"v": 1, "id": 6, "error": {"code": "full", "message": "no", "detail": {"a": 1, "b": None}}},
    {"v": 1, "op": "logs", "id": 7, "name": "plain", "lines": 10},
    {"v": 1, "op": "inspect", "id": 8, "name": "plain"},
    {"v": 1, "op": "describe", "id": 9, "name": "plain"},
]  # fmt: skip


def check_wire(data: bytes) -> None:
    for bounds in (None, wire.REQUEST, wire.SIGNAL):
        try:
            message = wire.unpack(data, bounds)
        except MessageError:
            continue
        wire.Error.unwire(message.get("error")).wire()
        for key, kind in (("name", str), ("roles", list), ("timeout", int)):
            try:
                wire.field(message, key, kind, None)
            except wire.Error as e:
                wire.pack({"id": message.get("id"), "error": e.wire()})
        assert wire.unpack(wire.pack(message)).keys() == message.keys()


class _Part(ctypes.Structure):
    """struct part of pocketd/front/msgpack.h."""

    _fields_ = [("at", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Front:
    """The reader of `pocket`, whose input lies before a page that nobody may read: beyond it is death by SIGSEGV, as
    undefined behaviour is death by SIGILL."""

    _SIZE = 1 << 17

    def __init__(self) -> None:
        path = _PLACE / "msgpack.so"
        source = Path(__file__).parents[2] / "pocketd" / "front" / "msgpack.c"
        checks = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
        versions = (f"-DOLDEST={wire.OLDEST}", f"-DVERSION={wire.VERSION}")
        subprocess.run(["cc", "-shared", "-fPIC", *checks, *versions, "-o", str(path), str(source)], check=True)
        self.reader = ctypes.CDLL(str(path))
        self.reader.check.argtypes = [_Part, ctypes.c_void_p]
        self.reader.get.argtypes = [_Part, ctypes.c_char_p, ctypes.c_void_p]
        for name in ("as_text", "as_int"):
            getattr(self.reader, name).argtypes = [_Part, ctypes.c_void_p]
        for name in ("check", "get", "as_text", "as_int"):
            getattr(self.reader, name).restype = ctypes.c_bool
        self._map = mmap.mmap(-1, self._SIZE + mmap.PAGESIZE)
        self._end = ctypes.addressof(ctypes.c_char.from_buffer(self._map)) + self._SIZE
        syscall({"x86_64": 10, "aarch64": 226}[platform.machine()], self._end, mmap.PAGESIZE, 0, call="mprotect")

    def read(self, data: bytes) -> dict[str, str | int | None] | None:
        """The keys asked for with their texts and numbers, None for other values; or None for what is no message."""
        data = data[: self._SIZE]
        self._map[self._SIZE - len(data) : self._SIZE] = data
        body, why = _Part(self._end - len(data), len(data)), ctypes.c_char_p()
        found: dict[str, str | int | None] = {}
        if not self.reader.check(body, ctypes.byref(why)):
            assert why.value
            return None
        for key in ("v", "op", "id", "name", "error", "signal"):
            value, text, number = _Part(), _Part(), ctypes.c_int64()
            if self.reader.get(body, key.encode(), ctypes.byref(value)):
                assert body.at <= value.at and value.at + value.size <= self._end and value.size
                found[key] = None
                if self.reader.as_text(value, ctypes.byref(text)):
                    assert value.at < text.at and text.at + text.size == value.at + value.size
                    found[key] = ctypes.string_at(text.at, text.size).decode(errors="surrogateescape")
                elif self.reader.as_int(value, ctypes.byref(number)):
                    found[key] = number.value
        return found


_front = functools.cache(_Front)


def check_front(data: bytes) -> None:
    """The C reader takes what Python's takes, in the same sense; deeper nesting and odd keys within as well."""
    found = _front().read(data)
    try:
        message = wire.unpack(data)
    except MessageError:
        return
    assert found is not None
    for key in message.keys() & {"v", "op", "id", "name", "error", "signal"}:
        value = message[key]
        is_number = type(value) is int and -(1 << 63) <= value < 1 << 63
        assert found[key] == (value if type(value) is str or is_number else None)
    assert found.keys() <= message.keys()


_OURS, _THEIRS = messages.pair()


def check_datagram(data: bytes) -> None:
    """What comes by a socket, descriptors with it: the first byte says how many, and of which kinds."""
    before = _lowest()
    kinds = data[:1] or b"\0"
    sent: list[int] = []
    for bit in range(kinds[0] & 3):
        sent.append(memory.sealed(data, "f") if kinds[0] >> (2 + bit) & 1 else os.open("/dev/null", os.O_RDONLY))
    _OURS.setblocking(False)
    try:
        messages._send(_OURS, [data[1:33000]], sent, 0)
    except OSError:
        return
    finally:
        for fd in sent:
            os.close(fd)
    try:
        with wire.receive(_THEIRS, socket.MSG_DONTWAIT, wire.REQUEST)[1]:
            pass
    except (MessageError, EOFError):
        pass
    assert _lowest() == before, "a descriptor was left open"


def _lowest() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


_ARENA, _FD = Arena.create(1, 1 << 16)
_ARENAS = Arenas(1)
_ARENAS.receive(1, _FD)


def check_handle(data: bytes) -> None:
    try:
        handle = tensors.decode(data)
        arena, size = _ARENAS.find(handle)
    except tensors.BadTensor as e:
        assert f"{_ARENA.address:x}" not in str(e) and len(str(e)) < 10_000
        return
    assert 0 <= handle.offset <= arena.size and handle.offset % tensors.ALIGNMENT == 0
    if handle.strides is None:
        assert handle.offset + size <= arena.size
        tensors.buffer(memoryview(arena.map)[handle.offset : handle.offset + size], handle.dtype, handle.shape)


def _resolve(data: bytes) -> Any:
    handle = tensors.decode(data)
    _ARENAS.find(handle)
    return handle


_FORMAT = values.Format(lambda value: None, _resolve)
_VALUES = values.Format(lambda value: tensors.encode(value) if isinstance(value, tensors.Handle) else None, _resolve)
_HANDLES = [
    tensors.Handle(1, 64, "float32", (4, 4)),
    tensors.Handle(1, 0, "uint8", (16,), (1,)),
    tensors.Handle(1, 128, "complex128", (2, 2), (32, 16)),
    tensors.Handle(2, 0, "bfloat16", ()),
]


def check_values(data: bytes) -> None:
    try:
        message = _FORMAT.unpack(data)
    except MessageError:
        return
    fault = _FORMAT.faults[0] if _FORMAT.faults else None
    assert fault is None or isinstance(fault, wire.Error)
    try:
        _FORMAT.pack(message)
    except wire.Error:
        pass


_TEMPORARY = tempfile.TemporaryDirectory(prefix="fuzz-")  # removed with the process
_PLACE = Path(_TEMPORARY.name)
_MAIN = b"""
[service.plain]
runtime = "python"
env = { A = "b" }
limits = { "memory.max" = "1G" }
[service.plain.models]
m = "models:make"
[pocket.p]
service = "plain"
dir = "%s"
program = "app.py"
may_run = ["nobody", "@users", "cgroup:/x"]
allow = { models = ["m"], write = ["data"], network = "none" }
mounts = ["/usr/share:/data"]
[defaults.run]
limits = { "pids.max" = 5 }
[admission]
reserve = "64M"
queue = 3
"""


def check_config(data: bytes) -> None:
    """As the operator's file, as a drop-in, and as what an author wrote."""
    app = _PLACE / "app"
    app.mkdir(exist_ok=True)
    (_PLACE / "pocketd.conf.d").mkdir(exist_ok=True)
    main, drop_in, author = _PLACE / "pocketd.conf", _PLACE / "pocketd.conf.d" / "90-p.conf", app / "pocket.toml"
    good = _MAIN % os.fsencode(app)
    for file in (main, drop_in, author):
        main.write_bytes(good)
        drop_in.write_bytes(b"")
        author.write_bytes(b"")
        file.write_bytes(data)
        found = config.load(main)
        assert isinstance(found, Config)
        config.describe(found.problems)
        json.dumps([str(p.value) for p in found.problems])
        if file is author:
            assert "plain" in found.services, "an author spoilt the operator's definitions"
            assert not found.pockets or not found.pockets["p"].run_as


def check_ids(data: bytes) -> None:
    path = _PLACE / "ids.json"
    path.write_bytes(data)
    try:
        found = Identities(path)
    except wire.Error as e:
        assert e.code == "state"
        return
    assert FIRST <= found.named("p") < FIRST + COUNT


_SERVICE = Service("plain").wire()


def check_definition(data: bytes) -> None:
    """What an init gives back of the definition that it keeps. pocketd believes it, and catches none of these errors:
    it is pocketd's own word, from a process of root's; here it is only seen that nothing worse comes of it."""
    try:
        kept = wire.unpack(data).get("kept")
    except MessageError:
        return
    try:
        Service.unwire(kept)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, AttributeError):
        pass


TARGETS: dict[str, Target] = {
    "wire": Target([_pack(r) for r in _REQUESTS], check_wire, 30),
    "front": Target([_pack(r) for r in _REQUESTS], check_front, 5),
    "datagram": Target(
        [bytes([k]) + b"\0" + _pack(r) for r in _REQUESTS for k in (0, 5)] + [b"\5\1", b"\1\1", b"\2\2hello"],
        check_datagram,
        10,
    ),
    "handle": Target([tensors.encode(h) for h in _HANDLES], check_handle, 25),
    "values": Target(
        [
            _VALUES.pack({"v": 1, "op": "call", "id": 1, "target": "a:b", "args": [_HANDLES[0], (1, (2, "x"))]}),
            _VALUES.pack({"v": 1, "op": "call", "id": 1, "kwargs": {"a": 1.5, "b": b"x", "c": [None, True]}}),
            _VALUES.pack({"v": 1, "id": 3, "op": "model", "model": 0, "args": _HANDLES, "free": [[2, 0]], "drop": [2]}),
        ],
        check_values,
        27,
    ),
    "config": Target([_MAIN, b'service = "plain"\n[limits]\n"memory.max" = "1G"\n', b"a.b.c = 1\n"], check_config, 1),
    "ids": Target([b'{"p": 1900000000}', b'{"a": 1900000001, "b": 1900000002}', b"{}"], check_ids, 1),
    "kept": Target([_pack({"v": 1, "kept": _SERVICE})], check_definition, 1),
}
