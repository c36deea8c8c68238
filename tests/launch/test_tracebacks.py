"""What Python says of errors is said the same way, with no frame of anybody's but the program's own."""

from __future__ import annotations

import pytest

MODULES = {
    "module.py": "def fail(x):\n    return inner(x)\ndef inner(x):\n    raise ValueError(f'no {x}')\n",
    "wrong.py": "def f(:\n    pass\n",
    "failing.py": "import module\nmodule.fail('at import')\n",
    "package/__init__.py": "from . import sub\n",
    "package/sub.py": "1/0\n",
}

PROGRAMS = {
    "at the top": "1/0",
    "nested": "import module\ndef f():\n    module.fail(1)\n\nf()",
    "chained": "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise ValueError('x') from e",
    "during another": "try:\n    {}['a']\nexcept KeyError:\n    1/0",
    "suppressed": "try:\n    1/0\nexcept ZeroDivisionError:\n    raise ValueError from None",
    "in an imported module": "import failing",
    "in a package": "import package",
    "syntax error": "def f():\n    return (\n\nx = 3\n",
    "syntax error in a module": "print(1)\nimport wrong",
    "indentation": "if 1:\nprint(2)",
    "tabs": "if 1:\n\tprint(1)\n        print(2)",
    "null name": "import module.missing",
    "missing module": "import missing_of_that_name",
    "name error with a suggestion": "value = 3\nprint(valeu)",
    "attribute error with a suggestion": "import sys\nsys.arvg",
    "notes": "e = ValueError('x')\ngetattr(e, 'add_note', print)('a note')\nraise e",
    "recursion": "import sys\nsys.setrecursionlimit(200)\ndef f(n): return f(n + 1)\nf(0)",
    "memory error": "x = [0] * (1 << 60)",
    "unicode": "raise ValueError('é€\\udcff')",
    "empty message": "raise ValueError",
    "a class of its own": "class Mine(Exception): pass\nraise Mine('x', 2)",
    "a str that fails": "class Mine(Exception):\n    def __str__(self): 1/0\nraise Mine",
    "base exception": "raise BaseException('x')",
    "generator exit": "raise GeneratorExit",
    "keyboard interrupt": "raise KeyboardInterrupt",
    "keyboard interrupt in a function": "def f():\n    raise KeyboardInterrupt('words')\nf()",
    "in a comprehension": "[1 // n for n in (1, 0)]",
    "in a lambda": "(lambda: 1/0)()",
    "in exec": "exec('1/0')",
    "in a callback of C": "sorted([1, 2], key=lambda x: 1/0)",
    "a long line": "x = " + "1 + " * 300 + "1/0",
    "traceback printed": "import traceback\ntry:\n    1/0\nexcept Exception:\n    traceback.print_exc()",
    "stack printed": "import traceback\ndef f():\n    traceback.print_stack()\nf()",
    "stack counted": "import inspect, sys\nprint(len(inspect.stack()))\ntry:\n    sys._getframe(1)\n"
    "except ValueError as e:\n    print(e)",
    "faulthandler": "import faulthandler\ndef f(): faulthandler.dump_traceback(all_threads=False)\nf()",
    "warning": "import warnings\nwarnings.warn('x', stacklevel=1)\nwarnings.warn('y', stacklevel=2)\n"
    "warnings.warn('z', stacklevel=5)",
    "logging": "import logging\nlogging.basicConfig(format='%(filename)s %(lineno)d %(funcName)s %(message)s')\n"
    "logging.warning('x', stack_info=True)",
    "excepthook": "import sys\nsys.excepthook = lambda *a: print(a[0].__name__, a[2].tb_lineno, a[2].tb_next)\n1/0",
    "excepthook that fails": "import sys\ndef hook(*a): raise ValueError('in the hook')\nsys.excepthook = hook\n1/0",
    "excepthook that exits": "import sys\ndef hook(*a): sys.exit(7)\nsys.excepthook = hook\n1/0",
    "excepthook of None": "import sys\nsys.excepthook = None\n1/0",
    "excepthook and threads": "import sys, threading\nsys.excepthook = print\n"
    "t = threading.Thread(target=lambda: 1/0)\nt.start(); t.join()",
    "asyncio": "import asyncio\nasync def f(): await g()\nasync def g(): 1/0\nasyncio.run(f())",
    "sys.last_value": "import atexit, sys\natexit.register(lambda: print(sys.last_type, sys.last_traceback))\n1/0",
    "tracebacklimit": "import sys, module\nsys.tracebacklimit = 1\nmodule.fail(1)",
    "deleted source": "import os\nos.unlink(__file__)\n1/0",
    "unraisable": "class A:\n    def __del__(self): 1/0\nA()\nprint('on')",
    "groups": "raise ExceptionGroup('many', [ValueError(1), ExceptionGroup('in', [TypeError(2)])])",
    "frames have their globals": "import sys\nf = sys._getframe()\nprint(f.f_globals is globals(), f.f_back, f.f_code)",
    "assert": "assert 1 == 2, 'words'",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_errors_look_the_same(both, name):
    for path, source in MODULES.items():
        both.write(path, source)
    both.write("app.py", PROGRAMS[name])
    mask = (rb"0x[0-9a-f]+",)
    expected = both.plain("app.py").masked(mask)
    both.write("app.py", PROGRAMS[name])
    found = both.pocket("app.py").masked(mask)
    assert found == expected, f"in a pocket:\n{found.shown()}\nunder python:\n{expected.shown()}"
    assert b"/run/pocketd" not in found.err


@pytest.mark.parametrize(
    "name", ["at the top", "nested", "chained", "syntax error", "keyboard interrupt", "stack printed"]
)
def test_errors_of_modules_and_directories_look_the_same(both, name):
    for path, source in MODULES.items():
        both.write(path, source)
    both.write("run/__init__.py", "")
    both.write("run/app.py", PROGRAMS[name])
    both.write("folder/__main__.py", PROGRAMS[name])
    both.write("folder/module.py", MODULES["module.py"])
    both.same("-m", "run.app")
    both.same("folder")
    both.same("-c", PROGRAMS[name])


def test_an_error_in_a_program_run_by_runpy(both):
    both.write("other.py", "def f(): 1/0\nf()")
    both.same_program("import runpy; runpy.run_path('other.py', run_name='__main__')")


def test_debuggers_and_profilers_see_the_program_alone(both):
    both.same_program("""
        import cProfile, pstats, sys, io
        seen = []
        def trace(frame, event, arg):
            seen.append((frame.f_code.co_name, frame.f_back.f_code.co_name, frame.f_back.f_back))
        sys.settrace(trace)
        def f(): pass
        f()
        sys.settrace(None)
        print(seen)
        p = cProfile.Profile(); p.runcall(f); print(len(p.getstats()))
    """)  # fmt: skip
    both.same("-c", "import pdb; pdb.run('x = 1')", input=b"where\nstep\nwhere\nquit\n", mask=(rb"0x[0-9a-f]+",))
