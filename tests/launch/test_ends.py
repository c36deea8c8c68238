"""How a program ends: exit codes of every kind, death by signals, what runs at the end."""

from __future__ import annotations

import signal
import sys
import textwrap

import pytest

CODES = ["0", "3", "255", "256", "257", "-1", "-256", "None", "True", "False", "''", "'words'", "'é€\\n'", "1.5", "[1]"]
CODES += ["2**31", "2**32 + 3", "2**63 - 1", "2**64", "-2**64", "(1, 2)", "object", "ValueError('x')"]


@pytest.mark.parametrize("code", CODES)
def test_exit_codes_are_pythons(both, code):
    both.same_program(f"import sys; print('out'); sys.exit({code})")


@pytest.mark.parametrize(
    "by", ["exit(3)", "quit(4)", "raise SystemExit", "raise SystemExit(5)", "import os; os._exit(6)"]
)
def test_other_ways_to_exit(both, by):
    both.same_program(f"print('out', flush=True)\n{by}")


def test_exit_with_more_than_one_value(both):
    both.same_program("raise SystemExit(1, 2)")
    both.same_program("class Mine(SystemExit): code = 7\nraise Mine")


def test_exit_in_a_module_in_a_function_and_in_a_thread(both):
    both.write("module.py", "import sys; sys.exit(9)")
    assert both.same_program("import module").status == 9
    both.same_program("import sys, threading\nt = threading.Thread(target=sys.exit, args=(4,)); t.start(); t.join()")


DAEMONS = {
    "waits": "threading.Event().wait",
    "sleeps": "functools.partial(time.sleep, 1000)",
    "computes": "beside.compute",
    "opens files": "beside.open_files",
    "waits in C for a lock": "lock.acquire",
}
LEFT_OPEN = """
import beside, functools, gzip, threading, time, zipfile
lock = threading.Lock()
lock.acquire()
for n in range(3): threading.Thread(target={daemon}, daemon=True).start()
time.sleep(0.05)
f = open('f', 'w'); f.write('kept')
g = {opened}; g.write(b'kept')
z = zipfile.ZipFile('z', 'w'); z.writestr(zipfile.ZipInfo('a'), 'kept')
class A:
    def __del__(self): print('deleted')
a = A()
print('end')
"""

END = {
    "atexit": "import atexit\nfor n in range(3): atexit.register(print, n)\nprint('last')",
    "atexit after an error": "import atexit; atexit.register(print, 'end'); 1/0",
    "atexit after exit": "import atexit, sys; atexit.register(print, 'end'); sys.exit(3)",
    "an error in atexit": "import atexit\ndef f(): 1/0\natexit.register(print, 'first'); atexit.register(f)",
    "exit in atexit": "import atexit, sys; atexit.register(print, 'first'); atexit.register(sys.exit, 4)",
    "os._exit in atexit": "import atexit, os; atexit.register(os._exit, 5); print('lost?')",
    "atexit registers more": "import atexit\natexit.register(lambda: atexit.register(print, 'more'))",
    "atexit knows its globals": "import atexit\nvalue = 3\natexit.register(lambda: print(value, __name__))",
    "a finalizer": "class A:\n  def __del__(self): print('deleted', __name__)\na = A()\nb = [a]",
    "a finalizer in a cycle": "class A:\n  def __del__(self): print('deleted')\na = A(); a.me = a",
    "an error in a finalizer": "exec('class A:\\n  def __del__(self): 1/0'); a = A()",  # Python finds no source then
    "weakref.finalize": "import weakref\nclass A: pass\na = A(); weakref.finalize(a, print, 'finalized')",
    "a file left open": "f = open('out', 'w'); f.write('kept')",
    "a file left open in a function": "def f():\n  f.file = open('out', 'w'); f.file.write('kept')\nf()",
    "a file left open in an error": "def f():\n  g = open('out', 'w'); g.write('kept'); 1/0\nf()",
    "a file left open in a daemon thread's program": "import threading\nthreading.Thread(target=threading.Event().wait,"
    " daemon=True).start()\nf = open('out', 'w'); f.write('kept')",
    "a zip file left open": "import zipfile; z = zipfile.ZipFile('out', 'w'); z.writestr(zipfile.ZipInfo('a'), 'kept')",
    "a gzip file left open": "import gzip; z = gzip.GzipFile('out', 'w', mtime=0); z.write(b'kept')",
    "stdio of C left unflushed": "import ctypes; ctypes.CDLL(None).printf(b'from C\\n')",
    "a temporary directory": "import tempfile, os; d = tempfile.TemporaryDirectory(dir='.'); print(os.listdir(d.name))",
    "logging": "import logging; logging.basicConfig(); logging.warning('x'); logging.getLogger('a').error('b')",
    "a generator left open": "def g():\n  try: yield\n  finally: print('closed')\nx = g(); next(x)",
    "a module that is left": "import beside\nprint('end')",
}


@pytest.mark.parametrize("name", END)
def test_what_runs_at_the_end(both, name):
    both.write("beside.py", "class A:\n  def __del__(self): print('beside deleted')\na = A()")
    both.write("app.py", END[name])

    def run(by):
        ended = by("app.py").masked((rb"0x[0-9a-f]+",))
        out = both.place / "out"
        text = out.read_bytes() if out.exists() else None
        out.unlink(missing_ok=True)
        return ended, text

    expected = run(both.plain)
    assert run(both.pocket) == expected


def test_threads_are_waited_for_and_daemons_are_not(both):
    both.same_program("""
        import threading, time
        gate = threading.Event()
        def late():
            gate.wait(); print("late")
        threading.Thread(target=late).start()
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        threading.Timer(0.05, gate.set).start()
        print("main ends")
    """)


@pytest.mark.parametrize("what", DAEMONS)
def test_files_left_open_and_finalizers_beside_daemon_threads(both, what):
    """They run no line any more when Python lets go of what there is. tqdm has such a thread."""
    both.write(
        "beside.py", "def compute():\n    while 1: pass\ndef open_files():\n    while 1: open('/dev/null').close()"
    )
    # Python 3.13 closes the file beneath one of gzip's before that, and complains.
    opened = "gzip.GzipFile('g', 'w', mtime=0)" if sys.version_info < (3, 13) else "open('g', 'wb')"
    both.write("app.py", LEFT_OPEN.format(daemon=DAEMONS[what], opened=opened))

    def run(by):
        ended = by("app.py")
        return ended, [(name, (both.place / name).read_bytes(), (both.place / name).unlink()) for name in "fgz"]

    expected = run(both.plain)
    for _ in range(5):
        assert run(both.pocket) == expected


STREAMS = {
    "prints all the time": """
        def loop():
            while True: print("", end="", flush=True)
    """,
    "writes into a pipe that is full": """
        import os
        f = os.fdopen(os.pipe()[1], "w")
        def loop():
            while True: f.write("line\\n")
    """,
}


@pytest.mark.parametrize("what", STREAMS)
def test_an_end_beside_a_daemon_thread_that_has_a_streams_lock(both, what):
    """It was stopped with that, and nobody gives it any more."""
    source = textwrap.dedent(STREAMS[what]) + textwrap.dedent("""
        import sys, threading, time
        threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.05)
        print("end")
        sys.exit(3)
    """)
    both.write("app.py", source)
    for _ in range(8):
        ended = both.pocket("app.py")
        assert (ended.status, ended.out) == (3, b"end\n")


def test_a_file_left_open_beside_a_daemon_thread_that_cannot_be_stopped(both):
    both.write(
        "app.py",
        """if True:
        import functools, hashlib, threading, time
        compute = functools.partial(hashlib.pbkdf2_hmac, "sha256", b"x", b"y", 10**9)
        threading.Thread(target=compute, daemon=True).start()
        time.sleep(0.05)
        f = open("out", "w"); f.write("kept")
        print("end")
    """,
    )
    assert both.pocket("app.py").out == b"end\n"
    assert (both.place / "out").read_text() == "kept"


def test_what_a_daemon_threads_function_has_as_globals_lives_on(both):
    both.same_program("""
        import threading, time
        class A:
            def __del__(self): print("deleted")
        a = A()
        threading.Thread(target=lambda: time.sleep(1000), daemon=True).start()
        print("end")
    """)


def test_an_error_in_a_thread(both):
    both.same_program("""
        import threading
        def f(): 1/0
        t = threading.Thread(target=f, name="mine"); t.start(); t.join(); print("on")
    """)


SIGNALS = ["SIGKILL", "SIGTERM", "SIGABRT", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGHUP", "SIGUSR1", "SIGALRM"]
SIGNALS += [
    "SIGPIPE",
    "SIGQUIT",
    "SIGXCPU",
    "SIGXFSZ",
    "SIGSYS",
    "SIGTRAP",
    "SIGVTALRM",
    "SIGPROF",
    "SIGRTMIN",
    "SIGRTMAX",
]


@pytest.mark.parametrize("name", SIGNALS)
def test_death_by_a_signal_is_the_commands_too(both, name):
    ended = both.same_program(f"import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.{name}); print(2)")
    ignored = name in ("SIGPIPE", "SIGXFSZ")  # by Python itself
    assert ended.status == (0 if ignored else -getattr(signal, name))


CRASHES = {
    "a null pointer": "import ctypes; ctypes.string_at(0)",
    "os.abort": "import os; os.abort()",
    "abort of C": "import ctypes; ctypes.CDLL(None).abort()",
    "faulthandler": "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(0)",
    "an assertion of C": "import signal; signal.raise_signal(signal.SIGABRT)",
    "a limit on cpu": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass",
    "from a thread": "import threading, os; t = threading.Thread(target=os.abort); t.start(); t.join()",
    "an alarm": "import signal; signal.alarm(1); signal.pause()",
}


@pytest.mark.parametrize("name", CRASHES)
def test_crashes(both, name):
    both.same_program(CRASHES[name], mask=(rb"0x[0-9a-f]+",))


def test_python_as_pid_2_takes_signals_as_always(both):
    """Not as PID 1, which the kernel shields from its own signals."""
    both.same_program("""
        import os, signal
        pid = os.fork()
        if pid == 0: os.abort()
        print(os.waitpid(pid, 0)[1])
        signal.raise_signal(signal.SIGTERM)
    """)
