"""A service to log in to, made of the real loop and a stand-in for the login; and a pocket to log in from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pocketd.client import Session, login

ROOT = Path(__file__).resolve().parents[2]
STANDIN = Path(__file__).with_name("standin.py")

DETECTOR = """
    import os, signal, sys, threading, time, traceback
    import numpy as np

    def echo(*args, **kwargs): return [args, kwargs] if kwargs else list(args)
    def kinds(*args): return [f"{type(a).__module__}.{type(a).__name__}" for a in args]
    def add(a, b): return a + b
    def same(a): return a
    def nothing_of(a): return None
    def total(a): return float(a.sum())
    def boom(text="no"): raise ValueError(text)
    def leave(code): sys.exit(code)
    def die(number): os.kill(os.getpid(), number); time.sleep(10)
    def exit(code): os._exit(code)
    def pid(): return os.getpid()
    def nap(seconds): time.sleep(seconds); return "rested"
    def stubborn(seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try: time.sleep(end - time.monotonic())
            except BaseException: pass
        return np.zeros(1000)
    def paint(image): image[...] = 7
    def zeros(n, dtype="float32"): return np.zeros(n, dtype)
    def address(a): return a.ctypes.data % 64, a.flags.writeable, a.flags.c_contiguous
    def strange(): return object()
    def half_strange(): return [np.zeros(1000), object()]
    def objects(): return np.array([object()], dtype=object)
    def words(kind): return np.array([["a", "bc"]], dtype=kind)
    def when(): return np.datetime64("2020-01-01")
    def number(dtype, value): return np.array([value]).astype(dtype)[0]
    def half():
        import ml_dtypes
        return ml_dtypes.bfloat16(1.5)
    def lists(n): return [np.zeros(100) for _ in range(n)]
    def grow(megabytes): return np.zeros(megabytes << 20, "u1")
    def used():
        import gc
        [found] = [o for o in gc.get_objects() if type(o).__name__ == "Heap"]
        return len(found._used)
    def target(target): return target
    def unreadable(): raise ValueError("cannot read \\udcff.jpg")
    def odd(how):
        class Meta(type):
            @property
            def __name__(cls): raise ValueError("no")
        class Odd(Exception, metaclass=Meta if how == "name" else type):
            if how == "str":
                def __str__(self): raise KeyboardInterrupt
            if how == "notes":
                @property
                def __notes__(self): raise ValueError("no")
            if how == "attribute":
                def __getattribute__(self, name): raise ValueError("no")
        if how == "syntax":
            e = SyntaxError("x", ("f", 1, 2, "text"))
            e.offset = "three"
            raise e
        raise Odd("odd")

    keeps, errors = [], []
    def keep(a, how="itself"):
        made = {"itself": lambda: a, "view": lambda: a.view(), "slice": lambda: a[1:, ::2], "turned": lambda: a.T,
                "buffer": lambda: memoryview(a)}
        keeps.append(made[how]())
    def keep_some(arrays, n): keeps.extend(arrays[:n])
    def keep_error(a):
        try:
            raise ValueError("kept")
        except ValueError as e:
            errors.append(e)
            raise
    def kept(): return [np.asarray(a).ravel().tolist() for a in keeps]
    def kept_errors(): return [last(e).f_locals["a"].tolist() for e in errors]
    def last(e): return list(traceback.walk_tb(e.__traceback__))[-1][0]
    def drop_kept(): keeps.clear()
    def big(n): return b"x" * n
    def deep(n):
        value = ()
        for _ in range(n): value = (value,)
        return value
    def status():
        import resource
        fds = len(os.listdir("/proc/self/fd"))
        return fds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, threading.active_count()
    class Thing:
        @staticmethod
        def inner(): return "inner"
    limit = 3
"""


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pocket's directory with a module of its own."""
    directory = tmp_path_factory.mktemp("pocket")
    (directory / "detector.py").write_text(textwrap.dedent(DETECTOR))
    return directory


def standin(runtime: str, directory: Path, models: dict[str, str], path: str = "") -> Iterator[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{path}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(STANDIN), runtime, str(directory), json.dumps(models)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline() == b"ready\n", "the stand-in did not start"
        yield str(directory)
    finally:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


FACTORIES = """
    class Counter:
        def __init__(self): self.n = 0
        def __call__(self, a): return a * 2
        def count(self, by=1):
            self.n += by
            return self.n
        def _private(self): return 1
        size = 3
"""


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The runtime directory of a stand-in whose service is `python` with numpy."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "factories.py").write_text(textwrap.dedent(FACTORIES))
    yield from standin("python", tmp_path_factory.mktemp("run"), {"counter": "factories:Counter"}, str(modules))


@pytest.fixture
def open_session(service: str, pocket: Path) -> Iterator[Callable[..., Session]]:
    """Logs in to the `python` service; what it made is closed at the end."""
    made: list[Session] = []

    def opened(name: str = "python", **options: object) -> Session:
        made.append(login(name, directory=str(pocket), runtime_dir=service, timeout=20, **options))  # type: ignore[arg-type]
        return made[-1]

    yield opened
    for session in made:
        session.close()


@pytest.fixture
def session(open_session: Callable[..., Session]) -> Session:
    return open_session()
