"""Client sessions of a pocket whose modules are preloaded: as any others, but that the modules are there already."""

# ruff: noqa: E501
from __future__ import annotations

import concurrent.futures
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from pocketd.client import Cancelled, RemoteError, ServiceFailed, Session, Timeout, UnknownModel, login
from tests.conftest import CONFIG, service_environment, toml_table, wait_for
from tests.launch.both import ends
from tests.launch.held.pocket import Pocket, Pockets
from tests.launch.held.test_slots import ready

APP = """
import os
imported_in, calls = os.getpid(), []

def warm_up():
    calls.append(os.getpid())

def look():
    return {"imported in": imported_in, "calls": calls, "here": os.getpid()}

def add(what):
    calls.append(what)
    return len(calls)
"""


@pytest.fixture
def preload(hold: Callable[..., Pocket]) -> Callable[..., Pocket]:
    """`preload(source, names, **keys)`: a pocket of the test's own, for clients, whose module `app` has that source."""

    def make(source: str, names: list[str] | None = None, **keys: Any) -> Pocket:
        return hold(source, None, **{"program": None, "preload": names or ["app"], **keys})

    return make


def enter(pocket: Pocket, **options: Any) -> Session:
    return login(pocket.name, runtime_dir=str(pocket.pocketd.runtime_dir), **options)


def ask(pocket: Pocket, target: str, *args: Any, way: str | None = "held", **kwargs: Any) -> Any:
    """The result of one call in a session of its own, which came the way that it is to."""
    pocket.forget()
    with enter(pocket) as session:
        found = session.call(target, *args, **kwargs)
    assert way is None or pocket.ways() == [way], (pocket.ways(), pocket.events("launch-not-held"))
    return found


def log(pocket: Pocket) -> str:
    return (pocket.pocketd.state_dir / "services" / f"{pocket.service}.log").read_text()


def test_a_module_is_imported_and_its_function_called_once(preload):
    pocket = preload(APP, ["app", "app:warm_up"])
    facts = pocket.warm()
    assert facts["threads"] >= 1
    first, second = (ask(pocket, "app:look") for _ in range(2))
    assert first["imported in"] == second["imported in"] and first["calls"] == second["calls"] == [first["imported in"]]
    assert len({first["imported in"], first["here"], second["here"]}) == 3


def test_modules_are_imported_in_their_order(preload):
    pocket = preload("import first\nfound = list(first.names)\ndef look(): return found\n", ["first", "second", "app"])
    pocket.write("first.py", "names = []\n")
    pocket.write("second.py", "import first, sys\nfirst.names.append('app' in sys.modules)\n")
    pocket.warm()
    assert ask(pocket, "app:look") == [False]


def test_what_one_session_changes_no_other_finds(preload):
    pocket = preload(APP)
    pocket.warm()
    assert [ask(pocket, "app:add", n, way=way) for n, way in ((1, "held"), (2, "held"))] == [1, 1]


def test_what_is_not_preloaded_is_imported_by_a_call(preload):
    pocket = preload(APP)
    pocket.write("other.py", "import app\ndef look(): return app.look()\n")
    pocket.warm()
    assert ask(pocket, "other:look")["calls"] == []


def test_sessions_come_the_long_way_until_it_is_held_and_are_the_same(preload):
    pocket = preload(APP)
    found = ask(pocket, "app:look", way="root")
    assert found["imported in"] == found["here"]
    pocket.wait_held()
    assert ask(pocket, "app:add", 1) == ask(pocket, "app:add", 1, way=None) == 1


def test_a_session_that_comes_the_long_way_has_what_is_preloaded(preload):
    source = "MODEL = None\ndef ready():\n    global MODEL\n    MODEL = [1, 2]\ndef find(x): return x in MODEL\n"
    pocket = preload(source, ["app", "app:ready"])
    assert ask(pocket, "app:find", 2, way="root") is True
    pocket.wait_held()
    assert ask(pocket, "app:find", 2) is True


def test_a_session_goes_on_where_what_is_preloaded_fails(preload):
    """As programs go on that cannot be held. Until that is known each tries, and its log says why."""
    pocket = preload("def ready(): raise ValueError('no camera')\ndef find(x): return x\n", ["app:ready"])
    assert ask(pocket, "app:find", 2, way="root") == 2
    assert wait_for(lambda: "no camera" in (pocket.pocketd.state_dir / "services/plain.log").read_text())


def test_what_a_session_has_of_its_own(preload, tmp_path, monkeypatch):
    """Environment, directory, streams, arguments, id; and its host name is its pocket's."""
    pocket = preload(
        """
        import os, socket, sys
        out = sys.stdout
        def look():
            out.write(f"said by {os.environ.get('MINE')}\\n"); out.flush()
            return [os.environ.get("MINE"), os.getcwd(), sys.stdin.read(), os.isatty(1), sys.argv, socket.gethostname(),
                    sys.path[0], __file__, sys.modules["app"].__name__, os.umask(0o22)]
        """
    )
    monkeypatch.chdir("/usr")
    monkeypatch.setenv("MINE", "long way")
    long = ask(pocket, "app:look", way="root")
    pocket.wait_held()
    for value, directory in (("one", "/usr"), ("two", tmp_path)):
        monkeypatch.setenv("MINE", value)
        monkeypatch.chdir(directory)
        found = ask(pocket, "app:look")
        where = str(directory) if directory == "/usr" else "/pocket"
        assert found == [value, where, *long[2:]]
        assert wait_for(lambda value=value: f"pocket {pocket.name} said by {value}\n" in log(pocket)), log(pocket)


def test_it_prints_to_the_log_once(preload):
    pocket = preload("import sys\nprint('at its import')\nsys.stderr.write('and this')\ndef f(): return 1\n")
    pocket.warm()
    for _ in range(3):
        ask(pocket, "app:f")
    assert wait_for(lambda: "at its import" in log(pocket))
    assert (log(pocket).count("at its import"), log(pocket).count("and this")) == (1, 1)


def test_an_environment_that_it_saw_otherwise_goes_the_long_way(preload, monkeypatch):
    pocket = preload("import os\nseen = os.environ.get('MODE')\ndef f(): return seen\n", env={"MODE": "a"})
    pocket.warm()
    monkeypatch.setenv("MODE", "a")
    assert ask(pocket, "app:f") == "a"
    monkeypatch.setenv("MODE", "b")
    assert ask(pocket, "app:f", way="root") == "b"
    (why,) = pocket.events("launch-not-held")
    assert "MODE is not what the pocket's code saw while it is preloaded" in why


def test_a_directory_that_it_looked_at(preload, tmp_path, monkeypatch):
    """It is the pocket's, as that of a client whose own the worker does not see."""
    pocket = preload("text = open('data').read()\ndef f(): return text\n")
    pocket.write("data", "text")
    pocket.warm()
    for directory in (pocket.place, tmp_path):
        monkeypatch.chdir(directory)
        assert ask(pocket, "app:f") == "text"
    monkeypatch.chdir("/usr")
    with pytest.raises(RemoteError, match="No such file"):
        ask(pocket, "app:f")
    assert pocket.ways() == ["root"]


def test_models_tensors_and_errors_are_as_in_any_session(preload):
    numpy = pytest.importorskip("numpy")
    pocket = preload(
        """
        def double(x): return x * 2
        def fail(): raise KeyError("deep")
        """
    )
    pocket.warm()
    pocket.forget()
    with enter(pocket) as session:
        x = session.tensor((3, 5), "float32")
        x.numpy()[...] = 4
        for _ in range(3):
            assert (session.call("app:double", x).numpy() == numpy.full((3, 5), 8)).all()
        with pytest.raises(RemoteError, match="deep") as caught:
            session.call("app:fail")
        assert caught.value.type == "KeyError" and "app.py" in caught.value.remote_traceback
        with pytest.raises(RemoteError, match="has no attribute"):
            session.call("app:nothing")
    assert pocket.ways() == ["held"]


@pytest.mark.parametrize("warm", [0, 1])
def test_a_call_that_is_cancelled(preload, warm):
    pocket = preload("import time\ndef wait():\n    while True: time.sleep(0.01)\ndef f(): return 1\n", warm=warm)
    pocket.warm()
    assert not warm or ready(pocket, 1)
    pocket.forget()
    with enter(pocket) as session:
        with pytest.raises(Timeout):
            session.call("app:wait", timeout=0.2)
        assert session.call("app:f") == 1
        canceller = threading.Timer(0.2, session.cancel)
        canceller.start()
        with pytest.raises(Cancelled):
            session.call("app:wait")
        assert session.call("app:f") == 1
    assert pocket.ways() == ["slot" if warm else "held"]


def test_a_client_that_goes_takes_its_worker_along(preload):
    pocket = preload("import subprocess\ndef f(): return subprocess.Popen(['sleep', '1000']).pid\n")
    pocket.warm()
    ask(pocket, "app:f")
    template = pocket.template
    assert wait_for(lambda: pocket.processes() == [template])


def test_of_many_sessions_each_is_its_own(preload):
    pocket = preload(APP)
    pocket.warm()
    pocket.forget()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        sessions = list(pool.map(lambda _: enter(pocket), range(20)))
        found = list(pool.map(lambda session: session.call("app:look"), sessions))
        counts = list(pool.map(lambda session: [session.call("app:add", n) for n in range(3)], sessions))
    assert len({f["here"] for f in found}) == 20 and len({f["imported in"] for f in found}) == 1
    assert counts == [[1, 2, 3]] * 20
    for session in sessions:
        session.close()
    assert pocket.ways() == ["held"] * 20
    template = pocket.template
    assert wait_for(lambda: pocket.processes() == [template])


# -- slots


def test_a_session_from_a_slot(preload, monkeypatch):
    pocket = preload(APP + "def mine(): return [os.environ.get('MINE'), os.getcwd()]\n", ["app", "app:warm_up"], warm=1)
    here = set()
    monkeypatch.chdir("/usr")
    for value in ("one", "two"):
        assert pocket.warm()["slots"] == 1 and ready(pocket, 1)
        monkeypatch.setenv("MINE", value)
        assert ask(pocket, "app:mine", way="slot") == [value, "/usr"]
        pocket.warm()
        assert ready(pocket, 1)
        found = ask(pocket, "app:look", way="slot")
        assert found["calls"] == [found["imported in"]]
        here.add(found["here"])
    assert len(here) == 2


def test_what_a_session_from_a_slot_prints(preload):
    pocket = preload(
        "import sys\ndef say(word):\n    sys.stdout.write(f'said {word}\\n')\n    sys.stdout.flush()\n", warm=1
    )
    pocket.warm()
    assert ready(pocket, 1)
    ask(pocket, "app:say", "slot", way="slot")
    assert wait_for(lambda: f"pocket {pocket.name} said slot\n" in log(pocket)), log(pocket)


def test_a_session_that_a_slot_cannot_serve_goes_the_long_way(preload, monkeypatch):
    pocket = preload("import os\nmode = os.environ.get('MODE')\ndef f(): return mode\n", warm=1)
    pocket.warm()
    assert ready(pocket, 1)
    monkeypatch.setenv("MODE", "x")
    assert ask(pocket, "app:f", way="root") == "x"


# -- what cannot be held

WRONG = {
    "a module that is not there": ("import nothing_of_that_name\n", ["app"], "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
    "its own module is not there": ("", ["another"], "ModuleNotFoundError: No module named 'another'"),
    "an error deep in it": ("def f():\n    return {}['key']\nf()\n", ["app"], "KeyError: 'key'"),
    "a syntax error": ("def f(:\n", ["app"], "SyntaxError"),
    "no such function": ("", ["app:ready"], "module 'app' has no attribute 'ready'"),
    "what is no function": ("ready = 3\n", ["app:ready"], "app:ready is not callable"),
    "a function with arguments": ("def ready(x): pass\n", ["app:ready"], "missing 1 required positional argument: 'x'"),
    "a function that fails": ("def ready():\n    raise ValueError('no weights')\n", ["app:ready"], "ValueError: no weights"),
    "a network that it has not": ("import socket\nsocket.create_connection(('192.0.2.1', 80))\n", ["app"], r"OSError.*(\n.*)*pocket: this pocket has no network; to allow it, as root: pocket allow p\d+ network=host"),
    "an exit": ("import sys\nsys.exit('enough')\n", ["app"], "SystemExit: enough"),
    "its end": ("import os\nos._exit(3)\n", ["app"], "ended with status 3 before it was ready"),
    "the whole environment": ("import os\nenvironment = dict(os.environ)\n", ["app"], "it reads the whole environment in .*app.py, line 2 while it is preloaded; do that in a function"),
    "a descriptor closed": ("import os\nos.close(1)\n", ["app"], "it closes or replaces descriptor 1 while it is preloaded"),
    "much that is printed": ("print('x' * (1 << 21))\n", ["app"], "prints more than 1 MiB while it is preloaded"),
    "a write to its own files": ("open('/pocket/out/x', 'w')\n", ["app"], "it writes /pocket/out/x in .*app.py, line 1"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_preloaded_is_told_and_sessions_go_on_without(preload, what):
    source, names, words = WRONG[what]
    pocket = preload(source, names, allow={"write": ["out"]})
    (pocket.place / "out").mkdir()
    pocket.write("good.py", "def f(): return 7\n")
    told = pocket.refused()
    assert re.search(words, told), told
    if "deep" in what:
        assert re.search(r'app.py", line 3, in <module>.*\n.*f\(\).*(\n.*)*app.py", line 2, in f', told), told
        assert "runtime/" not in told
    assert ask(pocket, "good:f", way="root") == 7
    row = pocket.row()
    assert row["held"] == "not held" and re.search(words, row["why_not_held"])
    assert pocket.name in pocket.pocketd.pocket("ps").stdout


HOLDS = {
    "a socket": ("import socket\ns = socket.create_server(('127.0.0.1', 0))\n", r"\(socket: socket:\[\d+\]\)"),
    "an end of a pipe": ("import os\nends = os.pipe()\nos.close(ends[0])\n", r"\(pipe: pipe:\[\d+\]\)"),
    "a child": ("import subprocess\nc = subprocess.Popen(['sleep', '1000'])\n", r"child processes \("),
    "a timer": ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 1000)\n", r"a running timer \(setitimer, alarm\)"),
    "a file that it writes": ("f = open('/tmp/out', 'w')\n", r"\(file: /tmp/out\), open for writing"),
    "an asyncio loop": ("import asyncio\nloop = asyncio.new_event_loop()\n", r"an asyncio event loop that is not closed"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOLDS)
def test_what_a_fork_cannot_carry_over_is_named(preload, what):
    source, words = HOLDS[what]
    pocket = preload(
        f"def ready():\n    import app\n    exec({source!r}, vars(app))\ndef f(): return 7\n", ["app:ready"]
    )
    told = pocket.refused()
    assert re.search(f"once it is preloaded the pocket's code holds what a fork cannot carry over: .*{words}", told), (
        told
    )
    assert "pocketd.on_start" in told
    assert ask(pocket, "app:f", way="root") == 7
    assert wait_for(lambda: not pocket.cgroup.exists())


def test_it_is_preloaded_once_it_has_been_put_right(preload):
    pocket = preload("import nothing_of_that_name\n")
    pocket.refused()
    pocket.write("app.py", APP)
    pocket.wait_held()
    assert ask(pocket, "app:add", 1) == 1


def test_each_session_has_a_file_offset_of_its_own(preload):
    pocket = preload("f = open(__file__, 'rb', buffering=0)\nf.read(2)\ndef more(n): return f.read(n)\n")
    pocket.warm()
    assert [ask(pocket, "app:more", 3), ask(pocket, "app:more", 5)] == [b"= o", b"= ope"]


# -- on_start


@pytest.mark.parametrize("warm", [0, 1])
def test_what_each_session_is_to_do_first(preload, warm):
    pocket = preload(
        """
        import os, pocketd
        started = []
        @pocketd.on_start
        def begin(): started.append([os.getpid(), os.environ.get("HOME")])
        pocketd.checkpoint()
        pocketd.rehearsed()
        def look(): return started, os.getpid()
        """,
        warm=warm,
    )
    for _ in range(2):
        pocket.warm()
        assert not warm or ready(pocket, 1)
        started, here = ask(pocket, "app:look", way="slot" if warm else "held")
        assert started == [[here, os.environ["HOME"]]]


def test_a_session_that_cannot_begin_says_why(preload):
    pocket = preload(
        "import pocketd\ndef begin(): {}['nowhere']\npocketd.on_start(begin) if hasattr(__import__('sys'), '_pocketd_held') else None\n"
    )
    pocket.warm()
    with pytest.raises(ServiceFailed, match="a function of pocketd.on_start failed: KeyError: 'nowhere'"):
        enter(pocket)
    assert wait_for(lambda: 'app.py", line 2, in begin' in log(pocket))


# -- random state

DRAWS = {
    "random": ("import random\n", "random.seed(7)\n", "random.random()"),
    "an own Random": ("import random\n", "r = random.Random(7)\n", "(r if 'r' in globals() else random).random()"),
    "numpy": ("import numpy as np\n", "np.random.seed(7)\n", "np.random.rand()"),
    "default_rng": ("import numpy as np\nr = np.random.default_rng()\n", "r = np.random.default_rng(7)\n", "r.random()"),
}  # fmt: skip


@pytest.mark.parametrize("warm", [0, 1])
@pytest.mark.parametrize("what", DRAWS)
def test_random_state_is_each_sessions_own_unless_it_was_seeded(preload, what, warm):
    imports, seed, draw = DRAWS[what]
    way = "slot" if warm else "held"
    for seeded in (False, True):
        source = f"{imports}{seed if seeded else ''}{draw}\ndef draws(): return [{draw}, {draw}]\n"
        pocket = preload(source, warm=warm)
        found = []
        for _ in range(2):
            pocket.warm()
            assert not warm or ready(pocket, 1)
            found.append(ask(pocket, "app:draws", way=way))
        command = [sys.executable, "-c", "import app, json; print(json.dumps(app.draws()))"]
        plain = subprocess.run(command, cwd=pocket.place, env=pocket.environment(None), capture_output=True, check=True)
        expected = json.loads(plain.stdout)
        assert found == [expected] * 2 if seeded else len({*map(tuple, found), tuple(expected)}) == 3


# -- changes


@pytest.mark.parametrize("what", ["app.py", "data"])
def test_a_change_of_its_files_is_in_the_next_session_and_the_one_before_goes_on(preload, what):
    pocket = preload("text = open('/pocket/data').read()\ndef f(): return [text, 1]\n", warm=1)
    pocket.write("data", "old")
    pocket.warm()
    with enter(pocket) as session:
        old = pocket.template
        changed = {"app.py": "text = 'new'\ndef f(): return [text, 1]\n", "data": "new"}
        pocket.write(what, changed[what])
        assert ask(pocket, "app:f", way="root") == ["new", 1]
        pocket.wait_held()
        assert pocket.template != old and ends(old)
        assert session.call("app:f") == ["old", 1]
    pocket.warm()
    assert ready(pocket, 1)
    assert ask(pocket, "app:f", way="slot") == ["new", 1]


@pytest.mark.parametrize("how", ["killed", "cooled"])
def test_a_template_that_ends_is_made_again_and_sessions_go_on(preload, how):
    pocket = preload(APP)
    pocket.warm()
    with enter(pocket) as session:
        template = pocket.template
        pocket.cool() if how == "cooled" else os.kill(template, signal.SIGKILL)
        assert ends(template)
        assert wait_for(lambda: "template_pid" not in pocket.row())
        assert ask(pocket, "app:add", 1, way="root") == 1
        assert session.call("app:add", 1) == 1
    pocket.warm()
    assert pocket.template != template
    assert ask(pocket, "app:add", 1) == 1


def test_it_is_made_anew_when_it_is_old(preload):
    pocket = preload(APP, max_age=1)
    pocket.warm()
    old = pocket.template
    with enter(pocket) as session:
        assert wait_for(lambda: pocket.row().get("template_pid") not in (None, old))
        assert session.call("app:add", 1) == 1
    assert ask(pocket, "app:add", 1, way=None) == 1


def test_a_slot_killed_is_passed_over(preload):
    pocket = preload(APP, warm=1)
    pocket.warm()
    assert ready(pocket, 1)
    template = pocket.template
    (slot,) = [pid for pid in pocket.processes() if pid != template]
    os.kill(slot, signal.SIGKILL)
    assert ends(slot)
    assert ask(pocket, "app:add", 1, way=None) == 1


def test_warm_cool_and_ps(preload):
    pocket = preload(APP, warm=1)
    said = pocket.pocketd.pocket("warm", pocket.name).stdout
    assert re.match(rf"{pocket.name} is held: \d+\.\d\d s to preload, \d+ threads\n", said), said
    assert ready(pocket, 1)
    row = pocket.row()
    assert (row["held"], row["slots"], row["warm"]) == ("held", 1, 1) and row["template_private"] > 0
    (shown,) = [line for line in pocket.pocketd.pocket("ps").stdout.splitlines() if line.startswith(f"{pocket.name} ")]
    assert "held, " in shown and "1 of 1" in shown
    pocket.cool()
    assert pocket.gone() and pocket.row()["held"] == "cool"
    assert pocket.pocketd.pocket("cool", pocket.name).stdout == f"{pocket.name} is already cool\n"


def test_a_pocket_with_nothing_to_be_warm_says_what_would_be(preload):
    pocket = preload(APP, ["app"])
    bare = preload(APP, preload=None)
    assert 'preload = ["app"], to have that module of its directory imported' in bare.refused()
    pocket.warm()


# -- isolation


def test_it_is_confined_before_its_first_line_as_any_worker_is(preload):
    pocket = preload(
        """
        import os
        def status():
            with open("/proc/thread-self/status") as f: lines = dict(line.split(":", 1) for line in f)
            names = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
            return {name: lines[name].strip() for name in (*names, "Seccomp_filters")}
        at_import = status()
        def both(): return [at_import, status()]
        """
    )
    plain = ask(pocket, "app:both", way="root")
    pocket.wait_held()
    held = ask(pocket, "app:both")
    assert held == plain and held[0] == held[1]
    assert held[0]["CapBnd"] == "0" * 16 and held[0]["NoNewPrivs"] == "1" and held[0]["Seccomp"] == "2"


def test_a_program_does_not_come_from_it(preload):
    pocket = preload("print('ran')\n")
    pocket.warm()
    done = pocket.pocketd.pocket("run", "-p", pocket.name, "app.py", check=False)
    assert done.returncode or done.stdout == "ran\n"
    assert "held" not in pocket.ways()


# -- hostile, as in test_hostile.py: what its template does when a session is asked for

REACH = """
import os, socket, sys, time
held = getattr(sys, "_pocketd_held", None)
def asked(attack):
    if held: type(held).fork = lambda self, message, leaf, session, avoid, output: attack(message, output)
def say(**words): type(held).refuse.__globals__["wire"].send(held.talk, words)
def f(): return 1
"""
ATTACKS = {
    "ends": "os._exit(0)",
    "says that it has forked": "say(op='forked', launch=message['launch'])",
    "says nothing": "pass",
    "refuses": "say(op='refused', launch=message['launch'], error={'code': 'held', 'message': 'x' * 9000, 'detail': {}})",
    "floods the log for ever": "\n    os.set_blocking(output, False)\n    while True:\n        try: os.write(output, b'x' * 4096)\n        except BlockingIOError: time.sleep(0.001)",
    "keeps the session's output": "held.kept = os.dup(output); say(op='refused', launch=message['launch'], error=None)",
}  # fmt: skip


@pytest.mark.parametrize("what", ATTACKS)
def test_a_template_that(preload, what):
    """Its session goes the long way, others go on, and nothing of it is left."""
    other = preload(APP)
    other.warm()
    pocket = preload(f"{REACH}\ndef attack(message, output):\n    {ATTACKS[what]}\nasked(attack)\n")
    pocket.warm()
    assert ask(pocket, "app:f", way="root") == 1
    assert ask(other, "app:add", 1) == 1
    pocket.cool()
    assert pocket.gone(), pocket.processes()


# -- pocketd, and the service's models


@pytest.fixture
def own(own_pocketd, tmp_path):
    tmp_path.chmod(0o755)
    place = tmp_path / "pockets"
    place.mkdir()
    return lambda config: Pockets(own_pocketd(config), place)


def test_it_gives_way_to_the_budget(own):
    pocket: Pocket = own(f'{CONFIG}\n[held]\nbudget = "1M"\n').make(APP, None, program=None, preload=["app"], warm=1)
    pocket.warm()
    assert wait_for(lambda: pocket.events("pocket-given-up"))
    assert "[held] budget is 1M" in pocket.events("pocket-given-up")[0]
    assert ask(pocket, "app:add", 1, way="root") == 1


def test_what_a_slot_shares_with_its_template_counts_in_the_budget(own):
    pockets = own(CONFIG)
    pocket: Pocket = pockets.make(f"big = bytearray(80 << 20)\n{APP}", None, program=None, preload=["app"], warm=1)
    pocket.warm()
    assert ready(pocket, 1)
    pockets.base = f'{CONFIG}\n[held]\nbudget = "40M"\n'
    pockets.read_again()
    assert wait_for(lambda: pocket.events("pocket-given-up"))
    assert "[held] budget is 40M" in pocket.events("pocket-given-up")[0]


@pytest.mark.parametrize("warm", [0, 1])
def test_pocketd_ends_and_begins_while_a_session_goes_on(own, warm):
    pocket: Pocket = own(CONFIG).make(APP, None, program=None, preload=["app"], warm=warm)
    pocket.warm()
    daemon = pocket.pocketd
    with enter(pocket) as session:
        assert session.call("app:add", 1) == 1
        daemon.end(signal.SIGKILL)
        assert session.call("app:add", 2) == 2
        daemon.start()
        assert [w["pocket"] for w in daemon.workers()] == [pocket.name]
        assert session.call("app:add", 3) == 3
        pocket.warm()
        assert not warm or ready(pocket, 1)
        assert ask(pocket, "app:add", 1, way="slot" if warm else "held") == 1
    pocket.cool()
    assert pocket.gone()


def test_models_of_the_service_that_the_pocket_may_use_are_in_its_sessions(own):
    """And those that it may not use any more are not in their memory."""
    source = """
        import sys
        at_import = [name in sys.modules for name in ("graphlib", "sched")]
        def loaded(): return at_import
        """
    models = '{ sorter = "graphlib:TopologicalSorter", planner = "sched:scheduler" }'
    pocket: Pocket = own(f'[service.plain]\nruntime = "python"\nmodels = {models}\n').make(
        source, None, program=None, preload=["app"], allow={"models": ["sorter", "planner"]}
    )
    pocket.warm()
    pocket.forget()
    with enter(pocket) as session:
        assert session.models == ("planner", "sorter")
        assert session.call("app:loaded") == [True, True]
        assert session.model("planner").empty() is True
        pocket.pocketd.pocket("deny", pocket.name, "model=planner")
        pocket.warm()
        with enter(pocket) as narrow:
            assert narrow.models == ("sorter",)
            assert narrow.call("app:loaded") == [True, False]
            with pytest.raises(UnknownModel):
                narrow.model("planner")
        assert session.model("planner").empty() is True
    assert pocket.ways() == ["held", "held"]


# -- TensorFlow

KERAS = """
import keras, numpy as np, tensorflow as tf
{seed}
built = []

def ready():
    layers = [keras.layers.Conv2D(8, 3), keras.layers.Flatten(), keras.layers.Dense(10)]
    built.append(keras.Sequential([keras.Input((32, 32, 3)), *layers]))
    score(np.zeros((1, 32, 32, 3), "float32"))

def score(image):
    if not built:
        ready()
    return len(built), run(image)

@tf.function
def run(image):
    return built[0](image, training=False)

def draws():
    if not built:
        ready()
    drawn = np.random.rand(), tf.random.uniform([]), keras.random.uniform([])
    return [float(n) for n in drawn]
"""


def scores(session: Session) -> list[bytes]:
    image = session.tensor((1, 32, 32, 3), "float32")
    found = []
    for value in (0.5, 0.5, 0.25):
        image.numpy()[...] = value
        count, result = session.call("app:score", image)
        assert count == 1  # it is built once
        found.append(result.numpy().tobytes())
    return found


def test_a_model_that_its_module_has_built_gives_what_it_gives_without(preload):
    source = KERAS.format(seed="keras.utils.set_random_seed(7)")
    pocket = preload(source, ["app", "app:ready"], service="tensorflow", warm=1)
    plain = preload(source, preload=None, service="tensorflow")
    with enter(plain) as session:
        expected = scores(session)
    assert expected[0] == expected[1] != expected[2]
    pocket.warm()
    assert ready(pocket, 1)
    pocket.forget()
    with enter(pocket) as slot, enter(pocket) as held:
        assert scores(held) == scores(slot) == expected
    assert pocket.ways() == ["slot", "held"]


def test_what_tensorflow_draws_is_each_sessions_own_unless_it_was_seeded(preload):
    for seed in ("keras.utils.set_random_seed(7)", ""):
        source = KERAS.format(seed=seed)
        pocket = preload(source, ["app", "app:ready"], service="tensorflow")
        plain = ask(preload(source, preload=None, service="tensorflow"), "app:draws", way=None)
        pocket.warm()
        first, second = (ask(pocket, "app:draws") for _ in range(2))
        if seed:
            assert first == second == plain
        else:
            assert not set(first) & set(second)


def test_a_model_of_the_service_beside_what_is_preloaded(own, small_model):
    numpy = pytest.importorskip("numpy")
    config = f"""
        [service.tensorflow]
        runtime = "tensorflow"
        env = {toml_table(service_environment())}
        models = {{ small = "{small_model[0]}" }}
        """
    pocket: Pocket = own(config).make(
        KERAS.format(seed=""), None, "tensorflow", program=None, preload=["app:ready"], allow={"models": ["small"]}
    )
    shutil.copy(small_model[0], pocket.place / "own.keras")
    pocket.warm()
    with enter(pocket) as session:
        image = session.tensor((1, 32, 32, 3), "float32")
        image.numpy()[...] = 1
        for model in (session.model("small"), session.load("own.keras")):
            assert numpy.allclose(model(image).numpy(), small_model[1], atol=1e-6)
        scores(session)
    assert pocket.ways() == ["held"]
