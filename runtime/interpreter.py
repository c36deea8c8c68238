"""A running interpreter made to look like one that was just started for a program.

What a fork inherits from its template and a fresh `python PROGRAM` would not have: our own modules and search path,
descriptors, the environment, signal dispositions, standard streams set up for another terminal.
"""

from __future__ import annotations

import _thread
import array
import atexit
import builtins
import codecs
import ctypes
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import itertools
import linecache
import locale
import os
import resource
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Callable, Collection, Dict, List, NoReturn, Optional, Set, Tuple

from nsutil import clone
from nsutil.syscalls import libc
from pocketd import wire
from pocketd.wire import Message
from runtime import frames

OURS = ("nsutil", "runtime", "pocketd", "msgpack")
_LIBRARY = "/run/pocketd/lib"
# Limits of the caller that a program runs under too; the rest are the service's.
RLIMITS = ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_STACK", "RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA")


_FLAGS = [field.partition("=")[0] for field in repr(sys.flags).partition("(")[2].split(", ")]


_BUILTINS = dict(vars(builtins))  # a program may change its own
frozen = False  # the program was held, and what it had made by then is frozen (gc.freeze)
_STUCK = 1.0  # seconds in which a lock is waited for at the end, where daemon threads may have it
_FUTEX = ("202", "98")  # futex(2) on x86-64 and on aarch64
_known = 0  # how many modules there were before the program's own


_exits: List[Tuple[Any, Tuple[Any, ...], Dict[str, Any]]] = []  # what the template's libraries registered by atexit
_register = atexit.register


def _remember_exit(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    _exits.append((function, args, kwargs))
    return _register(function, *args, **kwargs)


def _run_inherited_exits() -> None:
    """What libraries registered in the template. Some of it concerns the template's own files, which are not here."""
    for function, args, kwargs in reversed(_exits):
        try:
            function(*args, **kwargs)
        except Exception:
            pass


def set_up() -> None:
    """In a template, before it loads anything: signals as a program finds them, no surprise from the environment."""
    getattr(linecache, "_interactive_cache", {}).clear()  # from 3.13: what this process was started with by -c
    atexit.register = _remember_exit
    sys.argv[:] = [""]
    sys.path[:] = [p for p in sys.path if p not in ("", _LIBRARY)]
    # msgpack's extension leaves these; another that is made by Cython makes its own.
    for name in [m for m in sys.modules if m == "cython_runtime" or m.startswith("_cython_")]:
        del sys.modules[name]


class _OfPocketd(importlib.abc.MetaPathFinder):
    """Finds `pocketd` for pockets' code where nobody has installed it, and of it what means something there:
    checkpoint(), rehearsed(), on_start()."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[importlib.machinery.ModuleSpec]:
        if name != "pocketd":
            return None
        return importlib.util.spec_from_loader(name, importlib.machinery.SourceFileLoader(name, _OF_POCKETD))


_finder = _OfPocketd()
_OF_POCKETD = f"{_LIBRARY}/pocketd/__init__.py"


def leave_modules() -> None:
    """In a root template, which has imported all that it and its children need of ours: no module of ours is left to be
    imported by an app, so that its own `runtime.py` works. Here, since each worker would otherwise take them out by
    itself, at the price of 100 copied pages."""
    for name in [m for m in sys.modules if m.partition(".")[0] in OURS]:
        del sys.modules[name]
    for path in [p for p in sys.path_importer_cache if f"{p}/".startswith(f"{_LIBRARY}/")]:
        del sys.path_importer_cache[path]
    sys.meta_path.append(_finder)


def begin() -> None:
    """In a worker: what its app registers with atexit is all that there is but for what libraries have, and gc is on
    again."""
    atexit._clear()
    atexit.register = _register
    atexit.register(_run_inherited_exits)  # first, so it runs last
    global _known
    _known = len(sys.modules)
    clone.forget()
    gc.enable()


def environment(start: Message) -> Dict[bytes, bytes]:
    """The caller's environment, as it is, but for variables that say which process they are for: that is this one."""
    pairs = wire.field(start, "environment", list, [])
    found = {name: value for name, value in pairs if name and b"=" not in name and b"\0" not in name + value}
    for name in wire.field(start, "own_pid", list, []):
        if name in (b"WATCHDOG_PID", b"LISTEN_PID"):  # sd_watchdog_enabled(3), sd_listen_fds(3)
            found[name] = str(os.getpid()).encode()
    return found


def adopt(start: Message, streams: Optional[Callable[[], object]] = None) -> None:
    """Take over the caller's environment, directory, umask, limits, signals, locale, time zone, and standard streams,
    which `streams` makes."""
    set_environment(environment(start))
    os.umask(wire.field(start, "umask", int, 0o022) & 0o777)
    change_directory(start)
    for name, soft in wire.field(start, "limits", dict, {}).items():
        lower_limit(name, soft)
    dispositions(wire.field(start, "ignored", list, []))
    set_locale()
    time.tzset()
    (streams or set_streams)()


def tell_libraries(settings: Dict[str, str]) -> None:
    """Put these into the environment as C sees it, where it has no others; Python does not, and the next
    `set_environment` takes them out again."""
    for name, value in settings.items():
        libc.setenv(name.encode(), value.encode(), 0)


_environ = ctypes.c_void_p.in_dll(libc, "environ")
_held_environment: Any = None  # what it points to


def set_environment(pairs: Dict[bytes, bytes]) -> None:
    """Make these the environment, for Python and for C, at once: putenv(3) for each of them costs more than all else
    that a run takes over. environ(7): a program may assign it; setenv(3) copies the array before it changes it."""
    global _held_environment
    data: Dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]  # shared by os.environb
    data.clear()
    data.update(pairs)
    strings = [name + b"=" + value + b"\0" for name, value in pairs.items()]
    text = array.array("b", b"".join(strings))
    places = itertools.accumulate(map(len, strings[:-1]), initial=text.buffer_info()[0])
    pointers = array.array("Q", [*(places if strings else ()), 0])
    _environ.value = pointers.buffer_info()[0]
    _held_environment = pointers, text


def touch(streams: Callable[[], object]) -> None:
    """Go once through what a run does before its first line, in a slot that waits: each page that it writes to is a
    copy then already (runtime.slot)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        said = {
            "environment": list(os.environb.items()),
            "directory": os.fsencode(os.getcwd()),
            "umask": current_umask(),
            "limits": {name: resource.getrlimit(getattr(resource, name))[0] for name in RLIMITS},
            "arguments": [b"x"] * 4,
            "ignored": [],
        }
        wire.send(ours, said, [2] * 3)
        for flags in (socket.MSG_PEEK, 0):
            start, fds = wire.receive(theirs, flags)
            fds.close()
    adopt(start, streams)
    code = compile("import os, sys, time\nclass C:\n  def f(self): return [1]\nC().f()\n", "<touch>", "exec")
    frames.alone(exec, code, {"__name__": "touch"})


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


elsewhere = ""  # the caller's directory, where the worker does not see it


def change_directory(start: Message) -> None:
    """The caller's directory where the worker sees it, else the pocket's."""
    global elsewhere
    directory = wire.field(start, "directory", bytes, b"/pocket")
    try:
        os.chdir(directory)
        elsewhere = ""
    except OSError:
        os.chdir("/pocket")
        elsewhere = os.fsdecode(directory)


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


_VALID = frozenset(map(int, signal.valid_signals()))


def block(start: Message) -> None:
    """Block the signals that the caller was started with as blocked, and no others."""
    numbers = {n for n in wire.field(start, "blocked", list, []) if n in _VALID}
    # By libc, since Python makes an enumeration's member of each signal that was blocked: by then all are.
    mask = (ctypes.c_uint64 * 16)(sum(1 << n - 1 for n in numbers))
    libc.pthread_sigmask(signal.SIG_SETMASK, ctypes.byref(mask), None)


def set_locale() -> None:
    """LC_CTYPE as Python sets it (PEP 538); UTF-8 mode (PEP 540) by a UTF-8 locale, as far as can be."""
    try:
        name = locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:  # not in this root file system
        name = locale.setlocale(locale.LC_CTYPE, "C")
    coerced = name == "C" and not os.environ.get("LC_ALL") and os.environ.get("PYTHONCOERCECLOCALE") != "0"
    utf8 = coerced or utf8_mode(name)
    set_flag("utf8_mode", utf8)
    if utf8:
        try:
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        except locale.Error:
            return  # glibc before 2.35 on a distribution that does not add it
        if coerced:
            os.environ["LC_CTYPE"] = "C.UTF-8"


def set_flag(name: str, value: bool) -> None:
    """Change one of sys.flags, which Python code goes by; the interpreter's own copy cannot be reached.

    A struct sequence keeps its items as a tuple does (CPython: Include/structseq.h). Only small integers go in and out,
    whose reference counts do not matter.
    """
    index = next(i for i in range(len(sys.flags)) if _FLAGS[i] == name)
    slot: Any = ctypes.py_object.from_address(
        id(sys.flags) + tuple.__basicsize__ + index * ctypes.sizeof(ctypes.c_void_p)
    )
    if slot.value is sys.flags[index]:
        slot.value = int(value)


def utf8_mode(ctype: str) -> bool:
    asked = os.environ.get("PYTHONUTF8")
    return asked == "1" or (ctype in ("C", "POSIX") and asked != "0")


def set_streams() -> None:
    """sys.stdin, stdout and stderr as the caller's environment and terminal ask for. CPython: create_stdio, PEP 538."""
    encoding = stream_encoding()
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream: Any = make_stream(fd, name, mode, encoding) if is_open(fd) else None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def make_stream(fd: int, name: str, mode: str, encoding: Tuple[str, str]) -> io.TextIOWrapper:
    kind: Any = io.BufferedReader if mode == "r" else io.BufferedWriter
    text = io.TextIOWrapper.__new__(io.TextIOWrapper)
    open_stream(text, kind.__new__(kind), fd, name, mode, encoding)
    return text


def open_stream(text: Any, buffer: Any, fd: int, name: str, mode: str, encoded: Tuple[str, str]) -> None:
    """Make a standard stream, or make it anew, of these two objects, which a program may have kept.

    `buffer` is not used where the environment wants output unbuffered. `encoded`: as `stream_encoding` says.
    """
    encoding, errors = encoded
    if name == "stderr":
        errors = "backslashreplace"
    unbuffered = mode == "w" and bool(os.environ.get("PYTHONUNBUFFERED"))
    raw: Any = io.FileIO(fd, mode + "b", closefd=False)
    raw.name = f"<{name}>"
    if not unbuffered:
        size = os.fstat(fd).st_blksize
        buffer.__init__(raw, size if size > 1 else io.DEFAULT_BUFFER_SIZE)  # as open() does
    line = name == "stderr" or raw.isatty()
    below = raw if unbuffered else buffer
    through = bool(os.environ.get("PYTHONUNBUFFERED"))  # of standard input too
    text.__init__(below, encoding, errors, newline="\n", line_buffering=line, write_through=through)
    text.mode = mode


def stream_encoding() -> Tuple[str, str]:
    """The encoding and error handler of standard streams: PYTHONIOENCODING, UTF-8 mode, the locale (initconfig.c)."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if encoding and not errors:
        errors = "strict"
    name = locale.setlocale(locale.LC_CTYPE)
    lax = name in ("C", "POSIX", "C.UTF-8", "C.utf8", "UTF-8") or utf8_mode(name)
    if not encoding:
        encoding = "utf-8" if utf8_mode(name) else locale.nl_langinfo(locale.CODESET)
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError:
        encoding = "utf-8"  # Python itself would not start
    return encoding, errors or ("surrogateescape" if lax else "strict")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def finish(code: int, *, full: bool = False, last: Callable[[], object] = lambda: None) -> NoReturn:
    """End as `python PROGRAM` does, but for the template's modules, which are torn down only if `full`.

    That takes 0.1 to 0.4 s for a framework's and frees what the kernel frees anyway. last: called when nothing of the
    program's is there any more.
    """
    if not wind_up(code):
        code = 120
    last()
    if full:
        ctypes.pythonapi.Py_Exit(code)
    os._exit(code & 0xFF)


def wind_up(code: int) -> bool:
    """Join threads, run atexit functions, flush, forget the program; False when a standard stream was not flushed.
    `code`: how the process ends if that comes to no end.

    CPython: Py_FinalizeEx.
    """
    try:
        frames.alone(threading._shutdown)  # type: ignore[attr-defined]
    except BaseException:
        sys.excepthook(*sys.exc_info())
    frames.alone(atexit._run_exitfuncs)
    frames.untraced()
    builtins.__dict__.update(_BUILTINS)
    good = flush()
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    if others:  # daemon threads: where Python lets go of what there is, they run no line any more
        kept = namespaces_of(others)
        stopped = clone.stop([thread.native_id for thread in others if thread.native_id])
        if stopped:
            watch_the_end(code if good else 120)
        flush_files_apart()
        if stopped:  # else one computes, and may hold an allocator's lock
            forget_program(kept)
    else:
        flush_files()
        forget_program()
    flush_quietly()
    libc.fflush(None)
    return good


def watch_the_end(code: int) -> None:
    """End this process where its main thread waits for what a stopped thread has, such as a stream's lock, and nobody
    will give it. CPython waits a second for those (_enter_buffered_busy) and aborts."""
    main = threading.get_native_id()

    def watch() -> None:
        wait_until(main, lambda: False, _STUCK)
        os._exit(code & 0xFF)

    with suppress(OSError, RuntimeError):  # no /proc, no room for a thread
        state_of(main)
        _thread.start_new_thread(watch, ())


def state_of(tid: int) -> Tuple[str, ...]:
    """What a thread of this process waits in, and how often it has begun to wait. proc(5)."""
    with open(f"/proc/self/task/{tid}/syscall") as at, open(f"/proc/self/task/{tid}/status") as status:
        return at.read(), *(line for line in status if "ctxt_switches" in line)


def wait_until(tid: int, done: Callable[[], bool], seconds: float) -> None:
    """Until that, or until the thread has waited in one futex(2) for so many seconds."""
    before, since = state_of(tid), time.monotonic()
    while not done() and time.monotonic() - since < seconds:
        time.sleep(0.01)
        now = state_of(tid)
        if now != before or now[0].partition(" ")[0] not in _FUTEX:
            before, since = now, time.monotonic()


def namespaces_of(threads: List[threading.Thread]) -> Set[int]:
    """What these threads' functions have as globals, by id: Python has them live on, and all that they hold."""
    found: Set[int] = set()
    known = sys._current_frames()
    for thread in threads:
        frame = known.get(thread.ident or 0)
        while frame is not None:
            found.add(id(frame.f_globals))
            frame = frame.f_back
    return found


def forget_program(kept: Collection[int] = ()) -> None:
    """Let go of what the program's modules hold: files that it left open are written, finalizers run. `kept`:
    namespaces that stay, by id.

    CPython: finalize_modules.
    """
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        sys.__dict__.pop(name, None)
    for name in ("stdin", "stdout", "stderr"):
        setattr(sys, name, getattr(sys, f"__{name}__"))
    names = list(itertools.islice(reversed(sys.modules), max(0, len(sys.modules) - _known)))
    gone = [sys.modules.pop(name, None) for name in ("__main__", *names)]
    if frozen:  # no collection finds what was there before
        for module in gone:
            if id(getattr(module, "__dict__", None)) not in kept:
                clear(getattr(module, "__dict__", {}))
    del gone[:]
    frames.alone(gc.collect)


def clear(namespace: Dict[str, Any]) -> None:
    """CPython: _PyModule_ClearDict."""
    for own in (True, False):
        for name in list(namespace):
            if name[:1] == "_" and name[1:2] != "_" if own else name != "__builtins__":
                namespace[name] = None


def flush_files_apart() -> None:
    """In threads of their own, where stopped ones may have a file's lock: those that wait for one are left, and
    that file with them."""
    streams = open_files()
    while streams:
        ended: List[bool] = []
        known: List[int] = []

        def work(ended: List[bool] = ended, known: List[int] = known) -> None:
            known.append(threading.get_native_id())
            while streams:
                flush_file(streams.pop(0))
            ended.append(True)

        try:
            _thread.start_new_thread(work, ())
            while not known:
                time.sleep(0.001)
            wait_until(known[0], lambda ended=ended: bool(ended), _STUCK / 4)  # type: ignore[misc]
        except (OSError, RuntimeError):  # it has just ended; there is no room for a thread
            return


def flush_files() -> None:
    """Write what open files hold."""
    for stream in open_files():
        flush_file(stream)


def open_files() -> List[Any]:
    """Text comes first, as its bytes go to a binary file."""
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    return sorted((o for o in gc.get_objects() if type(o) in kinds), key=lambda stream: kinds.index(type(stream)))


def flush_file(stream: Any) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):
        pass  # closed, or nobody takes it


def finish_by(number: int) -> NoReturn:
    """End as `python PROGRAM` does after an uncaught KeyboardInterrupt: in good order, then by the signal itself."""
    wind_up(128 + number)
    die_by(number)


def flush() -> bool:
    """Flush the standard streams; False when one could not be, as Python's exit code 120 says (flush_std_files)."""
    good = True
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name, None)
        try:
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        except BaseException as e:
            good = False
            if name == "stdout":
                where = f"in: {stream!r}" if sys.version_info < (3, 13) else "on flushing sys.stdout:"
                complain(f"Exception ignored {where}\n{type(e).__name__}: {e}\n")
    return good


def flush_quietly() -> None:
    """As Python does after it has run a file and before it shows why that ended (flush_io)."""
    for name in ("stderr", "stdout"):
        try:
            getattr(sys, name).flush()
        except BaseException:
            pass


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
