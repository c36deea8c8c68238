"""A slice of `make fuzz` with the same inputs each time, what hypothesis thinks of, and peers that speak nonsense."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from pathlib import Path
from typing import Any

import msgpack
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsutil import memory, messages
from nsutil.messages import MessageError
from pocketd import tensors, values, wire
from pocketd.client.control import Control
from pocketd.client.handshake import open_login
from pocketd.identities import Identities
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.fuzz import targets
from tests.fuzz.mutate import mutated

SEED = 20_260_101
COUNTS = {
    "wire": 20_000,
    "front": 20_000,
    "datagram": 5_000,
    "handle": 20_000,
    "values": 20_000,
    "config": 300,
    "ids": 1000,
    "kept": 5000,
}

# Inputs that once did what they must not, with what that was; a new one goes here as the fuzzer prints it.
REGRESSIONS: list[tuple[str, str, bytes]] = [
    ("wire", "empty maps take 64 bytes each", msgpack.packb({"v": 1})[:-1] + b"\xdc\xff\xff" + b"\x80" * 65535),
    ("wire", "nesting as deep as msgpack goes", msgpack.packb({"v": 1})[:-1] + b"\x91" * 1023 + b"\1"),
    ("wire", "a version that is a text as long as the message", msgpack.packb({"v": "9" * 60_000})),
    ("ids", "a number that no integer can be", b'{"p": 1e999}'),
    ("ids", "no number", b'{"p": null}'),
    ("ids", "nesting deeper than the reader goes", b'{"p": ' + b"[" * 100_000),
]  # fmt: skip

bounded = settings(
    max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)  # fmt: skip
handles = st.builds(
    tensors.Handle,
    st.sampled_from([1, 2, 3, -1, 2**64 - 1]),
    st.sampled_from([0, 64, 1 << 16, (1 << 16) - 64, 2**63]) | st.integers(-100, 1 << 17),
    st.sampled_from([*tensors.DTYPES, "float31", ""]),
    st.lists(st.sampled_from([0, 1, 2, 3, 64, 2**31, 2**63, -1]), max_size=6).map(tuple),
    st.none() | st.lists(st.integers(-4096, 4096) | st.just(2**62), max_size=6).map(tuple),
)


@pytest.mark.parametrize("name", targets.TARGETS)
def test_mutations_of_valid_inputs(name: str) -> None:
    target = targets.TARGETS[name]
    for data in target.corpus:
        target.check(data)
    for data in mutated(SEED, target.corpus, COUNTS[name]):
        try:
            target.check(data)
        except BaseException as e:
            raise AssertionError(f"{name} fails on {data!r}") from e


@pytest.mark.parametrize(("name", "why", "data"), REGRESSIONS, ids=[why for _, why, _ in REGRESSIONS])
def test_what_once_failed(name: str, why: str, data: bytes) -> None:
    targets.TARGETS[name].check(data)


@pytest.mark.parametrize("data", [b'{"p": 1e999}', b'{"p": null}', b'{"p": []}'])
def test_a_damaged_ids_json_is_an_error_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "ids.json").write_bytes(data)
    with pytest.raises(wire.Error, match="damaged"):
        Identities(tmp_path / "ids.json")


@bounded
@given(st.dictionaries(st.text(), plain, max_size=6), st.integers(0, 4))
def test_a_message_arrives_as_it_was_sent(message: dict[str, Any], count: int) -> None:
    ours, theirs = messages.pair()
    with ours, theirs, open("/dev/null") as null:
        wire.send(ours, {**message, "v": 1}, [null.fileno()] * count)
        got, fds = wire.receive(theirs)
        with fds:
            assert got == {**message, "v": 1} and len(fds) == count


@bounded
@given(plain)
def test_bounds_are_kept_by_whatever_passes_them(value: Any) -> None:
    bounds = wire.Bounds(300, 3, 10)
    try:
        message = wire.unpack(wire.pack({"value": value}), bounds)
    except MessageError:
        return
    assert depth(message) <= 3 and count(message) <= 10


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


def count(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return len(inner) + sum(map(count, inner))


@bounded
@given(handles)
def test_a_handle_is_within_its_arena_or_refused(handle: tensors.Handle) -> None:
    try:
        targets.check_handle(tensors.encode(handle))
    except OverflowError:
        pass  # of msgpack, which packs no such number: it cannot be sent


@bounded
@given(
    st.recursive(
        plain.filter(lambda v: not isinstance(v, (list, dict))),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.lists(inner, max_size=4).map(tuple)
            | st.dictionaries(st.text(), inner, max_size=4)
        ),
        max_leaves=15,
    )
)
def test_a_value_arrives_as_it_was_sent(value: Any) -> None:
    form = values.Format(lambda v: None, lambda data: None)
    assert form.unpack(form.pack({"v": 1, "value": value}))["value"] == value


toml = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text() | st.dates() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "runtime", "env", "limits", "models", "may_run", "start", "service", "dir", "program", "allow", "mounts", "run_as",
    "requires", "preload", "rootfs", "stop_timeout", "reload", "exit", "cold", "reserve", "queue", "wait", "pressure",
]  # fmt: skip
definition = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), toml, max_size=6)
named = st.dictionaries(st.sampled_from(["a", "p", "plain"]) | st.text(max_size=5), definition | toml, max_size=3)


@bounded
@given(
    st.fixed_dictionaries({}, optional={"service": named, "pocket": named, "defaults": named, "admission": definition})
)
def test_any_tree_of_toml_is_a_configuration_with_problems(tree: dict[str, Any]) -> None:
    targets.check_config(tomli_w.dumps(tree).encode("utf-8", "replace"))


# -- live


def reply_or_end(s: socket.socket) -> None:
    s.settimeout(TIMEOUT)
    with contextlib.suppress(MessageError, EOFError, ConnectionError):
        messages.receive(s)[1].close()


def descriptors(pid: int) -> int:
    return len([fd for fd in os.listdir(f"/proc/{pid}/fd") if not _is_id_map(pid, fd)])


def _is_id_map(pid: int, fd: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(f"/proc/{pid}/fd/{fd}").startswith("user:")
    return False


def test_a_live_pocketd_answers_after_any_bytes(pocketd: Pocketd) -> None:
    """Requests near valid ones with descriptors that are not what they should be. No `on` or `off` is among them."""
    assert pocketd.process
    pocketd.pocket("run", "--service", "plain", "-c", "")
    assert pocketd.settled()
    chance = random.Random(SEED)
    corpus = [c for c in targets.TARGETS["wire"].corpus if b"login" not in c]
    login = msgpack.packb({"v": 1, "op": "login", "id": 2, "session": "a" * 32, "mode": "client", "name": "plain",
                           "path": "/", "roles": ["session", "hold", "dir"]})  # fmt: skip
    log = pocketd.log.stat().st_size
    before = descriptors(pocketd.process.pid)
    with contextlib.ExitStack() as stack:
        ours, theirs = map(stack.enter_context, messages.pair())
        sent = [ours.fileno(), theirs.fileno(), os.open("/dev/null", os.O_RDONLY)]
        sent += [os.open("/var/tmp", os.O_PATH), os.memfd_create("x"), memory.create(4096, "y")]
        for fd in sent[2:]:
            stack.callback(os.close, fd)
        for data in mutated(SEED, [*corpus, login], 600):
            s = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            with s:
                s.connect(str(pocketd.runtime_dir / "pocketd.sock"))
                fds = chance.choices(sent, k=chance.choice((0, 0, 1, 3, 5)))
                with contextlib.suppress(BrokenPipeError):
                    messages.send(s, data[:32000], fds)
                s.shutdown(socket.SHUT_WR)
                reply_or_end(s)
    assert pocketd.ps()["services"]
    assert pocketd.settled() and pocketd.workers() == []
    assert wait_for(lambda: descriptors(pocketd.process.pid) <= before, 10), "descriptors are left"
    faults = [line for line in pocketd.log.read_text()[log:].splitlines() if " fault " in line and " error " in line]
    assert not faults, faults[:5]


def test_a_live_worker_ends_by_itself_after_any_bytes(pocketd: Pocketd, tmp_path: Path) -> None:
    """Each session gets messages near valid ones until it has enough: 76 is what a worker says to garbage."""
    (tmp_path / "a.py").write_text("def b(*args, **kwargs): return args\n")
    corpus = targets.TARGETS["values"].corpus
    inputs = mutated(SEED, corpus, 400)
    codes = set()
    with Control(str(pocketd.runtime_dir)) as control:
        while data := next(inputs, None):
            start = {"environment": [], "directory": os.fsencode(tmp_path)}
            login = open_login(control, mode="client", name="plain", directory=str(tmp_path), start=start)
            with login.session as session, login.hold as hold:
                session.settimeout(TIMEOUT)
                while data is not None:
                    try:
                        messages.send(session, data[:32000])
                        session.setblocking(False)
                        with contextlib.suppress(BlockingIOError):
                            messages.receive(session)[1].close()
                        session.setblocking(True)
                    except (OSError, EOFError):
                        break
                    data = next(inputs, None)
                with contextlib.suppress(OSError):
                    session.shutdown(socket.SHUT_WR)
                hold.settimeout(TIMEOUT)
                message, _ = wire.receive(hold)
                codes.add(os.waitstatus_to_exitcode(message["status"]))
    assert codes <= {0, 76} and 76 in codes, codes
    assert -signal.SIGSEGV not in codes
    assert pocketd.settled() and pocketd.workers() == []
