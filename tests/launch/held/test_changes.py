"""What changes around a template: its files, its definition, pocketd, the service; and templates that end."""

# ruff: noqa: E501
from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from pocketd import held
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.launch.both import Ended, ends, finish, read_line
from tests.launch.held.pocket import Pocket, Pockets, popen
from tests.launch.held.test_program import HERE

LOOP = """
import sys
value = 1
here = None
print("ready", flush=True)
for line in sys.stdin: print("got", line, end="", flush=True)
sys.exit(42)
"""
FILES = {
    "its program": ("app.py", "print(2)\n", "import sys\nhere = None\nprint(1)\n"),
    "a module": ("mine.py", "x = 2\n", "import mine\nhere = None\nprint(mine.x)\n"),
    "a file that it read": ("data", "2", "text = open('/pocket/data').read()\nhere = None\nprint(text)\n"),
    "a file by its own path": ("data", "2", "import os\ntext = open(os.path.dirname(__file__) + '/data').read()\nhere = None\nprint(text)\n"),
    "a file in a mount": ("../extra/data", "2", "text = open('/extra/data').read()\nhere = None\nprint(text)\n"),
    "a file that was not there": ("new", "2", "import os\nthere = os.path.exists('/pocket/new')\nhere = None\nprint(there)\n"),
    "a file that could not be opened": ("new", "2", "try: text = open('/pocket/new').read()\nexcept OSError: text = 'none'\nhere = None\nprint(text)\n"),
    "a directory listed": ("sub/new", "2", "import os\nnames = sorted(os.listdir('/pocket/sub'))\nhere = None\nprint(names)\n"),
    "a file that it may write": ("out/state", "2", "text = open('/pocket/out/state').read()\nhere = None\nprint(text)\n"),
    "its definition's file": ("pocket.toml", "# nothing\n", "text = open('/pocket/pocket.toml').read()\nhere = None\nprint(text)\n"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["written", "renamed over"])
@pytest.mark.parametrize("what", FILES)
def test_the_next_run_after_a_change_sees_it(hold, what, how):
    """And the template is made anew when all is quiet."""
    name, text, source = FILES[what]
    extra = hold(source, None).place.parent / "extra"
    extra.mkdir(exist_ok=True)
    pocket = hold(source, "here =", mounts=[f"{extra}:/extra"], allow={"write": ["out"]})
    for path in ("sub/old", "data", "out/state", "../extra/data"):
        pocket.write(path, "1")
    pocket.write("mine.py", "x = 1\n")
    pocket.write("pocket.toml", "")
    pocket.warm()
    first = pocket.from_held().out
    path = pocket.place / name
    if how == "written":
        path.write_text(text)
    else:
        (pocket.place.parent / "beside").write_text(text)
        os.rename(pocket.place.parent / "beside", path)
    second = pocket.pocket().out
    assert second != first
    if what == "a file that it may write":  # nobody watches it: the template itself said so, and was given up
        pocket.warm()
    elif what != "its program":
        pocket.wait_held()
    if what != "its program":
        assert pocket.from_held().out == second


def test_of_many_changes_none_is_missed(hold):
    pocket = hold("text = open('/pocket/data').read()\nhere = None\nprint(text)\n", "here =")
    pocket.write("data", "start")
    pocket.warm()
    for n in range(40):
        (pocket.place / "data").write_text(f"{n}")
        assert pocket.pocket().out == b"%d\n" % n
    pocket.wait_held()


def test_a_run_goes_on_when_its_template_is_made_anew(hold):
    pocket = hold(LOOP, "here =")
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    old = pocket.template
    pocket.write("app.py", LOOP.replace("got", "new"))
    assert pocket.pocket(input=b"x\n").out == b"ready\nnew x\n"
    pocket.wait_held(2)
    assert pocket.template != old and ends(old)
    run.stdin.write(b"y\n")
    run.stdin.flush()
    assert read_line(run.stdout.fileno()) == b"got y\n"
    run.stdin.close()
    run.stdin = None
    assert finish(run).status == 42


@pytest.mark.parametrize("how", ["cooled", "killed", "stopped and killed"])
def test_a_run_goes_on_when_its_template_ends(hold, how):
    pocket = hold(LOOP, "here =")
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    template = pocket.template
    if how == "cooled":
        pocket.cool()
    else:
        if how != "killed":
            os.kill(template, signal.SIGSTOP)
        os.kill(template, signal.SIGKILL)
    assert ends(template)
    assert wait_for(lambda: "template_pid" not in pocket.row())
    assert pocket.pocket(input=b"x\n") == Ended(42, b"ready\ngot x\n", b"")
    run.stdin.write(b"y\n")
    run.stdin.flush()
    assert read_line(run.stdout.fileno()) == b"got y\n"
    run.stdin.close()
    run.stdin = None
    assert finish(run).status == 42
    pocket.warm()
    assert pocket.from_held(input=b"").status == 42


def test_cool_says_whether_there_was_one(hold):
    pocket = hold(LOOP, "here =")
    pocket.warm()
    pocket.cool()
    assert pocket.gone() and pocket.row()["held"] == "cool"
    pocket.cool()


def test_what_was_cooled_is_not_held_again_when_its_files_are_quiet(hold):
    """A second pocket's files, changed after the first's, say when those have been quiet for long enough."""
    cooled, clock = (hold(f"import os\n{HERE}print(1)\n", "here =") for _ in range(2))
    cooled.warm()
    clock.warm()
    cooled.write("app.py", f"import os\n{HERE}print(2)\n")
    assert wait_for(lambda: cooled.events("pocket-given-up"))
    cooled.cool()
    clock.write("app.py", f"import os\n{HERE}print(2)\n")
    clock.wait_held(2)
    assert len(cooled.events("pocket-held")) == 1
    assert cooled.row()["held"] == "cool"


def test_cool_ends_the_making_too(hold):
    pocket = hold(f"import time\ntime.sleep(1000)\n{HERE}print(1)\n", "here =")
    with pocket.pocketd.popen("warm", pocket.name, stderr=subprocess.PIPE, text=True) as warm:
        assert wait_for(lambda: pocket.row()["held"] == "holding")
        assert wait_for(pocket.processes)
        pocket.cool()
        assert "it was cooled meanwhile" in warm.communicate(timeout=TIMEOUT)[1]
        assert warm.returncode == 125
    assert pocket.gone()
    assert pocket.row()["held"] == "cool"
    pocket.write("app.py", f"{HERE}print(1)\n")
    pocket.warm()
    assert pocket.from_held().out == b"1\n"


def test_a_making_that_is_ended_at_any_moment_costs_its_pocket_alone(hold):
    """The service's own template answers for a pocket's that is not there any more."""
    pocket = hold(f"import os\n{HERE}print(1)\n", "here =")
    other = hold(f"{HERE}print(2)\n", "here =")
    other.warm()

    def roots() -> list[int]:
        return [t["pid"] for t in pocket.pocketd.ps()["templates"] if t["service"] == "plain" and t["kind"] == "root"]

    (root,) = roots()
    for _ in range(5):
        os.kill(root, signal.SIGSTOP)
        try:
            with pocket.pocketd.popen("warm", pocket.name, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL):
                assert wait_for(lambda: pocket.row()["held"] == "holding")
                assert wait_for(lambda: pocket.cgroup.exists())
                pocket.pocketd.ps()
                pocket.cool()
        finally:
            os.kill(root, signal.SIGCONT)
        assert other.from_held().out == b"2\n"
    assert pocket.gone()
    assert roots() == [root]
    assert other.from_held().out == b"2\n"


@pytest.mark.parametrize("verb", [("set", "pids.max=500"), ("allow", "write=out")])
def test_a_definition_changed_at_run_time(hold, verb):
    pocket = hold("import os\nhere = None\nprint(os.access('/pocket/out', os.W_OK))\n", "here =")
    (pocket.place / "out").mkdir()
    pocket.warm()
    pocket.from_held()
    done = pocket.pocketd.pocket(verb[0], pocket.name, *verb[1:], check=False)
    if done.returncode:
        pytest.skip(done.stderr)
    expected = b"True\n" if verb[0] == "allow" else b"False\n"
    assert pocket.pocket().out == expected
    pocket.warm()
    assert pocket.from_held().out == expected


def test_a_definition_taken_away(hold, pool):
    pocket = hold(LOOP, "here =", warm=1)
    pocket.warm()
    del pool.definitions[pocket.name]
    pool.read_again()
    assert pocket.pocket().status == 127
    assert wait_for(lambda: not pocket.cgroup.exists())


# -- pocketd and the service


@pytest.fixture
def own(own_pocketd, tmp_path):
    from tests.conftest import CONFIG

    daemon: Pocketd = own_pocketd(CONFIG)
    place = tmp_path / "pockets"
    place.mkdir()
    tmp_path.chmod(0o755)
    return Pockets(daemon, place)


@pytest.mark.parametrize("warm", [0, 1])
def test_a_template_that_died_is_not_made_again_at_once(hold, warm):
    """Its runs may be what ends it; and slots do not ask for it sooner than launches."""
    pocket = hold(LOOP, "here =", warm=warm)
    pocket.warm()
    pocket.forget()
    began, template = time.monotonic(), pocket.template
    os.kill(template, signal.SIGKILL)
    assert ends(template)
    while not pocket.events("pocket-held"):
        pocket.pocket(input=b"x\n")
        assert time.monotonic() - began < 120
    assert time.monotonic() - began >= held.BACKOFF


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_pocketd_ends_and_begins_while_a_run_goes_on_and_slots_wait(own, how, warm):
    pocket: Pocket = own.make(LOOP, "here =", warm=warm)
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    pocket.warm()
    pocket.answered()
    daemon = pocket.pocketd
    daemon.end(how)
    run.stdin.write(b"one\n")
    run.stdin.flush()
    assert read_line(run.stdout.fileno()) == b"got one\n"
    daemon.start()
    assert [w["pocket"] for w in daemon.workers()] == [pocket.name]
    assert pocket.pocket(input=b"x\n") == Ended(42, b"ready\ngot x\n", b"")
    run.stdin.write(b"two\n")
    run.stdin.flush()
    assert read_line(run.stdout.fileno()) == b"got two\n"
    run.stdin.close()
    run.stdin = None
    assert finish(run).status == 42
    pocket.warm()
    pocket.from_held(way="slot" if warm else "held", input=b"")
    assert wait_for(lambda: len(pocket.processes()) == 1 + warm), pocket.processes()
    pocket.cool()
    assert pocket.gone()


def test_a_run_that_ends_without_a_pocketd(own):
    pocket: Pocket = own.make(LOOP, "here =")
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    pocket.answered()
    pocket.pocketd.end(signal.SIGKILL)
    run.stdin.close()
    run.stdin = None
    assert finish(run).status == 42
    pocket.pocketd.start()
    assert wait_for(lambda: not pocket.cgroup.exists())


def test_the_service_off_ends_all(own):
    pocket: Pocket = own.make(LOOP, "here =", warm=1)
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    pocket.pocketd.pocket("plain", "off")
    assert finish(run).status == -signal.SIGTERM
    assert not pocket.cgroup.exists()
    pocket.warm()
    assert pocket.pocket(input=b"").status == 42


def test_the_service_reloaded(own):
    pocket: Pocket = own.make(LOOP, "here =")
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    pocket.pocketd.pocket("reload", "plain")
    assert pocket.pocket(input=b"").status == 42
    run.stdin.close()
    run.stdin = None
    assert finish(run).status == 42
    pocket.warm()


# -- many forks


def test_many_runs_of_a_busy_template(hold):
    """Another thread of Python computes all the time. HELD_RUNS=2000 asks for more of them."""
    pocket = hold(
        """
        import sys, threading
        counts = {}
        def work():
            n = 0
            while True:
                n += 1
                counts[n % 97] = [n, str(n)]
        threading.Thread(target=work, daemon=True).start()
        table = [n * n for n in range(1000)]
        here = None
        n = int(sys.argv[1])
        before = len(counts)
        print(table[n % 1000], before > 0 or bool(counts))
        """,
        "here =",
    )
    pocket.warm()
    pocket.forget()
    total, at_once = int(os.environ.get("HELD_RUNS", "200")), 4
    wrong = []
    for first in range(0, total, at_once):
        runs = [(n, popen(pocket, str(n), stdin=subprocess.DEVNULL)) for n in range(first, first + at_once)]
        for n, run in runs:
            ended = finish(run)
            if ended.status or ended.out.split()[:1] != [b"%d" % (n % 1000) ** 2]:
                wrong.append((n, ended))
    assert not wrong, wrong[:3]
    ways = pocket.ways()
    assert ways.count("held") == total, {way: ways.count(way) for way in set(ways)}
    assert wait_for(lambda: pocket.processes() == [pocket.template])
