"""Where a program may be held. A run goes on from there as under plain Python; what came before does not run again."""

from __future__ import annotations

import re
import sys

import pytest

from tests.launch.both import Ended

BEFORE = """
import os, sys
first = os.getpid()
"""
AFTER = """
print("other" if os.getpid() != first else "same", sys.argv)
"""
FUNCTION = f"""{BEFORE}
def main(extra=None):
    "What it does."
    print("other" if os.getpid() != first else "same", sys.argv, extra, main.__doc__)
    return 3

if __name__ == "__main__":
    sys.exit(main())
"""
PLACES = {
    "a statement": (BEFORE + "image = load = sys.argv\n" + AFTER, "image = load"),
    "a statement, blanks aside": (BEFORE + "image = ( 1,\n  2)\n" + AFTER, "image=(1,2"),
    "a compound statement": (BEFORE + "for word in sys.argv:\n    pass\n" + AFTER, "for word in"),
    "the second of a line": (BEFORE + "x = 1; y = 2\n" + AFTER, "y = 2"),
    "a decorated function": (BEFORE + "@str\ndef f(): pass\n" + AFTER, "@str"),
    "the last statement": (BEFORE + AFTER, 'print("other'),
    "a function": (FUNCTION, "main"),
    "a function's line": (FUNCTION, "app.py:7"),
    "the guard": (FUNCTION, "if __name__"),
    "a line": (BEFORE + AFTER, "app.py:5"),
    "a line with its directory": (BEFORE + AFTER, "{place}/app.py:5"),
    "a line of a loop": (BEFORE + "for n in range(3):\n    print(n)\n" + AFTER, "app.py:5"),
    "a call": (BEFORE + "import pocketd\npocketd.checkpoint()\n" + AFTER, "pocketd.checkpoint()"),
    "a call in a function": (
        BEFORE + "import pocketd\ndef f(x):\n    pocketd.checkpoint()\n    return x\nprint(f(3))\n" + AFTER,
        "pocketd.checkpoint()",
    ),
    "after a docstring and a future": (
        '"Says."\nfrom __future__ import annotations\n'
        + BEFORE
        + "def f(x: nothing): pass\nprint(f.__annotations__)\n"
        + AFTER,
        "def f(",
    ),
    "a method's line": (
        BEFORE + "class A:\n    def f(self):\n        print(__class__, self.__class__)\nA().f()\n" + AFTER,
        "app.py:6",
    ),
    "a generator's line": (BEFORE + "def f():\n    yield 1\n    yield 2\nprint(list(f()))\n" + AFTER, "app.py:6"),
    "in try": (
        BEFORE + "try:\n    x = 1 / len(sys.argv[9:])\nexcept ZeroDivisionError as e:\n    print(e)\n" + AFTER,
        "app.py:5",
    ),
    "in with": (BEFORE + "import contextlib\nwith contextlib.suppress(KeyError):\n    {}[1]\n" + AFTER, "app.py:6"),
    "in except": (
        BEFORE + "try:\n    {}[1]\nexcept KeyError as e:\n    print(repr(e), sys.exc_info()[0])\n" + AFTER,
        "app.py:7",
    ),
    "in the guard": (BEFORE + 'if __name__ == "__main__":\n    x = load = 1\n    print(x)\n' + AFTER, "x = load"),
    "in match": (BEFORE + "match os.name:\n    case 'posix':\n        print(1)\n" + AFTER, "app.py:6"),
}


@pytest.mark.parametrize("form", PLACES)
def test_what_comes_before_ran_once(hold, form):
    source, checkpoint = PLACES[form]
    pocket = hold(source, checkpoint)
    pocket.warm()
    plain = pocket.plain("a", "b c")
    for _ in range(2):
        held = pocket.from_held("a", "b c")
        assert b"other" in held.out
        assert Ended(held.status, held.out.replace(b"other", b"same"), held.err) == plain


# How often a function that is slow the first time was, and where: all of these can be rehearsed.
WARMED = """
import os, sys
first = []

def slow(): first.append("colorsys" in sys.modules); import colorsys
"""
IN_GUARD = """
if __name__ == "__main__":
    x = 1
    here = 2
    x += here
    USE
print(x)
"""
IN_ELSE = """
if os.name == "nt":
    x = 1
else:
    here = 2
    USE
    x = here
print(x)
"""
IN_FUNCTION = """
def main(a, *more, key=3, **others):
    b = a + 1
    global c
    c = 5
    def inner(n): return n + b
    print("here")
    USE
    c += b
    d = [inner(n) for n in range(b)]
    print(a, more, key, others, b, c, d)
    return d
print(main(1, 2, 3, x=4))
"""
CALLED = """
import pocketd
def main(a):
    b = a + 1
    if a:
        pocketd.checkpoint()
        USE
        b += 1
    print(a, b, sys.argv[1:])
main(1)
"""
IN_METHOD = """
import pocketd
class App:
    __own = 1
    def __init__(self): self.__n = 2
    def run(self, a):
        pocketd.checkpoint()
        USE
        print(self.__own, self.__n, a, sys.argv[1:])
App().run(1)
"""
GLOBAL_WITHIN = """
import pocketd
count = 1
def main():
    count = 5
    def bump():
        global count
        count += 1
    pocketd.checkpoint()
    USE
    bump()
    print(count, globals()["count"], sys.argv[1:])
main()
"""
MANGLED = """
import pocketd
class App:
    def __main(self, a):
        pocketd.checkpoint()
        USE
        print(a, sys.argv[1:])
    def run(self): self.__main(1)
App().run()
"""
LET_GO = """
import pocketd
class Loud:
    def __del__(self): print("gone")
def main():
    held = Loud()
    pocketd.checkpoint()
    del held
    print("after")
main()
"""
IN_PLACES = {
    "beside a global of a function within": (GLOBAL_WITHIN, "pocketd.checkpoint()"),
    "in a method of a private name": (MANGLED, "pocketd.checkpoint()"),
    "in the guard": (IN_GUARD, "here ="),
    "in an else": (IN_ELSE, "app.py:10"),
    "in the midst of a function": (IN_FUNCTION, "app.py:12"),
    "in a function, called": (CALLED, "pocketd.checkpoint()"),
    "in a method, called": (IN_METHOD, "pocketd.checkpoint()"),
}


@pytest.mark.parametrize("where", IN_PLACES)
def test_where_the_rest_can_be_rehearsed(hold, where):
    source, checkpoint = IN_PLACES[where]
    source = source.replace("USE", "used = slow()")
    pocket = hold(
        WARMED + source + "if sys.argv[1:] == ['a']: sys.stderr.write(f'{first}\\n')\n",
        checkpoint,
        rehearse=["s"],
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    plain, held = pocket.plain("a"), pocket.from_held("a")
    assert (held.status, held.out) == (plain.status, plain.out)
    assert (plain.err, held.err) == (b"[False]\n", b"[True]\n")


def test_what_a_run_lets_go_of_goes(hold):
    pocket = hold(LET_GO, "pocketd.checkpoint()", rehearse=["s"])
    assert pocket.warm()["rehearsed"] is True
    assert pocket.same("a").out == b"gone\nafter\n"


def test_a_statement_of_the_top_level_itself_comes_first(hold):
    source = "import sys\nif len(sys.orig_argv) > 99:\n    print('no')\nprint('yes', sys.argv[1:])\n"
    pocket = hold(source.replace("sys.orig_argv", "sys.path"), "print(")
    pocket.warm()
    assert pocket.same("a").out == b"yes ['a']\n"


CANNOT = {
    "a name of a function around it": (
        "def f():\n    if len('x') > 1:\n        n = 0\n    def g():\n        nonlocal n\n        n = 1\n"
        "    g()\n    print(n)\nf()\n",
        "app.py:8",
    ),
    "another file": ("import other\nimport sys\nsys.path\nprint(1)\n", "pocketd.checkpoint()"),
    "a loop": ("for n in range(2):\n    x = n\n    print(n)\n", "app.py:3"),
    "with": ("import contextlib\nwith contextlib.suppress(KeyError):\n    print(1)\n", "app.py:4"),
    "a generator": ("def f():\n    yield 1\n    yield 2\nprint(list(f()))\n", "app.py:4"),
    "a closure": ("def f():\n    x = 1\n    def g():\n        print(x)\n    g()\nf()\n", "app.py:5"),
}
if sys.version_info < (3, 12):  # PEP 709: from then on it has no frame of its own
    CANNOT["a comprehension"] = (
        "import pocketd\nprint([pocketd.checkpoint() for n in range(2)])\n",
        "pocketd.checkpoint()",
    )


@pytest.mark.parametrize("where", CANNOT)
def test_where_it_cannot_it_is_held_without(hold, where):
    source, checkpoint = CANNOT[where]
    pocket = hold(f"#{' pocketd' * ('other' in source)}\n{source}", checkpoint, rehearse=[])
    pocket.write("other.py", "import pocketd\ndef at():\n    pocketd.checkpoint()\nat()\n")
    facts = pocket.warm()
    assert facts["rehearsed"] is False and "rehears" in facts["not_rehearsed"]
    pocket.same()


def test_a_program_that_is_held_nowhere_is_as_it_is(hold):
    """pocketd's three functions do nothing where nothing is held, in a pocket and elsewhere."""
    pocket = hold(
        """
        import pocketd
        pocketd.on_start(lambda: print("started"))
        pocketd.checkpoint()
        pocketd.rehearsed()
        print("on")
        """
    )
    assert pocket.plain().out == pocket.pocket().out == b"started\non\n"


def test_what_is_to_be_done_in_each_run_is_done_in_each(hold):
    pocket = hold(
        """
        import os, pocketd, sys
        first = os.getpid()
        @pocketd.on_start
        def begin():
            global mine
            mine = os.getpid(), list(sys.argv)
            print("begun")
        pocketd.checkpoint()
        print(mine == (os.getpid(), sys.argv))
        """,
        "pocketd.checkpoint()",
    )
    pocket.warm()
    assert pocket.same("x").out == b"begun\nTrue\n"


WRONG = {
    "no such statement": ("x = 1\n", "y = 2", "no top-level statement of"),
    "two such statements": ("x = 1\nx = 1\n", "x =", "begins 2 top-level statements of"),
    "no such function": ("x = 1\n", "main", "it has no such function"),
    "no such line": ("x = 1\n", "app.py:9", "no statement begins in line 9 of"),
    "inside a statement": ("x = (1,\n2)\n", "app.py:2", "no statement begins in line 2 of"),
    "another file": ("x = 1\n", "other.py:1", "other.py:1 is not in the program"),
    "a coroutine": ("async def main(): pass\n", "main", "main is a coroutine"),
    "a syntax error": ("x = \n", "main", "SyntaxError"),
    "a null byte": ("x = 1\0\n", "main", "null"),
    "an end before it": ("import sys\nsys.exit(4)\nx = 1\n", "x =", "the program ended, with status 4, before"),
    "an error before it": ("{}['k']\nx = 1\n", "x =", "KeyError: 'k'"),
    "a call that is not reached": ("import pocketd\n", "pocketd.checkpoint()", "the program ended, with status 0"),
    "a function that is not called": ("def main(): pass\n", "main", "the program ended, with status 0"),
    "a signal before it": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nx = 1\n", "x =", "ended"),
    "an exit before it": ("import os\nos._exit(0)\nx = 1\n", "x =", "ended"),
    "a timer": (
        "import threading\nt = threading.Timer(600, print)\nt.start()\nx = 1\nt.cancel()\n", "x =", "a running timer",
    ),
    "much shared memory": (
        "import mmap\nm = mmap.mmap(-1, 65 << 20)\nm[0] = 1\nx = 1\n", "x =", "has 65 MiB of shared memory",
    ),
    "another thread": (
        "import threading\ndef main(): pass\nt = threading.Thread(target=main)\nt.start(); t.join()\n", "main",
        "in a thread other than the main one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_checkpoint_that_cannot_be_is_named_and_the_program_runs(hold, what):
    source, checkpoint, words = WRONG[what]
    pocket = hold(source, checkpoint)
    assert words in pocket.refused()
    expected = pocket.plain()
    found = pocket.pocket()
    if what != "a null byte":  # python reads a file to its first one
        assert (found.status, found.out) == (expected.status, expected.out)
    assert set(pocket.ways()) == {"root"}
    row = pocket.row()
    assert row["held"] == "not held" and row["why_not_held"]
    assert pocket.name in pocket.pocketd.pocket("ps").stdout


def test_no_terminal_obeys_why_a_pocket_is_not_held(hold):
    said = hold("raise ValueError('\\x1b[2J')\nx = 1\n", "x =").refused()
    assert "ValueError: \\x1b[2J" in said and "\x1b" not in said


def test_it_is_held_once_it_has_been_put_right(hold):
    pocket = hold("x = 1\nprint(x)\n", "print(y")
    pocket.refused()
    pocket.write("app.py", "y = 2\nprint(y)\n")
    pocket.wait_held()
    assert pocket.same().out == b"2\n"


@pytest.fixture
def hurried(pool):
    """Programs have 3 s to their checkpoint."""
    pool.base += "[held]\ntimeout = 3\n"
    try:
        yield
    finally:
        pool.base = pool.base.replace("[held]\ntimeout = 3\n", "")
        pool.read_again()


BLOCKS = {
    "a sleep": "time.sleep(1000)",
    "a loop": "while True: pass",
    "a connection that never comes": "socket.create_server(('127.0.0.1', 0)).accept()",
    "a lock": "threading.Lock().acquire() and (lock := threading.Lock()).acquire() and lock.acquire()",
    "a child": "subprocess.run(['sleep', '1000'])",
    "a condition that catches all": "\nwhile True:\n  try: time.sleep(1000)\n  except BaseException: pass",
}


@pytest.mark.parametrize("what", BLOCKS)
def test_a_program_that_blocks_before_its_checkpoint_is_shown_where(hold, hurried, what):
    source = (
        f"import socket, subprocess, sys, threading, time\nprint('on the way')\n{BLOCKS[what]}\nhere = None\nprint(1)\n"
    )
    said = hold(source, "here =").refused()
    line = 5 if "catches all" in what else 3
    assert re.search(rf"after 3 s it is still at \S+/app.py, line {line}, in <module>", said), said
    assert said.rstrip().endswith("on the way"), said


def test_one_that_does_not_even_answer_is_ended(hold, hurried):
    """What it has written is shown, and not what is in buffers of its own."""
    block = "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())"
    source = f"import os, signal, time\n{block}\nos.write(2, b'written')\ntime.sleep(1000)\nhere = None\n"
    said = hold(source, "here =").refused()
    assert "it was not held after 3 s, and was ended" in said and "written" in said, said


ENDS = {
    "os._exit(3)": "with status 3",
    "os.kill(os.getpid(), 9)": "by SIGKILL",
    "import ctypes; ctypes.string_at(0)": "by SIGSEGV",
}


@pytest.mark.parametrize("end", ENDS)
def test_output_of_a_program_that_does_not_live_to_its_checkpoint(hold, end):
    said = hold(f"import os\nprint('on the way', flush=True)\n{end}\nhere = None\n", "here =").refused()
    assert f"the template ended {ENDS[end]} before it was ready" in said and "on the way" in said, said
