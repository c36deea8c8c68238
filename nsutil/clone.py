"""Cloning this process: whole, with its running threads (live fork), or as fork does, into a cgroup and namespaces.

The C half is livefork.c, a plain shared library beside this file, loaded with PyDLL so that the interpreter lock (GIL)
is held throughout: no other Python thread moves between parking and clone.

Python in a child that is not revived yet. Threads that wait for the GIL exist there only in memory, and two things
would wait for one of them for ever, so both are seen to in the child, in C, before a line of Python runs:
- A waiter that has asked for the GIL (gil_drop_request, CPython's ceval_gil.c): the next release waits until another
  thread has taken it. The request is cleared.
- glibc before 2.41: pthread_cond_signal on the GIL's condition, when it begins a new group of waiters, waits until the
  old group has left. The GIL's conditions and mutexes are set aside, with what its waiters have left in them, and fresh
  ones stand in their place until the threads come back. No wake-up is lost: who waits for the GIL looks again after a
  switch interval, and who waits for another to have taken it has been signalled by the forking thread, which holds it.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from nsutil.library import load
from nsutil.obstacles import Obstacle, inspect, renew, shared_mappings

__all__ = [
    "Child",
    "CloneError",
    "Obstacle",
    "attempt",
    "fork",
    "free_pid",
    "inspect",
    "live_fork",
    "pause",
    "privatize_shared_mappings",
    "renew",
    "revive",
    "shared_mappings",
    "stop",
]

CLONE_PARENT = 0x00008000  # linux/sched.h; the CLONE_NEW* stand in namespaces.py

# A child of live_fork(quiet=False) whose threads could not be brought back ends with this status (livefork.h).
NOT_REVIVED = 120

_JEMALLOC = (
    ". It is jemalloc's: background_thread:false keeps it from starting one, in MALLOC_CONF, or in what the library's "
    "copy goes by (JE_ARROW_MALLOC_CONF of pyarrow, _RJEM_MALLOC_CONF of polars), before its import"
)

# One try to park; then all threads run again for a moment, so that one that waits for another gets on.
_TRY = 0.25


class CloneError(OSError):
    """A clone, park or revive that failed. `str()` says what was asked, on what, the kernel's word, and what to do."""

    def __init__(self, number: int, message: str, stage: str = "", thread: str = "", tid: int = 0) -> None:
        super().__init__(number, message)
        self.stage = stage  # "park", "quiet", "clone a thread", "revive", or the system call
        self.thread = thread  # the name of the thread it failed on, if any
        self.tid = tid


class Child(NamedTuple):
    pid: int  # in this process's pid namespace
    pidfd: int  # O_CLOEXEC; the caller owns it


class _Failure(ctypes.Structure):
    _fields_ = [
        ("stage", ctypes.c_char * 32),
        ("thread", ctypes.c_char * 16),
        ("tid", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("blocked", ctypes.c_uint64),
        ("done", ctypes.c_uint32),
        ("wanted", ctypes.c_uint32),
    ]


class _Request(ctypes.Structure):
    _fields_ = [
        ("flags", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_int64),
        ("hold_ns", ctypes.c_int64),
        ("parked_ns", ctypes.c_int64),
        ("set_tid", ctypes.c_void_p),
        ("set_tid_size", ctypes.c_uint64),
        ("lock_request", ctypes.c_void_p),
        ("lock", ctypes.c_void_p),
        ("only", ctypes.c_void_p),
        ("only_size", ctypes.c_uint64),
        ("cgroup", ctypes.c_int32),
        ("pid_namespace", ctypes.c_int32),
        ("own_pid_namespace", ctypes.c_int32),
        ("quiet", ctypes.c_int32),
        ("revive_at_once", ctypes.c_int32),
        ("pidfd", ctypes.c_int32),
    ]


class _Range(ctypes.Structure):
    _fields_ = [
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("protection", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


def _load() -> Any:
    library = load()
    for name in ("livefork_fork", "livefork_clone", "livefork_pause"):
        getattr(library, name).restype = ctypes.c_long
    libc = ctypes.CDLL(None)
    try:  # glibc 2.35+ (rseq(2)); older ones register nothing
        offset, size = ctypes.c_ssize_t.in_dll(libc, "__rseq_offset"), ctypes.c_uint32.in_dll(libc, "__rseq_size")
    except ValueError:
        return library
    ctypes.c_ssize_t.in_dll(library, "livefork_rseq_offset").value = offset.value
    ctypes.c_uint32.in_dll(library, "livefork_rseq_size").value = size.value
    return library


_library = _load()
_python: Any = ctypes.PyDLL(None)  # of its own: what is said of functions of ctypes.pythonapi, programs see
for _name in ("PyThreadState_Get", "PyInterpreterState_Get"):
    getattr(_python, _name).restype = ctypes.c_void_p


# Where a request for the GIL stands. Up to 3.12: gil_drop_request, in the interpreter's state, beside recursion_limit
# (internal/pycore_interp.h, pycore_ceval_state.h): their offsets, of 64-bit builds. From 3.13: bit 0 of eval_breaker
# (_PY_GIL_DROP_REQUEST_BIT), in the thread's state (cpython/pystate.h: prev, next, interp, eval_breaker).
_LOCK_REQUESTS = {(3, 9): (76, 64), (3, 10): (72, 64), (3, 11): (104, 96), (3, 12): (372, 376)}


def _lock_request() -> int:
    """The address of the word whose bit 0 is a request for the GIL. Raises CloneError for an unknown Python."""
    interpreter: int = _python.PyInterpreterState_Get()
    if sys.version_info >= (3, 13):
        state: int = _python.PyThreadState_Get()
        if ctypes.c_size_t.from_address(state + 16).value == interpreter:
            return state + 24
    elif sys.version_info[:2] in _LOCK_REQUESTS:
        request, recursion_limit = _LOCK_REQUESTS[sys.version_info[:2]]
        known = ctypes.c_int32.from_address(interpreter + recursion_limit).value == sys.getrecursionlimit()
        if known and ctypes.c_uint32.from_address(interpreter + request).value in (0, 1):
            return interpreter + request
    raise _unknown_python("a request for the GIL")


class _Symbol(ctypes.Structure):  # Elf64_Sym, elf(5)
    _fields_ = [
        ("name", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("value", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    ]


# struct _gil_runtime_state (internal/pycore_gil.h, 3.9-3.14): interval in microseconds, last_holder, locked, then
# switch_number and, at this offset, what livefork.h calls livefork_lock.
_LOCK = 32
_gil = 0  # where it was found: in _PyRuntime, from 3.12 in the main interpreter, which is a part of that


def _lock() -> int:
    """The address of the GIL's conditions and mutexes. Raises CloneError for an unknown Python."""
    global _gil
    held = struct.pack("@LPi", round(sys.getswitchinterval() * 1e6), _python.PyThreadState_Get(), 1)  # by this thread
    if not _gil or ctypes.string_at(_gil, len(held)) != held:
        runtime = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(_python, "_PyRuntime")))
        symbol, found = ctypes.POINTER(_Symbol)(), (ctypes.c_void_p * 4)()
        known = ctypes.CDLL(None).dladdr1(runtime, found, ctypes.byref(symbol), 1)  # RTLD_DL_SYMENT: how large it is
        content = ctypes.string_at(runtime, symbol.contents.size if known else 0)
        at = content.find(held)
        if at < 0 or at % 8 or content.count(held) != 1:
            raise _unknown_python("the GIL")
        assert runtime.value
        _gil = runtime.value + at
    return _gil + _LOCK


def _unknown_python(what: str) -> CloneError:
    return CloneError(errno.ENOSYS, f"live fork: {what} does not stand where CPython 3.9-3.14 has it: {sys.version}")


def _request(
    flags: int, cgroup: int | None, pid_namespace: int | None, set_tid: Sequence[int], parent: bool
) -> _Request:
    request = _Request(flags=flags | (CLONE_PARENT if parent else 0), pidfd=-1)
    request.cgroup = -1 if cgroup is None else cgroup
    request.pid_namespace = request.own_pid_namespace = -1
    if pid_namespace is not None:
        request.pid_namespace = pid_namespace
        request.own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    if set_tid:
        request.set_tid_size = len(set_tid)
        numbers = array.array("i", set_tid)  # ctypes' arrays and their types are cycles, and templates collect none
        request.set_tid = numbers.buffer_info()[0]
        request.numbers = numbers  # keeps it alive
    return request


def live_fork(
    *,
    flags: int = 0,
    cgroup: int | None = None,
    pid_namespace: int | None = None,
    set_tid: Sequence[int] = (),
    parent: bool = False,
    quiet: bool = True,
    timeout: float = 5.0,
) -> Child | None:
    """Clone this process with all its threads. Returns the Child; None in the child.

    The child has ONE thread and all signals blocked until it calls `revive()`: the time to join namespaces and give up
    privileges, which all threads then inherit. It may run Python there, but must not wait for another thread.

    flags: CLONE_NEW*. cgroup: a directory of cgroup2 to be born in (CLONE_INTO_CGROUP). pid_namespace: the pidfd of a
    process (`pause()`) whose pid namespace the child is born in. set_tid: the child's pid, innermost pid namespace
    first (clone3(2)); it must not be a thread's id here (`free_pid()`). parent: a sibling, not a child (CLONE_PARENT).
    All descriptors stay the caller's. quiet: wait until every other thread is asleep in a system call, so that none
    holds an allocator's lock; without, the threads come back before this returns in the child (with status NOT_REVIVED
    and a line on stderr when that fails), and `revive()` only restores the signal mask. timeout: seconds for all of it.

    Only the main thread may call it: a clone's caller becomes the child's main thread. Raises CloneError; the parent is
    then as it was.
    """
    if threading.get_ident() != threading.main_thread().ident:
        raise CloneError(errno.EINVAL, "live fork: only the main thread can be forked from; call it there")
    if set_tid and set_tid[0] in _thread_ids():
        # setresuid in the child would signal it for that thread (glibc's setxid broadcast), and wait.
        raise CloneError(errno.EEXIST, f"live fork: pid {set_tid[0]} is a thread's id here; take free_pid()", "set_tid")
    request, failure = _request(flags, cgroup, pid_namespace, set_tid, parent), _Failure()
    request.quiet, request.revive_at_once = int(quiet), int(not quiet)
    end, tries = time.monotonic() + timeout, 0
    try:
        while True:
            tries += 1
            request.lock_request, request.lock = _lock_request(), _lock()
            # The last try is never a short one, which would name a thread that is only slow.
            request.timeout_ns = int(max(_TRY / 2, min(end - time.monotonic(), _TRY)) * 1e9)
            pid = _library.livefork_fork(ctypes.byref(request), ctypes.byref(failure))
            if pid == 0:
                return None
            if pid > 0:
                return Child(pid, request.pidfd)
            again = (failure.stage, failure.error) in ((b"park", errno.ETIMEDOUT), (b"quiet", errno.EAGAIN))
            if not again or time.monotonic() > end - _TRY / 2:
                raise _explain(failure, "live fork", timeout, tries)
            # There is nothing to poll. A busy thread may need the GIL to get on, or that it finds the GIL taken.
            time.sleep(0.001)
            request.hold_ns = 0 if tries % 2 == 0 else min(2 ** (tries // 2), 64) * 1_000_000
    finally:  # in the child too
        if request.own_pid_namespace >= 0:
            os.close(request.own_pid_namespace)


def revive(timeout: float = 5.0) -> int:
    """In a child of `live_fork`: bring its threads back and restore the signal mask. Returns how many came back.

    Raises CloneError; then none of them has run a line, and this process must end.
    """
    failure = _Failure()
    count: int = _library.livefork_revive(ctypes.c_int64(int(timeout * 1e9)), ctypes.byref(failure))
    if count < 0:
        raise _explain(failure, "revive", timeout, 1)
    # Threads have new ids; Python keeps them (threading.Thread.native_id).
    main = threading.main_thread()
    main._native_id = threading.get_native_id()  # type: ignore[attr-defined]
    others = [thread for thread in threading.enumerate() if thread is not main]
    if others:
        before, after = ((ctypes.c_int32 * count)() for _ in range(2))
        _library.livefork_revived(before, after, count)
        new = dict(zip(before, after))
        for thread in others:
            thread._native_id = new.get(thread.native_id, thread.native_id)  # type: ignore[attr-defined]
    return count


def attempt() -> None:
    """Whether this process can be forked live shows now: in a child that ends at once. Raises CloneError."""
    child = live_fork()
    if child is None:
        os._exit(0)
    select.select([child.pidfd], [], [])
    with suppress(ChildProcessError):  # a thread of the program, or a handler, has waited for it
        os.waitpid(child.pid, 0)
    os.close(child.pidfd)


def stop(threads: Sequence[int], timeout: float = 0.5) -> bool:
    """Stop threads of this process, by their native ids, for good: whatever they wait for, they run no line any more,
    as daemon threads do when Python ends. False, and all go on, where one computes and may hold an allocator's lock,
    or takes no signals."""
    request, failure = _Request(pidfd=-1), _Failure()
    numbers = array.array("i", threads)
    request.only, request.only_size = numbers.buffer_info()
    end = time.monotonic() + timeout
    while True:
        request.lock_request, request.lock = _lock_request(), _lock()
        request.timeout_ns = int(max(end - time.monotonic(), 0.05) * 1e9)
        if _library.livefork_stop(ctypes.byref(request), ctypes.byref(failure)) == 0:
            return True
        if failure.stage != b"quiet" or time.monotonic() > end:
            return False
        request.hold_ns = min(2 * request.hold_ns + 1_000_000, 64_000_000)


def forget() -> None:
    """In a child that has revived its threads: take away the handler by which they had been stopped, a signal's that
    Python does not know of. The next `live_fork` installs one again."""
    _library.livefork_forget()


def fork(
    *,
    flags: int = 0,
    cgroup: int | None = None,
    pid_namespace: int | None = None,
    set_tid: Sequence[int] = (),
    parent: bool = False,
) -> Child | None:
    """fork(2) with clone3's options (see `live_fork`), for a process that has one thread. None in the child.

    Runs Python's fork handlers (os.register_at_fork), not libc's (pthread_atfork). Raises CloneError; also when this
    process has other threads, whose locks would stay locked in the child for ever.
    """
    others = _thread_ids() - {threading.get_native_id()}
    if others:
        names = ", ".join(f"{tid} ({_thread_name(tid)})" for tid in sorted(others))
        raise CloneError(errno.EBUSY, f"fork: this process has other threads: {names}; use live_fork", "fork")
    request, failure = _request(flags, cgroup, pid_namespace, set_tid, parent), _Failure()
    try:
        _python.PyOS_BeforeFork()
        pid = _library.livefork_clone(ctypes.byref(request), ctypes.byref(failure))
        if pid == 0:
            _python.PyOS_AfterFork_Child()
            return None
        _python.PyOS_AfterFork_Parent()
    finally:
        if request.own_pid_namespace >= 0:
            os.close(request.own_pid_namespace)
    if pid < 0:
        raise _explain(failure, "fork", 0, 1)
    return Child(pid, request.pidfd)


def pause(*, flags: int, cgroup: int | None = None, parent: bool = False) -> Child:
    """Clone a process that waits for ever, with no descriptor open: the first process of a pid namespace (flags with
    CLONE_NEWPID). Orphans of its namespace are reaped by the kernel. Its end is the end of all in the namespace. In a
    network namespace of its own (CLONE_NEWNET) it brings up `lo`, soon.

    Made of this process, whose pages it shares until they change. Raises CloneError.
    """
    request, failure = _request(flags, cgroup, None, (), parent), _Failure()
    pid = _library.livefork_pause(ctypes.byref(request), ctypes.byref(failure))
    if pid < 0:
        raise _explain(failure, "pause", 0, 1)
    return Child(pid, request.pidfd)


def free_pid(avoid: Iterable[int]) -> int:
    """The smallest pid above 1 that is neither in `avoid` (the pids of all templates that a child descends from) nor a
    thread's id of this process: for `set_tid` in a fresh pid namespace. OpenSSL and others detect a fork by getpid."""
    taken = {*avoid, os.getpid(), *_thread_ids()}
    return next(pid for pid in range(2, len(taken) + 3) if pid not in taken)


def privatize_shared_mappings(timeout: float = 5.0) -> list[str]:
    """Replace each writable MAP_SHARED mapping by a private copy at the same address, every other thread being parked.
    Returns their names. What is written there later reaches no file and no other process.

    Raises CloneError, naming the mapping, for what cannot be copied (devices, io_uring, aio).
    """
    mappings = shared_mappings()
    for mapping in mappings:
        if mapping.remedy != "privatize":
            raise CloneError(
                errno.EINVAL, f"privatize: {mapping} cannot be copied; close it before the fork", mapping.kind
            )
    ranges, failure = (_Range * len(mappings))(), _Failure()
    for each, mapping in zip(ranges, mappings):
        assert mapping.range
        each.start, each.end, each.protection = *mapping.range, mapping.protection
    nanoseconds = ctypes.c_int64(int(timeout * 1e9))
    if mappings and _library.livefork_privatize(ranges, len(ranges), nanoseconds, ctypes.byref(failure)) < 0:
        what = "privatize" if failure.tid else f"privatize {mappings[failure.done]}"
        raise _explain(failure, what, timeout, 1)
    return [mapping.name for mapping in mappings]


def _thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def _thread_name(tid: int) -> str:
    try:
        with open(f"/proc/self/task/{tid}/comm") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "ended"


def _explain(failure: _Failure, what: str, timeout: float, tries: int) -> CloneError:
    stage, name = failure.stage.decode(), failure.thread.decode(errors="replace")
    said = os.strerror(failure.error)
    thread = f"thread {failure.tid} ({name})"
    if stage == "park":
        signals = [s for s in range(signal.SIGRTMIN, signal.SIGRTMAX + 1) if failure.blocked >> (s - 1) & 1]
        why = (
            f"it blocks signals (SigBlk {failure.blocked:016x})"
            if signals
            else "it was in a system call that nothing interrupts"
        )
        text = (
            f"{thread} did not stop within {timeout:g} s: {why}. A process with such a thread cannot be forked live; "
            "hold the program before it starts the thread, or let the thread take real-time signals"
            + (_JEMALLOC if name.startswith("jemalloc") else "")
        )
    elif stage == "quiet":
        text = (
            f"{thread} was busy in each of {tries} tries within {timeout:g} s, so it may hold a lock that the child "
            "needs. Hold the program where its threads wait"
        )
    elif stage == "revive" and failure.error == errno.EBUSY:
        text = "this process is itself a live fork whose threads are not back: call revive() first"
    elif stage == "revive":
        text = f"{failure.done} of {failure.wanted} threads were ready within {timeout:g} s: the machine is overloaded"
    elif stage == "clone a thread":
        text = f"{thread}, the {failure.done + 1}. of {failure.wanted}: {said}{_advice(stage, failure.error)}"
    else:
        text = f"{stage}: {said}{_advice(stage, failure.error)}"
        if failure.tid:
            text = f"{thread}: {text}"
    return CloneError(failure.error, f"{what}: {text}", stage, name, failure.tid)


def _advice(stage: str, number: int) -> str:
    if number == errno.EAGAIN and stage in ("clone3", "clone a thread"):
        return f". {_process_limit()}"
    known = {
        ("clone3", errno.ENOSYS): "needs Linux 5.7, and a seccomp filter that lets clone3 pass, for cgroup and set_tid",
        ("clone3", errno.EEXIST): "the pid asked for by set_tid is taken",
        ("clone3", errno.ENOMEM): "no memory; or the first process of the pid namespace has ended",
        ("clone3", errno.EBUSY): "the cgroup has controllers enabled for its children: only a leaf takes processes",
        ("clone3", errno.ENODEV): "the cgroup has been removed",
        ("clone3", errno.ENOENT): "the cgroup has been removed, or is not beneath this process's cgroup namespace",
        ("clone3", errno.EACCES): "cgroup.procs of the cgroup and of the common ancestor must be writable",
        ("clone3", errno.ENOSPC): "user.max_*_namespaces is reached",
        ("clone3", errno.EPERM): "needs CAP_SYS_ADMIN for namespaces and CAP_CHECKPOINT_RESTORE for set_tid",
        ("setns", errno.ESRCH): "the process that stands for the pid namespace has ended",
        ("setns", errno.EPERM): "needs CAP_SYS_ADMIN",
        (
            "rt_tgsigqueueinfo",
            errno.EAGAIN,
        ): f"RLIMIT_SIGPENDING is {resource.getrlimit(resource.RLIMIT_SIGPENDING)[0]}",
    }
    advice = known.get((stage, number))
    return f": {advice}" if advice else ""


def _process_limit() -> str:
    """Which limit on processes and threads this process is under (EAGAIN, clone(2))."""
    found = []
    try:
        with open("/proc/self/cgroup") as file:
            paths = {line.split(":", 2)[1]: line.split(":", 2)[2].rstrip("\n") for line in file}
        with open("/proc/self/mounts") as file:
            mounts = [line.split()[1:4] for line in file]
        for at, kind, options in mounts:
            controller = "" if kind == "cgroup2" else "pids"
            if not kind.startswith("cgroup") or controller not in ["", *options.split(",")] or controller not in paths:
                continue
            path = paths[controller]
            while path != "/":
                try:
                    with open(f"{at}{path}/pids.max") as file:
                        limit = file.read().strip()
                    if limit != "max":
                        found.append(f"pids.max of {at}{path} is {limit}")
                except OSError:
                    pass
                path = os.path.dirname(path)
    except OSError:
        pass
    limit_of_user = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    if limit_of_user != resource.RLIM_INFINITY and os.getuid() != 0:
        found.append(f"RLIMIT_NPROC of uid {os.getuid()} is {limit_of_user}")
    if not found:
        found.append("pids.max of a cgroup that cannot be seen from here, or kernel.threads-max or kernel.pid_max")
    return "The limit on threads is reached: " + "; ".join(found) + ". Raise it: a live fork needs all its threads"
