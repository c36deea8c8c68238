"""A pocket takes all it can get of one thing, to its limits: others go on, pocketd answers, and nothing is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pocketd.client import login
from tests.conftest import ROOT, TIMEOUT, wait_for
from tests.vm.guest.installed import Program, call, cgroup_of, configure, ps, settled

pytestmark = pytest.mark.usefixtures("pockets")
SCRATCH = Path("/var/lib/vm-scratch")
LIMITS = '"pids.max" = 100, "memory.max" = "200M", "memory.swap.max" = 0, "cpu.max" = "50%"'
SECOND = 1_000_000  # of a processor, in microseconds
# What shows that an attack came to where it is held: a file of its cgroup's, the word in it, and more than how much.
HELD = {
    "processes": ("pids.events", "max", 0),
    "children": ("cpu.stat", "usage_usec", SECOND),
    "memory": ("memory.events", "oom_kill", 1),
    "files": ("memory.stat", "shmem", 50 << 20),
    "memfds": ("memory.stat", "shmem", 50 << 20),
    "descriptors": ("memory.stat", "slab", 4 << 20),
    "watches": ("cpu.stat", "usage_usec", SECOND),
    "terminals": ("cpu.stat", "usage_usec", SECOND),
    "keyrings": ("cpu.stat", "usage_usec", SECOND),
}


@pytest.fixture(scope="module")
def pockets(installed):
    for name in ("attacker", "bystander"):
        (SCRATCH / name).mkdir(exist_ok=True)
    shutil.copy(ROOT / "bench/programs/attack.py", SCRATCH / "attacker")
    (SCRATCH / "bystander/app.py").write_text("def nothing():\n    return None\n")
    configure(
        "attacks",
        f"""
        [pocket.attacker]
        service = "plain"
        dir = "{SCRATCH}/attacker"
        limits = {{ {LIMITS} }}

        [pocket.bystander]
        service = "plain"
        dir = "{SCRATCH}/bystander"
        """,
    )
    call("on", name="plain")


def value(name: str, key: str) -> int:
    found = dict(line.split() for line in (cgroup_of("attacker") / name).read_text().splitlines())
    return int(found[key])


def processes_of(uid: str) -> list[str]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue  # it has ended
        if f"\nUid:\t{uid}\t" in text:
            found.append(text.splitlines()[0])
    return found


@pytest.mark.parametrize("kind", HELD)
def test_others_go_on_and_nothing_is_left(kind):
    name, key, more_than = HELD[kind]
    with login("bystander", timeout=TIMEOUT) as before:
        with Program("attacker", f"import attack; attack.main({kind!r})") as program:
            assert program.line() == "begun"
            pid = program.login.reply["pid"]
            uid = Path(f"/proc/{pid}/status").read_text().partition("\nUid:\t")[2].split()[0]
            assert wait_for(lambda: value(name, key) > more_than), (kind, value(name, key))
            assert before.call("app:nothing", timeout=TIMEOUT) is None
            with login("bystander", timeout=TIMEOUT) as session:
                assert session.call("app:nothing", timeout=TIMEOUT) is None
            assert "attacker" in [worker["pocket"] for worker in ps()["workers"]]  # so that it went on meanwhile
            assert processes_of(uid)
        assert settled("attacker")
        assert processes_of(uid) == []
        assert before.call("app:nothing", timeout=TIMEOUT) is None
