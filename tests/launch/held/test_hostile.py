"""A pocket's template is its program's to take over. What it does then harms its own pocket alone, and leaves nothing."""

# ruff: noqa: E501
from __future__ import annotations

import subprocess
import textwrap

import pytest

from tests.conftest import TIMEOUT, wait_for
from tests.launch.both import Ended, finish
from tests.launch.held.pocket import Pocket, popen

# What each program begins with: the template's own objects, its socket, and the means to be called when it is asked.
REACH = """
import ctypes, gc, os, signal, socket, sys, threading, time
held = getattr(sys, '_pocketd_held', None)
libc = ctypes.CDLL(None, use_errno=True)
mine = os.getpid()
def asked(attack):
    "Have `attack(message, leaf, session)` called in the template in place of its fork."
    if held: type(held).fork = lambda self, message, leaf, session, avoid, *more: attack(message, leaf, session)
_send = type(held).refuse.__globals__["wire"].send if held else None
def say(**words):
    _send(held.talk, words)
"""
# What it does when a run is asked for; `message`, `leaf` and `session` are what it was given.
ATTACKS = {
    "says that it has forked": "say(op='forked', launch=message['launch'])",
    "says so of others' launches": "[say(op='forked', launch=n) for n in range(300)]",
    "says nothing": "pass",
    "ends": "os._exit(0)",
    "is killed": "os.kill(os.getpid(), 9)",
    "closes its socket": "held.talk.close(); time.sleep(600)",
    "sends garbage": "os.write(held.talk.fileno(), b'\\xff' * 4000)",
    "sends an empty message": "held.talk.send(b'')",
    "sends a flood": "[say(op='forked', launch=message['launch'], more='x' * 9000) for _ in range(3000)]",
    "sends descriptors": "socket.send_fds(held.talk, [b'x'], [0, 1, 2])",
    "says odd things": "[say(op=op, launch=launch) for op in ('ready', 'failed', 'uncover', 'forked', 'x', None, 3) for launch in (-1, None, 'x', 1 << 60, [], {})]",
    "refuses without words": "say(op='refused', launch=message['launch'], error=None)",
    "refuses with too many": "say(op='refused', launch=message['launch'], error={'code': 'x' * 3000, 'message': 'y' * 9000, 'detail': {}})",
    "refuses with itself in the details": "say(op='refused', launch=message['launch'], error={'code': 'x', 'message': 'y', 'detail': {'self': 1, 'code': 2, 'message': 3}})",
    "reads the session": "socket.socket(fileno=os.dup(session)).recv(1 << 20)",
    "answers on the session": "os.write(session, b'x' * 100)",
    "floods the session": "s = socket.socket(fileno=os.dup(session)); s.setblocking(False)\n    try:\n        while True: s.send(b'x' * 4096)\n    except OSError: pass",
    "floods each descriptor": "for fd in range(3, 64):\n        try:\n            os.set_blocking(fd, False)\n            while True: os.write(fd, b'x' * 4096)\n        except OSError: pass",
    "forks elsewhere": "\n    if os.fork() == 0: time.sleep(600)\n    say(op='forked', launch=message['launch'])",
    "makes a sibling": "\n    libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0) == 0 and time.sleep(600)\n    say(op='forked', launch=message['launch'])",
    "makes many siblings": "\n    for _ in range(50): libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0) == 0 and os._exit(7)\n    say(op='forked', launch=message['launch'])",
    "keeps the leaf, and kills": "held.kept = os.dup(leaf)\n    for name in ('cgroup.kill', '../cgroup.kill', '../self/cgroup.kill'):\n        try: os.write(os.open(name, os.O_WRONLY, dir_fd=leaf), b'1')\n        except OSError: pass",
}  # fmt: skip


def program(body: str) -> str:
    return (
        textwrap.dedent(REACH)
        + f"def attack(message, leaf, session):\n    {body}\n"
        + "here = None\nprint('ran', sys.argv[1:])\n"
    )


@pytest.fixture
def other(hold) -> Pocket:
    pocket = hold("import os\nhere = None\nprint('other', os.getuid() > 0)\n", "here =", warm=1)
    pocket.warm()
    return pocket


def unharmed(hostile: Pocket, other: Pocket) -> None:
    """Other pockets, the service and pocketd answer; of the hostile one nothing is left once it is cooled."""
    assert other.pocket() == Ended(0, b"other True\n", b"")
    assert other.pocketd.ps()["services"]
    hostile.cool()
    assert hostile.gone(), hostile.processes()


@pytest.mark.parametrize("what", [*ATTACKS])
def test_a_template_that(hold, other, what):
    pocket = hold(program(ATTACKS[what]), "here =")
    pocket.write("app.py", program(ATTACKS[what]).replace("here = None\n", "asked(attack)\nhere = None\n"))
    init = [s["pid"] for s in pocket.pocketd.ps()["services"] if s["name"] == "plain"]
    pocket.warm()
    runs = [popen(pocket, "x") for _ in range(2)]
    assert other.pocket() == Ended(0, b"other True\n", b"")
    for run in runs:  # it may have had the caller's start, and then it is its own run that is lost
        try:
            out, _ = run.communicate(timeout=5 if what == "reads the session" else TIMEOUT)
        except subprocess.TimeoutExpired:  # what it waits for, its own template has taken
            assert what == "reads the session"
            run.kill()
            out, _ = run.communicate()
        assert out in (b"", b"ran ['x']\n")
    unharmed(pocket, other)
    assert init == [s["pid"] for s in pocket.pocketd.ps()["services"] if s["name"] == "plain"]


def test_a_template_that_stops_itself(hold, other):
    pocket = hold(
        program("os.kill(os.getpid(), 19)").replace("here = None\n", "asked(attack)\nhere = None\n"), "here ="
    )
    pocket.warm()
    run = popen(pocket, "x")
    assert other.pocket() == Ended(0, b"other True\n", b"")
    assert finish(run) == Ended(0, b"ran ['x']\n", b"")  # another way, when its time is up
    unharmed(pocket, other)


LOOKS = """
import os, sys
def look(leaf):
    found = []
    def tried(what, path, flags=os.O_RDONLY, data=None):
        try:
            fd = os.open(path, flags, dir_fd=leaf)
            if data is not None: os.write(fd, data)
            found.append(what)
        except OSError: pass
    for up in ("..", "../..", "../../..", "../../../.."):
        for name in ("other", "init", "templates", "cgroup.procs", "cgroup.kill"):
            tried(f"{up}/{name}", f"{up}/{name}", os.O_WRONLY if "." in name else os.O_RDONLY)
    return found
"""


def test_the_leaf_that_it_is_given_leads_nowhere(hold, other):
    """Beneath its own cgroup it may look; not above, and nothing can be killed or moved out of there."""
    source = REACH + LOOKS + (
        "plain = type(held).fork\n"
        "def attack(self, message, leaf, session, *rest):\n    found.extend(look(leaf))\n    return plain(self, message, leaf, session, *rest)\n"
        "found = []\ntype(held).fork = attack\nhere = None\nprint(sorted(set(found)))\n"
    )  # fmt: skip
    pocket = hold(source, "here =")
    pocket.warm()
    out = pocket.from_held().out.decode()
    reached = [path for path in eval(out) if path.startswith("../..") or "kill" in path]
    assert reached == [], out
    unharmed(pocket, other)


INSIDE = {
    "a user namespace by clone3": "args = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)\nr = libc.syscall(435, args, 88)\nif r == 0: os._exit(0)\nprint(r)",
    "a user namespace by unshare": "print(libc.unshare(0x10000000))",
    "a mount namespace": "print(libc.unshare(0x00020000))",
    "namespaces by clone3": "for flag in (0x00020000, 0x04000000, 0x08000000, 0x20000000, 0x40000000, 0x02000000):\n    args = (ctypes.c_uint64 * 11)(flag, 0, 0, 0, 17)\n    r = libc.syscall(435, args, 88)\n    if r == 0: os._exit(0)\n    assert r == -1\nprint(-1)",
    "a pid of its choice": "tid = ctypes.c_int32(77)\nargs = (ctypes.c_uint64 * 11)(0, 0, 0, 0, 17, 0, 0, 0, ctypes.addressof(tid), 1)\nr = libc.syscall(435, args, 88)\nif r == 0: os._exit(0)\nprint(r)",
    "ptrace of its parent": "print(libc.ptrace(16, os.getppid() or 1, 0, 0))",
}  # fmt: skip


@pytest.mark.parametrize("what", INSIDE)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_its_filter_lets_through_gives_nothing(hold, other, what, when):
    before, after = (INSIDE[what], "") if when == "before" else ("", INSIDE[what])
    source = f"import ctypes, os\nlibc = ctypes.CDLL(None)\n{before}\nhere = None\n{after}\n"
    pocket = hold(source, "here =")
    pocket.warm()
    assert pocket.from_held().out == b"-1\n"
    unharmed(pocket, other)


@pytest.mark.parametrize("when", ["before", "after"])
def test_processes_that_it_makes_are_its_own(hold, other, when):
    """Siblings by CLONE_PARENT are init's children: reaped, and ended with the pocket."""
    make = (
        "for _ in range(20):\n    if libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0) == 0: time.sleep(600) or os._exit(0)\n"
    )
    source = f"import ctypes, os, time\nlibc = ctypes.CDLL(None)\n{make if when == 'before' else ''}here = None\n{make if when == 'after' else ''}print('on', flush=True)\n"
    pocket = hold(source, "here =")
    pocket.warm()
    assert pocket.from_held() == Ended(0, b"on\n", b"")
    if when == "after":
        assert wait_for(lambda: pocket.processes() == [pocket.template])
    unharmed(pocket, other)


FLOOD = """
import sys, threading, os
def flood():
    while True:
        os.write(sys._pocketd_held.log, b"\\n" * 4096)
threading.Thread(target=flood, daemon=True).start()
here = None
print("ran")
"""


def test_a_template_that_writes_to_the_services_log_without_end(hold, other):
    """No more of it is written than of a worker's output: what others said is there still, and launches go on."""
    hostile = hold(FLOOD, "here =")
    witness = hold("print('this was said before')\nhere = None\nprint(1)\n", "here =")
    witness.warm()
    hostile.warm()
    for _ in range(5):
        assert other.pocket() == Ended(0, b"other True\n", b"")
    log = (other.pocketd.state_dir / "services/plain.log").read_text()
    assert f" of {hostile.name} " in log and "this was said before" in log
    unharmed(hostile, other)
