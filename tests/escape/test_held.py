"""A worker that a pocket's own template made is confined as any other. That template is the pocket's program up to its
checkpoint, as little trusted. It may call clone3, so as to fork into its sessions' cgroups, and so may its workers."""

from __future__ import annotations

import compileall
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nsutil import namespaces as n
from tests.conftest import TIMEOUT, wait_for
from tests.escape.attempt import Attempt, Inside, each, outcome
from tests.escape.kinds import HELD
from tests.escape.test_calls import FILTERED, ROOTS, SPACES
from tests.escape.test_files import KERNELS
from tests.escape.test_processes import ON_PID_1, RANK
from tests.escape.test_talking import NETWORK


@pytest.fixture(scope="module")
def held(daemon, enter, place):
    """A worker that came from the pocket's template, by pocketd's own word."""
    (place / "held/app.py").write_text(HELD)
    compileall.compile_dir(place / "held", quiet=1)
    subprocess.run(daemon.command("warm", "held"), env=daemon.environment, check=True, timeout=TIMEOUT)
    mark = daemon.log.stat().st_size
    inside: Inside = enter("held", defined=True)
    said = re.compile(rb"session-started .*pocket=held .*way=(held|slot)")
    assert wait_for(lambda: said.search(daemon.log.read_bytes()[mark:]), 20)
    yield inside
    inside.end()


def status(pid: int) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def test_the_template_has_given_up_all(daemon, held):
    """By the kernel: the template, and what waits for sessions, are as any worker."""
    (row,) = [row for row in daemon.ps()["pockets"] if row["name"] == "held"]
    assert row
    pids = {
        int(pid)
        for file in daemon.cgroup_path.glob("*/service/pockets/held/**/cgroup.procs")
        for pid in file.read_text().split()
    }
    assert len(pids) >= 2, "the template and a worker"
    for pid in pids:
        said = status(pid)
        assert said["Uid"].split()[0] != "0" and len(set(said["Uid"].split())) == 1, said["Name"]
        assert {int(said[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {0}
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")


# The kernel's own refusal, where a filter would say ENOSYS: no capability, and no user namespace to have one in.
CLONE3 = {
    f"clone3 a {kind} namespace": Attempt("calls.clone3", ("EPERM", "ENOSYS"), "root", given={"flag": flag})
    for kind, flag in SPACES.items()
}
REFUSED = {
    **CLONE3,
    "clone3 a user namespace": Attempt("calls.clone3", ("ENOSPC", "EPERM", "ENOSYS"), given={"flag": n.CLONE_NEWUSER}),
    "clone a user namespace": FILTERED["clone a user namespace"],
    "be uid 0 by a uid_map": FILTERED["be uid 0 by a uid_map"],
    "ptrace": FILTERED["ptrace a child"],
    "mount a tmpfs": ROOTS["mount a tmpfs"],
    "setns": ROOTS["setns a namespace's file"],
    "write /proc/sys": KERNELS["write /proc/sys"],
    "mknod of a disk": KERNELS["mknod of a disk"],
    "capset": RANK["capset"],
    "setuid": RANK["setuid"],
    "open /proc/1/mem": ON_PID_1["open /proc/1/mem"],
    "kill of PID 1": ON_PID_1["kill"],
    "route": NETWORK["route"],
}


@each(REFUSED)
def test_what_stops_it(held, through, attempt, thread):
    assert through(attempt) == attempt.through
    found: Any = outcome(held.attempt(attempt.name, thread, **attempt.given))
    assert found in attempt.refused
