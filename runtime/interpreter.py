"""A running interpreter made to look like one that was just started for a program.

What a fork inherits from its template and a fresh `python PROGRAM` would not have: our own modules and search path,
descriptors, the environment, signal dispositions, standard streams set up for another terminal.
"""

from __future__ import annotations

import atexit
import gc
import io
import locale
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any, Container, Iterable, List, NoReturn, Tuple

from nsutil.syscalls import SYS_CLOSE_RANGE, syscall
from pocketd import wire
from pocketd.wire import Message

OURS = ("nsutil", "runtime", "pocketd", "msgpack")
_LIBRARY = "/run/pocketd/lib"
# Limits of the caller that a program runs under too; the rest are the service's.
RLIMITS = ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_STACK", "RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA")


def set_up() -> None:
    """In a template, before it loads anything: signals as a program finds them, no surprise from the environment."""
    sys.argv[:] = [""]
    sys.path[:] = [p for p in sys.path if p not in ("", _LIBRARY)]
    # msgpack's extension leaves these; another that is made by Cython makes its own.
    for name in [m for m in sys.modules if m == "cython_runtime" or m.startswith("_cython_")]:
        del sys.modules[name]


@dataclass(frozen=True)
class Clean:
    """What a worker must take out of its interpreter, found by the template beforehand.

    A look at each of thousands of names would touch, and so copy, as many pages in every worker.
    """

    modules: Tuple[str, ...]
    finders: Tuple[str, ...]

    @classmethod
    def find(cls) -> Clean:
        finders = tuple(p for p in sys.path_importer_cache if f"{p}/".startswith(f"{_LIBRARY}/"))
        return cls(tuple(m for m in sys.modules if m.partition(".")[0] in OURS), finders)

    def restore(self) -> None:
        """No module of ours is left to be imported by an app, so that its own `runtime.py` works; gc is on again."""
        for name in self.modules:
            sys.modules.pop(name, None)
        for path in self.finders:
            sys.path_importer_cache.pop(path, None)
        gc.enable()


def close_others(keep: Container[int]) -> None:
    """Close every descriptor but 0, 1, 2 and those in `keep`."""
    first = 3
    for fd in sorted(k for k in keep if k > 2):  # type: ignore[attr-defined]
        if fd > first:
            syscall(SYS_CLOSE_RANGE, first, fd - 1, 0, call="close_range")
        first = fd + 1
    syscall(SYS_CLOSE_RANGE, first, 0xFFFFFFFF, 0, call="close_range")


def reopen(fds: Iterable[int]) -> None:
    """Give each regular file that a library holds open an offset of this process's own."""
    for fd in fds:
        at = os.lseek(fd, 0, os.SEEK_CUR)
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(own, at, os.SEEK_SET)
        os.dup2(own, fd, inheritable=False)
        os.close(own)


def adopt(start: Message) -> None:
    """Take over the caller's environment, directory, umask, limits, signals, locale, time zone and streams."""
    pairs = wire.field(start, "environment", list, [])
    os.environ.clear()
    for name, value in pairs:
        if name and b"=" not in name and b"\0" not in name + value:
            os.environb[name] = value
    os.umask(wire.field(start, "umask", int, 0o022) & 0o777)
    change_directory(start)
    for name, soft in wire.field(start, "limits", dict, {}).items():
        lower_limit(name, soft)
    dispositions(wire.field(start, "ignored", list, []))
    try:
        locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:
        pass  # not in this root file system: C, as for any program here
    time.tzset()
    set_streams()


def change_directory(start: Message) -> None:
    """The caller's directory where the worker sees it, else the pocket's."""
    try:
        os.chdir(wire.field(start, "directory", bytes, b"/pocket"))
    except OSError:
        os.chdir("/pocket")


def lower_limit(name: str, soft: Any) -> None:
    if name not in RLIMITS or not isinstance(soft, int):
        return
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY or 0 <= soft <= hard:
        resource.setrlimit(kind, (soft, hard))


def dispositions(ignored: List[Any]) -> None:
    """Ignore what the caller had ignored (nohup). All else is already as Python starts: templates change nothing."""
    for number in ignored:
        if isinstance(number, int) and number not in (signal.SIGKILL, signal.SIGSTOP):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass  # no such signal, or one that glibc keeps for itself


def set_streams() -> None:
    """sys.stdin, stdout and stderr as the caller's environment and terminal ask for. CPython: create_stdio, PEP 538."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream: Any = make_stream(fd, name, mode) if is_open(fd) else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def make_stream(fd: int, name: str, mode: str) -> io.TextIOWrapper:
    encoding, errors = stream_encoding()
    if name == "stderr":
        errors = "backslashreplace"
    unbuffered = mode == "w" and bool(os.environ.get("PYTHONUNBUFFERED"))
    raw = io.FileIO(fd, mode, closefd=False)
    raw.name = f"<{name}>"
    buffer: Any = raw if unbuffered else io.BufferedWriter(raw) if mode == "w" else io.BufferedReader(raw)
    line = mode == "w" and (name == "stderr" or raw.isatty())
    stream = io.TextIOWrapper(buffer, encoding, errors, newline="\n", line_buffering=line, write_through=unbuffered)
    stream.mode = mode  # type: ignore[misc]
    return stream


def stream_encoding() -> Tuple[str, str]:
    """The encoding and error handler of standard streams: PYTHONIOENCODING, UTF-8 mode, the locale."""
    asked, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    name = locale.setlocale(locale.LC_CTYPE)
    simple = name in ("C", "POSIX") or os.environ.get("PYTHONUTF8") == "1"
    encoding = asked or ("utf-8" if simple else locale.nl_langinfo(locale.CODESET).lower())
    return encoding, errors or ("surrogateescape" if simple and not asked else "strict")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def finish(code: int, *, full: bool = False) -> NoReturn:
    """End as `python PROGRAM` does, but for the tearing down of modules: threads joined, atexit run, streams flushed.

    Tearing down what a framework imported takes 0.1 to 0.4 s of a program's end and frees what the kernel frees anyway.
    """
    if not wind_up():
        code = 120
    if full:
        import ctypes

        ctypes.pythonapi.Py_Exit(code)
    os._exit(code & 0xFF)


def wind_up() -> bool:
    """Join threads, run atexit functions, flush; False when standard output could not be flushed."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    return flush()


def finish_by(number: int) -> NoReturn:
    """End as `python PROGRAM` does after an uncaught KeyboardInterrupt: in good order, then by the signal itself."""
    wind_up()
    die_by(number)


def flush() -> bool:
    """Flush the standard streams; False when standard output could not be, as Python's exit code 120 says."""
    good = True
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BaseException as e:
            if stream is sys.stdout:
                good = False
                complain(f"Exception ignored in: {stream!r}\n{type(e).__name__}: {e}\n")
    return good


def complain(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except BaseException:
        pass


def die_by(number: int) -> NoReturn:
    """End by a signal, as if nothing had caught it."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)
