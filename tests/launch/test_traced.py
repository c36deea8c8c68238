"""What a program traces or profiles is the program, as under plain Python: no line of pocketd's."""

from __future__ import annotations

import pytest

TRACED = """
import atexit, sys
def work(): return [1].count(1)
def last(): work()
atexit.register(last)
def show(frame, event, arg):
    if frame.f_code.co_filename.endswith("app.py"):
        out.append((frame.f_code.co_name, event, frame.f_lineno))
    else:
        others.add(frame.f_code.co_filename)
    return show
def told():
    sys.settrace(None); sys.setprofile(None)
    print(out, [name for name in others if "/pocketd/" in name and "/site-packages/" not in name])
out, others = [], set()
atexit.register(told)
"""


@pytest.mark.parametrize(
    "how", ["sys.settrace(show)", "sys.setprofile(show)", "sys.setprofile(show); sys.settrace(show)"]
)
@pytest.mark.parametrize("end", ["work()", "work(); sys.exit(3)", "1/0", "sys.settrace(None); sys.setprofile(None)"])
def test_a_trace_function_hears_of_the_program_alone(both, how, end):
    ended = both.same_program(f"{TRACED}{how}\nwork()\n{end}\n")
    assert b"('work', 'return', 3)" in ended.out and ended.out.endswith(b" []\n")


def test_a_trace_function_hears_of_an_exception_hook(both):
    both.same_program(f"{TRACED}def hook(*a): work()\nsys.excepthook = hook\nsys.settrace(show)\n1/0\n")
