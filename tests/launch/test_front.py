"""`pocket` in C and the command in Python: the same words and the same ends, whatever pocketd answers."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import pytest

from nsutil import memory, messages
from pocketd import wire
from pocketd.command.main import USAGE, VERBS
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for

CONFIG = """
[service.plain]
runtime = "python"
[pocket.app]
service = "plain"
dir = "{0}"
program = "app.py"
env = {{ GIVEN = "1", LANG = "C" }}
[pocket.bare]
service = "plain"
dir = "{0}"
"""
FRONTS = ("c", "python")
both_fronts = pytest.mark.parametrize("front", FRONTS, indirect=True)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory):
    place = tmp_path_factory.mktemp("front")
    (place / "app").mkdir()
    (place / "app" / "app.py").write_text(
        "import os, sys; print(sys.argv, os.environ.get('GIVEN'), os.environ.get('LANG'))"
    )
    made = Pocketd(place, CONFIG.format(place / "app"))
    made.start()
    yield made
    made.close()


def ended(daemon: Pocketd, *words: str, **options: Any) -> tuple[int, bytes, bytes]:
    options = {"env": daemon.environment, "stdin": subprocess.DEVNULL, "timeout": TIMEOUT, **options}
    done = subprocess.run(daemon.command(*words), capture_output=True, **options)
    return done.returncode, done.stdout, done.stderr


WORDS: list[tuple[str, ...]] = [
    (), ("help",), ("-h",), ("--version",), ("--nothing",), ("",), ("--runtime-dir",), ("--runtime-dir", "/none", "ps"),
    ("--runtime-dir=/none", "run", "-c", "1"), ("app", "a", "--b"), ("app",), ("app", "on"), ("app", "off"), ("bare",),
    ("plain",), ("nobody",), ("nobody", "on"), ("run",), ("run", "--help"), ("run", "--nothing", "x"), ("run", "--"),
    ("run", "--service"), ("run", "--service", "plain"), ("run", "--service", "none", "-c", "1"), ("run", "-m"),
    ("run", "--service=plain", "-c", "import sys; print(sys.argv)", "--dir=x"), ("run", "--service", "", "-c", "1"),
    ("run", "--service", "plain", "--", "-c"), ("run", "--service", "plain", "-"), ("run", "--service", "plain", ""),
    ("run", "-p"), ("run", "-p", ""), ("run", "-p", "plain"), ("run", "-p", "app", "-p"), ("run", "-p=app"),
    ("run", "--cold=x"), ("run", "--dir", "/", "-c", "1"), ("run", "--dir", "/none", "-c", "1"), ("run", "--cold"),
    ("run", "--service=plain", "--dir", "", "-c", "import os; print(os.getcwd())"), ("run", "--dir=app.py", "-c", "1"),
    ("run", "--runtime-dir", "/none", "-c", "1"), ("run", "--runtime-dir", "/" + "n" * 120, "-c", "1"),
    ("run", "--runtime-dir", "", "--service", "plain", "-c", "print(2)"),
    *(("run", "--service=plain", "--mount", at, "-c", "1") for at in ("", ":", "a:b:c", "a:b:rw:rw", "/none", ":/x")),
    ("run", "--service=plain", "--mount", "/etc/passwd:x/../y:rw", "-c", "import os; print(os.path.exists('/y'))"),
    *(("run", "--service=plain", "--mount", f"{at}:/m", "-c", "1") for at in ("//etc", "/../etc/./", "/etc/..//tmp")),
    ("run", "--service=plain", *(f"--mount=/etc:/m{n}" for n in range(29)), "-c", "1"),
    ("run", "--service=plain", "-c", "1", "/root", "x=/root/", "/", "..", "//root", "/usr/..", "/usr/lib", "./app.py"),
    ("run", "--service=plain", "app.py", "/var/../root", "app.py/../..", "=", "a=b=/root"),
    ("run", "--service=plain", "none.py"),
]  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words)[:60])
def test_both_fronts_say_the_same(daemon, monkeypatch, words):
    found = []
    for front in FRONTS:
        monkeypatch.setattr(Pocketd, "front", front)
        status, out, err = ended(daemon, *words, cwd=daemon.place / "app")
        found.append((status, out, sorted(err.splitlines())))  # hints about one word come in any order from Python
    assert found[0] == found[1]
    assert not [line for line in found[0][2] if b"Traceback" in line]


@both_fronts
def test_a_trace_begins_with_the_request(daemon, front):
    status, out, err = ended(daemon, "run", "--service=plain", "--trace", "-c", "print(1)", cwd=daemon.place)
    first, *steps = err.decode().splitlines()
    assert (status, out, first) == (0, b"1\n", "pocket: milliseconds since the request, and since the line before")
    assert 0 <= float(steps[0].split()[1]) < float(steps[-1].split()[1]) < TIMEOUT * 1e3


class Full:
    """A pocketd that has no room for a program until `relieve`."""

    def __init__(self, daemon: Pocketd):
        self.daemon, self.text = daemon, daemon.config.read_text()
        daemon.pocket("plain", "on")
        self._configure('[admission]\nreserve = "1P"\nwait = 600\n')

    def _configure(self, more: str) -> None:
        self.daemon.config.write_text(f"{self.text}{more}")
        self.daemon.pocket("reload")

    def start(self, **options: Any) -> subprocess.Popen[Any]:
        """One that waits for it."""
        process = self.daemon.popen("run", "--service=plain", "-c", "print(1)", cwd=self.daemon.place, **options)
        assert wait_for(lambda: "launch-waits" in self.daemon.log.read_text())
        return process

    def relieve(self) -> None:
        self._configure("")


@pytest.fixture
def full(own_pocketd) -> Full:
    return Full(own_pocketd(f'[service.plain]\nruntime = "python"\nenv = {toml_table(service_environment())}\n'))


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_a_command_that_waits_for_its_worker_can_be_ended(full, number):
    process = full.start()
    process.send_signal(number)
    assert process.wait(TIMEOUT) == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_whose_pocketd_does_not_answer_can_be_ended(own_pocketd, number):
    daemon = own_pocketd(f'[service.plain]\nruntime = "python"\nenv = {toml_table(service_environment())}\n')
    daemon.pocket("plain", "on")
    os.kill(daemon.process.pid, signal.SIGSTOP)
    try:
        process = daemon.popen("run", "--service=plain", "-c", "print(1)", cwd=daemon.place)
        assert wait_for(lambda: unblocked(process.pid, number))
        process.send_signal(number)
        assert process.wait(TIMEOUT) == -number
    finally:
        os.kill(daemon.process.pid, signal.SIGCONT)


def unblocked(pid, number):
    """Whether a process that had blocked a signal has not any more: it is `pocket`, and waits."""
    status = Path(f"/proc/{pid}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
    return blocked and not blocked >> number - 1 & 1


def test_one_that_ignores_a_signal_goes_on_waiting(full):
    process = full.start(stdout=subprocess.PIPE, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    full.relieve()
    assert process.communicate(timeout=TIMEOUT)[0] == b"1\n"
    assert process.returncode == 0


@pytest.mark.parametrize("verb", sorted({*VERBS, *re.findall(r"(?m)^(?:usage:|      ) pocket ([a-z]+)", USAGE)}))
def test_no_verb_is_taken_for_a_pocket(daemon, monkeypatch, verb):
    """A `pocket` that was built before the verb was there would ask pocketd for a pocket of that name."""
    found = []
    for front in FRONTS:
        monkeypatch.setattr(Pocketd, "front", front)
        found.append(ended(daemon, verb, "--no-such-option"))
    assert found[0] == found[1]


def test_what_python_does_is_beside_it(tmp_path):
    copy = shutil.copy(Path(sys.executable).parent / "pocket", tmp_path)
    done = subprocess.run([copy, "ps"], capture_output=True, timeout=TIMEOUT)
    words = f"pocket: {tmp_path}/pocket-py cannot be run: No such file or directory\n"
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", words.encode())


# -- a pocketd that answers as it likes

Answer = Callable[[socket.socket, dict[str, Any], list[socket.socket]], None]


@pytest.fixture
def standin(tmp_path: Path) -> Iterator[Callable[..., Pocketd]]:
    """Starts a socket that gives one of the answers to each connection, and nobody behind it."""
    with ExitStack() as stack:

        def make(*answers: Answer) -> Pocketd:
            made = Pocketd(tmp_path, "")
            made.runtime_dir.mkdir()
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(str(made.runtime_dir / "pocketd.sock"))
            listener.listen()
            thread = threading.Thread(target=serve, args=(listener, answers), daemon=True)
            thread.start()
            stack.callback(thread.join, TIMEOUT)
            return made

        yield make


def serve(listener: socket.socket, answers: tuple[Answer, ...]) -> None:
    for answer in answers:
        connection, _ = listener.accept()
        with connection, ExitStack() as stack:
            request, fds = wire.receive(connection)
            ends = [stack.enter_context(socket.socket(fileno=fd)) for fd in fds.rest()[:2]]
            answer(connection, request, ends)


def run(daemon: Pocketd) -> tuple[int, bytes, bytes]:
    return ended(daemon, "run", "-c", "1", cwd=daemon.place)


def silent(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
    """Ends before it answered."""


def reply(**fields: Any) -> Answer:
    return lambda connection, request, _: wire.send(connection, {"id": request["id"], **fields})


def raw(data: bytes, fds: Callable[[], list[int]] = list) -> Answer:
    def answer(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        sent = fds()
        messages._send(connection, [data], sent, 0)
        for fd in sent:
            os.close(fd)

    return answer


def accepted(hold: bytes = b"", session: bytes = b"") -> Answer:
    """Lets the caller in, and says this on its sockets, as init and the worker would."""

    def answer(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        for end, said in zip(ends, (session, hold), strict=True):
            if said:
                end.send(said)
        wire.send(connection, {"id": request["id"], "ok": True})

    return answer


def said(**fields: Any) -> bytes:
    return b"\0" + wire.pack(fields)


@both_fronts
def test_a_login_is_repeated_with_the_next_pocketd(standin, front):
    seen = []

    def lost(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        seen.append(request["session"])

    def found(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        seen.append(request["session"])
        accepted(said(op="exit", status=3 << 8))(connection, request, ends)

    assert run(standin(lost, lost, found)) == (3, b"", b"")
    assert len(seen) == 3 and len(set(seen)) == 1


def test_a_pocketd_that_does_not_come_back_is_given_up(standin):
    def last(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        os.unlink(alone.runtime_dir / "pocketd.sock")

    alone = standin(last)
    words = f"pocket: pocketd ended before it answered 'login' (socket {alone.runtime_dir}/pocketd.sock)\n"
    assert run(alone) == (125, b"", words.encode())


LONG = "so it is, " * 10_000


@both_fronts
@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        ({"code": "not-found", "message": "none", "detail": {}}, 127, "none"),
        ({"code": "full", "message": "two\nlines", "detail": {"a": [1]}}, 125, "two\nlines"),
        ({"code": "service", "message": LONG}, 125, LONG),
        ({"message": 5, "code": []}, 125, ""),
        ("no", 125, "the peer sent an error of an unknown form"),
    ],
    ids=["not found", "full", "in a memfd", "of other types", "of another form"],
)
def test_refusals(standin, front, error, status, words):
    assert run(standin(reply(error=error))) == (status, b"", f"pocket: {words}\n".encode())


@both_fronts
def test_an_error_that_answers_no_request(standin, front):
    error = wire.Error("full", "pocketd is full").wire()
    assert run(standin(raw(b"\0" + wire.pack({"id": None, "error": error})))) == (
        125,
        b"",
        b"pocket: pocketd is full\n",
    )


@both_fronts
def test_progress_and_strangers_answers_are_passed_over(standin, front):
    def answer(connection: socket.socket, request: dict[str, Any], ends: list[socket.socket]) -> None:
        for other in ({"id": 77, "error": {}}, {"id": "x"}, {"ok": True}, {"id": request["id"], "progress": "waits"}):
            wire.send(connection, other)
        wire.send(connection, {"id": request["id"], "progress": 3})
        accepted(said(op="exit", status=0))(connection, request, ends)

    assert run(standin(answer)) == (0, b"", b"")


def unsealed() -> list[int]:
    fd = os.memfd_create("unsealed")
    os.write(fd, wire.pack({"id": 1}))
    return [fd]


NONSENSE = {
    "an empty body": (b"\0",),
    "another kind of datagram": (b"\2" + wire.pack({"id": 1}),),
    "no msgpack": (b"\0\xc1",),
    "more than one value": (b"\0" + wire.pack({"id": 1}) + b"\0",),
    "a map that is cut": (b"\0\xdf\xff\xff\xff\xff\xa1v\1",),
    "a text that is cut": (b"\0\x82\xa1v\1\xa2id\xdb\xff\xff\xff\xff",),
    "an array without end": (b"\0\x81\xa1v" + b"\xdd\xff\xff\xff\xff" * 6000,),
    "an extension": (b"\0\x82\xa1v\1\xa2id\xd4\1\1",),
    "a list": (b"\0\x90",),
    "a key that is a number": (b"\0\x82\xa1v\1\1\1",),
    "no version": (b"\0" + msgpack.packb({"id": 1}),),
    "a later version": (b"\0" + msgpack.packb({"v": 2, "id": 1}),),
    "a version that is true": (b"\0" + msgpack.packb({"v": True, "id": 1}),),
    "a memfd that is not there": (b"\1",),
    "a memfd that can change": (b"\1", unsealed),
    "a memfd that is a file": (b"\1", lambda: [os.open("/etc/passwd", os.O_RDONLY)]),
    "an empty memfd": (b"\1", lambda: [memory.sealed(b"", "empty")]),
    "a datagram that is too long": (b"\0" + wire.pack({"id": 1, "x": "x" * messages.MAX_INLINE}),),
}


@both_fronts
@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_answers_that_are_none(standin, front, nonsense):
    status, out, err = run(standin(raw(*nonsense)))
    assert (status, out) == (125, b"") and err.startswith(b"pocket: pocketd's answer to 'login' is not understood: ")
    assert err.count(b"\n") == 1


@both_fronts
def test_more_descriptors_than_a_message_has(standin, front):
    daemon = standin(raw(b"\0" + wire.pack({"id": 1}), lambda: [os.open("/dev/null", os.O_RDONLY) for _ in range(40)]))
    assert run(daemon)[:2] == (125, b"")


@both_fronts
@pytest.mark.parametrize(
    ("hold", "session", "status", "words"),
    [
        (said(op="exit", status=7 << 8), b"", 7, ""),
        (said(op="exit", status=signal.SIGTERM), b"", -signal.SIGTERM, ""),
        (said(op="exit", status=9, error={"code": "memory", "message": "too much"}), b"", -9, "pocket: too much\n"),
        (said(op="exit", status=1 << 8), said(op="failed", error={"message": "no tree"}), 1, "pocket: no tree\n"),
        (said(op="exit", status=1 << 8), said(op="ready", error={"message": "no tree"}), 1, ""),
        (said(op="exit", status=0), b"\0\xc1", 0, ""),
        (said(op="exit"), b"", 125, ""),
        (said(op="exit", status="0"), b"", 125, ""),
        (said(op="exit", status=None, error="?"), b"", 125, "pocket: the peer sent an error of an unknown form\n"),
        (said(op="exit", error={"message": "gone"}), b"", 125, "pocket: gone\n"),
        (b"\0\xc1", b"", 125, "pocket: the service ended\n"),
        (b"", b"", 125, "pocket: the service ended\n"),
    ],
    ids=itertools.count(),
)
def test_ends(standin, front, hold, session, status, words):
    assert run(standin(accepted(hold, session))) == (status, b"", words.encode())


@both_fronts
def test_a_pocket_whose_description_is_odd(standin, front):
    """What Python has no words for either ends, with nothing run."""
    daemon = standin(*[reply(kind="pocket", program=3, directory=None)] * (2 if front == "c" else 1))
    assert ended(daemon, "app", cwd=daemon.place)[:2] != (0, b"")
