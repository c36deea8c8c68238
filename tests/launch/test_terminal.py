"""A real terminal: the program has it, its size, its line buffering, and its job control."""

from __future__ import annotations

import ctypes
import fcntl
import os
import pty
import select
import shlex
import signal
import struct
import termios
import time
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT, service_environment, toml_table, wait_for


class Terminal:
    """A terminal with a command in its foreground, as a shell with job control starts one."""

    def __init__(self, command, env, cwd, size=(24, 80)):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(command[0], command, env)
        self.resize(*size)
        self.text = b""
        self.status = None

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.fd, text)

    def until(self, wanted, timeout=TIMEOUT):
        """Read until `wanted` has appeared; returns what came with it, and forgets it."""
        end = time.monotonic() + timeout
        while wanted not in self.text:
            if not select.select([self.fd], [], [], max(0.0, end - time.monotonic()))[0]:
                raise AssertionError(f"{wanted!r} did not come; there is {self.text!r}")
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # EIO: nobody has the other end any more
                data = b""
            if not data:
                raise AssertionError(f"{wanted!r} did not come before the end; there is {self.text!r}")
            self.text += data
        at = self.text.index(wanted) + len(wanted)
        came, self.text = self.text[:at], self.text[at:]
        return came

    def end(self):
        """What else it writes, and how it ends."""
        rest = self.text
        while select.select([self.fd], [], [], TIMEOUT)[0]:
            try:
                data = os.read(self.fd, 4096)
            except OSError:
                break
            if not data:
                break
            rest += data
        _, self.status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(self.status), rest

    def close(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(both):
    opened = []
    assert both.pocket("-c", "").status == 0  # the service is on, and shows no progress

    def start(program, pocket=True, name="app.py"):
        both.write(name, program)
        env = both.environment({"TERM": "xterm"})
        command = both.pocket_command(name) if pocket else both.plain_command(name)
        if not pocket:
            env.pop("POCKETD_RUNTIME_DIR")
        opened.append(Terminal([os.fsencode(w) for w in command], env, both.place))
        return opened[-1]

    yield start
    for t in opened:
        t.close()


def same(terminal, program, act=lambda t: None):
    results = []
    for pocket in (False, True):
        t = terminal(program, pocket)
        act(t)
        results.append(t.end())
    assert results[1] == results[0]
    return results[0]


def test_the_program_has_the_terminal(terminal):
    same(
        terminal,
        """
        import os, shutil, sys, termios
        print([os.isatty(n) for n in range(3)], os.get_terminal_size(), shutil.get_terminal_size())
        print([(s.line_buffering, s.encoding, s.errors, s.isatty()) for s in (sys.stdin, sys.stdout, sys.stderr)])
        print(termios.tcgetattr(0)[:4], os.tcgetpgrp(0) > 0 if 0 else "")
        """,
    )


def test_lines_come_at_once(terminal):
    t = terminal("import sys\nprint('first')\nsys.stdin.readline()\nprint('second')\nsys.stdin.readline()")
    t.until(b"first\r\n")
    t.type(b"\n")
    t.until(b"second\r\n")
    t.type(b"\n")
    assert t.end()[0] == 0


def test_input_is_typed(terminal):
    def act(t):
        t.until(b"? ")
        t.type(b"words\n")

    assert b"got words" in same(terminal, "print('got', input('? '))", act)[1]


def test_the_end_of_input_is_typed(terminal):
    def act(t):
        t.until(b"go\r\n")
        t.type(b"a\n\x04")

    same(terminal, "import sys\nprint('go')\nprint(sys.stdin.read())", act)


def test_a_password_is_not_echoed(terminal):
    """getpass opens /dev/tty, which a worker has not; it falls back to standard input, still without an echo."""
    t = terminal("import getpass\nprint(len(getpass.getpass('word: ')))")
    t.until(b"word: ")
    t.type(b"secret\n")
    status, rest = t.end()
    assert status == 0 and b"6" in rest and b"secret" not in rest


def test_a_change_of_size_is_told(terminal):
    t = terminal("""
        import os, signal, time
        signal.signal(signal.SIGWINCH, lambda *a: os.write(1, b"size %d %d\\n" % os.get_terminal_size()))
        print("ready")
        while True: time.sleep(0.1)
    """)
    t.until(b"ready\r\n")
    for rows, columns in ((40, 100), (10, 20)):
        t.resize(rows, columns)
        t.until(b"size %d %d\r\n" % (columns, rows))


CHILD = """
    import os, signal, time
    signal.signal(signal.SIGINT, lambda *a: (os.write(1, b"child hears\\n"), os._exit(7)))
    os.write(1, b"ready\\n")
    time.sleep(1000)
"""
INTERRUPTED = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "child.py"])
    try:
        time.sleep(1000)
    except KeyboardInterrupt:
        print("program hears", child.wait())
        sys.exit(9)
"""


def test_an_interrupt_reaches_the_program_and_its_child(terminal, both):
    """^C goes to the terminal's foreground group: the program and what it started."""

    def act(t):
        t.until(b"ready\r\n")
        t.type(b"\x03")

    both.write("child.py", CHILD)
    for pocket in (False, True):
        t = terminal(INTERRUPTED, pocket)
        act(t)
        status, rest = t.end()
        assert status == 9 and b"program hears 7" in rest and b"child hears" in rest, (pocket, rest)


def test_an_interrupt_that_nobody_handles(terminal):
    def act(t):
        t.until(b"ready\r\n")
        t.type(b"\x03")

    program = "import time\ndef f():\n    print('ready')\n    while True: time.sleep(1)\nf()"
    results = []
    for pocket in (False, True):
        t = terminal(program, pocket)
        act(t)
        status, rest = t.end()
        results.append((status, rest[-len(b"KeyboardInterrupt\r\n") :]))
    assert results == [(-signal.SIGINT, b"KeyboardInterrupt\r\n")] * 2


def test_quit_by_the_keyboard(terminal):
    def act(t):
        t.until(b"ready\r\n")
        t.type(b"\x1c")

    status, _ = same(terminal, "import signal\nprint('ready')\nsignal.pause()", act)
    assert status == -signal.SIGQUIT


def test_two_interrupts_in_a_row(terminal):
    t = terminal("""
        import os, signal, time
        def hear(*a): signal.signal(signal.SIGINT, signal.SIG_DFL); os.write(1, b"once\\n")
        signal.signal(signal.SIGINT, hear)
        print("ready")
        while True: time.sleep(1)
    """)
    t.until(b"ready\r\n")
    t.type(b"\x03")
    t.until(b"once\r\n")
    t.type(b"\x03")
    assert t.end()[0] == -signal.SIGINT


def stopped(pid):
    """Wait until a child of ours stops."""
    seen: list[int] = []

    def changed():
        seen[:] = os.waitpid(pid, os.WUNTRACED | os.WNOHANG)
        return seen[0]

    return wait_for(changed) and os.WIFSTOPPED(seen[1])


WORKING = """
    import os, signal, subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    signal.signal(signal.SIGCONT, lambda *a: os.write(1, b"goes on\\n"))
    print("ready", child.pid)
    while True:
        time.sleep(0.01)
"""


def test_stop_and_go_on_by_the_keyboard(terminal, both):
    """^Z stops the command, as its shell must see, and the program with its children; fg's SIGCONT goes on with all."""
    t = terminal(WORKING)
    t.until(b"ready")
    worker = next(w for w in both.pocketd.workers() if w["directory"] == str(both.place))
    leaf = next(p for p in both.pocketd.cgroup_path.glob(f"*/service/pockets/*/{worker['session']}/cgroup.procs"))
    running = [pid for pid in map(int, leaf.read_text().split()) if _name(pid) != "pause"]
    t.type(b"\x1a")
    assert stopped(t.pid)
    group = [pid for pid in running if os.getpgid(pid) == os.getpgid(worker["pid"])]
    assert len(group) == 2
    assert wait_for(lambda: all(_state(pid) == "T" for pid in group))
    os.kill(t.pid, signal.SIGCONT)
    t.until(b"goes on\r\n")
    assert wait_for(lambda: all(_state(pid) != "T" for pid in group))
    t.type(b"\x03")
    assert t.end()[0] == -signal.SIGINT


def test_a_program_that_handles_the_stop_is_not_stopped(terminal):
    t = terminal("""
        import os, signal, time
        signal.signal(signal.SIGTSTP, lambda *a: os.write(1, b"heard\\n"))
        print("ready")
        while True: time.sleep(1)
    """)
    t.until(b"ready\r\n")
    for _ in range(3):
        t.type(b"\x1a")
        t.until(b"heard\r\n")
    assert _state(t.pid) != "T"


def test_a_program_that_ignores_the_stop_is_not_stopped(terminal):
    t = terminal("""
        import signal, sys
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        print("ready")
        print(sys.stdin.readline())
    """)
    t.until(b"ready\r\n")
    t.type(b"\x1a")
    t.type(b"typed\n")
    t.until(b"typed\r\n")
    assert t.end()[0] == 0


def test_a_program_that_stops_itself_stops_the_command(terminal):
    t = terminal("import os, signal\nprint('ready')\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('on again')")
    t.until(b"ready\r\n")
    assert stopped(t.pid)
    os.kill(t.pid, signal.SIGCONT)
    t.until(b"on again\r\n")
    assert t.end()[0] == 0


# linux/ptrace.h, linux/wait.h
PTRACE_DETACH, PTRACE_GETEVENTMSG, PTRACE_SEIZE, PTRACE_O_CHILDREN, WALL = 17, 0x4201, 0x4206, 0xE, 0x40000000


def _ptrace(request, pid, data):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes, libc.ptrace.restype = (
        [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p],
        ctypes.c_long,
    )
    return libc.ptrace(request, pid, None, data)


def test_a_program_that_stops_itself_at_once_stops_the_command(terminal, pocketd):
    """Before its template has said that there is a worker: the template is stopped in its clone3 meanwhile."""
    (template,) = (t["pid"] for t in pocketd.ps()["templates"] if t["service"] == "plain")
    init = int(Path(f"/proc/{template}/status").read_text().partition("\nPPid:\t")[2].split()[0])
    assert _ptrace(PTRACE_SEIZE, template, PTRACE_O_CHILDREN) == 0
    try:
        t = terminal("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nprint('on again')")
        _, status = os.waitpid(template, WALL)
        assert status >> 16, status  # PTRACE_EVENT_...
        born = ctypes.c_ulong()
        assert _ptrace(PTRACE_GETEVENTMSG, template, ctypes.byref(born)) == 0
        worker = born.value
        os.waitpid(worker, WALL)
        assert _ptrace(PTRACE_DETACH, worker, 0) == 0
        assert wait_for(lambda: _state(worker) == "T")
        assert wait_for(lambda: _state(init) == "S")  # it knows
    finally:
        assert _ptrace(PTRACE_DETACH, template, 0) == 0
    assert stopped(t.pid)
    os.kill(t.pid, signal.SIGCONT)
    t.until(b"on again\r\n")
    assert t.end()[0] == 0


def test_jobs_of_a_shell(terminal, both):
    """bash with job control: ^Z, jobs, bg, fg, ^C and the status of each."""
    shell = "/bin/bash"
    if not os.path.exists(shell):
        pytest.skip("no bash")
    both.write(
        "app.py",
        """
        import os, signal, time
        signal.signal(signal.SIGCONT, lambda *a: os.write(1, b"goes on\\n"))
        print('rea' + 'dy')
        while True: time.sleep(1)
        """,
    )
    script = both.place / "run.sh"
    script.write_text(f"exec {shlex.join(map(os.fsdecode, both.pocket_command('app.py')))}\n")
    env = {**both.environment(None), "PS1": "$ ", "TERM": "dumb"}
    t = Terminal([b"/bin/bash", b"--norc", b"--noprofile", b"-i"], env, both.place)
    try:
        t.until(b"$ ")
        t.type(b"sh run.sh\n")
        t.until(b"ready\r\n")
        t.type(b"\x1a")
        t.until(b"Stopped")
        t.until(b"$ ")
        t.type(b"fg\n")
        t.until(b"goes on\r\n")  # by now the shell has given it the terminal
        t.type(b"\x03")
        t.until(b"KeyboardInterrupt")
        t.until(b"$ ")
        t.type(b"echo status $?\n")
        t.until(b"status 130\r\n")
        t.type(b"exit\n")
        assert t.end()[0] == 0
    finally:
        t.close()


def test_a_terminal_that_goes_away_ends_the_program(terminal, both):
    t = terminal("import signal\nprint('ready')\nsignal.pause()")
    t.until(b"ready\r\n")
    os.close(t.fd)
    _, t.status = os.waitpid(t.pid, 0)
    assert os.waitstatus_to_exitcode(t.status) == -signal.SIGHUP
    t.fd = os.open(os.devnull, os.O_RDONLY)
    assert both.pocketd.settled()


def test_progress_is_shown_on_a_terminal_alone(both, own_pocketd):
    """The first login starts a service: a terminal shows what goes on; a pipe gets the program's words alone."""
    daemon = own_pocketd(f'[service.plain]\nruntime = "python"\nenv = {toml_table(service_environment())}\n')
    done = daemon.pocket("run", "--service", "plain", "-c", "print(1)", cwd=both.place)
    assert (done.stdout, done.stderr) == ("1\n", "")
    daemon.pocket("plain", "off")
    command = [os.fsencode(w) for w in daemon.command("run", "--service", "plain", "-c", "print(1)")]
    t = Terminal(command, daemon.environment, both.place)
    try:
        t.until(b"plain: making the container\r\n")
        t.until(b"1\r\n")
        assert t.end()[0] == 0
    finally:
        t.close()


def _name(pid):
    with open(f"/proc/{pid}/comm") as f:
        return f.read().strip()


def _state(pid):
    with open(f"/proc/{pid}/stat") as f:
        return f.read().rpartition(")")[2].split()[0]
