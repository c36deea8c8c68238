"""What a run that goes on from a checkpoint finds and leaves is what it would under plain Python."""

# ruff: noqa: E501
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import wait_for
from tests.launch.both import Ended, ends, finish, read_line
from tests.launch.held.pocket import Pocket, popen
from tests.launch.test_terminal import Terminal

HERE = "here = None\n"  # each program of this file is held before this line

# What it prints, on each of its two streams, before and after the checkpoint, in all manners of printing.
PRINTS = f"""
import os, sys
print("before, a line")
print("before, no line", end="")
sys.stderr.write("error before, no line")
print("error before", file=sys.stderr)
os.write(1, b"past Python\\n")
{HERE}
print("after, a line")
sys.stderr.write("error after")
sys.stdout.write("after, no line")
"""
PROGRAMS = {
    "prints": PRINTS,
    "flushes before it": f"print('a', flush=True); print('b', end='', flush=True)\n{HERE}print('c')\n",
    "prints bytes": f"import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')\n{HERE}sys.stdout.buffer.write(b'\\xfd')\n",
    "prints much": f"for n in range(9000): print(n)\n{HERE}for n in range(9000): print(n)\n",
    "returns": f"{HERE}",
    "exits": f"import sys\n{HERE}sys.exit()\n",
    "exits with 0": f"import sys\n{HERE}sys.exit(0)\n",
    "exits with 7": f"import sys\n{HERE}sys.exit(7)\n",
    "exits with -1": f"import sys\n{HERE}sys.exit(-1)\n",
    "exits with 256": f"import sys\n{HERE}sys.exit(256)\n",
    "exits with words": f"import sys\n{HERE}sys.exit('it went wrong')\n",
    "exits with an object": f"import sys\n{HERE}sys.exit([1, 2])\n",
    "exits with True": f"import sys\n{HERE}sys.exit(True)\n",
    "exits with a float": f"import sys\n{HERE}sys.exit(1.5)\n",
    "exits by the system call": f"import os\nprint('unflushed')\n{HERE}os._exit(9)\n",
    "raises": f"def f():\n    raise ValueError('deep')\n{HERE}f()\n",
    "raises at the checkpoint": f"x = 1\n{HERE.replace('None', '1 / 0')}",
    "raises a group": f"{HERE}raise ExceptionGroup('all', [ValueError(1), KeyError(2)])\n",
    "raises in a cause": f"def f():\n    try: 1 / 0\n    except Exception as e: raise KeyError(3) from e\n{HERE}f()\n",
    "raises with notes": f"{HERE}e = ValueError('x')\ne.add_note('a note')\nraise e\n",
    "raises KeyboardInterrupt": f"{HERE}raise KeyboardInterrupt\n",
    "raises SystemExit of a subclass": f"class E(SystemExit): pass\n{HERE}raise E(3)\n",
    "raises a BaseException": f"class E(BaseException): pass\n{HERE}raise E('x')\n",
    "recurses": f"def f(n): return f(n + 1)\n{HERE}try: f(0)\nexcept RecursionError as e: print(e)\n",
    "has an excepthook": f"import sys\nsys.excepthook = lambda *a: print('hook', a[1])\n{HERE}1 / 0\n",
    "shows its stack": f"import traceback\ndef f(): traceback.print_stack()\n{HERE}f()\n",
    "looks at its frames": f"import sys\n{HERE}f = sys._getframe()\nprint(f.f_lineno, f.f_code.co_name, f.f_back)\n",
    "warns": f"import warnings\nwarnings.warn('before')\n{HERE}warnings.warn('after')\n",
    "dies by SIGTERM": f"import os, signal\n{HERE}os.kill(os.getpid(), signal.SIGTERM)\n",
    "dies by SIGKILL": f"import os, signal\n{HERE}os.kill(os.getpid(), signal.SIGKILL)\n",
    "aborts": f"import os\n{HERE}os.abort()\n",
    "handles a signal": (
        "import os, signal\nsignal.signal(signal.SIGUSR1, lambda n, f: print('got', n, f.f_lineno))\n"
        f"{HERE}os.kill(os.getpid(), signal.SIGUSR1)\nprint(signal.getsignal(signal.SIGUSR1).__name__)\n"
    ),
    "blocks a signal": (
        f"import signal\n{HERE}print(signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
        "print({n.name: signal.getsignal(n) for n in signal.valid_signals() if isinstance(n, signal.Signals)})\n"
    ),
    "blocked a signal before": (
        f"import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n{HERE}"
        "print(signal.pthread_sigmask(signal.SIG_BLOCK, []))\n"
    ),
    "ignored a signal before": (
        f"import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{HERE}os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('on')\n"
    ),
    "its atexit functions": (
        "import atexit\nprint('x')\natexit.register(print, 'first registered')\n@atexit.register\ndef f(): print('second')\n"
        f"{HERE}atexit.register(print, 'third')\n"
    ),
    "its atexit functions after an error": f"import atexit\natexit.register(print, 'at exit')\n{HERE}1 / 0\n",
    "its atexit functions after os._exit": f"import atexit, os\natexit.register(print, 'x')\n{HERE}os._exit(3)\n",
    "its finalizers": f"class A:\n    def __del__(self): print('gone')\na = A()\n{HERE}b = A()\n",
    "its weakref finalizers": f"import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 'final')\n{HERE}",
    "logging": (
        "import logging, sys\nlogging.basicConfig(format='%(levelname)s %(message)s %(lineno)d')\n"
        "handler = logging.StreamHandler(sys.stdout)\nlogging.getLogger('x').addHandler(handler)\n"
        f"logging.warning('before')\n{HERE}logging.warning('after')\nlogging.getLogger('x').error('error')\n"
    ),
    "names of sys": (
        "from sys import argv, exit, orig_argv, path, stdin, stdout, stderr\nimport sys\n"
        f"{HERE}print(argv, orig_argv[1:], argv is sys.argv, stdout is sys.stdout, stderr is sys.stderr, stdin is sys.stdin)\n"
        "print('by stdout', file=stdout)\nprint('by stderr', file=stderr)\nprint(stdin.read())\nexit(2)\n"
    ),
    "print kept": f"import functools\nsay = functools.partial(print, 'said', flush=True)\n{HERE}say(1)\n",
    "the environment kept": f"from os import environ, environb, getenv\n{HERE}print(environ['CHANGED'], environb[b'CHANGED'], getenv('CHANGED'))\n",
    "the environment": f"import os\n{HERE}print({{k: v for k, v in sorted(os.environ.items()) if k != '_'}})\n",
    "the environment in C": f"import ctypes\n{HERE}g = ctypes.CDLL(None).getenv\ng.restype = ctypes.c_char_p\nprint(g(b'CHANGED'), g(b'OTHER'))\n",
    "the environment of a child": (
        f"import os, subprocess\nos.environ['SET'] = 'before'\nos.environ.pop('GONE', 0)\n{HERE}subprocess.run(['env'], env=None) if 0 else 0\n"
        "print(sorted(l for l in subprocess.run(['env'], capture_output=True, text=True).stdout.splitlines() if l[:2] != '_='))\n"
    ),
    "the directory": f"import os\n{HERE}print(os.getcwd(), os.path.abspath('x'), os.listdir())\n",
    "the umask": f"import os\n{HERE}print(oct(os.umask(0)))\n",
    "the umask set before": f"import os\nos.umask(0o37)\n{HERE}print(oct(os.umask(0)))\n",
    "limits": f"import resource\n{HERE}print([resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_STACK, resource.RLIMIT_CORE)])\n",
    "its arguments": f"import sys\nname = sys.argv[0]\n{HERE}print(name, sys.argv, len(sys.argv), sys.orig_argv[1:], type(sys.argv))\n",
    "argparse": f"import argparse\np = argparse.ArgumentParser()\np.add_argument('--n', type=int)\np.add_argument('words', nargs='*')\n{HERE}print(p.parse_args())\n",
    "argparse's usage": f"import argparse\np = argparse.ArgumentParser()\n{HERE}p.parse_args()\n",
    "argparse of its own name": f"import argparse, os, sys\np = argparse.ArgumentParser(prog=os.path.basename(sys.argv[0]))\n{HERE}p.parse_args()\n",
    "its command line": f"{HERE}print(open('/proc/self/cmdline', 'rb').read().split(b'\\0')[1:])\n",
    "descriptors": f"import os\n{HERE}print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])\n",
    "its streams": (
        f"import sys\n{HERE}print([(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno(), s.isatty(), s.closed)"
        " for s in (sys.stdin, sys.stdout, sys.stderr)])\n"
        "print([type(s.buffer).__name__ + type(s.buffer.raw).__name__ for s in (sys.stdin, sys.stdout, sys.stderr)])\n"
    ),
    "streams reconfigured": (
        "import sys\nsys.stdout.reconfigure(encoding='latin-1', line_buffering=True)\nsys.stderr.reconfigure(errors='replace')\n"
        f"print('\\xe9')\n{HERE}print('\\xe9', sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.errors)\n"
    ),
    "streams wrapped": f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='latin-1')\nprint('\xe9')\n{HERE}print('\xe8')\n",
    "streams detached": f"import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding='ascii', errors='replace')\nprint('\\xe9')\n{HERE}print('\\xe9')\n",
    "streams closed": f"import sys\nsys.stdin.close()\n{HERE}print(sys.stdin.closed)\n",
    "stdout closed": f"import sys\nprint('before')\nsys.stdout.close()\n{HERE}print('after', file=sys.stderr)\n",
    "stdout by its number": f"import os, sys\nout = open(1, 'w', closefd=False)\nprint('a', file=out, flush=True)\n{HERE}print('b', file=out, flush=True)\nprint('c')\n",
    "a writer of its own": f"import sys\nclass W:\n    def write(self, t): sys.__stdout__.write(t.upper())\n    def flush(self): pass\nsys.stdout = W()\nprint('a')\n{HERE}print('b')\n",
    "stdin": f"import sys\n{HERE}print(repr(sys.stdin.read()))\n",
    "stdin by lines": f"import sys\n{HERE}print(input(), [line for line in sys.stdin])\n",
    "stdin by its number": f"import os\n{HERE}print(os.read(0, 100))\n",
    "the locale": f"import locale, sys\n{HERE}print(locale.getlocale(), locale.setlocale(locale.LC_CTYPE), sys.getfilesystemencoding(), sys.flags.utf8_mode)\n",
    "the time zone": f"import time\n{HERE}print(time.tzname, time.localtime(0).tm_hour)\n",
    "threads": f"import threading\n{HERE}t = threading.Thread(target=print, args=('in a thread',))\nt.start()\nprint(threading.current_thread().name, t.name)\n",
    "a thread from before": (
        "import queue, threading\nq, r = queue.Queue(), queue.Queue()\n"
        "def work():\n    while True: r.put(q.get() * 2)\nthreading.Thread(target=work, daemon=True).start()\n"
        f"q.put(1); print(r.get())\n{HERE}q.put(21)\nprint(r.get(timeout=60))\n"
    ),
    "an executor from before": (
        "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(3)\nprint(list(pool.map(abs, [-1, -2])))\n"
        f"{HERE}print(list(pool.map(abs, range(-50, 0))))\n"
    ),
    "children": f"import os, subprocess, sys\n{HERE}print(subprocess.run(['sh', '-c', 'echo hello; exit 3']).returncode)\n",
    "a fork": f"import os\n{HERE}pid = os.fork()\nif pid == 0: os._exit(5)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n",
    "multiprocessing": (
        "import multiprocessing\n"
        f"{HERE}if __name__ == '__main__':\n    with multiprocessing.Pool(2) as p: print(p.map(abs, [-1, -2]))\n"
    ),
    "asyncio": f"import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\n{HERE}print(asyncio.run(f()))\n",
    "asyncio used before": f"import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 3\nasyncio.run(f())\n{HERE}print(asyncio.run(f()))\n",
    "a file read before": f"f = open(__file__)\nprint(f.readline())\n{HERE}print(f.readline(), f.tell())\n",
    "a file of bytes read before": f"import os\nf = os.open(__file__, os.O_RDONLY)\nos.lseek(f, 3, 0)\n{HERE}print(f, os.read(f, 5), os.read(f, 5), os.get_inheritable(f))\n",
    "modules": f"import json, sys\n{HERE}print('json' in sys.modules, __name__, __file__, __doc__, __spec__, __builtins__)\n",
    "its namespace": f"x = 1\n{HERE}print(sorted(n for n in globals() if n != '__annotations__'), __cached__, __package__, type(__loader__).__name__)\n",
    "collection": f"import gc\n{HERE}print(gc.isenabled(), gc.get_threshold(), gc.get_freeze_count() if 0 else '')\n",
    "collection off": f"import gc\ngc.disable()\n{HERE}print(gc.isenabled())\n",
    "hooks": f"import sys\n{HERE}print([type(f).__name__ if isinstance(f, object) else f for f in sys.meta_path if type(f).__name__ != '_OfPocketd'], sys.gettrace(), sys.flags)\n",
    "search path": f"import sys\n{HERE}print(sys.path)\n",
    "functions as they are": (
        f"import os, random, sys\n{HERE}print(os.getcwd, os.isatty, os.get_terminal_size, type(os.environ), random.seed, type(sys.argv), open)\n"
    ),
    "pickles": f"import pickle\nclass A: pass\n{HERE}print(type(pickle.loads(pickle.dumps(A()))) is A)\n",
    "inspect's sources": f"import inspect\ndef f():\n    return 1\n{HERE}print(inspect.getsource(f))\n",
    "a process group": f"import os\n{HERE}print(os.getpid() == os.getsid(0), os.getpgrp() == os.getpid() or 1)\n",
    "dataclasses": f"from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n{HERE}print(A(3))\n",
}  # fmt: skip
MASK = (rb"0x[0-9a-f]+", rb"'XDG_SESSION_ID.*?,")
NOT_SO = {"a process group"}


@pytest.mark.parametrize("what", [name for name in PROGRAMS if name not in NOT_SO])
def test_it_is_the_same(hold, what):
    pocket = hold(PROGRAMS[what], "here =")
    pocket.warm()
    pocket.same("a", "--n=3", "\xe9 b", mask=MASK, input=b"one\ntwo\nthree", env={"CHANGED": "yes"})


@pytest.mark.parametrize("checkpoint", ["def main", "main"])
def test_output_into_a_file_a_pipe_and_one_file_for_both(hold, tmp_path, checkpoint):
    pocket = hold(PRINTS.replace(HERE, "def main():\n  pass\nmain()\n"), checkpoint)
    pocket.warm()
    pocket.same()
    found = []
    for run in (pocket.plain, pocket.from_held):
        with open(tmp_path / "out", "wb+") as out:
            out.write(b"was there\n")
            out.flush()
            run(stdout=out, stderr=subprocess.STDOUT)
            found.append((out.tell(), (tmp_path / "out").read_bytes()))
    # Into one file: what was printed before comes in the order of the streams, not of the lines.
    assert found[0][0] == found[1][0] and sorted(found[0][1].split(b"\n")) == sorted(found[1][1].split(b"\n"))


ENVIRONMENTS = {
    "unbuffered": {"PYTHONUNBUFFERED": "1"},
    "another encoding": {"PYTHONIOENCODING": "latin-1:replace"},
    "C": {"LC_ALL": "C"},
    "POSIX without coercion": {"LC_ALL": None, "LANG": "C", "PYTHONCOERCECLOCALE": "0"},
    "UTF-8 mode": {"PYTHONUTF8": "1"},
    "time zone": {"TZ": "Asia/Tokyo"},
    "no bytecode": {"PYTHONDONTWRITEBYTECODE": "1"},
    "another home": {"HOME": "/nowhere"},
}


@pytest.mark.parametrize("which", ENVIRONMENTS)
def test_in_another_environment(hold, which):
    """From its template or not, it is as plain Python's."""
    pocket = hold(
        PRINTS + "import time\nprint('\xe9', [(s.encoding, s.errors, s.write_through) for s in (sys.stdin, "
        "sys.stdout, sys.stderr)], time.tzname, sys.flags)\n",
        "here =",
    )
    pocket.warm()
    env = ENVIRONMENTS[which]
    expected, found = pocket.plain(env=env), pocket.pocket(env=env)
    assert found == expected, (found.shown(), expected.shown(), pocket.events("launch-not-held"))


def redirected(pocket: Pocket, redirection: str) -> tuple[Ended, Ended]:
    ended = []
    for words in (pocket.plain_command(), pocket.pocket_command()):
        command = " ".join(f"'{os.fsdecode(word)}'" for word in words)
        done = subprocess.run(
            ["sh", "-c", f"exec {command} {redirection}"],
            capture_output=True,
            cwd=pocket.place,
            env=pocket.environment(None),
        )
        ended.append(Ended(done.returncode, done.stdout, done.stderr))
    return ended[0], ended[1]


@pytest.mark.parametrize(
    "redirection", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "</dev/null >/dev/full", ">/dev/null", "2>&1", "1<>/dev/null"]
)
def test_streams_that_are_closed_or_full(hold, redirection):
    pocket = hold(
        """
        import os, sys
        print("before")
        if sys.stderr: print("error before", file=sys.stderr)
        here = None
        facts = [s and (s.name, s.fileno()) for s in (sys.stdin, sys.stdout, sys.stderr)]
        print(facts)
        if sys.stderr: print(facts, file=sys.stderr)
        """,
        "here =",
    )
    pocket.warm()
    plain, held = redirected(pocket, redirection)
    assert held == plain
    assert pocket.went("held")


def test_a_pipe_that_nobody_reads(hold):
    pocket = hold("print('before')\nhere = None\nfor n in range(100000): print(n)\n", "here =")
    pocket.warm()
    plain, held = redirected(pocket, "| head -c 20; true")
    assert held.out == plain.out


def test_input_from_a_file_goes_on_where_it_stands(hold, tmp_path):
    pocket = hold("import sys\nhere = None\nprint(sys.stdin.readline(), sys.stdin.buffer.tell())\n", "here =")
    pocket.warm()
    (tmp_path / "in").write_text("one\ntwo\nthree\n")
    found = []
    for run in (pocket.plain, pocket.from_held):
        with open(tmp_path / "in", "rb", buffering=0) as given:
            given.seek(4)
            found.append(run(stdin=given))
    assert found[0] == found[1]


def test_each_run_has_a_file_offset_of_its_own(hold):
    pocket = hold(
        "f = open(__file__)\nf.read(2)\nhere = None\nprint(f.read(3), f.tell(), flush=True)\ninput()\nprint(f.read(4))\n",
        "here =",
    )
    pocket.warm()
    runs = [popen(pocket), popen(pocket)]
    assert [read_line(run.stdout.fileno()) for run in runs] == [b"= o 5\n"] * 2
    for run in runs:
        run.stdin.write(b"\n")
    assert [finish(run) for run in runs] == [Ended(0, b"pen(\n", b"")] * 2


def test_a_directory_outside_the_pocket_and_its_umask(hold):
    pocket = hold("import os\nhere = None\nprint(os.getcwd(), oct(os.umask(0)))\n", "here =")
    pocket.write("sub/x", "")
    pocket.warm()
    pocket.same(cwd=pocket.place / "sub", umask=0o27)
    assert pocket.from_held(cwd="/usr").out.startswith(b"/usr ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_it(hold, number):
    pocket = hold("import signal\nhere = None\nprint('ready', flush=True)\nsignal.pause()\n", "here =")
    pocket.warm()
    run = popen(pocket)
    assert read_line(run.stdout.fileno()) == b"ready\n"
    run.send_signal(number)
    ended = finish(run)
    assert ended.status == -number
    assert (b"KeyboardInterrupt" in ended.err) == (number == signal.SIGINT)


def test_a_handler_from_before_the_checkpoint(hold):
    pocket = hold(
        """
        import signal, sys
        def end(number, frame):
            print("handled", number, len(sys.argv))
            sys.exit(11)
        signal.signal(signal.SIGTERM, end)
        here = None
        print("ready", flush=True)
        while True: signal.pause()
        """,
        "here =",
    )
    pocket.warm()
    run = popen(pocket, "x")
    assert read_line(run.stdout.fileno()) == b"ready\n"
    run.send_signal(signal.SIGTERM)
    assert finish(run) == Ended(11, b"handled 15 2\n", b"")
    assert ends(pocket.template, 0) is False  # the template heard nothing


def test_the_caller_gone_ends_it(hold):
    pocket = hold(
        "import os, signal\nhere = None\nprint(os.readlink('/proc/self'), flush=True)\nsignal.pause()\n", "here ="
    )
    pocket.warm()
    run = popen(pocket)
    read_line(run.stdout.fileno())
    (worker,) = [w["pid"] for w in pocket.pocketd.workers() if w["pocket"] == pocket.name]
    run.kill()
    assert ends(worker)
    finish(run)


def test_what_a_run_leaves_running_ends_with_it(hold):
    pocket = hold(
        "import subprocess\nhere = None\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\n", "here ="
    )
    pocket.warm()
    assert pocket.from_held().status == 0
    template = pocket.template
    assert wait_for(lambda: pocket.processes() == [template])


# -- a terminal


@pytest.fixture
def terminal():
    opened = []

    def start(pocket: Pocket, plain: bool) -> Terminal:
        env = pocket.environment({"TERM": "xterm"})
        command = pocket.plain_command() if plain else pocket.pocket_command()
        opened.append(Terminal([os.fsencode(w) for w in command], env, pocket.place))
        return opened[-1]

    yield start
    for t in opened:
        t.close()


def test_on_a_terminal(hold, terminal):
    pocket = hold(
        f"""
import os, shutil, sys
print("before")
print("error before", file=sys.stderr)
{HERE}
print([os.isatty(n) for n in range(3)], os.get_terminal_size(), shutil.get_terminal_size())
print([(s.line_buffering, s.encoding, s.errors, s.isatty()) for s in (sys.stdin, sys.stdout, sys.stderr)])
print("no line", end="")
print("error", file=sys.stderr)
print(input("? "))
""",
        "here =",
    )
    pocket.warm()
    ended = []
    for plain in (True, False):
        t = terminal(pocket, plain)
        t.type(b"typed\n")
        ended.append(t.end())
    assert sorted(ended[0][1].splitlines()) == sorted(ended[1][1].splitlines())
    assert ended[0][0] == ended[1][0] == 0
    assert pocket.went("held")


def test_an_interrupt_by_a_terminal(hold, terminal):
    # Says so and waits in one and the same line, so that it is interrupted in that one.
    source = "import signal, os\nhere = None\nos.write(1, b'ready\\n'), signal.pause()\n"
    pocket = hold(source, "here =")
    pocket.warm()
    ended = []
    for plain in (True, False):
        t = terminal(pocket, plain)
        t.until(b"ready\r\n")
        t.type(b"\x03")
        status, text = t.end()
        ended.append((status, re.sub(rb"\n *\^+\r\n", b"\n", text)))  # which of the two calls it was in
    assert ended[0] == ended[1]
    assert ended[0][0] == -signal.SIGINT and b"KeyboardInterrupt" in ended[0][1]


def test_a_program_in_a_directory_of_another_version(hold):
    """What it imports after the checkpoint from its own directory."""
    pocket = hold("import sys\nhere = None\nimport mine\nprint(mine.value, mine.__file__)\n", "here =")
    pocket.write("mine.py", "value = 3\n")
    pocket.warm()
    pocket.same()
    assert sys.version_info >= (3, 11)


SCRATCH = """
import os, time
open("/tmp/base", "w").close()
def main():
    print(sorted(os.listdir("/tmp")), sorted(os.listdir("/dev/shm")))
    os.makedirs("/tmp/new/er", exist_ok=True)
    open("/tmp/new/er/file", "w").close()
    open("/dev/shm/mine", "w").close()
    time.sleep(0.05)  # more than a tick of the clock that files' times are taken from
main()
"""


@pytest.mark.parametrize("slots", [0, 1])
def test_a_run_finds_no_files_of_those_before(hold, slots):
    """What runs of one template have in /tmp goes when the last of them has ended (a little after its caller heard)."""
    pocket = hold(SCRATCH, "main", **({"warm": slots} if slots else {}))
    pocket.warm()
    tmp = f"/proc/{pocket.template}/root/tmp"
    for _ in range(4):
        assert pocket.pocketd.pocket(pocket.name).stdout == "['base'] []\n"
        assert wait_for(lambda: os.listdir(tmp) == ["base"])


KEPT = """
import os, sys, time
def main():
    open("/tmp/theirs", "w").close()
    for place in ("/tmp/data", "/root/deep/data", "/pocket/out"):
        open(f"{place}/{sys.argv[1]}", "w").close()
    time.sleep(0.05)
main()
"""


@pytest.mark.parametrize("rehearse", [None, ["s"]])
def test_what_is_mounted_beneath_scratch_is_kept(hold, tmp_path, rehearse):
    """A pocket's directory may lie in /tmp or a home, and what it may write there is its user's."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
    mounts = [f"{tmp_path}/a:/tmp/data:rw", f"{tmp_path}/b:/root/deep/data:rw"]
    keys = {"rehearse": rehearse} if rehearse else {}
    pocket = hold(KEPT, "main", mounts=mounts, allow={"write": ["out"]}, **keys)
    assert pocket.warm()["rehearsed"] is bool(rehearse)
    tmp = f"/proc/{pocket.template}/root/tmp"
    places = [tmp_path / "a", tmp_path / "b", pocket.place / "out"]
    written = [f"before-{n}" for n in range(3)]
    for place, name in zip(places, written, strict=True):
        (place / name).touch()
    for n in range(3):
        assert pocket.from_held(f"{n}").status == 0
        assert wait_for(lambda: "theirs" not in os.listdir(tmp))
    for place, name in zip(places, written, strict=True):
        assert {*os.listdir(place)} == {name, "0", "1", "2"}


def test_a_finalizer_that_needs_other_modules_at_the_end(hold):
    """What the program itself holds goes first, while the modules that it imports are whole."""
    source = """
    import multiprocessing.pool, sys, time
    def main():
        pool = multiprocessing.pool.ThreadPool(3)
        global kept
        kept = pool, pool.map_async(lambda i: time.sleep(30) if i == 9 else i, range(10))
        time.sleep(0.1)
        print(sys.argv[1:])
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()")
    pocket.warm()
    for _ in range(3):
        pocket.same("a")
