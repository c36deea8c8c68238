"""What a program looks at before its checkpoint: refused where it is its caller's alone, noted where it may be the same."""

# ruff: noqa: E501
from __future__ import annotations

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.conftest import wait_for
from tests.launch.held.pocket import popen

HERE = "here = None\n"
CALLERS = {
    "sys.argv": "import sys\nname = sys.argv[1:]\n",
    "the length of sys.argv": "import sys\nif len(sys.argv) > 1: pass\n",
    "sys.argv in a loop": "import sys\nfor word in sys.argv: pass\n",
    "sys.argv by argparse": "import argparse\np = argparse.ArgumentParser()\np.parse_args()\n",
    "sys.argv printed": "import sys\nprint(sys.argv)\n",
    "sys.argv joined": "import sys\nprint(' '.join(sys.argv))\n",
    "sys.argv sliced by a copy": "import sys\nwords = list(sys.argv)\n",
    "sys.argv kept and read": "from sys import argv\nargv[1:2]\n",
    "sys.argv added to": "import sys\nsys.argv.append('x')\n",
    "sys.argv set": "import sys\nsys.argv[1:] = []\n",
    "sys.argv added": "import sys\nwords = sys.argv + []\n",
    "sys.orig_argv": "import sys\nsys.orig_argv[2]\n",
    "its command line": "open('/proc/self/cmdline').read()\n",
    "sys.stdin.read": "import sys\nsys.stdin.read()\n",
    "sys.stdin.readline": "import sys\nsys.stdin.readline()\n",
    "sys.stdin in a loop": "import sys\nfor line in sys.stdin: pass\n",
    "sys.stdin.buffer": "import sys\nsys.stdin.buffer.read()\n",
    "sys.stdin.buffer.raw": "import sys\nsys.stdin.buffer.raw.read(1)\n",
    "input": "input()\n",
    "os.read": "import os\nos.read(0, 1)\n",
    "open(0)": "open(0).read()\n",
    "/dev/stdin": "open('/dev/stdin').read()\n",
    "fileinput": "import fileinput\nfor line in fileinput.input(): pass\n",
    "what its input is": "import os, stat\nstat.S_ISFIFO(os.fstat(0).st_mode)\n",
    "what its output is": "import os\nos.stat('/dev/fd/1')\n",
    "where its input is": "import os\nos.readlink('/proc/self/fd/0')\n",
    "where its input is, resolved": "import os\nos.path.realpath('/proc/self/fd/0')\n",
    "whether there is input": "import select, sys\nselect.select([sys.stdin], [], [], 0)\n",
    "the whole environment": "import os\ndict(os.environ)\n",
    "the whole environment, in a loop": "import os\nfor name in os.environ: pass\n",
    "the whole environment by items": "import os\nlist(os.environ.items())\n",
    "the whole environment copied": "import os\nos.environ.copy()\n",
    "the whole environment of bytes": "import os\nlist(os.environb)\n",
    "the whole environment printed": "import os\nprint(os.environ)\n",
    "the whole environment unpacked": "import os\n{**os.environ}\n",
    "its own files written": "import os\nopen(os.path.join(os.path.dirname(__file__), 'out/x'), 'w')\n",
    "its own files removed": "import os\nos.remove(os.path.join(os.path.dirname(__file__), 'out/y'))\n",
}


@pytest.mark.parametrize("what", CALLERS)
def test_what_is_its_callers_alone_is_refused_by_its_line(hold, what):
    pocket = hold("import os\n" + CALLERS[what] + HERE, "here =", allow={"write": ["out"]})
    why = pocket.refused()
    assert re.search(r"it (reads|writes|removes|looks|waits) .*before its checkpoint", why), why
    if not re.search(r"os\.read|buffer|line in sys.stdin", CALLERS[what]):
        line = CALLERS[what].count("\n", 0, CALLERS[what].rstrip("\n").rfind("\n") + 1) + 2
        assert f"in {pocket.app}, line {line}" in why, why
    plain = pocket.plain("x", input=b"")
    if what != "/dev/stdin":  # a pipe of another user's
        assert pocket.pocket("x", input=b"").status == plain.status


@pytest.mark.parametrize("handler", ["except Exception: pass", "except BaseException: pass", "finally: pass"])
def test_catching_what_is_raised_does_not_help(hold, handler):
    pocket = hold(f"import sys\ntry: sys.argv[1]\n{handler}\n{HERE}", "here =")
    assert "it reads its arguments" in pocket.refused()


def test_in_another_file_of_the_pocket(hold):
    pocket = hold(f"import mine\n{HERE}", "here =")
    pocket.write("mine.py", "import sys\n\nsys.argv[1]\n")
    assert f"in {pocket.place}/mine.py, line 3" in pocket.refused()


FINE = {
    "its own name": "import sys\nprint(sys.argv[0])\n",
    "a default that is not called": "import sys\ndef f(argv=sys.argv): return argv\n",
    "a parser made": "import argparse\nargparse.ArgumentParser(prog='x')\n",
    "whether a variable is there": "import os\n'NOTHING' in os.environ\n",
    "streams asked for their names": "import sys\nprint(sys.stdin.name, sys.stdout.fileno())\n",
    "files of /proc": "open('/proc/cpuinfo').read(9)\n",
    "a directory listed": "import os\nos.listdir('/usr')\n",
    "logging": "import logging\nlogging.basicConfig(level='INFO')\nlogging.info('x')\n",
    "subprocess imported": "import subprocess\n",
    "a child that has ended": "import subprocess\nprint(subprocess.run(['true']).returncode)\n",
    "temporary files": "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x')\n",
}


@pytest.mark.parametrize("what", FINE)
def test_what_may_be_looked_at(hold, what):
    pocket = hold(FINE[what] + HERE + "print('on')\n", "here =")
    pocket.warm()
    pocket.same("x")


def test_arguments_kept_as_a_default(hold):
    pocket = hold(f"import sys\ndef f(argv=sys.argv): return argv[1:]\n{HERE}print(f(), sys.argv)\n", "here =")
    pocket.warm()
    pocket.same("x")
    pocket.same("y", "z")


def test_arguments_set_anew(hold):
    pocket = hold(f"import sys\nsys.argv = ['mine', 'x']\n{HERE}print(sys.argv)\n", "here =")
    pocket.warm()
    pocket.same("given")


# -- variables

READS = {
    "os.environ": "os.environ['MODE']",
    "os.environ.get": "os.environ.get('MODE')",
    "os.getenv": "os.getenv('MODE')",
    "os.environb": "os.environb.get(b'MODE')",
    "os.getenvb": "os.getenvb(b'MODE')",
    "in": "'MODE' in os.environ",
    "setdefault": "os.environ.setdefault('MODE', 'none')",
    "pop": "os.environ.pop('MODE', None)",
}


@pytest.mark.parametrize("how", READS)
def test_a_run_with_another_value_of_a_variable_that_was_read(hold, how):
    pocket = hold(
        f"import os\nmode = {READS[how]}\n{HERE}print(mode, os.environ.get('MODE'))\n", "here =", env={"MODE": "a"}
    )
    assert pocket.warm()["variables"] == ["MODE"]
    # What its definition sets, each of its runs has.
    assert pocket.from_held().out == pocket.plain(env={"MODE": "a"}).out
    pocket = hold(f"import os\nmode = os.environ.get('OTHER')\n{HERE}print(mode)\n", "here =")
    pocket.warm()
    for value in ("x", ""):
        pocket.forget()
        assert pocket.pocket(env={"OTHER": value}).out == pocket.plain(env={"OTHER": value}).out
        assert pocket.went("root")
        (why,) = pocket.events("launch-not-held")
        assert "OTHER is not what the program saw" in why
    pocket.same()


def test_a_variable_that_was_set_is_set_in_each_run(hold):
    pocket = hold(
        f"import os\nos.environ['SET'] = 'program'\nos.environ.pop('GONE', 0)\nos.putenv('PUT', 'x')\n{HERE}"
        "print(os.environ.get('SET'), os.environ.get('GONE'))\n",
        "here =",
    )
    pocket.warm()
    pocket.same(env={"SET": "caller"})


def test_a_variable_of_python_itself(hold):
    pocket = hold(f"{HERE}import sys\nprint(sys.path[1:2], sys.dont_write_bytecode)\n", "here =")
    pocket.warm()
    for env in ({"PYTHONPATH": "/usr/share"}, {"PYTHONWARNINGS": "error"}):
        assert pocket.pocket(env=env).out == pocket.plain(env=env).out


@pytest.mark.parametrize("said", ["", "import sys\nsys.dont_write_bytecode = True\n"])
def test_whether_bytecode_is_written_is_each_callers(hold, said):
    """Images of containers like to say that it is not."""
    pocket = hold(f"{said}{HERE}import sys\nprint(sys.dont_write_bytecode, sys.flags.dont_write_bytecode)\n", "here =")
    pocket.warm()
    for env in ({}, {"PYTHONDONTWRITEBYTECODE": "1"}):
        pocket.same(env=env)


# -- state of the process

STATES = {
    "a directory": "import os\nos.chdir('/usr')\n{here}print(os.getcwd())\n",
    "a directory of its own": "import os\nos.chdir(os.path.dirname(__file__) + '/sub')\n{here}print(os.getcwd(), open('x').read())\n",
    "a umask": "import os\nos.umask(0o27)\n{here}print(oct(os.umask(0)))\n",
    "a locale": "import locale\nlocale.setlocale(locale.LC_ALL, 'C.UTF-8')\n{here}print(locale.setlocale(locale.LC_ALL))\n",
    "a time zone": "import os, time\nos.environ['TZ'] = 'Asia/Tokyo'\ntime.tzset()\n{here}print(time.tzname, time.localtime(0).tm_hour)\n",
    "a limit": "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (99, 199))\n{here}print(resource.getrlimit(resource.RLIMIT_NOFILE))\n",
    "blocked signals": "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])\n{here}print(signal.pthread_sigmask(0, []))\n",
    "a niceness": "import os\nos.nice(3)\n{here}print(os.nice(0))\n",
    "processors": "import os\nos.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n{here}print(os.sched_getaffinity(0))\n",
    "a name": "import ctypes\nctypes.CDLL(None).prctl(15, b'mine')\n{here}print(open('/proc/self/comm').read())\n",
    "a recursion limit": "import sys\nsys.setrecursionlimit(777)\n{here}print(sys.getrecursionlimit())\n",
    "a switch interval": "import sys\nsys.setswitchinterval(0.5)\n{here}print(sys.getswitchinterval())\n",
    "warnings": "import warnings\nwarnings.simplefilter('error')\n{here}warnings.warn('x')\n",
    "a wakeup descriptor": "import signal\nsignal.set_wakeup_fd(-1)\n{here}print(signal.set_wakeup_fd(-1))\n",
    "faulthandler": "import faulthandler\nfaulthandler.enable()\n{here}print(faulthandler.is_enabled())\n",
    "tracemalloc": "import tracemalloc\ntracemalloc.start()\n{here}print(tracemalloc.is_tracing())\n",
    "a trace": "import sys\nsys.settrace(lambda *a: None)\n{here}print(sys.gettrace() is not None)\n",
    "a context variable": "import contextvars\nv = contextvars.ContextVar('v')\nv.set(3)\n{here}print(v.get())\n",
    "a decimal context": "import decimal\ndecimal.getcontext().prec = 5\n{here}print(decimal.Decimal(1) / 3)\n",
    "thread locals": "import threading\nl = threading.local()\nl.x = 4\n{here}print(l.x)\n",
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_what_was_set_before_is_set_in_each_run(hold, what):
    pocket = hold(STATES[what].format(here=HERE), "here =")
    pocket.write("sub/x", "text")
    pocket.warm()
    pocket.same(umask=0o77 if what != "a umask" else 0o22)


def test_the_directory_looked_at(hold):
    pocket = hold(f"import os\nplace = os.getcwd()\n{HERE}print(place)\n", "here =")
    pocket.write("sub/x", "")
    pocket.warm()
    pocket.same(cwd=pocket.place)
    pocket.forget()
    assert pocket.pocket(cwd=pocket.place / "sub").out == f"{pocket.place}/sub\n".encode()
    assert pocket.went("root") and "looked at its directory" in pocket.events("launch-not-held")[0]


def test_a_relative_path(hold):
    pocket = hold(f"text = open('given').read()\n{HERE}print(text)\n", "here =")
    pocket.write("given", "here")
    pocket.write("sub/given", "there")
    pocket.warm()
    pocket.same(cwd=pocket.place)
    assert pocket.pocket(cwd=pocket.place / "sub").out == b"there\n"


def test_whether_output_is_a_terminal(hold):
    pocket = hold(f"import sys\ncolour = sys.stdout.isatty()\n{HERE}print(colour, sys.stdout.isatty())\n", "here =")
    pocket.warm()
    pocket.same()
    ours, theirs = os.openpty()
    try:
        for command in (pocket.plain_command(), pocket.pocket_command()):
            subprocess.run(command, stdout=theirs, env=pocket.environment(None), cwd=pocket.place, check=True)
            assert os.read(ours, 100) == b"True True\r\n"
    finally:
        os.close(ours)
        os.close(theirs)


# -- what a fork cannot carry over

LEFT = {
    "a socket": ("import socket\ns = socket.socket()\n", "socket"),
    "a pair of sockets": ("import socket\ns = socket.socketpair()\n", "socket"),
    "one end of a pipe": ("import os\np = os.pipe()\nos.close(p[1])\n", "pipe"),
    "a pipe that is opened twice": ("import os\np = os.pipe()\nq = os.open(f'/proc/self/fd/{p[1]}', os.O_WRONLY | os.O_NONBLOCK)\n", "pipe"),
    "a file open for writing": ("f = open('/tmp/x', 'w')\n", "open for writing"),
    "a file open for appending": ("f = open('/tmp/x', 'a')\n", "open for writing"),
    "a running child": ("import subprocess\nc = subprocess.Popen(['sleep', '600'])\n", "child processes ("),
    "a zombie": ("import os\nif os.fork() == 0: os._exit(0)\n", "child processes"),
    "an event loop": ("import asyncio\nloop = asyncio.new_event_loop()\n", "an asyncio event loop"),
    "a value of multiprocessing": ("import multiprocessing\nn = multiprocessing.Value('i')\n", "a Value or Array of multiprocessing"),
    "an interval timer": ("import signal\nsignal.setitimer(signal.ITIMER_REAL, 600)\n", "timer"),
    "a virtual timer": ("import signal\nsignal.setitimer(signal.ITIMER_VIRTUAL, 600)\n", "timer"),
    "an alarm": ("import signal\nsignal.alarm(600)\n", "timer"),
    "a POSIX timer": (
        "import ctypes\nt = ctypes.c_void_p()\nassert ctypes.CDLL(None).timer_create(1, None, ctypes.byref(t)) == 0\n", "timer"
    ),
    "locked memory": ("import ctypes\nb = ctypes.create_string_buffer(9000)\nassert ctypes.CDLL(None).mlock(b, 9000) == 0\n", "mlock"),
    "a pool of processes": ("import multiprocessing\np = multiprocessing.Pool(1)\n", "child processes"),
    "a file lock": ("import fcntl, os\nf = open('/tmp/x', 'w')\nfcntl.lockf(f, fcntl.LOCK_EX)\n", "open for writing"),
    "a thread that blocks signals": (
        "import signal, threading, time\ndef f():\n    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n    e.set()\n"
        "    time.sleep(600)\ne = threading.Event()\nthreading.Thread(target=f, daemon=True).start(); e.wait()\n", "block"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT)
def test_what_cannot_be_carried_over_is_named_and_the_pocket_runs_without(hold, what):
    source, word = LEFT[what]
    pocket = hold(source + HERE + "import os\nprint('on', flush=True)\nos._exit(0)\n", "here =")
    why = pocket.refused()
    assert word in why, why
    ended = pocket.pocket()
    assert (ended.status, ended.out) == (0, b"on\n")
    assert pocket.went("root")


def test_a_running_loop_is_named(hold):
    pocket = hold("import asyncio\nasync def f():\n    here = 1\n    print('on')\nasyncio.run(f())\n", "app.py:3")
    assert "asyncio" in pocket.refused()
    assert pocket.pocket().out == b"on\n"


def test_standard_input_is_each_runs_own(hold):
    pocket = hold(f"import sys\n{HERE}print(sys.stdin.read())\n", "here =")
    pocket.warm()
    runs = [popen(pocket) for _ in range(2)]
    for n, run in enumerate(runs):
        out, _ = run.communicate(b"%d" % n)
        assert out == b"%d\n" % n


GENERATED = """
import atexit, os, sys
os.makedirs("/tmp/made")
sys.path.append("/tmp/made")
open("/tmp/made/generated.py", "w").write("value = 3\\n")
import generated
atexit.register(lambda: os.path.exists(generated.__file__) and os.remove(generated.__file__))
here = None
print(generated.value)
"""


def test_a_module_that_the_program_wrote_and_each_run_removes(hold):
    """As TensorFlow does with what autograph generated."""
    pocket = hold(GENERATED, "here =")
    pocket.warm()
    for _ in range(3):
        assert pocket.from_held().out == b"3\n"


def test_a_function_of_tensorflow_that_was_traced_before(hold):
    source = """
        import tensorflow as tf
        @tf.function
        def double(x):
            while x < 100: x *= 2
            return x
        double(tf.constant(3))
        here = None
        print(int(double(tf.constant(5))))
        """
    pocket = hold(source, "here =", service="tensorflow")
    pocket.warm()
    for _ in range(3):
        assert pocket.from_held().out == b"160\n"


def test_runs_that_it_refuses_cost_a_template_nothing(hold):
    """Of the leaf of one that went another way init may hear nothing: pocketd removes it."""
    pocket = hold(
        "import os, sys\nmode = os.environ.get('MODE')\ndef main(): print(mode, sys.argv[1:])\nmain()\n", "main"
    )
    pocket.warm()
    template = pocket.template
    mark = (pocket.pocketd.state_dir / "services/plain.log").stat().st_size
    for _ in range(12):
        assert pocket.pocket("a", env={"MODE": "x"}).out == b"x ['a']\n"
    assert pocket.went(*["root"] * 12)
    init = next(s["pid"] for s in pocket.pocketd.ps()["services"] if s["name"] == "plain")
    assert wait_for(lambda: leaves(init) == 0)
    log = (pocket.pocketd.state_dir / "services/plain.log").read_bytes()
    assert pocket.template == template and b"hangs in a fork" not in log[mark:]


def leaves(init):
    """Of how many cgroups init waits for the end."""
    return sum(os.readlink(f).endswith("/cgroup.events") for f in Path(f"/proc/{init}/fd").iterdir())


def test_what_is_watched_is_called_as_it_is_elsewhere(hold):
    """By names of its arguments, and with what can be gone through once."""
    source = """
import os, select
with open(os.devnull) as f:
    print(os.fstat(fd=f.fileno()).st_size, os.stat(path="/").st_nlink > 0)
    print(select.select((file for file in [f]), [], [], 0)[0] == [f])
"""
    pocket = hold(f"{source}{HERE}print(1)\n", "here =")
    pocket.warm()
    pocket.same()


def test_libraries_are_told_to_start_no_thread_that_blocks_signals(hold):
    """jemalloc's in pyarrow and polars: in C's environment, until the checkpoint."""
    source = """
    import ctypes, os, subprocess, sys
    def seen():
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_char_p
        names = "JE_ARROW_MALLOC_CONF", "_RJEM_MALLOC_CONF"
        return [libc.getenv(name.encode()) for name in names], [os.environ.get(name) for name in names]
    before = seen()
    def main():
        print(before, seen(), b"MALLOC" in subprocess.check_output("env"))
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()")
    pocket.warm()
    told = "([b'background_thread:false', b'background_thread:false'], ['background_thread:false', 'background_thread:false'])"
    for _ in range(2):
        assert pocket.from_held().out.decode() == f"{told} ([None, None], [None, None]) False\n"


def test_a_library_that_adds_to_what_it_was_told(hold):
    """As polars does; in a run the variable is what it makes of it there."""
    source = """
    import ctypes, os, sys
    given = os.environ.get("_RJEM_MALLOC_CONF")
    os.environ["_RJEM_MALLOC_CONF"] = "mine" + ("," + given if given else "")
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    at_import = libc.getenv(b"_RJEM_MALLOC_CONF")
    def main():
        if "at import" in sys.argv: print(at_import)
        print(os.environ["_RJEM_MALLOC_CONF"])
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()")
    pocket.warm()
    pocket.same()
    pocket.same(env={"_RJEM_MALLOC_CONF": "theirs"}, way="root")
    assert pocket.from_held("at import").out == b"b'mine,background_thread:false'\nmine\n"


def test_event_descriptors_and_epoll_sets_are_each_runs_own(hold):
    """Such as the runtime of polars waits with, in threads of its own."""
    source = """
    import os, queue, select, selectors, sys, threading
    woken, chosen, seen = os.eventfd(0), selectors.DefaultSelector(), queue.Queue()
    chosen.register(woken, selectors.EVENT_READ)
    def wait():
        while True:
            for key, _ in chosen.select():
                seen.put(os.eventfd_read(key.fd))
    threading.Thread(target=wait, daemon=True).start()
    os.eventfd_write(woken, 1)
    first = seen.get()
    def main():
        for n, word in enumerate(sys.argv[1:], 2):
            os.eventfd_write(woken, n)
            print(word, first, seen.get())
    main()
    """
    for rehearse in (None, ["a", "b"]):
        pocket = hold(textwrap.dedent(source), "main()", **({"rehearse": rehearse} if rehearse else {}))
        assert pocket.warm()["rehearsed"] is bool(rehearse)
        for _ in range(3):
            pocket.same("x", "y", "z")


def test_a_pipe_that_wakes_a_thread_is_each_runs_own(hold):
    source = """
    import os, queue, sys, threading
    reader, writer = os.pipe()
    seen = queue.Queue()
    def wait():
        while word := os.read(reader, 100):
            seen.put(word)
    threading.Thread(target=wait, daemon=True).start()
    os.write(writer, b"first")
    first = seen.get()
    def main():
        for word in sys.argv[1:]:
            os.write(writer, word.encode())
            print(first, seen.get(), flush=True)
        sys.stdin.read()
    main()
    """
    for rehearse in (None, ["a", "b"]):
        pocket = hold(textwrap.dedent(source), "main()", **({"rehearse": rehearse} if rehearse else {}))
        assert pocket.warm()["rehearsed"] is bool(rehearse)
        for _ in range(2):
            pocket.same("x", "y", "z", stdin=subprocess.DEVNULL)
        runs = [popen(pocket, *[f"{n}"] * 50) for n in range(3)]  # at the same time
        for n, run in enumerate(runs):
            out, _ = run.communicate(b"")
            assert out == f"b'first' b'{n}'\n".encode() * 50, out


def test_a_program_that_imports_onnxruntime_itself(hold):
    pytest.importorskip("onnxruntime")
    source = """
    import sys, onnxruntime
    providers = onnxruntime.get_available_providers()
    def main(): print(providers[-1], sys.argv[1:])
    main()
    """
    pocket = hold(textwrap.dedent(source), "main()", rehearse=["s"])
    assert pocket.warm()["rehearsed"] is True
    pocket.same("a")


def test_weak_references_to_what_is_gone_are_no_obstacle(hold):
    """A proxy raises when it is asked of which class it is."""
    source = """
    import asyncio, sys, weakref
    class A: pass
    a = A()
    proxy = weakref.proxy(a)
    del a
    def main(): print(sys.argv[1:])
    main()
    """
    for rehearse in (None, ["s"]):
        pocket = hold(textwrap.dedent(source), "main()", **({"rehearse": rehearse} if rehearse else {}))
        assert pocket.warm()["rehearsed"] is bool(rehearse)
        pocket.same("a")
