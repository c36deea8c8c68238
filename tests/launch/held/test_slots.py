"""Slots: workers made ahead of time. Each serves one run, which is as any other, and none is left behind."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cgroup.hierarchy import Hierarchy, path_of
from pocketd.client.control import Control
from pocketd.slots import DELAY
from runtime import workingset
from tests.conftest import ROOT, TIMEOUT, wait_for
from tests.launch.both import Ended, ends, finish, read_line
from tests.launch.held.pocket import Pocket, popen
from tests.launch.held.test_program import HERE, PRINTS

SHOW = f"""
import os, sys
name = os.path.basename(sys.argv[0])
print("before")
{HERE}
print(name, sys.argv[1:], os.getcwd(), os.environ.get("MINE"), oct(os.umask(0)), sys.stdin.read(), os.isatty(1))
print("error", file=sys.stderr)
sys.exit(7)
"""


def ready(pocket: Pocket, count: int) -> bool:
    """Wait for so many slots: processes beneath the pocket's cgroup that are no template and no session's."""

    def there() -> bool:
        sessions = len([w for w in pocket.pocketd.workers() if w["pocket"] == pocket.name])
        return len(pocket.processes()) == count + sessions + bool(pocket.row().get("template_pid"))

    return wait_for(there, 20)


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_a_run_from_a_slot_is_as_any_other(hold, checkpoint):
    pocket = hold(SHOW, checkpoint, warm=1)
    for words in (("a",), ("b", "c")):
        assert pocket.warm()["slots"] == 1
        pocket.same(*words, way="slot", input=b"text", env={"MINE": words[0]}, umask=0o27)


def test_slots_wait_when_warm_has_returned(hold):
    """Its pages take longer to make than an answer takes."""
    source = f"data = bytearray(200 << 20)\n{HERE}data[::4096] = bytes(len(data) // 4096)\n"
    pocket = hold(source, "here =", warm=2, rehearse=[])
    with Control(str(pocket.pocketd.runtime_dir), timeout=TIMEOUT) as control:
        for _ in range(3):
            assert control.call("warm", name=pocket.name)["slots"] == 2
            assert pocket.row(control.call("ps"))["slots"] == 2
            control.call("cool", name=pocket.name)


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_prints_from_a_slot(hold, checkpoint):
    pocket = hold(PRINTS, checkpoint, warm=1)
    pocket.warm()
    pocket.same(way="slot")


def test_a_slot_of_a_program_that_looked_at_its_directory(hold):
    pocket = hold(f"import os\nbefore = os.getcwd()\n{HERE}print(before, os.getcwd())\n", "here =", warm=1)
    pocket.warm()
    pocket.same(way="slot")
    pocket.warm()
    assert pocket.pocket(cwd="/usr").out.endswith(b"/usr /usr\n")


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nx = 1\nprint(x is 1, sys.argv[1:])\n",  # a SyntaxWarning
        "import sys\nprint(\n",  # a SyntaxError
        "import inspect\ndef f(): pass\nprint(inspect.getsource(f), __file__, __loader__ is not None)\n",
        "def f():\n    raise ValueError\nf()\n",
    ],
)
def test_a_program_that_was_compiled_ahead_is_as_any_other(hold, source):
    pocket = hold(source, None, warm=1)
    pocket.warm()
    pocket.same("a", way="slot")


def test_a_program_that_has_changed_since_it_was_compiled(tmp_path):
    """pocketd ends the slots of a pocket whose files change, as soon as it hears of it."""
    script = """
        import os, sys
        from pathlib import Path
        from runtime import program
        path = Path(sys.argv[1])
        path.write_text("print('first')")
        program.prepare(str(path))
        assert program._ahead.path == str(path)
        program.run_file(str(path), program.compiled)
        path.write_text("print('other')")
        program.run_file(str(path), program.compiled)
        path.unlink()
        path.mkdir()
        (path / "__main__.py").write_text("print('directory')")
        program.run_file(str(path), program.compiled)
        fifo = path.parent / "fifo"
        os.mkfifo(fifo)
        program.prepare(str(fifo))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "app.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=TIMEOUT, check=False)
    assert (done.stdout, done.stderr) == (b"first\nother\ndirectory\n", b"")


def test_each_serves_one_run(hold):
    pocket = hold(f"import os\n{HERE}print(os.getpid(), flush=True)\ninput()\n", "here =", warm=2)
    pocket.warm()
    assert ready(pocket, 2)
    runs = [popen(pocket) for _ in range(5)]
    pids = [read_line(run.stdout.fileno()) for run in runs]
    assert len(set(pids)) == 5 and b"" not in pids
    for run in runs:
        run.communicate(b"\n")
    assert [run.returncode for run in runs] == [0] * 5
    pocket.warm()
    assert ready(pocket, 2)


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_one_is_replaced_after_its_program_had_the_processors(hold, checkpoint):
    pocket = hold(f"{HERE}print(1, flush=True)\ninput()\n", checkpoint, warm=2)
    pocket.warm()
    assert ready(pocket, 2)
    began = time.monotonic()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"1\n"
    there, seconds = ready(pocket, 2), time.monotonic() - began
    run.communicate(b"\n")
    assert there and (seconds >= DELAY or pocket.slots_gave_way())


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_a_run_that_a_slot_cannot_serve_goes_another_way(hold, checkpoint):
    pocket = hold(
        f"import os\nmode = os.environ.get('MODE')\n{HERE}print(mode, os.environ.get('MODE'))\n", checkpoint, warm=1
    )
    pocket.warm()
    for value in ("x", "y"):
        assert pocket.pocket(env={"MODE": value}) == Ended(0, b"%s %s\n" % (value.encode(), value.encode()), b"")
        pocket.warm()
    assert pocket.pocket().out == b"None None\n"


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_a_variable_for_which_a_run_is_cold(hold, checkpoint):
    pocket = hold(f"import sys\n{HERE}print(sys.flags.optimize, hash('x'))\n", checkpoint, warm=1)
    pocket.warm()
    env = {"PYTHONHASHSEED": "0", "PYTHONOPTIMIZE": "1"}
    assert pocket.pocket(env=env).out == pocket.plain(env=env).out


def with_a_slot(hold):
    """A pocket and the pid of its slot."""
    pocket = hold(SHOW, "here =", warm=1)
    pocket.warm()
    assert ready(pocket, 1)
    template = pocket.template
    (slot,) = [pid for pid in pocket.processes() if pid != template]
    return pocket, slot


def test_a_slot_killed_is_made_again_and_nobody_notices(hold):
    pocket, slot = with_a_slot(hold)
    os.kill(slot, signal.SIGKILL)
    assert ends(slot)
    assert pocket.pocket("a").status == 7
    pocket.warm()
    pocket.same("b", way="slot")


def test_a_slot_killed_is_made_again_though_nobody_comes(hold):
    pocket, slot = with_a_slot(hold)
    os.kill(slot, signal.SIGKILL)
    assert ends(slot)
    assert wait_for(lambda: pocket.events("slot-not-made"))
    assert ready(pocket, 1)
    pocket.same("b", way="slot")


def test_a_slot_stopped_is_passed_over(hold):
    pocket, slot = with_a_slot(hold)
    os.kill(slot, signal.SIGSTOP)
    pocket.same("a", way="held")
    assert ends(slot)


def test_slots_go_with_their_template_and_its_files(hold):
    pocket = hold(f"{HERE}print('one')\n", "here =", warm=1)
    pocket.warm()
    assert ready(pocket, 1)
    pocket.write("app.py", f"{HERE}print('two')\n")
    assert pocket.pocket().out == b"two\n"
    pocket.warm()
    pocket.same(way="slot")
    pocket.cool()
    assert pocket.gone()


def test_slots_without_a_checkpoint_see_new_files(hold):
    pocket = hold("print(open('/pocket/x').read())\n", None, warm=1)
    pocket.write("x", "one")
    pocket.warm()
    pocket.write("x", "two")
    pocket.write("app.py", "print(open('/pocket/x').read(), 3)\n")
    assert pocket.from_held(way="slot").out == b"two 3\n"


def test_signals_and_a_caller_that_goes(hold):
    # Not pause(2), before which a signal of Python's can come too early.
    waits = "while True:\n    time.sleep(0.1)\n"
    pocket = hold(f"import time\n{HERE}print('ready', flush=True)\n{waits}", "here =", warm=1)
    for number in (signal.SIGTERM, signal.SIGINT):
        pocket.warm()
        pocket.forget()
        run = popen(pocket)
        assert read_line(run.stdout.fileno()) == b"ready\n"
        run.send_signal(number)
        assert finish(run).status == -number
        assert pocket.went("slot")
    pocket.warm()
    run = popen(pocket)
    read_line(run.stdout.fileno())
    (worker,) = [w["pid"] for w in pocket.pocketd.workers() if w["pocket"] == pocket.name]
    run.kill()
    assert ends(worker)
    finish(run)


def test_many_at_once(hold):
    pocket = hold(f"import sys\n{HERE}print(int(sys.argv[1]) ** 2)\n", "here =", warm=3)
    pocket.warm()
    runs = [(n, popen(pocket, str(n), stdin=subprocess.DEVNULL)) for n in range(24)]
    assert [(n, finish(run)) for n, run in runs] == [(n, Ended(0, b"%d\n" % n**2, b"")) for n, _ in runs]


def test_what_a_run_makes_its_own_is_made_ahead(hold):
    pages = 4096
    source = f"""
        import mmap, resource

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        data = bytearray({pages} * mmap.PAGESIZE)
        data[:: mmap.PAGESIZE] = b"1" * {pages}
        {HERE}
        had = faults()
        data[:: mmap.PAGESIZE] = b"2" * {pages}
        print("few" if faults() - had < {pages} / 10 else "many")
    """
    cases: list[tuple[dict[str, list[str]], bytes]] = [({}, b"many\n"), ({"rehearse": []}, b"few\n")]
    for keys, found in cases:
        pocket = hold(source, "here =", warm=1, **keys)
        facts = pocket.warm()
        assert facts["rehearsed"] is bool(keys), facts["not_rehearsed"]
        assert ready(pocket, 1)
        assert pocket.pocket() == Ended(0, found, b"")


def test_so_are_those_that_its_end_writes(hold):
    """What a program frees when it is over lies in its template's pages too."""
    pages = 2048
    source = f"""
        import mmap, os, resource, sys
        def faults(resource=resource):
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        class Data:
            def __init__(self):
                self.area = mmap.mmap(-1, {pages} * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                sys.kept = self.area  # an allocator keeps what is freed, and a mapping would be gone
                self.write(b"1")
            def write(self, what, page=mmap.PAGESIZE):
                self.area[::page] = what * {pages}
            def __del__(self, faults=faults, os=os):
                had = faults()
                self.write(b"2")
                os.write(1, b"few" if faults() - had < {pages} / 10 else b"many")
        data = Data()
        {HERE}
    """
    cases: list[tuple[dict[str, list[str]], bytes]] = [({}, b"many"), ({"rehearse": []}, b"few")]
    for keys, found in cases:
        pocket = hold(source, "here =", warm=1, **keys)
        facts = pocket.warm()
        assert facts["rehearsed"] is bool(keys), facts["not_rehearsed"]
        assert ready(pocket, 1)
        assert pocket.pocket() == Ended(0, found, b"")


def test_pages_are_made_where_others_cannot_be():
    """Some of what a run writes to its template may only read, and some is not there."""
    size = 1024 * mmap.PAGESIZE
    areas = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
    places = [ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in areas]
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(places[0]), ctypes.c_size_t(size), mmap.PROT_READ) == 0
    assert libc.mprotect(ctypes.c_void_p(places[1]), ctypes.c_size_t(size), 0) == 0
    assert workingset.WorkingSet([(place, place + size) for place in places]).make() == 2
    had = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    areas[2][:: mmap.PAGESIZE] = b"1" * 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - had < 100


_SEIZE = 0x4206  # linux/ptrace.h


@pytest.mark.parametrize("warm", [0, 1])
def test_its_status_is_told_although_its_cgroup_is_empty_before_it_can_be_reaped(hold, warm):
    """A process leaves its cgroup before its parent may wait for it (do_exit). One that is traced may be waited for
    only when its tracer has let go of it, so here the time between the two is as long as we like."""
    pocket = hold(f"import sys\n{HERE}print(flush=True)\ninput()\nsys.exit(7)\n", "here =", warm=warm)
    pocket.warm()
    run = popen(pocket)
    read_line(run.stdout.fileno())
    (worker,) = [w["pid"] for w in pocket.pocketd.workers() if w["pocket"] == pocket.name]
    with Hierarchy.find() as found:
        leaf = Path(found.mount.path + path_of(worker))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.ptrace(_SEIZE, worker, None, None) == 0, os.strerror(ctypes.get_errno())
    try:
        run.stdin.write(b"\n")
        run.stdin.close()
        os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
        assert wait_for(lambda: "populated 0" in (leaf / "cgroup.events").read_text())
        other = popen(pocket)
        other.communicate(b"\n", timeout=TIMEOUT)
        assert other.returncode == 7  # init has heard of the empty one by then
    finally:
        os.waitpid(worker, 0)  # its tracer lets go of it
    assert (run.wait(TIMEOUT), run.stderr.read()) == (7, b"")
