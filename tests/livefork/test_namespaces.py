"""Where a child is born, what it inherits, and what stops it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.livefork.test_python import WORKERS

Python = Callable[..., str]


def unified() -> Path | None:
    """Where cgroup2 is mounted."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)


def leaf_with(controller: str | None) -> Iterator[Path]:
    at = unified()
    if at is None or os.getuid():
        pytest.skip("needs root and a cgroup2 mount")
    if controller and controller not in (at / "cgroup.controllers").read_text().split():
        pytest.skip(f"the {controller} controller is not in {at} (a cgroup v1 hierarchy has it)")
    if controller and controller not in (at / "cgroup.subtree_control").read_text().split():
        pytest.skip(f"the {controller} controller is not enabled for the children of {at}")
    leaf = at / f"livefork-test-{os.getpid()}"
    leaf.mkdir()
    yield leaf
    leaf.rmdir()


@pytest.fixture
def leaf() -> Iterator[Path]:
    yield from leaf_with(None)


@pytest.fixture
def leaf_with_pids() -> Iterator[Path]:
    yield from leaf_with("pids")


def test_a_child_is_born_in_the_pid_namespace_of_a_pause_with_the_pid_asked_for(python: Python) -> None:
    python(
        WORKERS
        + """
pause = stand()
own = os.readlink("/proc/self/ns/pid")
pid = clone.free_pid([2, 3, 5])
assert pid == 4
def act():
    alone = len(os.listdir(f"/proc/self/task")) == 1
    clone.revive()
    return os.getpid(), os.readlink("/proc/self/ns/pid") != own, ask(), alone
for _ in range(3):
    assert child_says(act, pid_namespace=pause.pidfd, set_tid=[pid]) == [4, True, expected, True]
    assert os.readlink("/proc/self/ns/pid_for_children") == own
    assert child_says(revived(os.getppid)) == os.getpid()
signal.pidfd_send_signal(pause.pidfd, signal.SIGKILL)
assert outcome(pause) == -signal.SIGKILL
pause = stand()
os.kill(pause.pid, signal.SIGKILL)
os.waitpid(pause.pid, 0)
try:
    clone.live_fork(pid_namespace=pause.pidfd)
    raise SystemExit("no error")
except clone.CloneError as error:
    assert "ended" in str(error), str(error)
assert os.readlink("/proc/self/ns/pid_for_children") == own
"""
    )


def test_free_pid_avoids_this_process_and_its_threads(python: Python) -> None:
    python(
        WORKERS
        + """
pause = stand()
def act():  # its threads have small numbers there
    clone.revive()
    return clone.free_pid([]), tasks()
pid, threads = child_says(act, pid_namespace=pause.pidfd, set_tid=[2])
assert threads == [2, 3, 4, 5, 6] or len(threads) == 5, threads
assert pid not in threads
try:
    clone.live_fork(pid_namespace=pause.pidfd, set_tid=[tasks()[-1]])
    raise SystemExit("no error")
except clone.CloneError as error:
    assert "free_pid" in str(error)
os.kill(pause.pid, signal.SIGKILL)
"""
    )


def test_a_sibling_is_born_in_a_cgroup(python: Python, leaf: Path) -> None:
    python(
        WORKERS
        + f"""
leaf = {str(leaf)!r}
template = os.getpid()
def act():  # in the template: its child is the child of the one that made it
    clone.revive()
    directory = os.open(leaf, os.O_RDONLY | os.O_DIRECTORY)
    reader, writer = os.pipe()
    child = clone.live_fork(parent=True, cgroup=directory, flags=namespaces.CLONE_NEWNS | namespaces.CLONE_NEWIPC)
    if child is None:
        clone.revive()
        cgroup = [line.split(":", 2)[2].strip() for line in open("/proc/self/cgroup") if line.startswith("0:")]
        os.write(writer, json.dumps([os.getppid(), cgroup, ask()]).encode())
        os._exit(7)
    said = json.loads(os.read(reader, 4096))
    return child.pid, said
sibling, (parent, cgroup, squares) = child_says(act)
assert parent == template and squares == expected
assert leaf.endswith(cgroup[0]) and len(cgroup[0]) > 1, cgroup
assert os.waitstatus_to_exitcode(os.waitpid(sibling, 0x40000000)[1]) == 7  # __WALL: its exit signal is not SIGCHLD
"""
    )


def test_fork_leaves_no_descriptor_behind(python: Python) -> None:
    python(
        """
def descriptors():
    return sorted((int(fd), os.readlink(f"/proc/self/fd/{fd}")) for fd in os.listdir("/proc/self/fd")[:-1])
def own():
    return [list(each) for each in descriptors() if "/fd" not in each[1]]
pause = stand()
for make in (clone.fork, clone.live_fork):
    reader, writer = os.pipe()
    before = own()
    child = make(pid_namespace=pause.pidfd, set_tid=[9])
    if child is None:
        if make is clone.live_fork: clone.revive()
        os.write(writer, json.dumps([os.getpid(), own()]).encode())
        os._exit(0)
    pid, there = json.loads(os.read(reader, 65536))
    assert pid == 9 and there == before, (pid, before, there)
    assert not os.get_inheritable(child.pidfd)
    assert outcome(child) == 0
    assert own() == before
    os.close(reader); os.close(writer)
os.kill(pause.pid, signal.SIGKILL)
"""
    )


def test_fork_runs_pythons_handlers_and_refuses_other_threads(python: Python) -> None:
    python(
        """
import threading, time
ran = []
os.register_at_fork(before=lambda: ran.append("before"), after_in_child=lambda: ran.append("child"),
                    after_in_parent=lambda: ran.append("parent"))
assert child_says(lambda: ran, clone.fork, flags=namespaces.CLONE_NEWUTS) == ["before", "child"]
assert ran == ["before", "parent"]
thread = threading.Thread(target=time.sleep, args=(30,), daemon=True)
thread.start()
try:
    clone.fork()
    raise SystemExit("no error")
except clone.CloneError as error:
    assert str(thread.native_id) in str(error), str(error)
"""
    )


def test_a_pause_holds_nothing_and_reaps_orphans(python: Python) -> None:
    python(
        """
import re, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pause = stand()
def status(field):
    return re.search(rf"^{field}:\\t(.*)$", open(f"/proc/{pause.pid}/status").read(), re.MULTILINE)[1]
deadline = time.monotonic() + 30
while status("Name") != "pause" or status("SigBlk") != "0" * 16:  # it is on its way there
    assert time.monotonic() < deadline
assert os.listdir(f"/proc/{pause.pid}/fd") == []
assert int(status("SigIgn"), 16) == 1 << signal.SIGCHLD - 1 and int(status("SigCgt"), 16) == 0
assert os.getsid(pause.pid) == pause.pid
assert os.stat(f"/proc/{pause.pid}/fd").st_uid == 0 and os.readlink(f"/proc/{pause.pid}/cwd") == "/"
# A child of a worker outlives it, and ends: nobody but the pause is there to reap it.
reader, writer = os.pipe()
child = clone.fork(pid_namespace=pause.pidfd)
if child is None:
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)
    os._exit(0)
assert outcome(child) == 0
children = lambda: open(f"/proc/{pause.pid}/task/{pause.pid}/children").read().split()
while not children():
    assert time.monotonic() < deadline
os.close(reader)
os.close(writer)  # the orphan reads the end of the pipe
while children():
    assert time.monotonic() < deadline
os.kill(pause.pid, signal.SIGKILL)
assert outcome(pause) == -signal.SIGKILL
"""
    )


FEW = """
import errno, resource
def act():
    os.setresgid(54321, 54321, 54321)
    os.setresuid(54321, 54321, 54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (3, 3))
    try:
        clone.revive()
    except clone.CloneError as error:
        return error.errno == errno.EAGAIN, error.stage, str(error), len(tasks())
"""


def test_a_limit_hit_half_way_through_revive_is_named(python: Python) -> None:
    if os.getuid():
        pytest.skip("needs root: RLIMIT_NPROC counts a user's threads")
    python(
        WORKERS
        + FEW
        + """
again, stage, text, threads = child_says(act)
assert again and stage == "clone a thread", (again, stage)
assert "RLIMIT_NPROC of uid 54321 is 3" in text and "of 4" in text, text
assert 1 < threads < 5, threads
assert ask() == expected
"""
    )


def test_pids_max_hit_half_way_through_revive_is_named(python: Python, leaf_with_pids: Path) -> None:
    (leaf_with_pids / "pids.max").write_text("3")
    python(
        WORKERS
        + f"""
import errno
def act():
    try:
        clone.revive()
    except clone.CloneError as error:
        return error.errno == errno.EAGAIN, str(error)
directory = os.open({str(leaf_with_pids)!r}, os.O_RDONLY | os.O_DIRECTORY)
again, text = child_says(act, cgroup=directory)
assert again and "pids.max" in text and "is 3" in text, text
"""
    )


def test_an_at_once_child_that_cannot_revive_ends_and_says_so(python: Python) -> None:
    """Where no descriptor, lock or allocator can be trusted: one line and a status."""
    if os.getuid():
        pytest.skip("needs root: RLIMIT_NPROC counts a user's threads")
    python(
        WORKERS
        + """
import resource
def act():
    clone.revive()
    os.setresgid(54322, 54322, 54322)
    os.setresuid(54322, 54322, 54322)
    resource.setrlimit(resource.RLIMIT_NPROC, (8, 8))  # 5 here, 1 + 2 there
    reader, writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    child = clone.live_fork(quiet=False)
    if child is None:
        os._exit(0)
    os.dup2(kept, 2)
    os.close(writer)
    return outcome(child), os.read(reader, 4096).decode()
status, line = child_says(act)
assert status == clone.NOT_REVIVED and line.startswith("live fork: errno 11") and line.endswith("\\n"), (status, line)
"""
    )


def test_clone_is_used_where_a_filter_refuses_clone3(python: Python) -> None:
    """Containers' seccomp filters: clone3 is ENOSYS. A cgroup or a pid then cannot be had."""
    python(
        WORKERS
        + """
import ctypes, errno, struct
# linux/filter.h: load the number; clone3 (435): SECCOMP_RET_ERRNO | ENOSYS; else SECCOMP_RET_ALLOW
program = struct.pack("HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 435, 6, 0, 0, 0x50000 | errno.ENOSYS, 6, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(program)
libc = ctypes.CDLL(None, use_errno=True)
def act():
    clone.revive()
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, struct.pack("HxxxxxxQ", 4, ctypes.addressof(code)), 0, 0) == 0  # PR_SET_SECCOMP
    assert child_says(revived(ask), flags=namespaces.CLONE_NEWUTS) == expected
    try:
        clone.live_fork(set_tid=[4242424])
    except clone.CloneError as error:
        return error.errno == errno.ENOSYS, str(error)
refused, text = child_says(act)
assert refused and "5.7" in text, text
"""
    )


def test_the_forking_process_is_unharmed_when_clone_fails(python: Python, leaf: Path) -> None:
    removed = leaf / "removed"
    removed.mkdir()
    python(
        WORKERS
        + f"""
import errno
directory = os.open({str(removed)!r}, os.O_RDONLY | os.O_DIRECTORY)
os.rmdir({str(removed)!r})
for make in (clone.live_fork, lambda **o: clone.pause(flags=0, **o)):
    try:
        make(cgroup=directory)
        raise SystemExit("no error")
    except clone.CloneError as error:
        assert error.errno in (errno.ENODEV, errno.ENOENT) and "removed" in str(error), str(error)
assert ask() == expected
assert child_says(revived(ask)) == expected
"""
    )
