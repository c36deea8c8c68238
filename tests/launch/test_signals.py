"""Signals that the command receives are the program's, at once; the end of the command is the end of its worker."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.conftest import TIMEOUT, wait_for
from tests.launch.both import Ended, ends, finish, read_line

# What a process can handle; SIGCHLD is the kernel's word about children, 32 and 33 are glibc's own.
CATCHABLE = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD})

CATCHER = """
    import os, signal, sys, time
    caught = []
    def note(number, frame): os.write(1, b"%d\\n" % number)
    for n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        signal.signal(n, note)
    print("ready", flush=True)
    while True: time.sleep(0.1)
"""


LINES = (rb"line \d(?s:.*)\nKeyboard",)  # where an interrupt hits, which nobody can say


def run_both(both, begun, act, *, program=None, mask=(), **options):
    """Start the program both ways, let `act` do something to each process, and compare how they end."""
    if program is not None:
        both.write("app.py", program)
    results = []
    for command in (both.plain_command("app.py"), both.pocket_command("app.py")):
        process = begun(command, env=both.environment(None), cwd=both.place, **options)
        act(process)
        results.append(finish(process).masked(mask))
    assert results[1] == results[0], f"in a pocket:\n{results[1].shown()}\nunder python:\n{results[0].shown()}"
    return results[0]


def test_every_signal_that_can_be_caught_is_forwarded(both, begun):
    def act(process):
        for number in CATCHABLE:
            process.send_signal(number)
            assert read_line(process.stdout.fileno()) == b"%d\n" % number
        process.kill()

    both.write("app.py", CATCHER)
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    act(process)
    assert finish(process).err == b""


def test_a_signal_is_forwarded_within_milliseconds(both, begun):
    both.write("app.py", CATCHER)
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    took = []
    for _ in range(20):
        before = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        assert read_line(process.stdout.fileno()) == b"10\n"
        took.append(time.monotonic() - before)
    process.kill()
    assert sorted(took)[0] < 0.02, took  # the best of them, since others use this machine too


DEFAULT = sorted(set(CATCHABLE) - {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU})


@pytest.mark.parametrize("number", DEFAULT, ids=lambda n: getattr(n, "name", str(n)))
def test_what_a_signal_does_by_default(both, begun, number):
    """Ends it, is ignored, or raises KeyboardInterrupt, as under python."""
    harmless = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGURG, signal.SIGWINCH, signal.SIGCONT}

    def act(process):
        process.send_signal(number)
        if number in harmless:
            process.stdin.write(b"on\n")
            process.stdin.flush()
            process.stdin.close()
            process.stdin = None
        process.wait(TIMEOUT)

    program = "print('ready', flush=True)\nimport sys\nprint(sys.stdin.readline())"
    run_both(both, begun, act, program=program, stdin=subprocess.PIPE, mask=LINES)


def test_an_interrupt_shows_a_traceback_and_ends_by_sigint(both, begun):
    program = """
        import atexit, signal, time
        atexit.register(print, "at the end")
        def wait():
            try:
                # The traceback's line must not depend on how soon the signal comes.
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
                print("ready", flush=True)
                while not signal.sigpending():
                    time.sleep(0.001)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            finally:
                print("finally")
        wait()
    """
    ended = run_both(both, begun, lambda p: p.send_signal(signal.SIGINT), program=program)
    assert ended.status == -signal.SIGINT and b"KeyboardInterrupt" in ended.err and b"at the end" in ended.out


def test_an_interrupt_that_is_handled(both, begun):
    program = """
        import sys, time
        try:
            print("ready", flush=True)
            while True: time.sleep(0.1)
        except KeyboardInterrupt:
            sys.exit(4)
    """
    assert run_both(both, begun, lambda p: p.send_signal(signal.SIGINT), program=program).status == 4


def test_a_termination_that_is_handled(both, begun):
    program = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))
        print("ready", flush=True)
        while True: time.sleep(0.1)
    """
    assert run_both(both, begun, lambda p: p.send_signal(signal.SIGTERM), program=program).status == 5


def test_an_interrupt_in_the_middle_of_work(both, begun):
    program = "print('ready', flush=True)\nwhile True: pass"
    ended = run_both(both, begun, lambda p: p.send_signal(signal.SIGINT), program=program, mask=LINES)
    assert ended.status == -signal.SIGINT


def test_many_signals_in_a_row_are_all_forwarded(both, begun):
    """Real-time signals queue."""
    program = """
        import os, signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
        print("ready", flush=True)
        for _ in range(300): signal.sigwait([signal.SIGRTMIN])
        print("all")
    """

    def act(process):
        for _ in range(300):
            process.send_signal(signal.SIGRTMIN)

    both.write("app.py", program)
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    act(process)
    assert finish(process) == Ended(0, b"all\n", b"")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1])
def test_what_the_caller_ignores_is_ignored(both, begun, number):
    """nohup, and a background job of a shell without job control."""

    def act(process):
        process.send_signal(number)
        process.stdin.write(b"on\n")
        process.stdin.close()
        process.stdin = None

    program = f"""
        import signal, sys
        print("ready", flush=True)
        print(sys.stdin.readline(), signal.getsignal({int(number)}))
    """
    ended = run_both(
        both,
        begun,
        act,
        program=program,
        stdin=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    )
    assert ended.status == 0


def test_what_the_caller_blocks_is_blocked(both):
    program = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    both.same_program(program)
    block = [signal.SIGUSR1, signal.SIGTERM]
    ended = both.same_program(program, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, block))
    assert b"SIGTERM" in ended.out


def test_stop_and_continue(both, begun):
    both.write("app.py", CATCHER.replace("signal.signal(n, note)", "n == signal.SIGCONT and signal.signal(n, note)"))
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    session = next(w for w in both.pocketd.workers() if w["pid"] and _directory(w) == str(both.place))
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert wait_for(lambda: _state(session["pid"]) == "T")
    process.send_signal(signal.SIGCONT)
    assert read_line(process.stdout.fileno()) == b"18\n"
    assert _state(session["pid"]) != "T"
    process.kill()


def _directory(worker):
    return worker["directory"]


def _state(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]


CHILDREN = """
    import os, subprocess, sys, time
    for n in range(2):
        if os.fork() == 0:
            os.setsid()
            time.sleep(1000)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    print("ready", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["SIGKILL", "SIGSEGV"])
def test_the_end_of_the_command_is_the_end_of_its_worker_and_all_its_children(both, begun, number):
    both.write("app.py", CHILDREN)
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    leaf = next(p for p in both.pocketd.cgroup_path.glob("*/service/pockets/*/*/cgroup.procs") if _is_of(p, both.place))
    pids = [int(pid) for pid in leaf.read_text().split()]
    assert len(pids) >= 4  # the program, its two forks, its subprocess
    process.send_signal(signal.SIGKILL)
    if number != signal.SIGKILL:
        process.wait(TIMEOUT)
    assert all(ends(pid) for pid in pids)
    assert wait_for(lambda: not leaf.exists())


def _is_of(procs, place):
    for pid in procs.read_text().split():
        try:
            if os.path.samefile(f"/proc/{pid}/cwd", place):
                return True
        except OSError:
            pass
    return False


def test_the_end_of_the_program_is_the_end_of_what_it_left_behind(both):
    both.write("app.py", CHILDREN.replace('time.sleep(1000)\n"""', "") + "\n    ")
    both.write("app.py", CHILDREN.rstrip().removesuffix("time.sleep(1000)"))
    ended = both.pocket("app.py")
    assert (ended.status, ended.out) == (0, b"ready\n")
    assert both.pocketd.settled()


def test_a_worker_killed_from_outside_kills_the_command_the_same_way(both, begun):
    both.write("app.py", CATCHER)
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place)
    worker = next(w for w in both.pocketd.workers() if w["directory"] == str(both.place))
    os.kill(worker["pid"], signal.SIGKILL)
    assert finish(process) == Ended(-signal.SIGKILL, b"", b"")


def test_a_shell_shows_128_and_the_signal(both):
    both.write("app.py", "import os; os.kill(os.getpid(), 15)")
    command = ["sh", "-c", '"$@"; echo $?', "sh", *both.pocket_command("app.py")]
    done = subprocess.run(command, cwd=both.place, env=both.environment(None), capture_output=True, timeout=TIMEOUT)
    assert done.stdout == b"143\n"
