"""`pocket suggest`: what it proposes can be held, saves what it says, and changes nothing of a run."""

from __future__ import annotations

import json
import py_compile
import tomllib
import zipfile
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import Pocketd
from tests.launch.held.pocket import Pocket, lines

SLOW = "time.sleep(0.2)"  # what is worth to be done ahead of time
HEAD = "import asyncio, os, sys, time\n"


@pytest.fixture(autouse=True)
def front(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb is the command's in Python."""
    monkeypatch.setattr(Pocketd, "front", "python")


def suggest(pocket: Pocket, *words: str, **options: Any) -> dict[str, Any]:
    done = pocket.pocketd.pocket("suggest", "--json", pocket.name, *words, check=False, **options)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


PROGRAMS = {
    "the inner line of a compound statement": (
        f"""
        def load():
            {SLOW}
            return "model"

        def main(model, word):
            print(model, word)

        if __name__ == "__main__":
            model = load()
            word = sys.argv[1]
            main(model, word)
        """,
        "app.py:11",
    ),
    "the statement, where nothing in it was slow": (
        f"""
        {SLOW}
        if __name__ == "__main__":
            print(sys.argv[1:])
        """,
        "if __name__",
    ),
    "a function": (
        f"""
        {SLOW}
        def main():
            print(sys.argv[1])
        main()
        """,
        "main",
    ),
    "a line of a function": (
        f"""
        def main():
            {SLOW}
            word = sys.argv[1]
            print(word)
        main()
        """,
        "app.py:4",
    ),
    "a line in a loop, where it is reached first": (
        f"""
        {SLOW}
        for n in range(3):
            word = n == 2 and sys.argv[1]
            {SLOW}
        print(word)
        """,
        "for n",
    ),
    "a statement of several lines": (
        f"""
        {SLOW}
        print(
            "word",
            sys.argv[1],
        )
        """,
        "print(",
    ),
    "before the statement that starts a loop": (
        f"""
        {SLOW}
        async def main():
            word = sys.argv[1]
            print(word)
        asyncio.run(main())
        """,
        "asyncio.",
    ),
    "before it, though the coroutine is slow": (
        f"""
        {SLOW}
        def read():
            return sys.argv[1]
        async def main():
            {SLOW}
            print(read())
        def begin():
            asyncio.run(main())
        begin()
        """,
        "begin",
    ),
    "a method with the name of a function": (
        f"""
        def run():
            print("never")

        class Command:
            def run(self):
                print(sys.argv[1])
        {SLOW}
        Command().run()
        """,
        "Command(",
    ),
    "a function that has been called before": (
        f"""
        def show(look):
            print(sys.argv[1] if look else "nothing")
        show(False)
        {SLOW}
        show(True)
        """,
        "show(True)",
    ),
    "two statements with one beginning": (
        f"""
        try:
            {SLOW}
        finally:
            pass
        try:
            print(sys.argv[1])
        finally:
            pass
        """,
        "app.py:6",
    ),
}


@pytest.mark.parametrize("text, checkpoint", PROGRAMS.values(), ids=PROGRAMS)
def test_what_is_proposed_is_held_and_a_run_from_it_is_the_same(
    hold: Callable[..., Pocket], text: str, checkpoint: str
) -> None:
    pocket = hold(HEAD + lines(text))
    found = suggest(pocket, "word")
    assert found["checkpoint"] == checkpoint, found
    assert 0.15 < found["saves"] < found["whole"]
    assert found["looked"] == "its arguments"
    sample = ["word"] if found["rehearse"] else None
    held = hold(HEAD + lines(text), found["checkpoint"], rehearse=sample)
    held.warm()
    held.same("word")


LOOKS = {
    "line by line": ("for line in sys.stdin: print(line)", "standard input"),
    "the text": ("print(sys.stdin.read())", "standard input"),
    "a line": ("print(sys.stdin.readline())", "standard input"),
    "bytes": ("print(sys.stdin.buffer.read(3))", "standard input"),
    "all bytes": ("print(sys.stdin.buffer.read())", "standard input"),
    "a line of bytes": ("print(sys.stdin.buffer.readline())", "standard input"),
    "input": ("print(input())", "standard input"),
    "the descriptor": ("print(os.read(0, 4))", "standard input"),
    "the descriptor opened": ("print(open(0).read())", "standard input"),
    "its name": ("print(open('/dev/stdin').read())", "standard input"),
    "a copy": ("print(sys.argv.copy())", "its arguments"),
    "pop": ("print(sys.argv.pop())", "its arguments"),
    "index": ("print(sys.argv.index('word'))", "its arguments"),
    "concatenated": ("print(sys.argv + [])", "its arguments"),
    "printed": ("print(sys.argv)", "its arguments"),
    "a slice": ("print(sys.argv[1:])", "its arguments"),
    "a comparison": ("print(sys.argv == [])", "its arguments"),
    "the environment's names": ("print(len(list(os.environ)))", "its whole environment"),
    "its items": ("print(len({**os.environ}), len(dict(os.environb)))", "its whole environment"),
    "its items, one by one": ("for k, v in os.environ.items(): print(k)", "its whole environment"),
    "a copy of it": ("print(len(os.environ.copy()))", "its whole environment"),
}


@pytest.mark.parametrize("look, what", LOOKS.values(), ids=LOOKS)
def test_what_is_a_runs_own_is_seen(hold: Callable[..., Pocket], look: str, what: str) -> None:
    pocket = hold(HEAD + f"{SLOW}\nprint(sys.argv[0], os.environ.get('HOME'))\n{look}\n")
    found = suggest(pocket, "word", input="a line\n")
    assert (found.get("looked"), found.get("at")) == (what, "app.py, line 4"), found


def test_an_argument_list_is_one_for_other_processes_too(hold: Callable[..., Pocket]) -> None:
    pocket = hold("import pickle, sys\nprint(type(pickle.loads(pickle.dumps(sys.argv))))\n")
    assert "<class 'list'>" in pocket.pocketd.pocket("suggest", pocket.name, "word").stderr


NOWHERE = {
    "at once": ("import sys\nprint(sys.argv)\n", "at once"),
    "never": ("print(1)\n", "it never looked at anything"),
    "fails before": ("raise SystemExit(3)\n", "with status 3, before it looked"),
    "no program": ("print(\n", "SyntaxError"),
    "in the same statement": (f"import sys, time\nprint({SLOW}, sys.argv)\n", "in the same statement"),
    "in a coroutine": (
        f"import sys, time\nasync def main():\n    {SLOW}\n    print(sys.argv)\n__import__('asyncio').run(main())\n",
        "event loop",
    ),
    "in a thread": (
        f"import sys, threading, time\n{SLOW}\nthreading.Thread(target=lambda: print(sys.argv)).start()\n",
        "thread",
    ),
}


@pytest.mark.parametrize("text, why", NOWHERE.values(), ids=NOWHERE)
def test_a_program_that_cannot_be_held_is_told_why(hold: Callable[..., Pocket], text: str, why: str) -> None:
    found = suggest(hold(text), "word")
    assert found["checkpoint"] is None and why in found["why"], found


@pytest.mark.parametrize("kind", ["a directory", "a zip file", "bytecode"])
def test_what_is_no_source_is_told_so(hold: Callable[..., Pocket], kind: str) -> None:
    pocket = hold("print(1)", program="whole")
    place = pocket.place / "whole"
    if kind == "a directory":
        place.mkdir()
        (place / "__main__.py").write_text("print(1)")
    elif kind == "a zip file":
        with zipfile.ZipFile(place, "w") as file:
            file.writestr("__main__.py", "print(1)")
    else:
        py_compile.compile(pocket.app, str(place), doraise=True)
    found = suggest(pocket, "word")
    assert (found["status"], found["checkpoint"]) == (0, None)
    assert "not one file of Python source" in found["why"]


@pytest.mark.parametrize(
    "keys, env, why",
    [({"cold": True}, {}, "its definition"), ({}, {"PYTHONHASHSEED": "1"}, "PYTHONHASHSEED differs")],
    ids=["by its definition", "by its caller"],
)
def test_a_cold_run_is_told_why(
    hold: Callable[..., Pocket], keys: dict[str, Any], env: dict[str, str], why: str
) -> None:
    pocket = hold("import sys\nprint(sys.argv)\n", **keys)
    found = suggest(pocket, "word", env={**pocket.pocketd.environment, **env})
    assert found["checkpoint"] is None and "a process of its own" in found["why"] and why in found["why"]


def test_the_words_are_for_the_definition(hold: Callable[..., Pocket]) -> None:
    pocket = hold(HEAD + f"{SLOW}\nprint(sys.argv[1])\n")
    said = tomllib.loads(pocket.pocketd.pocket("suggest", pocket.name, "a word").stdout)
    assert said == {"checkpoint": "print(", "rehearse": ["a word"]}


@pytest.mark.parametrize("end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "sys.exit(4)", "sys.stdin.read()"])
def test_however_it_ends_what_it_looked_at_first_is_told(hold: Callable[..., Pocket], end: str) -> None:
    """A sample that fails, or reads what it would not have, is none; of what does not end by itself nobody knows."""
    pocket = hold(f"{HEAD}{SLOW}\nprint(sys.argv[1])\n{end}\n", None)
    found = suggest(pocket, "word", input="text")
    assert (found["checkpoint"], found["looked"], found["rehearse"]) == ("print(", "its arguments", False)
    pocket.pocketd.pocket("suggest", pocket.name, "word", check=False)


def test_what_ends_before_it_looks_is_told_too(hold: Callable[..., Pocket]) -> None:
    found = suggest(hold(f"{HEAD}os._exit(3)\n", None), "word")
    assert found["checkpoint"] is None and "os._exit" in found["why"]


BUSY = """
import sys, time
def load():
    begun, total = time.process_time(), 0
    for i in range(1_000_000):
        total += i
    sys.stderr.write(f"took {time.process_time() - begun} s")
load()
print(sys.argv[1])
"""


def test_a_program_that_is_watched_takes_not_much_longer(hold: Callable[..., Pocket]) -> None:
    """Else it would be said to save what only watching takes: a tracer makes this one take ten times as long."""
    pocket = hold(BUSY, None)
    watched = pocket.pocketd.pocket("suggest", pocket.name, "word").stderr
    alone = pocket.plain("word").err.decode()
    assert float(watched.split()[1]) < 4 * float(alone.split()[1])


@pytest.mark.parametrize("closed", [False, True])
def test_a_file_that_stays_open_for_writing_is_left_to_each_run(hold: Callable[..., Pocket], closed: bool) -> None:
    close = "log.close()" if closed else "log.flush()"
    pocket = hold(f"{HEAD}{SLOW}\nlog = open('/tmp/log', 'w')\n{close}\n{SLOW}\nprint(sys.argv[1])\n", None)
    found = suggest(pocket, "word")
    assert found["checkpoint"] == ("print(" if closed else "log =")
    assert found["looked"].startswith("its arguments" if closed else "a file that stays open for writing")


ELSEWHERE = f"""
import marshal, subprocess, sys, time
def there(function, *words):
    "What cloudpickle does for joblib: run its code in another process."
    run = "import marshal, sys, types; types.FunctionType(marshal.load(sys.stdin.buffer), globals())(1)"
    subprocess.run([sys.executable, "-c", run], input=marshal.dumps(function.__code__), check=True)
def names(function):
    return sorted(function.__code__.co_names)
def compiled(function):
    print(names(function), flush=True)
    return function
@compiled
def decorated(n):
    n += 1
    return n
def handed_on(n):
    print("handed on", n)
class A:
    def method(self):
        print("a method", self)
{SLOW}
there(handed_on)
there(decorated)
there(A.method)
print(sys.argv[1])
"""


def test_functions_that_others_compile_or_run_elsewhere_are_as_they_were(hold: Callable[..., Pocket]) -> None:
    pocket = hold(ELSEWHERE, None)
    watched = pocket.pocketd.pocket("suggest", "--json", pocket.name, "word", check=False)
    assert json.loads(watched.stdout)["checkpoint"] == "print(", watched.stderr
    plain = pocket.plain("word")
    assert plain.status == 0 and watched.stderr == plain.out.decode()
