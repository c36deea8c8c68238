"""What calls cost: descriptors and memory do not grow; time is printed as ratios, and judged by the benchmarks."""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest

from pocketd.client import Session


def resident(pid: int | None) -> int:
    """Pages of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def test_ten_thousand_calls_grow_nothing(session: Session) -> None:
    a = session.tensor((64, 64), "float32")
    a[...] = 1

    def calls(n: int) -> None:
        for _ in range(n):
            session.call("detector:add", a, 1)
            session.call("detector:echo", {"a": [a, "text"]})

    def state() -> list[int]:
        pids = (os.getpid(), session.pid)
        return [len(os.listdir(f"/proc/{p}/fd")) for p in pids] + [resident(p) for p in pids]

    calls(1000)
    before = state()
    calls(5000)
    after = state()
    assert after[:2] == before[:2]
    assert all(b - a < 256 for a, b in zip(before[2:], after[2:], strict=True)), (before, after)


def microseconds(functions: dict[str, Callable[[], object]], rounds: int = 15, each: int = 150) -> dict[str, float]:
    """The least of each function's medians over rounds in which they take turns."""
    medians: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, once in functions.items():
            taken = []
            for _ in range(each):
                began = time.perf_counter()
                once()
                taken.append(time.perf_counter() - began)
            medians[name].append(statistics.median(taken) * 1e6)
    return {name: min(all) for name, all in medians.items()}


def test_round_trips_are_told_as_ratios(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside a bare msgpack echo, on one cpu and across two: left alone, the scheduler places each pair as it likes,
    which changes a round trip several times over."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        while data := theirs.recv(65536):
            theirs.send(msgpack.packb(msgpack.unpackb(data)))
        os._exit(0)
    theirs.close()
    message = {"v": 1, "op": "call", "id": 1, "target": "detector:total", "args": [1], "kwargs": {}}

    def echo() -> None:
        ours.send(msgpack.packb(message))
        msgpack.unpackb(ours.recv(65536))

    small, large = session.tensor((64,), "uint8"), session.tensor((25 << 20,), "uint8")
    session.call("detector:paint", large)
    functions = {
        "echo": echo,
        "call": lambda: session.call("detector:pid"),
        "64 bytes in": lambda: session.call("detector:nothing_of", small),
        "25 MB in": lambda: session.call("detector:nothing_of", large),
        "64 bytes in and out": lambda: session.call("detector:same", small),
    }
    cpus = os.sched_getaffinity(0)
    here, there = min(cpus), max(cpus)
    try:
        for where, theirs_on in (("one cpu", here), ("two cpus", there)):
            os.sched_setaffinity(0, {here})
            for other in (pid, session.pid or 0):
                os.sched_setaffinity(other, {theirs_on})
            took = microseconds(functions)
            floor = took.pop("echo")
            told = ", ".join(f"{name} {taken / floor:.2f}" for name, taken in took.items())
            ratio = took["25 MB in"] / took["64 bytes in"]
            with capsys.disabled():
                print(f"\n  {where}: in echoes of {floor:.1f} us: {told}; 25 MB / 64 bytes {ratio:.2f}", end="")
    finally:
        os.sched_setaffinity(0, cpus)
        ours.close()
        os.waitpid(pid, 0)


def test_the_client_needs_no_numpy(service: str, pocket: Path) -> None:
    """Blocked, not absent: what a fresh container without it does."""
    code = f"""
import sys
sys.modules["numpy"] = None
from pocketd.client import login, BadTensor
with login("python", directory={str(pocket)!r}, runtime_dir={service!r}) as session:
    a = session.tensor((2, 3), "float32")
    a.buffer()[1, 2] = 5
    assert a[1, 2] == 5 and len(a) == 2
    a[0, 0] = 1.5
    b = session.call("detector:add", a, 1)
    assert b.tolist()[1][2] == 6.0 and b.buffer().shape == (2, 3), b
    assert session.model("counter")(a).tolist()[0][0] == 3.0
    c = session.tensor((), "int64"); c.buffer()[()] = 3
    assert session.call("detector:add", c, 4) in (7, ) or session.call("detector:add", c, 4).tolist() == 7
    import array
    assert session.call("detector:total", array.array("d", [1, 2])) == 3.0
    try:
        a.numpy()
    except BadTensor as e:
        print(e)
assert not [m for m in sys.modules if m.startswith("numpy.")]
third = [m for m, o in sys.modules.items() if "site-packages" in str(getattr(o, "__file__", ""))]
print(sorted({{m.partition(".")[0] for m in third}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not installed" in done.stdout and "'msgpack'" in done.stdout


def test_the_client_does_not_load_the_daemon() -> None:
    code = (
        "import sys, pocketd.client; print(*(m for m in sys.modules if m.startswith(('pocketd', 'runtime', 'cgroup'))))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    extra = [m for m in loaded if not m.startswith("pocketd.client")]
    assert set(extra) <= {
        "pocketd",
        "pocketd.wire",
        "pocketd.tensors",
        "pocketd.arena",
        "pocketd.arrays",
        "pocketd.values",
    }
