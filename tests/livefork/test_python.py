"""Live forks of a Python with threads of its own."""

from __future__ import annotations

from collections.abc import Callable

Python = Callable[..., str]

WORKERS = """
import os, queue, threading, time
asked, answered = queue.Queue(), queue.Queue()
def work():
    while True:
        number = asked.get()
        answered.put((os.getpid(), number**2))
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
def ask():
    for number in range(10):
        asked.put(number)
    answers = [answered.get(timeout=30) for _ in range(10)]
    assert {pid for pid, _ in answers} == {os.getpid()}
    return sorted(square for _, square in answers)
expected = [number**2 for number in range(10)]
def tasks():
    return sorted(map(int, os.listdir("/proc/self/task")))
assert ask() == expected
"""

# Three threads that want the interpreter lock all the time.
COMPUTE = """
def compute():
    n = 0
    while True:
        n += 1
for _ in range(3):
    threading.Thread(target=compute, daemon=True).start()
"""


def test_python_threads_answer_in_every_child(python: Python) -> None:
    python(
        WORKERS
        + """
for _ in range(100):
    assert child_says(revived(ask)) == expected
    assert ask() == expected
"""
    )


def test_a_child_has_one_thread_and_blocked_signals_until_it_revives(python: Python) -> None:
    python(
        WORKERS
        + """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def act():
    before = len(tasks()), len(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    count = clone.revive()
    return *before, count, len(tasks()), [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
alone, blocked, count, threads, mask = child_says(act)
assert (alone, count, threads, mask) == (1, 4, 5, [signal.SIGUSR1]), (alone, count, threads, mask)
assert blocked >= 60
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {signal.SIGUSR1}
"""
    )


def test_thread_ids_are_the_childs_own(python: Python) -> None:
    python(
        WORKERS
        + """
def act():
    clone.revive()
    return sorted(t.native_id for t in threading.enumerate()), tasks(), os.getpid(), threading.get_native_id()
known, real, pid, main = child_says(act)
assert known == real and pid == main and not set(real) & set(tasks()), (known, real, pid, main)
"""
    )


def test_a_child_of_computing_threads_runs_python_before_it_revives(python: Python) -> None:
    """A thread that had asked for the interpreter lock, or waits in its condition, is not there to take it."""
    python(
        WORKERS
        + COMPUTE
        + """
def act():
    end, n = time.monotonic() + 0.05, 0
    while time.monotonic() < end:  # pure Python: the evaluation loop looks at the request
        n += 1
    for _ in range(100):  # and calls that let the lock go and take it again
        os.close(os.open("/dev/null", os.O_RDONLY))
    alone = len(tasks()) == 1
    clone.revive(30)
    return alone, ask()
for _ in range(50):
    assert child_says(act) == [True, expected]
os._exit(0)
"""
    )


def test_a_child_forks_itself_and_its_child_once_more(python: Python) -> None:
    python(
        WORKERS
        + """
def generation(deeper):
    def act():
        clone.revive()
        assert ask() == expected
        return generation(deeper - 1) + 1 if deeper else 0
    return child_says(act)
for _ in range(10):
    assert generation(2) == 2
"""
    )


def test_more_threads_than_any_table_had_room_for(python: Python) -> None:
    python(
        WORKERS
        + """
assert child_says(revived(ask)) == expected
gate = threading.Event()
for _ in range(400):
    threading.Thread(target=gate.wait, daemon=True).start()
def act():
    before = len(tasks())
    return before, clone.revive(30), len(tasks())
assert child_says(act) == [1, 404, 405]
"""
    )


def test_threads_that_begin_and_end_all_the_time(python: Python) -> None:
    python(
        """
import threading, time
def beget():
    while True:
        threads = [threading.Thread(target=time.sleep, args=(0.0005,)) for _ in range(5)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
threading.Thread(target=beget, daemon=True).start()
for _ in range(50):
    assert child_says(revived(lambda: threading.active_count() > 1), timeout=30)
os._exit(0)
"""
    )


def test_a_thread_that_blocks_signals_is_named_in_bounded_time(python: Python) -> None:
    python(
        WORKERS
        + """
import ctypes, signal
ready, enough = threading.Event(), threading.Event()
def stubborn():
    ctypes.CDLL(None).prctl(15, b"stubborn", 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ready.set()
    enough.wait()
thread = threading.Thread(target=stubborn, daemon=True)
thread.start()
ready.wait()
before, start = tasks(), time.monotonic()
try:
    clone.live_fork(timeout=3)
    raise SystemExit("no error")
except clone.CloneError as error:
    assert time.monotonic() - start < 60
    assert error.stage == "park" and error.thread == "stubborn" and error.tid == thread.native_id, vars(error)
    assert "stubborn" in str(error) and "SigBlk" in str(error), str(error)
assert tasks() == before
enough.set()
thread.join()
assert ask() == expected
assert child_says(revived(ask)) == expected
"""
    )


def test_a_thread_that_is_never_quiet_is_named_and_can_be_forked_with_at_once(python: Python) -> None:
    python(
        WORKERS
        + """
import ctypes, hashlib
ready = threading.Event()
def derive():
    ctypes.CDLL(None).prctl(15, b"deriver", 0, 0, 0)
    ready.set()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without the interpreter lock
threading.Thread(target=derive, daemon=True).start()
ready.wait()
try:
    clone.live_fork(timeout=0.5)
    raise SystemExit("no error")
except clone.CloneError as error:
    assert error.stage == "quiet" and error.thread == "deriver" and "busy" in str(error), str(error)
for _ in range(20):
    assert child_says(revived(ask), quiet=False) == expected
os._exit(0)
"""
    )


def test_a_fork_leaves_no_garbage(python: Python) -> None:
    """A template does not collect any: it would grow with every launch, and each worker with it."""
    python(
        """
import gc
def forks():
    for _ in range(20):
        child = clone.live_fork(flags=0x20000000, set_tid=[1])  # CLONE_NEWPID
        if child is None:
            os._exit(0)
        os.waitpid(child.pid, 0)
        os.close(child.pidfd)
gc.disable()
forks()
gc.collect()
forks()
assert gc.collect() == 0
"""
    )


def test_only_the_main_thread_may_fork(python: Python) -> None:
    said = python(
        """
import threading
def act():
    try: clone.live_fork()
    except clone.CloneError as error: print(error)
thread = threading.Thread(target=act); thread.start(); thread.join()
"""
    )
    assert "main thread" in said


def test_a_signal_that_the_process_uses_is_left_to_it(python: Python) -> None:
    python(
        WORKERS
        + """
import re, signal
def caught():
    mask = int(re.search(r"SigCgt:\t([0-9a-f]+)", open("/proc/self/status").read())[1], 16)
    return {number for number in range(1, 65) if mask >> number - 1 & 1}
heard = []
def use(number):
    signal.signal(number, lambda number, frame: heard.append(number))
use(signal.SIGRTMAX)
before = caught()
assert child_says(revived(ask)) == expected
(chosen,) = caught() - before
use(chosen)  # taken after the first fork
assert child_says(revived(ask)) == expected
for number in (signal.SIGRTMAX, chosen):
    os.kill(os.getpid(), number)
assert heard == [signal.SIGRTMAX, chosen], heard
"""
    )


def test_revive_twice_and_fork_before_revive_are_told_apart(python: Python) -> None:
    python(
        WORKERS
        + """
import errno
def act():
    try:
        clone.live_fork()
    except clone.CloneError as error:
        first = error.errno, "revive() first" in str(error)
    return *first, clone.revive(), clone.revive()
assert child_says(act) == [errno.EBUSY, True, 4, 4]
"""
    )


def test_a_child_can_give_the_signal_back(python: Python) -> None:
    python(
        WORKERS
        + """
import re
def caught():
    return int(re.search(r"SigCgt:\\t([0-9a-f]+)", open("/proc/self/status").read())[1], 16)
before = caught()
def act():
    clone.revive()
    while_forked = caught()
    clone.forget()
    return [while_forked != before, caught() == before, ask() == expected, child_says(revived(ask)) == expected]
assert child_says(act) == [True] * 4
"""
    )
