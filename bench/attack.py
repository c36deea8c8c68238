"""What others notice of an attack on resources: the latency of a session's calls, of launches and of pocketd itself,
while a pocket with limits, or a local user, takes all that it can get, beside the same with nobody attacking.

usage, as root, best in the test VM, which has every controller:

    python -m tests.vm --run 'python -m bench.attack 5'     seconds for each attack
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.own import BIN, OwnPocketd
from cgroup.hierarchy import Hierarchy
from pocketd import wire
from pocketd.client import login
from pocketd.client.control import Control

HERE = Path(__file__).resolve().parent
UID = 60_123  # the local user who may connect and means no good
INSIDE = ("processor", "processes", "memory", "files", "descriptors", "watches", "terminals", "output")
LIMITS = {"pids.max": "200", "memory.max": "200M", "memory.swap.max": "0", "cpu.max": "50%"}
CONFIG = """
[service.plain]
runtime = "python"

[pocket.victim]
service = "plain"
dir = "{place}/victim"

[pocket.attacker]
service = "plain"
dir = "{place}/attacker"
program = "attack.py"
limits = {{ {limits} }}
"""
APP = "def nothing():\n    return None\n"


def timed(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return (time.perf_counter() - begun) * 1e3


class Victims:
    """Those who notice: each measure is made over and over for a while, one after the other."""

    def __init__(self, runtime_dir: str):
        self.runtime_dir = runtime_dir
        self.session = login("victim", runtime_dir=runtime_dir, timeout=120)
        self.control = Control(runtime_dir)

    def launch(self) -> None:
        login("victim", runtime_dir=self.runtime_dir, timeout=120).close()

    def measure(self, seconds: float) -> dict[str, tuple[float, float]]:
        """Milliseconds: the median and the 99th of a hundred."""
        found: dict[str, list[float]] = {"call": [], "pocketd": [], "launch": []}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                found["call"].append(timed(lambda: self.session.call("app:nothing")))
            found["pocketd"].append(timed(lambda: self.control.call("describe", name="victim", timeout=120)))
            found["launch"].append(timed(self.launch))
        return {name: (statistics.median(s), sorted(s)[int(len(s) * 0.99)]) for name, s in found.items()}

    def close(self) -> None:
        self.session.close()
        self.control.close()


@contextlib.contextmanager
def inside(pocketd: OwnPocketd, kind: str) -> Iterator[None]:
    """A program in the attacker's pocket."""
    process = subprocess.Popen(
        [str(BIN / "pocket"), "attacker", kind],
        env=pocketd.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout
    assert process.stdout.readline() == b"begun\n", kind
    drain = threading.Thread(target=swallow, args=(process.stdout.fileno(),), daemon=True)
    drain.start()
    try:
        yield
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def swallow(fd: int) -> None:
    while os.read(fd, 1 << 20):
        pass


@contextlib.contextmanager
def outside(pocketd: OwnPocketd, kind: str) -> Iterator[None]:
    """A local user at the control socket: 10 000 connections, or requests whose answers it never reads."""
    path = f"{pocketd.runtime}/pocketd.sock"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(UID, UID, UID)
            os.write(write, b"b")
            storm(path) if kind == "connections" else deaf(path)
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def storm(path: str) -> None:
    held: list[socket.socket] = []
    while True:
        for _ in range(10_000):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.setblocking(False)
            try:
                s.connect(path)
                held.append(s)
            except OSError:
                s.close()
            if len(held) > 500:
                held.pop(0).close()


def deaf(path: str) -> None:
    held: list[socket.socket] = []
    while True:
        with contextlib.suppress(OSError):
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            s.connect(path)
            held.append(s)
        for s in held[-20:]:
            with contextlib.suppress(OSError):
                while True:
                    wire.send(s, {"op": "ps", "id": 1}, flags=socket.MSG_DONTWAIT)
        if len(held) > 100:
            held.pop(0).close()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with Hierarchy.find() as hierarchy, tempfile.TemporaryDirectory(prefix="attack-", dir="/var/tmp") as directory:
        place = Path(directory)
        place.chmod(0o755)
        for name, file, text in (
            ("victim", "app.py", APP),
            ("attacker", "attack.py", (HERE / "programs/attack.py").read_text()),
        ):
            (place / name).mkdir()
            (place / name / file).write_text(text)
        held = {k: v for k, v in LIMITS.items() if not hierarchy.refusals({k: v})}
        missing = sorted(set(LIMITS) - set(held))
        if missing:
            print(f"this host cannot enforce {', '.join(missing)}: no attack on processes or memory")
        kinds = [kind for kind in INSIDE if not missing or kind not in ("processes", "memory", "files")]
        config = place / "pocketd.conf"
        config.write_text(CONFIG.format(place=place, limits=", ".join(f'"{k}" = "{v}"' for k, v in held.items())))
        with OwnPocketd(place, config) as pocketd:
            pocketd.turn_on("plain")
            os.chmod(f"{pocketd.runtime}/pocketd.sock", 0o666)
            victims = Victims(str(pocketd.runtime))
            victims.measure(1)
            print(f"{'ms: median, p99':<24}{'call':>18}{'pocketd':>18}{'launch':>18}")
            show("nobody attacks", victims.measure(seconds))
            for kind in kinds:
                with inside(pocketd, kind):
                    show(kind, victims.measure(seconds))
            for kind in ("connections", "never reading"):
                with outside(pocketd, kind):
                    show(kind, victims.measure(seconds))
            show("nobody attacks", victims.measure(seconds))
            victims.close()


def show(name: str, found: dict[str, tuple[float, float]]) -> None:
    cells = "".join(f"{f'{median:.2f} {p99:.2f}':>18}" for median, p99 in found.values())
    print(f"{name:<24}{cells}", flush=True)


if __name__ == "__main__":
    main()
