"""What others notice of an attack on resources: the latency of a session's calls, of launches and of pocketd itself,
while a pocket with limits, its client, or a local user takes all that it can get, beside the same with nobody
attacking, measured in turn.

usage, as root, best in the test VM, which has every controller:

    python -m tests.vm --run 'python -m bench.attack 10 /run/vm/results/attack.json'   seconds of each, the results
    python -m bench.attack 2 /tmp/attack.json memory logins                            these alone
    python -m bench.attack --table RESULTS.JSON                                        the table of docs/security.md
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import pwd
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from bench.own import BIN, OwnPocketd
from cgroup.hierarchy import Hierarchy
from nsutil import messages
from pocketd import wire
from pocketd.client import login
from pocketd.client.control import Control
from pocketd.client.handshake import Login, open_login
from pocketd.client.session import request

HERE = Path(__file__).resolve().parent
USER = "nobody"  # the local user who may connect and means no good
PATIENCE = 300.0  # seconds: what takes longer is reported as a failure
LIMITS = {"pids.max": "200", "memory.max": "200M", "memory.swap.max": "0", "cpu.max": "50%"}
ENDLESS = {k: v for k, v in LIMITS.items() if k != "cpu.max"}
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
may_run = ["{user}"]
limits = {{ {limits} }}

[pocket.endless]
service = "plain"
dir = "{place}/attacker"
program = "attack.py"
limits = {{ {endless} }}
"""
APP = "def nothing():\n    return None\n"
Attack = Callable[[OwnPocketd], AbstractContextManager[object]]


# -- who notices


def timed(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return (time.perf_counter() - begun) * 1e3


class Victims:
    """Those who notice: each measure is made over and over for a while, one after the other."""

    def __init__(self, runtime_dir: str):
        self.runtime_dir = runtime_dir
        self.session = login("victim", runtime_dir=runtime_dir, timeout=PATIENCE)
        self.control = Control(runtime_dir)

    def launch(self) -> None:
        login("victim", runtime_dir=self.runtime_dir, timeout=PATIENCE).close()

    def measure(self, seconds: float) -> dict[str, list[float]]:
        """Milliseconds."""
        found: dict[str, list[float]] = {"call": [], "pocketd": [], "launch": []}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(10):
                found["call"].append(timed(lambda: self.session.call("app:nothing", timeout=PATIENCE)))
                found["pocketd"].append(timed(lambda: self.control.call("describe", name="victim", timeout=PATIENCE)))
            found["launch"].append(timed(self.launch))
        return found

    def close(self) -> None:
        self.session.close()
        self.control.close()


# -- attacks from inside a pocket


def program(kind: str, pocket: str = "attacker") -> Attack:
    @contextlib.contextmanager
    def attack(pocketd: OwnPocketd) -> Iterator[None]:
        process = subprocess.Popen(
            [str(BIN / "pocket"), pocket, kind],
            env=pocketd.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert process.stdout and process.stdout.readline() == b"begun\n", kind
            yield
            if process.poll() is not None:
                raise SystemExit(f"the attack on {kind} ended by itself, with {process.returncode}")
        finally:
            process.kill()
            process.wait()

    return attack


# -- by its client


@contextlib.contextmanager
def flooded_log(pocketd: OwnPocketd) -> Iterator[None]:
    with login("attacker", runtime_dir=str(pocketd.runtime), timeout=PATIENCE) as session:

        def call() -> None:
            with contextlib.suppress(Exception):  # the session is closed under it
                session.call("attack:output")

        thread = threading.Thread(target=call)
        thread.start()
        yield
    thread.join()


@contextlib.contextmanager
def raw_session(pocketd: OwnPocketd) -> Iterator[Login]:
    wake, cancel = os.pipe()
    with Control(str(pocketd.runtime)) as control:
        made = open_login(control, **request("attacker", None, wake, None, PATIENCE))  # type: ignore[arg-type]
    with made.session, made.hold:
        yield made
    os.close(wake)
    os.close(cancel)


def client(kind: str) -> Attack:
    @contextlib.contextmanager
    def attack(pocketd: OwnPocketd) -> Iterator[None]:
        with raw_session(pocketd) as made, beside(lambda: CLIENTS[kind](made)):
            yield

    return attack


def signals(made: Login) -> None:
    """For init to pass on, as fast as it takes them."""
    while True:
        wire.send(made.hold, {"op": "signal", "signal": signal.SIGCONT})


def deaf_client(made: Login) -> None:
    """Calls with large replies, none of which is read; and signals, which init would answer if they were wrong."""
    call = {"op": "call", "id": 1, "target": "attack:replies", "args": [], "kwargs": {}}
    while True:
        wire.send(made.session, call)


CLIENTS = {"signals": signals, "deaf": deaf_client}


# -- by a local user


def local_user(what: Callable[[str], None]) -> Attack:
    @contextlib.contextmanager
    def attack(pocketd: OwnPocketd) -> Iterator[None]:
        with beside(lambda: what(f"{pocketd.runtime}/pocketd.sock"), pwd.getpwnam(USER).pw_uid):
            yield

    return attack


@contextlib.contextmanager
def beside(what: Callable[[], None], uid: int = 0) -> Iterator[None]:
    """Do it in a process of its own, with that uid, until the end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.write(write, b"b")
            what()
        finally:
            os._exit(1)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    try:
        yield
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            raise SystemExit("an attack ended by itself")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def connection(path: str) -> socket.socket | None:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    s.setblocking(False)
    try:
        s.connect(path)
        return s
    except OSError:
        s.close()
        return None


def storm(path: str) -> None:
    """Connections, as many as it gets, kept and given up again."""
    held: list[socket.socket] = []
    while True:
        s = connection(path)
        if s:
            held.append(s)
        if len(held) > 500:
            held.pop(0).close()


def deaf(path: str) -> None:
    """Requests whose answers it never reads."""
    held: list[socket.socket] = []
    while True:
        s = connection(path)
        if s:
            held.append(s)
        for s in held[-20:]:
            with contextlib.suppress(OSError):
                while True:
                    wire.send(s, {"op": "ps", "id": 1}, flags=socket.MSG_DONTWAIT)
        if len(held) > 100:
            held.pop(0).close()


def logins(path: str) -> None:
    """Sessions, as many as it gets, each given up a little later."""
    controls: list[socket.socket] = []
    held: list[tuple[socket.socket, ...]] = []
    while True:
        s = connection(path)
        if s:
            controls.append(s)
        if len(controls) > 100:
            controls.pop(0).close()
        for s in controls:
            (session, worker), (hold, init) = messages.pair(), messages.pair()
            login = {"session": os.urandom(16).hex(), "mode": "client", "name": "attacker"}
            fields = {"op": "login", "id": 1, "path": None, "roles": ["session", "hold"], **login}
            with worker, init, contextlib.suppress(OSError):
                wire.send(session, {"op": "start", "mode": "client", "environment": [], "directory": b"/"})
                wire.send(s, fields, [worker.fileno(), init.fileno()], socket.MSG_DONTWAIT)
            held.append((session, hold))
            if len(held) > 200:
                for end in held.pop(0):
                    end.close()


# -- the run

NOBODY = "nobody attacks"
ATTACKS: dict[str, tuple[str, Attack]] = {
    "processor": ("a pocket computes in 8 threads, cpu.max 50%", program("processor")),
    "endless": ("the same without cpu.max", program("processor", "endless")),
    "processes": ("a fork bomb that computes", program("processes")),
    "children": ("processes for init to reap", program("children")),
    "memory": ("memory, killed by its limit over and over", program("memory")),
    "files": ("/tmp filled and emptied", program("files")),
    "memfds": ("memory files, as many as it can open", program("memfds")),
    "descriptors": ("descriptors in flight over sockets", program("descriptors")),
    "watches": ("inotify", program("watches")),
    "terminals": ("terminals", program("terminals")),
    "keyrings": ("keyrings, all refused", program("keyrings")),
    "output": ("its log, in short lines", flooded_log),
    "signals": ("a client sends signals for its worker", client("signals")),
    "deaf": ("a client never reads its worker's replies", client("deaf")),
    "connections": ("a local user connects, without end", local_user(storm)),
    "never-reading": ("a local user never reads pocketd's answers", local_user(deaf)),
    "logins": ("a local user logs in, without end", local_user(logins)),
}
NEEDS_LIMITS = {"processes", "memory", "files", "memfds", "descriptors"}


def table(results: Mapping[str, Any]) -> str:
    """The results as a table of Markdown. Of fewer than a hundred p99 is the most: so the count is there."""
    alone: dict[str, list[float]] = {}
    for row in results["rows"]:
        for name, found in row["alone"].items():
            alone.setdefault(name, []).extend(found)
    lines = [["", *(f"{name}: median, p99" for name in alone), "launches"], ["---"] * (2 + len(alone))]
    for what, found in [(NOBODY, alone), *((row["what"], row["attacked"]) for row in results["rows"])]:
        cells = []
        for name, s in found.items():
            text = f"{statistics.median(s):.1f}, {p99(s):.1f}"
            cells.append(text if found is alone else f"{text} ({p99(s) / p99(alone[name]):.1f})")
        lines.append([what, *cells, str(len(found["launch"]))])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def p99(s: Sequence[float]) -> float:
    return sorted(s)[int(len(s) * 0.99)]


def run(seconds: float, wanted: Sequence[str]) -> dict[str, Any]:
    rows = []
    with Hierarchy.find() as hierarchy, tempfile.TemporaryDirectory(prefix="attack-", dir="/var/tmp") as directory:
        place = Path(directory)
        place.chmod(0o755)
        for name, file, text in (
            ("victim", "app.py", APP),
            ("attacker", "attack.py", (HERE / "programs/attack.py").read_text()),
        ):
            (place / name).mkdir()
            (place / name / file).write_text(text)
        missing = [k for k, v in LIMITS.items() if hierarchy.refusals({k: v})]
        kinds = [kind for kind in wanted if not missing or kind not in NEEDS_LIMITS]
        if missing:
            print(f"this host cannot enforce {', '.join(missing)}: without {', '.join(sorted(NEEDS_LIMITS))}")
        limits, endless = (
            ", ".join(f'"{k}" = "{v}"' for k, v in given.items() if k not in missing) for given in (LIMITS, ENDLESS)
        )
        config = place / "pocketd.conf"
        config.write_text(CONFIG.format(place=place, user=USER, limits=limits, endless=endless))
        with OwnPocketd(place, config) as pocketd:
            pocketd.turn_on("plain")
            os.chmod(f"{pocketd.runtime}/pocketd.sock", 0o666)
            victims = Victims(str(pocketd.runtime))
            victims.measure(1)
            for kind in kinds:
                what, attack = ATTACKS[kind]
                alone = victims.measure(seconds / 2)
                with attack(pocketd):
                    time.sleep(0.2)
                    attacked = victims.measure(seconds)
                rows.append({"kind": kind, "what": what, "alone": alone, "attacked": attacked})
                p = {name: f"{p99(alone[name]):.1f} {p99(attacked[name]):.1f}" for name in alone}
                print(f"{kind:<16}" + "  ".join(f"{name}: {text}" for name, text in p.items()), flush=True)
            victims.close()
    return {"seconds": seconds, "kernel": platform.release(), "python": platform.python_version(), "rows": rows}


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--table"]:
        print(table(json.loads(Path(words[1]).read_text())))
        return
    out = Path(words[1]) if len(words) > 1 else HERE / "results/attack.json"
    results = run(float(words[0]) if words else 5.0, words[2:] or list(ATTACKS))
    out.write_text(json.dumps(results))
    print(table(results))


if __name__ == "__main__":
    main()
