"""A worker makes no template, and no other pocket, slower or poorer: not by priorities, nor by what the kernel counts
by user or file system. Its processor time and memory are its cgroup's: tests/vm/guest/test_limits.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT, bare_environment
from tests.escape.attempt import THREADS, UID, Attempt, Inside, each, outcome
from tests.escape.conftest import control_command
from tests.escape.inside.starving import _ACTS, _MAKE
from tests.escape.test_processes import strangers

__all__ = ["strangers"]

WAYS = [pytest.param(how, thread, id=f"{how} - {thread} thread") for how in _ACTS for thread in THREADS]


@pytest.mark.parametrize("how, thread", WAYS)
def test_init_templates_and_other_workers_keep_their_priority_and_limits(prisoner, controls, strangers, how, thread):
    """The control slows a process of its own down, which is what root would do to them."""
    assert controls("user").attempt("starving.slow_down", how=how, pids=[]) == {"value": [0]}
    assert prisoner.attempt("starving.slow_down", thread, how=how, pids=strangers) == {"value": []}


@each({"PRIO_USER of root": Attempt("starving.slow_down_root", ("ESRCH", "EINVAL"), "root")})
def test_nor_do_roots_processes_all_at_once(refused, attempt, thread):
    refused(attempt, thread)


@pytest.fixture
def two_of_one_user(place):
    """Two processes of one user's, neither in a pocket."""
    made = []
    for _ in range(2):
        command = control_command("neighbour", os.path.realpath(sys.executable))
        made.append(Inside(command, env={**bare_environment(), "HOME": "/tmp"}, cwd=place / "control"))
    yield made
    for process in made:
        process.end()


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("kind", _MAKE)
def test_what_the_kernel_counts_by_user_is_counted_as_its_own(daemon, enter, controls, two_of_one_user, kind, thread):
    """Two processes of one user share it; a pocket shares it with nobody, and root has as much as before."""
    controls("user")  # makes its directory
    first, second = two_of_one_user
    refusal = first.attempt("starving.exhaust", stay=True, kind=kind)["value"]
    assert refusal in ("EMFILE", "EAGAIN"), refusal
    assert outcome(second.attempt("starving.one", stay=True, kind=kind)) == refusal
    greedy, other = enter("greedy"), enter("other")
    try:
        assert greedy.attempt("starving.exhaust", thread, kind=kind) == {"value": refusal}
        assert outcome(greedy.attempt("starving.one", thread, kind=kind)) == refusal
        assert other.attempt("starving.one", thread, kind=kind) == {"value": True}
        assert controls("host").attempt("starving.one", kind=kind) == {"value": True}
        assert daemon.pocket("run", "--service", "plain", "-c", "print(1)", cwd=daemon.place).stdout == "1\n"
    finally:
        greedy.end(), other.end()


SIZE = 8 << 20


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("path", ["/tmp", "/dev/shm"])
def test_the_services_own_memory_file_systems_are_not_filled(daemon, enter, place, path, thread):
    """Seen in a template; the control is a process that has the template's mounts instead of a worker's own."""
    pid = next(t["pid"] for t in daemon.ps()["templates"] if t["service"] == "plain")

    def there() -> int:
        status = os.statvfs(f"/proc/{pid}/root{path}")
        return status.f_bavail * status.f_frsize

    before = there()
    filler = enter("filler")
    try:
        said = filler.attempt("starving.fill", thread, path=path, size=SIZE)["value"]
        assert said["before"] - said["after"] >= SIZE
        assert there() == before
        assert not Path(f"/proc/{pid}/root{path}/filling").exists()
    finally:
        filler.end()


def test_who_has_the_templates_mounts_can_fill_them(daemon, pockets):
    """/tmp there is open to everybody: so it is the worker's own mounts that keep it."""
    pockets("prisoner")
    pid = next(t["pid"] for t in daemon.ps()["templates"] if t["service"] == "plain")
    path = Path(f"/proc/{pid}/root/tmp/filling")
    drop = [f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all"]
    command = ["nsenter", "-t", str(pid), "-m", "setpriv", *drop, "head", "-c", str(SIZE), "/dev/zero"]
    before = os.statvfs(path.parent).f_bavail
    with subprocess.Popen(command, stdout=subprocess.PIPE) as source:
        write = ["nsenter", "-t", str(pid), "-m", "setpriv", *drop, "sh", "-c", "cat > /tmp/filling"]
        subprocess.run(write, stdin=source.stdout, check=True, timeout=TIMEOUT)
    try:
        assert (before - os.statvfs(path.parent).f_bavail) * os.statvfs(path.parent).f_frsize >= SIZE
    finally:
        path.unlink()
