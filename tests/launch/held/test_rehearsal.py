"""A rehearsal warms what follows the checkpoint and leaves no trace; where it leaves one, the pocket is held without."""

# ruff: noqa: E501
# ruff: noqa: E501
from __future__ import annotations

import os
import signal
import textwrap

import pytest

from tests.conftest import wait_for
from tests.launch.both import Ended, finish, read_line
from tests.launch.held.pocket import popen

WARMS = """
import sys
import functools
@functools.lru_cache
def slow(x):
    return x * 2

def main():
    print(slow(21), sys.argv[1:], slow.cache_info().hits)

main()
"""


def test_what_follows_is_warm(hold):
    """A cache of the program's own is seen in its output: it must not be. One that is not seen stays warm."""
    source = WARMS.replace(", slow.cache_info().hits", "").replace(
        "    return x * 2", "    import colorsys\n    return x * 2"
    )
    pocket = hold(source + "sys.stderr.write(f'{\"colorsys\" in sys.modules}\\n')\n", "main()", rehearse=["s"])
    assert pocket.warm()["rehearsed"] is True
    assert pocket.row()["held"] == "rehearsed"
    pocket.same("a", "b")


CLEAN = {
    "names": "x = 1\nhere = None\nx += 1\ny = x\nprint(x)\n",
    "names deleted": "x = 1\nhere = None\nprint(x)\ndel x\n",
    "a function": "x = 1\ndef main():\n    global x\n    x += 1\n    print(x, sys.argv)\nmain()\n",
    "a function with arguments": "def main(a, *b, c=3, **d):\n    a += 1\n    print(a, b, c, d)\nmain(1, 2, 3, c=4, e=5)\n",
    "the working directory": "import os\nhere = None\nprint(os.getcwd())\nos.chdir('/usr')\n",
    "the environment": "import os\nhere = None\nprint(os.environ.get('A'), os.environ.get('B'))\nos.environ['A'] = 'x'\nos.environ.pop('B', 0)\n",
    "the umask": "import os\nhere = None\nprint(oct(os.umask(0o77)))\n",
    "the search path": "here = None\nprint(len(sys.path), 'x' in sys.path)\nsys.path.insert(0, 'x')\n",
    "signal handlers": "import signal\nhere = None\nprint(signal.getsignal(signal.SIGUSR1))\nsignal.signal(signal.SIGUSR1, print)\n",
    "ignored signals": "import signal\nhere = None\nprint(signal.getsignal(signal.SIGTERM))\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n",
    "blocked signals": "import signal\nhere = None\nprint(signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]))\n",
    "a limit": "import resource\nhere = None\nprint(resource.getrlimit(resource.RLIMIT_CORE))\nresource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))\n",
    "warnings": "import warnings\nhere = None\nwarnings.warn('x')\nwarnings.simplefilter('ignore')\n",
    "once-only warnings": "import warnings\ndef f(): warnings.warn('old', DeprecationWarning)\nhere = None\nf()\nf()\n",
    "its own module": "here = None\nimport mine\nmine.x += 1\nprint(mine.x)\n",
    "its own module, imported before": "import mine\nhere = None\nmine.x += 1\nprint(mine.x)\n",
    "its own package": "here = None\nimport pack.part\nprint(pack.part.x)\npack.part.x = 9\n",
    "a process that it forks": "import os\nhere = None\npid = os.fork()\nif not pid:\n    sys.exit(3)\nprint(os.waitpid(pid, 0)[1])\n",
    "functions of on_start": "import pocketd\nseen = 1\ndef more():\n    global seen\n    seen *= 3\npocketd.on_start(more)\nhere = None\npocketd.on_start(more)\nprint(seen)\n",
    "functions at its end": "import atexit\nhere = None\natexit.register(print, 'end')\n",
    "functions at its end, decorated": "import atexit\nhere = None\n@atexit.register\ndef f(): print('end')\n",
    "functions at its end by a name": "from atexit import register\nhere = None\nregister(print, 'end')\n",
    "functions at its end by weakref": "import weakref\nclass A: pass\na = A()\nhere = None\nweakref.finalize(a, print, 'end')\n",
    "logging": "import logging\nhere = None\nlogging.basicConfig(stream=sys.stdout)\nlogging.warning('x')\n",
    "standard streams": "here = None\nprint(sys.stdout.line_buffering)\nsys.stdout.reconfigure(line_buffering=True)\n",
    "a closed stream": "here = None\nprint('x')\nsys.stdout.close()\n",
    "replaced streams": "import io\nhere = None\nprint('x')\nsys.stdout = io.StringIO()\nprint('y')\n",
    "excepthook": "here = None\nprint(sys.excepthook is sys.__excepthook__)\nsys.excepthook = print\n",
    "recursion": "here = None\nprint(sys.getrecursionlimit())\nsys.setrecursionlimit(5000)\n",
    "a pool that stays": "from concurrent.futures import ThreadPoolExecutor\nhere = None\np = ThreadPoolExecutor(2)\nprint(list(p.map(abs, [-1])))\n",
    "a daemon thread": "import threading, time\nhere = None\nt = threading.Thread(target=time.sleep, args=(600,), daemon=True)\nt.start()\nprint(threading.active_count())\n",
    "an exit": "here = None\nprint('x')\nsys.exit()\n",
    "collection": "import gc\nhere = None\nprint(gc.isenabled())\ngc.disable()\n",
    "a generator": "def f():\n    yield 1\n    yield 2\ng = f()\nnext(g)\nhere = None\nprint(list(g))\n",
    "an open file": "f = open(__file__)\nf.readline()\nhere = None\nprint(f.readline())\n",
    "annotations": "x: int = 1\nhere = None\ny: str = 'a'\nprint(__annotations__)\n",
    "a decimal context": "import decimal\nhere = None\nprint(decimal.getcontext().prec)\ndecimal.getcontext().prec = 5\n",
    "the locale": "import locale\nhere = None\nprint(locale.setlocale(locale.LC_TIME))\nlocale.setlocale(locale.LC_TIME, 'C.UTF-8')\n",
    "a time zone": "import os, time\nhere = None\nprint(time.tzname)\nos.environ['TZ'] = 'Asia/Tokyo'\ntime.tzset()\n",
    "bytecode of what it makes": "import functools, os\n@functools.lru_cache\ndef made():\n    sys.path.insert(0, '/tmp')\n    open('/tmp/ours.py', 'w').close()\n    import ours\n    os.unlink('/tmp/ours.py')\n    sys.path.remove('/tmp')\n    return ours\nhere = None\nprint(made())\n",
    "a list": "seen = []\nhere = None\nseen.append(1)\nprint(seen)\n",
    "a module's attribute": "import string\nhere = None\nprint(getattr(string, 'mine', 0))\nstring.mine = 1\n",
    "a builtin": "import builtins\nhere = None\nprint(hasattr(builtins, 'mine'))\nbuiltins.mine = 1\n",
    "a list in a library's object": "import string\nkept = string.Template('')\nkept.seen = []\nhere = None\nkept.seen.append(1)\nprint(kept.seen)\n",
}  # fmt: skip
# What a rehearsal leaves behind, so that these are held without one: none may print anything else than under Python.
TRACES = {"a list in a library's object", "a generator", "an open file", "a daemon thread"}


# Where a rehearsal's trace is not looked for, since a library may keep there what it has warmed.
# Where nobody looks: pickle takes no lock apart.
HIDDEN = "import threading\nkept = threading.Barrier(1)\nkept.seen = []\n"


@pytest.mark.parametrize("what", CLEAN)
def test_it_leaves_no_trace(hold, what):
    """Rehearsed or not, a run is as under plain Python."""
    source = "import sys\n" + CLEAN[what]
    pocket = hold(source, "here =" if "here =" in source else "main", rehearse=["s"], allow={"write": ["out"]})
    pocket.write("mine.py", "x = 0\n")
    pocket.write("pack/part.py", "x = 0\n")
    pocket.write("pack/__init__.py", "")
    facts = pocket.warm()
    for _ in range(2):
        pocket.same("a")
    if facts["rehearsed"] is (what in TRACES):
        pytest.fail(f"rehearsed: {facts['rehearsed']}: {facts['not_rehearsed']}")


def test_a_trace_is_shown(hold):
    pocket = hold(
        f"import sys\n{HIDDEN}def main():\n    kept.seen.append(sys.argv[1])\n    print(len(kept.seen), kept.seen)\nmain()\n",
        "main",
        rehearse=["s.jpg"],
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is False
    assert (
        "its standard output is not the same: \"2 ['s.jpg', 's.jpg']\" instead of \"1 ['s.jpg']\""
        in facts["not_rehearsed"]
    )
    row = pocket.row()
    assert row["held"] == "held" and row["why_not_rehearsed"] == facts["not_rehearsed"]
    assert "2 ['s.jpg', 's.jpg']" in pocket.pocketd.pocket("ps").stdout
    assert pocket.same("a").out == b"1 ['a']\n"


FAILS = {
    "a status": ("sys.exit(3)", "the sample, which has nothing to read, ended with status 3"),
    "an error": ("{}['k']", "KeyError: 'k'"),
    "a signal": ("import os; os.kill(os.getpid(), 9)", "status -9"),
    "a socket left": ("import socket; s = socket.socket(); kept.seen.append(s)", "socket"),
    "a child left": ("import subprocess; subprocess.Popen(['sleep', '600'])", "child processes"),
    "an end of its process": ("import os; os._exit(0)", "the template ended"),
    "its arguments missing": ("print(sys.argv[2])", "IndexError"),
    "lines of another number each time": (
        "import os; print('x\\n' * (os.urandom(1)[0] + 1))",
        "its standard output is not the same",
    ),
}


@pytest.mark.parametrize("what", FAILS)
def test_a_rehearsal_that_fails_is_told_and_the_pocket_held_without(hold, what):
    source, words = FAILS[what]
    pocket = hold(
        f"import sys\n{HIDDEN}here = None\nif sys.argv[1] == 's':\n    {source}\nprint('on', sys.argv)\n",
        "here =",
        rehearse=["s"],
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is False and words in facts["not_rehearsed"]
    assert pocket.same("a").out.startswith(b"on")


KEPT = {
    "a library's object": f"{HIDDEN}kept.it = None\ndef words():\n    kept.it = kept.it or parser.parse_args()\n    return kept.it\n",
}


@pytest.mark.parametrize("what", KEPT)
def test_a_sample_that_is_kept_out_of_sight(hold, what):
    """A second run of the sample has it again, as the first; one without arguments is not refused as it should be."""
    source = f"import argparse, functools\nparser = argparse.ArgumentParser()\nparser.add_argument('word')\n{KEPT[what]}here = None\nprint(words().word)\n"
    pocket = hold(source, "here =", rehearse=["sample"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "a run without arguments" in facts["not_rehearsed"]
    assert pocket.same("other").out == b"other\n"


def test_a_run_without_arguments_shows_what_the_sample_does_not(hold):
    source = """
    import sys
    here = None
    if len(sys.argv) > 1:
        kept.seen.append(1)
        print("noted", *sys.argv[1:])
    else:
        print(kept.seen)
    """
    pocket = hold(HIDDEN + textwrap.dedent(source), "here = None", rehearse=["sample"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False
    assert "a run without arguments after it" in facts["not_rehearsed"] and "[1]" in facts["not_rehearsed"]
    pocket.same("word")
    pocket.same()


def test_a_run_without_arguments_may_do_something_else_each_time(hold):
    """Also in what its sample, which is the same each time, does not show: then it proves nothing."""
    source = """
    import os, sys
    here = None
    print(*sys.argv[1:], "" if len(sys.argv) > 1 else "word " * (1 + os.urandom(1)[0]))
    """
    assert hold(textwrap.dedent(source), "here = None", rehearse=["sample"]).warm()["rehearsed"] is True


def test_a_sample_that_never_ends(hold):
    source = "import signal, sys\nhere = None\nprint('on', *sys.argv[1:], flush=True)\nif sys.argv[1] == 's':\n    signal.pause()\n"
    pocket = hold(source, "here =", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "did not end within 60 s" in facts["not_rehearsed"]
    assert facts["not_rehearsed"].endswith("on s\n")
    assert pocket.same("a").out == b"on a\n"


# -- files


@pytest.mark.parametrize("base", ["{place}", "/pocket"])
def test_what_it_writes_is_thrown_away(hold, base):
    pocket = hold(
        f"""
        import os, sys
        base = {base!r}
        here = None
        print(sorted(os.listdir(base + "/out")), open(base + "/out/there").read())
        with open(base + "/out/" + sys.argv[1], "w") as f: f.write("new")
        with open(base + "/out/there", "a") as f: f.write("+")
        os.rename(base + "/out/" + sys.argv[1], base + "/out/" + sys.argv[1] + ".done")
        os.makedirs(base + "/out/deep/er", exist_ok=True)
        os.remove(base + "/out/old") if os.path.exists(base + "/out/old") else print("no old")
        """,
        "here =",
        rehearse=["sample"],
        allow={"write": ["out"]},
    )
    if base != "/pocket":
        pocket.write("app.py", (pocket.place / "app.py").read_text().replace("{place}", str(pocket.place)))
    out = pocket.place / "out"
    out.mkdir(exist_ok=True)
    (out / "there").write_text("was")
    (out / "old").write_text("old")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(out.rglob("*"))}
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(out.rglob("*"))} == before
    first = pocket.from_held("real")
    assert first == Ended(0, b"['old', 'there'] was\n", b"")
    assert sorted(os.listdir(out)) == ["deep", "real.done", "there"]
    assert (out / "there").read_text() == "was+" and (out / "real.done").read_text() == "new"
    assert pocket.from_held("again").out == b"['deep', 'real.done', 'there'] was+\nno old\n"


def test_files_that_differ_are_told(hold):
    pocket = hold(
        f"{HIDDEN}here = None\nkept.seen.append(1)\nopen('/pocket/out/count', 'w').write(str(len(kept.seen)))\n",
        "here =", rehearse=["s"], allow={"write": ["out"]},
    )  # fmt: skip
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "does not write the same to" in facts["not_rehearsed"]
    assert not (pocket.place / "out/count").exists()


def test_what_it_leaves_in_tmp_is_removed(hold):
    pocket = hold(
        "import os\nhere = None\nprint(os.listdir('/tmp'), os.listdir('/dev/shm'))\nopen('/tmp/x', 'w')\nos.makedirs('/tmp/a/b')\nopen('/dev/shm/y', 'w')\n",
        "here =",
        rehearse=[],
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    assert pocket.from_held().out == b"[] []\n"


# -- its end

LOOP = """
import signal, sys, time
import pocketd
def main():
    n = 0
    while True:
        n += 1
        print("turn", n, sys.argv[1:], flush=True)
        pocketd.rehearsed()
        if "once" in sys.argv: break
        time.sleep(0.01)
main()
"""


@pytest.mark.parametrize("until", ["output", "rehearsed", 0.3])
def test_a_loop_is_rehearsed_until(hold, until):
    pocket = hold(LOOP, "main()", rehearse=["s"], rehearse_until=until)
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]  # how many turns that are may be another number each time
    assert pocket.same("once").out == b"turn 1 ['once']\n"
    run = popen(pocket, "on")
    for n in range(1, 9):
        assert read_line(run.stdout.fileno()) == b"turn %d ['on']\n" % n
    run.send_signal(signal.SIGTERM)
    assert finish(run).status == -signal.SIGTERM


def test_a_trace_is_found_in_a_loop(hold):
    """As far as both have come they have to say the same; no two come as far."""
    pocket = hold(
        LOOP.replace("n = 0", "n = len(kept.seen)\n    kept.seen.append(1)")
        .replace("import pocketd", f"import pocketd, random\n{HIDDEN}")
        .replace("sleep(0.01)", "sleep(random.SystemRandom().random() / 50)"),
        "main()",
        rehearse=["s"],
        rehearse_until=0.3,
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is False
    assert "'turn 2 []' instead of 'turn 1 []'" in facts["not_rehearsed"]  # without arguments, which is tried first
    assert pocket.same("once").out == b"turn 1 ['once']\n"


HANGS = """
import sys, threading, time
lock = threading.Lock()
def main():
    while True:
        lock.acquire()
        print("tick", sys.argv[1:], flush=True)
        time.sleep(0.02)
        lock.release()
        if "once" in sys.argv: break
main()
"""


def test_a_loop_that_says_nothing_more_after_its_rehearsal(hold):
    """It was ended while it had the lock, which no run could take any more."""
    pocket = hold(HANGS, "main()", rehearse=["s"], rehearse_until=1)
    assert pocket.warm()["rehearsed"] is False
    pocket.same("once")


def test_a_digit_after_the_other(hold):
    """Many, and others each time: to look for times in them takes no longer than to look at them."""
    source = "import random, sys\nhere = None\nprint(''.join(random.SystemRandom().choices('0123456789', k=200_000)))\n"
    pocket = hold(source, "here =", rehearse=["s"])
    assert pocket.warm()["rehearsed"] is True


def test_many_places_to_write(hold):
    """Each takes descriptors for each run of the sample: more than one message carries."""
    places = [f"out{n}" for n in range(12)]
    source = "import os\nhere = None\nfor n in range(12): open(f'/pocket/out{n}/x', 'w').write(f'{os.urandom(8)}')\nprint(1)\n"
    pocket = hold(source, "here =", rehearse=[], allow={"write": places})
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    assert not any(any((pocket.place / place).iterdir()) for place in places)
    assert pocket.from_held().out == b"1\n"


def test_some_seconds_of_a_silent_loop(hold):
    pocket = hold(
        "import sys, time\ndef main():\n    while len(sys.argv) == 1: time.sleep(0.01)\n    print('end')\nmain()\n",
        "main()",
        rehearse=[],
        rehearse_until=0.3,
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("x")


def test_it_does_not_see_the_caller(hold):
    """A sample has its own arguments and nothing to read; no run sees anything of it."""
    pocket = hold(
        "import sys\nhere = None\nprint(sys.argv[1:], repr(sys.stdin.read()))\n", "here =", rehearse=["sample", "x"]
    )
    assert pocket.warm()["rehearsed"] is True
    pocket.same("mine", input=b"text")


def test_a_pocket_with_a_network_is_not_rehearsed(hold):
    pocket = hold("here = None\nprint(1)\n", "here =", rehearse=[], allow={"network": "host"})
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "a network" in facts["not_rehearsed"]
    pocket.same()


def test_nothing_of_it_reaches_the_log_or_a_caller(hold):
    pocket = hold(
        "import sys\nprint('before')\nhere = None\nprint('SAMPLE', *sys.argv[1:])\n", "here =", rehearse=["secret"]
    )
    assert pocket.warm()["rehearsed"] is True
    assert pocket.same("x").out == b"before\nSAMPLE x\n"


def test_statements_of_every_kind_after_the_checkpoint(hold):
    pocket = hold(
        textwrap.dedent(
            """
            "A docstring."
            from __future__ import annotations
            import sys
            here = None
            "not a docstring"
            class A:
                x: int = 1
                def f(self) -> A: return __class__
            async def g(): return 1
            for n in range(2): print(n)
            else: print("else")
            with open(__file__) as f: print(f.readline())
            try: 1 / 0
            except ZeroDivisionError as e: print(e)
            finally: print("finally")
            print(A().f(), __doc__, [n for n in range(3)], A.__annotations__)
            if (y := 3): print(y)
            """
        ),
        "here =",
        rehearse=[],
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same()


def test_it_is_made_anew_and_rehearsed_when_the_sample_changes(hold):
    pocket = hold("import sys\nhere = None\nprint(open('/pocket/' + sys.argv[1]).read())\n", "here =", rehearse=["s"])
    pocket.write("s", "one")
    pocket.warm()
    pocket.write("s", "two")
    assert pocket.pocket("s").out == b"two\n"
    assert wait_for(lambda: pocket.row()["held"] == "rehearsed")
    assert pocket.from_held("s").out == b"two\n"


TIMED = """
import sys, time
def main():
    begun = time.perf_counter()
    total = sum(range(20000))
    took = time.perf_counter() - begun
    print(f"1/1 ---- 0s {1e3 * took:.3f}ms/step - {took:.6f} s")
    print(time.strftime("%Y-%m-%d %H:%M:%S"), f"{took * 1e6:.2f} us", file=sys.stderr)
    print(total, sys.argv[1:], EXTRA)
main()
"""


@pytest.mark.parametrize(
    "extra, rehearsed", [("'x', object()", True), ("kept.seen.append(1) or len(kept.seen)", False)]
)
def test_times_that_a_program_prints_are_not_compared(hold, extra, rehearsed):
    """As model.predict() does; nor where an object lies."""
    pocket = hold(f"{HIDDEN}{TIMED.replace('EXTRA', extra)}", "main", rehearse=["s"])
    warm = pocket.warm()
    assert warm["rehearsed"] is rehearsed
    left_out = "its output has times or addresses in it, which the rehearsal's proof left out"
    assert warm["noted"] == ([left_out] if rehearsed else [])
    assert pocket.from_held("a").out.splitlines()[1].startswith(b"199990000 ['a']")


BY_ITSELF = {
    "a clock": "print('took', round(time.monotonic(), 7), 'in all')",
    "a pid": "print(os.getpid())",
    "random words": "print(*(CHANCE.choice(WORDS) for _ in range(20)), 'END')",
    "numbers, of which two are often the same": "print(*(CHANCE.randrange(100) for _ in range(400)))",
    "a column": "print(f'[{CHANCE.random() * 10 ** CHANCE.randrange(6):10.2f}]')",
    "a directory of its own": "print(tempfile.mkdtemp())",
    "a file of its own": "tempfile.NamedTemporaryFile(dir='/pocket/out', delete=False).write(b'x')",
    "what it writes": "open('/pocket/out/log', 'a').write(f'{time.time_ns()}\\n')",
    "random arrays": "import numpy; print(numpy.random.rand(3, 3)); print(numpy.random.default_rng().normal(size=4).tolist())",
}  # fmt: skip
DIFFERENT = (
    "import os, random, sys, tempfile, time\nCHANCE, WORDS = random.SystemRandom(), [f'w{n}' for n in range(1000)]\n"
    + HIDDEN
    + "here = None\n"
)


def different(hold, what, rest):
    source = f"{DIFFERENT}{BY_ITSELF[what]}\n{rest}\n"
    return hold(source, "here =", rehearse=["s"], allow={"write": ["out"]})


@pytest.mark.parametrize("what", BY_ITSELF)
def test_of_what_no_two_runs_do_the_same_the_rest_is_compared(hold, what):
    pocket = different(hold, what, "print('and', sys.argv[1:])")
    warm = pocket.warm()
    assert warm["rehearsed"] is True, warm["not_rehearsed"]
    assert any("no two runs of its sample do the same" in text for text in warm["noted"])
    assert pocket.from_held("a").out.splitlines()[-1] == b"and ['a']"


@pytest.mark.parametrize("what", BY_ITSELF)
def test_a_trace_is_found_beside_what_no_two_runs_do_the_same(hold, what):
    pocket = different(hold, what, "kept.seen.append(0)\nprint(len(kept.seen))")
    warm = pocket.warm()
    assert warm["rehearsed"] is False and "is not the same" in warm["not_rehearsed"]
    assert pocket.from_held("a").out.splitlines()[-1] == b"1"


def test_the_rest_of_a_method_that_says_super(hold):
    source = """
        import sys
        class Base:
            def run(self): print("base", type(self).__name__)
        class App(Base):
            def run(self):
                model = 3
                here = None
                super().run()
                print(model, __class__.__name__, sys.argv[1:])
        class More(App): pass
        More().run()
    """
    pocket = hold(textwrap.dedent(source), "app.py:8", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    assert pocket.same("a").out == b"base More\n3 App ['a']\n"


@pytest.mark.parametrize("rehearse", [None, ["s"]])
def test_a_handler_of_the_program_hears_of_its_own_children_alone(hold, rehearse):
    source = """
        import os, signal, sys
        heard = []
        signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
        def main():
            os.system("true")
            print(heard, sys.argv[1:])
        main()
    """
    pocket = hold(textwrap.dedent(source), "main()", **({"rehearse": rehearse} if rehearse else {}))
    facts = pocket.warm()
    assert facts["rehearsed"] is bool(rehearse), facts
    pocket.same("a")


@pytest.mark.parametrize("ignores", [False, True])
def test_a_child_that_nobody_waits_for_any_more(hold, ignores):
    """os.popen(...).read() leaves the shell to subprocess, which waits for it at its next one."""
    source = """
        import os, signal, sys
        {ignores}
        kernel = os.popen("echo linux").read()
        def main():
            print(kernel, os.popen("echo again").read(), sys.argv[1:])
        main()
    """
    ignored = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)" if ignores else ""
    pocket = hold(textwrap.dedent(source.format(ignores=ignored)), "main()", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("a")


def test_a_traceback_is_no_output_that_ends_a_rehearsal(hold):
    """Of a run without arguments, which ends with one: it would be shown in part, with where an object lies."""
    source = """
        import sys
        def main():
            try:
                n = int(sys.argv[1])
            except Exception as e:
                raise SystemError("usage: prog N") from e
            print("hello", n, flush=True)
            while n < 1000: pass
        if __name__ == "__main__": main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["1"], rehearse_until="output")
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("1000")
    pocket.same()


def test_what_went_out_of_hand_after_it_is_told_with_its_last_word(hold):
    source = f"import sys\n{HIDDEN}here = None\nif kept.seen: raise ValueError('seen before')\nkept.seen.append(1)\nprint('x')\n"
    facts = hold(source, "here =", rehearse=["s"]).warm()
    assert (
        "its exit status is 1 instead of 0; the last that it said is 'ValueError: seen before'"
        in facts["not_rehearsed"]
    )


def test_a_directory_that_it_makes_on_its_way(hold):
    """os.makedirs(..., exist_ok=True) before the checkpoint: what lies over it in a rehearsal had it, and is taken off."""
    source = """
        import os, sys
        os.makedirs("/pocket/out/cache/deep", mode=0o750, exist_ok=True)
        def main():
            print(oct(os.stat("/pocket/out/cache/deep").st_mode), sorted(os.listdir("/pocket/out/cache/deep")))
            open(f"/pocket/out/cache/deep/{sys.argv[1]}", "w").close()
        main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["s"], allow={"write": ["out"]})
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    assert pocket.from_held("a").out.endswith(b" []\n")
    assert pocket.from_held("b").out.endswith(b" ['a']\n")
    assert os.listdir(pocket.place / "out/cache/deep")


def test_a_sample_that_waits_for_its_input(hold):
    """By epoll, which takes no /dev/null."""
    source = """
        import asyncio, sys
        async def lines():
            reader = asyncio.StreamReader()
            loop = asyncio.get_running_loop()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            return await reader.read()
        here = None
        print(asyncio.run(lines()), sys.argv[1:])
    """
    pocket = hold(textwrap.dedent(source), "here =", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("a", input=b"text")


def test_the_rest_of_a_function_that_shares_names_with_another(hold):
    """Which changes them: the rest, run by itself, would not see that."""
    source = """
        import sys
        def main():
            count = 0
            def more():
                nonlocal count
                count += 1
            here = None
            more()
            print(count, sys.argv[1:])
        main()
    """
    pocket = hold(textwrap.dedent(source), "app.py:8", rehearse=["s"])
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "which changes names of it" in facts["not_rehearsed"]
    pocket.same("a")
