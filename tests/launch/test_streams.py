"""Standard input, output and error: pipes, files, closed, a reader that goes away, much output."""

from __future__ import annotations

import hashlib
import os
import select
import socket
import subprocess
from typing import Any

import pytest

from tests.conftest import TIMEOUT
from tests.launch.both import Both, Ended

KINDS = """
    import os, stat, sys
    for fd in range(3):
        try:
            mode = os.fstat(fd).st_mode
            print(fd, stat.S_IFMT(mode), os.isatty(fd), os.get_inheritable(fd), os.get_blocking(fd), file=sys.__stderr__ or open("log", "a"))
        except OSError as e:
            print(fd, e, file=sys.__stderr__ or open("log", "a"))
    for s in (sys.stdin, sys.stdout, sys.stderr):
        print(s and (s.name, s.mode, s.line_buffering, s.fileno(), s.closed), file=sys.__stderr__ or open("log", "a"))
"""  # noqa: E501


def test_pipes(both):
    both.same_program(KINDS, input=b"")


def test_dev_null(both):
    both.same_program(KINDS, stdout=subprocess.DEVNULL)
    both.same_program("import sys; print(sys.stdin.read())")


def test_input_of_10_mb_arrives(both):
    data = os.urandom(10 << 20)
    source = "import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())"
    assert both.same_program(source, input=data).out.decode().strip() == hashlib.sha256(data).hexdigest()


def test_input_by_line(both):
    both.same_program("import sys; print(input('? '), list(sys.stdin), sys.stdin.read())", input=b"a\nb\nc\r\nd")
    assert both.same_program("input()", input=b"").status == 1


def test_output_of_10_mb_arrives_at_a_slow_reader(both):
    both.write("app.py", "import sys\nfor n in range(1 << 20): sys.stdout.write('%09d\\n' % n)\nprint('end')")
    expected = hashlib.sha256(b"".join(b"%09d\n" % n for n in range(1 << 20)) + b"end\n").hexdigest()
    process = subprocess.Popen(
        both.pocket_command("app.py"), env=both.environment(None), cwd=both.place, stdout=subprocess.PIPE
    )
    assert process.stdout
    found = hashlib.sha256()
    while data := os.read(process.stdout.fileno(), 4096):
        found.update(data)
        select.select([], [], [], 0.0005)
    assert found.hexdigest() == expected
    assert process.wait(TIMEOUT) == 0
    process.stdout.close()


def test_output_without_a_last_line_end_is_flushed(both):
    both.same_program("import sys; sys.stdout.write('no end'); sys.stderr.write('none either')")


def test_output_of_both_kinds_keeps_its_order(both):
    both.same_program(
        "import sys, os\nprint('one', flush=True); print('two', file=sys.stderr); os.write(1, b'three\\n')",
        stderr=subprocess.STDOUT,
    )


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND])
def test_a_file_is_written_where_the_caller_stood(both, flags):
    """What the program writes is at the caller's own offset, which moves on with it."""

    def write(run):
        fd = os.open(both.place / "out", os.O_CREAT | os.O_WRONLY | flags, 0o600)
        try:
            os.write(fd, b"before\n")
            ended = run("app.py", stdout=fd)
            os.write(fd, b"after\n")
            return ended, os.lseek(fd, 0, os.SEEK_CUR), (both.place / "out").read_bytes()
        finally:
            os.close(fd)
            os.unlink(both.place / "out")

    both.write("app.py", "import sys; print('in between', sys.stdout.seekable(), sys.stdout.buffer.tell())")
    assert write(both.pocket) == write(both.plain)


def test_a_file_is_read_where_the_caller_stood(both):
    both.write("data", "one\ntwo\nthree\n")

    def read(run):
        with open(both.place / "data", "rb", buffering=0) as f:
            f.seek(4)
            ended = run("app.py", stdin=f)
            return ended, f.tell()

    both.write("app.py", "import os; print(os.read(0, 4)); print(os.lseek(0, 0, os.SEEK_CUR))")
    assert read(both.pocket) == read(both.plain)


def test_a_socket_as_standard_output(both):
    both.write("app.py", "import os, stat, sys; print(stat.S_ISSOCK(os.fstat(1).st_mode), sys.stdout.isatty())")

    def run(command: Any, **options: Any) -> tuple[int, bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            done = subprocess.run(command, cwd=both.place, stdout=theirs.fileno(), timeout=TIMEOUT, **options)
            theirs.close()
            return done.returncode, ours.recv(4096)

    env = both.environment(None)
    assert run(both.pocket_command("app.py"), env=env) == run(both.plain_command("app.py"), env=env)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_descriptors_stay_closed(both, closed):
    both.write("app.py", KINDS + "\n    os.dup2(os.open('/dev/null', os.O_RDWR), 9); print('end')")

    def run(command):
        line = f'cd {both.place}; exec "$@" {closed}'
        done = subprocess.run(
            ["sh", "-c", line, "sh", *command], env=both.environment(None), capture_output=True, timeout=TIMEOUT
        )
        log = both.place / "log"
        text = log.read_bytes() if log.exists() else b""
        log.unlink(missing_ok=True)
        return Ended(done.returncode, done.stdout, done.stderr), text

    assert run(both.pocket_command("app.py")) == run(both.plain_command("app.py"))


READERS = {
    "print": "import sys\nfor n in range(200000): print(n)\nprint('not reached', file=sys.stderr)",
    "at the end": "print('x' * 100)",
    "caught": "import os, sys\ntry:\n  while True: print('x' * 1000)\nexcept BrokenPipeError:\n"
    "  os.dup2(os.open(os.devnull, os.O_WRONLY), 1); sys.exit(5)",
    "default": "import signal\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\nwhile True: print('x' * 1000)",
    "by os.write": "import os\nwhile True: os.write(1, b'x' * 1000)",
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_goes_away(both: Both, name):
    """As under `python PROGRAM | head`: the same status and the same words."""
    both.write("app.py", READERS[name])

    def run(command):
        read, write = os.pipe()
        process = subprocess.Popen(
            command, env=both.environment(None), cwd=both.place, stdout=write, stderr=subprocess.PIPE
        )
        os.close(write)
        if name == "at the end":
            os.close(read)
        else:
            os.read(read, 10)
            os.close(read)
        _, err = process.communicate(timeout=TIMEOUT)
        return process.returncode, err

    assert run(both.pocket_command("app.py")) == run(both.plain_command("app.py"))


def test_a_full_disk_as_standard_output(both):
    """/dev/full: the error comes when the program flushes, and at its end."""
    for source in ("print('x')", "print('x', flush=True)", "import sys; print('x'); sys.exit(3)"):
        with open("/dev/full", "w") as full:
            both.same_program(source, stdout=full)


def test_standard_error_that_cannot_be_written(both):
    for source in ("1/0", "import sys; sys.exit('words')", "import sys; sys.stderr.write('x'); sys.exit(3)"):
        with open("/dev/full", "w") as full:
            both.same_program(source, stderr=full)


def test_a_program_that_closes_its_own_streams(both):
    both.same_program("import sys; sys.stdout.close()")
    both.same_program("import sys; sys.stderr.close(); print('x'); 1/0", mask=(rb"0x[0-9a-f]+", rb"refcount : \d+"))
    both.same_program("import os; os.close(1); print('x')")
    both.same_program("import sys; print('lost?'); sys.stdout = None")
    both.same_program("import io, sys; print('first'); sys.stdout = io.StringIO(); print('swallowed')")
    both.same_program("import sys; del sys.stdout; sys.__stdout__.write('x')")
    both.same_program("import sys; sys.stdout = open('out', 'w'); print('x'); sys.exit(2)")
    assert (both.place / "out").read_text() == "x\n"


@pytest.mark.parametrize("source", ["print('a'); 1/0", "print('a'); raise SystemExit('words')", "print('a'); exit(3)"])
def test_what_comes_first_on_one_descriptor(both, source):
    """Python flushes standard output before a file's traceback, and after that of -c, -m and a directory."""
    both.write("module.py", source)
    both.write("folder/__main__.py", source)
    for words in (["module.py"], ["-c", source], ["-m", "module"], ["folder"]):
        both.same(*words, stderr=subprocess.STDOUT)


def test_no_descriptor_is_open_but_the_three(both):
    source = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    both.same_program(source)  # the third is the directory that is being read
    assert both.pocket("-c", source).out == b"[0, 1, 2, 3]\n"


def test_the_callers_other_descriptors_do_not_pass(both):
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        source = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
        assert both.pocket("-c", source, pass_fds=(write,)).out == b"[0, 1, 2, 3]\n"
    finally:
        os.close(read)
        os.close(write)


def test_reopening_by_dev_stdin_and_dev_fd(both):
    ended = both.pocket("-c", "import os; print(os.readlink('/dev/stdin'), os.readlink('/dev/fd'))")
    assert ended.out == b"/proc/self/fd/0 /proc/self/fd\n"
