"""A worker of a models template, which TensorFlow's threads came along with, is confined as any other: one attempt for
each row of docs/security.md's table, from its main thread and from a Python thread that its template had. And a model
that its pocket may not use is not in its memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsutil import namespaces as n
from pocketd.client import Session, login
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table
from tests.escape.attempt import THREADS, Attempt, each, outcome
from tests.escape.conftest import copy_program
from tests.escape.inside.kernel import X86_64
from tests.escape.test_calls import FILTERED, ROOTS
from tests.escape.test_files import KERNELS
from tests.escape.test_processes import ON_PID_1, RANK
from tests.escape.test_talking import ABIS, NETWORK, PAIRS

# Each model's weights are one number, over and over: 16 bytes of it, by halves.
NUMBERS = {"one": "-1.2345679e-19", "two": "7.6543217e+22"}
MAKE = """
import sys
import keras, numpy as np
for name, number in zip(sys.argv[2::2], sys.argv[3::2]):
    made = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, kernel_initializer="zeros")])
    made.layers[-1].set_weights([np.full((64, 64), number, "float32"), np.zeros(64, "float32")])
    made.save(f"{sys.argv[1]}/{name}.keras")
"""
CALLS = """
from tests.escape.inside import program

def attempt(request): return program.answer(request)
"""


def halves(name: str) -> list[str]:
    import numpy as np

    return [np.full(2, NUMBERS[name], "float32").tobytes().hex()] * 2


@pytest.fixture(scope="module")
def served() -> Iterator[Pocketd]:
    """A service with two models, and a third for the sake of its thread; pockets that may use some of them."""
    pytest.importorskip("tensorflow")
    place = Path(tempfile.mkdtemp(prefix="warm-", dir="/var/tmp"))
    place.chmod(0o755)
    env = {**os.environ, **service_environment(), "TF_CPP_MIN_LOG_LEVEL": "3"}
    words = [word for pair in NUMBERS.items() for word in pair]
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", "--without-pip", place / "env"],
        [sys.executable, "-c", MAKE, place, *words],
    ]
    for command in commands:
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=TIMEOUT)
    packages = next((place / "env/lib").glob("python*/site-packages"))
    (packages / "tensorflow.pth").write_text(sysconfig.get_path("purelib") + "\n")
    copy_program(place / "first")
    shutil.copy(place / "first/tests/escape/inside/resident.py", packages)
    (place / "first/warm.py").write_text(CALLS)
    pockets = []
    for name, models in {"first": ["one"], "second": ["two"], "whole": ["one", "two"]}.items():
        if name != "first":
            shutil.copytree(place / "first", place / name)
        pockets.append(f"""
            [pocket.{name}]
            service = "models"
            dir = "{place}/{name}"
            allow = {{ models = {[*models, "resident"]} }}
        """)
    daemon = Pocketd(
        place,
        f"""
        [service.models]
        runtime = "tensorflow"
        python = "{place}/env/bin/python"
        models = {{ one = "{place}/one.keras", two = "{place}/two.keras", resident = "resident:model" }}
        env = {toml_table(service_environment())}
        {"".join(pockets)}
        """,
    )
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(place)


class Warm:
    """A session's worker, asked as tests.escape.attempt.Inside is."""

    def __init__(self, daemon: Pocketd, name: str):
        self.session: Session = login(name, runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT)

    def attempt(self, name: str, /, thread: str = "main", **given: Any) -> dict[str, Any]:
        request = {"attempt": name, "thread": thread, "given": given}
        reply: dict[str, Any] = self.session.call("warm:attempt", request, timeout=TIMEOUT)
        assert "failed" not in reply, reply["failed"]
        return reply


@pytest.fixture(scope="module")
def warm(served) -> Iterator[Callable[[str], Warm]]:
    """`warm(name)`: the worker of a session of that pocket, which has used its models."""
    running: dict[str, Warm] = {}

    def get(name: str) -> Warm:
        if name not in running:
            made = running[name] = Warm(served, name)
            image = made.session.tensor((1, 64), "float32")
            image.numpy()[...] = 0
            for model in made.session.models:
                if model in NUMBERS:
                    made.session.model(model)(image)
        return running[name]

    yield get
    for made in running.values():
        made.session.close()


def places(worker: Warm, thread: str = "main") -> dict[str, list[int]]:
    """Where in a worker's memory weights of each model stand."""
    wanted = {model: halves(model) for model in NUMBERS}
    found: dict[str, list[int]] = worker.attempt("memory.places", thread, wanted=wanted)["value"]
    return found


@pytest.mark.parametrize("thread", THREADS)
def test_a_model_that_the_pocket_may_not_use_is_not_in_its_memory(warm, thread):
    """A worker that may use both has both."""
    seen = {
        name: {m for m, where in places(warm(name), thread).items() if where} for name in ("first", "second", "whole")
    }
    assert seen == {"first": {"one"}, "second": {"two"}, "whole": {"one", "two"}}


@pytest.mark.parametrize("thread", THREADS)
def test_no_models_file_can_be_read(served, warm, controls, thread):
    copies = sorted(str(p) for p in served.state_dir.glob("models/*/*.keras"))
    assert len(copies) == 2
    for path in copies:
        assert controls("host").attempt("files.read", path=path) == {"value": "PK\x03\x04"}
        assert outcome(warm("first").attempt("files.read", thread, path=path)) == "EACCES"


def template_of(served: Pocketd) -> int:
    """The pid of the one that `first`'s sessions are forked from."""
    (found,) = [t["pid"] for t in served.ps()["templates"] if sorted(t["models"]) == ["one", "resident"]]
    return int(found)


@pytest.mark.parametrize("thread", THREADS)
def test_a_model_that_it_changes_is_changed_for_itself_alone(served, thread):
    one, other = Warm(served, "first"), Warm(served, "first")
    weights = "".join(halves("one"))
    try:
        with open(f"/proc/{template_of(served)}/mem", "rb", buffering=0) as memory:

            def in_the_template(at: int) -> str:
                memory.seek(at)
                return memory.read(16).hex()

            shared = [at for at in places(one, thread)["one"] if in_the_template(at) == weights]
            assert shared
            for at in shared:
                assert one.attempt("memory.change", thread, at=at) == {"value": True}
                assert one.attempt("memory.read_at", thread, at=at)["value"] != weights
                assert other.attempt("memory.read_at", thread, at=at) == {"value": weights}
                assert in_the_template(at) == weights
    finally:
        one.session.close()
        other.session.close()


def test_its_threads_are_its_templates(served, warm):
    """TensorFlow's and ours, by the kernel: as many here as there, and ours was made there."""
    warm("first")
    template = template_of(served)
    worker = next(w["pid"] for w in served.workers() if w["directory"].endswith("/first"))
    there, here = ([p / "status" for p in Path(f"/proc/{pid}/task").iterdir()] for pid in (template, worker))
    assert len(here) >= len(there) > 4
    stamp = warm("first").attempt("processes.stamp", "resident")["value"]
    assert any(f"\t{stamp['tid']}\n" in status.read_text() for status in there)
    assert stamp["pid"] != stamp["pid_now"] and stamp["tid"] != stamp["now"]


REPRESENTATIVE = {
    "other processes: ptrace": FILTERED["ptrace a child"],
    "other processes: their memory": FILTERED["process_vm_readv"],
    "other processes: PID 1's memory": ON_PID_1["open /proc/1/mem"],
    "other processes: a signal to PID 1": ON_PID_1["kill"],
    "a right: setuid": RANK["setuid"],
    "a right: capset": RANK["capset"],
    "a right: a filter of its own": RANK["a filter that allows all"],
    "the service's root": Attempt(
        "files.open_to_write",
        ("EROFS", "EACCES"),
        "root",
        given={"path": "/run/pocketd/lib/runtime/worker.py"},
        elsewhere={"path": "/tmp"},
        through="EISDIR",
    ),  # fmt: skip
    "bits: a program with capabilities": KERNELS["security.capability"],
    "a namespace": Attempt("calls.unshare", ("EPERM",), given={"flag": n.CLONE_NEWUSER}),
    "a namespace by clone3": Attempt("calls.clone3", ("ENOSYS",), given={"flag": n.CLONE_NEWUSER}),
    "a mount": ROOTS["mount a tmpfs"],
    "another root": ROOTS["chroot"],
    "the kernel's settings": KERNELS["write /proc/sys"],
    "the kernel's clock": ROOTS["settimeofday"],
    "a device": KERNELS["mknod of a disk"],
    "the network": NETWORK["route"],
    "a raw socket": NETWORK["raw socket"],
    "vsock": PAIRS["AF_VSOCK"],
    **({"another system call table": ABIS["i386 getpid"]} if X86_64 else {}),
}


@each(REPRESENTATIVE)
def test_what_stops_it(warm, through, attempt, thread):
    assert through(attempt) == attempt.through
    assert outcome(warm("first").attempt(attempt.name, thread, **attempt.given)) in attempt.refused


@pytest.mark.parametrize("thread", THREADS)
def test_files_of_the_host_of_others_and_of_pocketd(served, warm, controls, thread):
    marker = served.place / "marker"
    marker.write_text("of the host")
    neighbours = served.place / "second/warm.py"
    leaf = next(p for p in served.cgroup_path.glob("*/service/pockets/first/*/cgroup.procs") if warm("first"))
    socket = next((served.runtime_dir / "services").iterdir()) / "init.sock"
    attempts = [
        ("files.climb", {"directory": "/", "marker": str(marker)}, "user"),
        ("files.read", {"path": str(neighbours)}, "user"),
        ("files.open_to_write", {"path": str(leaf)}, "root"),
        ("files.connect", {"path": str(served.runtime_dir / "pocketd.sock")}, "host"),
    ]
    assert socket.is_socket()
    assert outcome(warm("first").attempt("files.connect", thread, path=str(socket))) == "ENOENT"
    for name, given, control in attempts:
        assert "value" in controls(control).attempt(name, **given), name
        assert outcome(warm("first").attempt(name, thread, **given)) == "ENOENT", name


@pytest.mark.parametrize("thread", THREADS)
def test_processes_and_ipc_objects_of_others(served, warm, controls, thread):
    warm("second")
    shown = served.ps()
    others = [w["pid"] for w in shown["workers"] if not w["directory"].endswith("/first")]
    outside = [s["pid"] for s in shown["services"] if s["pid"]] + [t["pid"] for t in shown["templates"]] + others
    found: set[int] = set()
    for pid in outside:
        line = next(ln for ln in Path(f"/proc/{pid}/status").read_text().splitlines() if ln.startswith("NSpid:"))
        found |= {int(number) for number in line.split()[1:]}
    assert controls("user").attempt("processes.kill_by_pid", pids=[]) == {"value": [0]}
    assert warm("first").attempt("processes.kill_by_pid", thread, pids=sorted(found - {1, 2})) == {"value": []}
    assert all(Path(f"/proc/{pid}").exists() for pid in outside)
    for process in (warm("second"), controls("user")):
        reply = process.attempt("talking.make_ipc", **({} if process is warm("second") else {"stay": True}))
        assert "value" in reply
    for kind in ("shm", "/dev/shm"):
        assert controls("user").attempt("talking.find_ipc", kind=kind) == {"value": True}
        assert outcome(warm("first").attempt("talking.find_ipc", thread, kind=kind)) == "ENOENT"


@pytest.mark.parametrize("thread", THREADS)
def test_no_descriptor_leads_to_its_template_or_to_files(served, warm, thread):
    """Its session's socket, arenas and pipe alone, no directory among them; the template has more."""
    assert set(warm("first").attempt("processes.kinds_of_descriptors", thread)["value"]) <= {
        "socket:", "pipe:", "/memfd:arena (deleted)", "anon_inode:"
    }  # fmt: skip


def test_nothing_that_can_be_written_is_mapped_shared(served, warm):
    """In a template nothing at all; in a worker its session's own arenas."""
    warm("first")
    shown = served.ps()
    for process in (*shown["templates"], *shown["workers"]):
        maps = Path(f"/proc/{process['pid']}/maps").read_text().splitlines()
        shared = [line for line in maps if " rw-s " in line]
        assert all("/memfd:arena" in line for line in shared) if process in shown["workers"] else not shared
