"""Other processes cannot be seen, signalled, read or limited; nothing gives a process more than it has."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from tests.escape.attempt import THREADS, Attempt, each, outcome


@pytest.fixture
def strangers(daemon, pockets, prisoner):
    """The ids of init, templates and another pocket's worker, as the host and as each pid namespace has them."""
    pockets("neighbour")
    shown = daemon.ps()
    others = [w["pid"] for w in shown["workers"] if w["directory"] != str(prisoner.directory)]
    outside = [s["pid"] for s in shown["services"] if s["pid"]] + [t["pid"] for t in shown["templates"]] + others
    assert len(outside) >= 3
    found = set()
    for pid in outside:
        status = Path(f"/proc/{pid}/status").read_text()
        found |= {int(n) for n in next(ln for ln in status.splitlines() if ln.startswith("NSpid:")).split()[1:]}
    yield sorted(found - {1, 2})
    assert all(Path(f"/proc/{pid}").exists() for pid in outside), "one of them died"
    assert pockets("neighbour").alive


@pytest.mark.oldest
@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("name, given", [("kill_by_pid", "pids"), ("kill_by_group", "groups")])
def test_init_templates_and_other_workers_get_no_signal(prisoner, controls, strangers, thread, name, given):
    assert controls("user").attempt(f"processes.{name}", **{given: []}) == {"value": [0]}
    assert prisoner.attempt(f"processes.{name}", thread, **{given: strangers}) == {"value": []}


@pytest.mark.parametrize("thread", THREADS)
def test_kill_of_all_finds_nobody(prisoner, controls, strangers, thread):
    controls("root").make("processes.leave_a_bystander")
    assert controls("root").attempt("processes.kill_all") == {"value": True}
    found = outcome(prisoner.attempt("processes.kill_all", thread))
    assert found == "ESRCH" or prisoner.shares  # its pocket's template, and what else has been made of that


@pytest.mark.parametrize("thread", THREADS)
def test_its_process_group_is_its_own(prisoner, controls, strangers, thread):
    """Without setsid, kill(0) reached the template through the pid namespace."""
    assert controls("user").make("processes.lead_a_group") is False
    assert controls("user").attempt("processes.kill_own_group") == {"value": True}
    assert prisoner.attempt("processes.lead_a_group", thread) == {"value": True}
    assert prisoner.attempt("processes.kill_own_group", thread) == {"value": True}


ON_PID_1 = {
    **{
        how: Attempt("processes.signal_pid_1", ("EPERM",), "root", given={"how": how})
        for how in ("kill", "tgkill", "rt_sigqueueinfo", "pidfd_send_signal")
    },
    **{
        f"open /proc/1/{name}": Attempt(
            "processes.open_of", ("EACCES", "EPERM"), "root", given={"pids": [], "name": name}
        )
        for name in ("mem", "environ", "root/etc/passwd", "cwd/.", "fd", "ns/mnt", "ns/net")
    },
    "write /proc/1/oom_score_adj": Attempt(
        "processes.write_of_1", ("EACCES", "EPERM"), "root", given={"name": "oom_score_adj", "text": "100"}
    ),
    "prlimit of PID 1": Attempt("processes.limit_1", ("EPERM",), "root"),
    "sched_setaffinity of PID 1": Attempt("processes.pin_1", ("EPERM",), "root"),
    "setpriority of PID 1": Attempt("processes.renice_1", ("EPERM",), "root"),
}


@each(ON_PID_1)
def test_pid_1_of_its_namespace_is_out_of_reach(refused, attempt, thread):
    refused(attempt, thread)


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("name", ["root/etc/passwd", "mem", "environ", "fd", "cwd/.", "ns/pid"])
def test_others_files_by_proc_pid_do_not_exist(prisoner, controls, strangers, thread, name):
    """With the host's /proc each of them is there, for the same code as root."""
    given = {"pids": strangers, "name": name}
    assert controls("host").attempt("processes.open_of", **given) == {"value": True}
    assert outcome(prisoner.attempt("processes.open_of", thread, **given)) == "ENOENT"


RANK = {
    "nice": Attempt("processes.be_nicer", ("EACCES", "EPERM"), "root"),
    "SCHED_FIFO": Attempt("processes.be_real_time", ("EPERM",), "root"),
    "IOPRIO_CLASS_RT": Attempt("processes.have_real_time_io", ("EPERM",), "root"),
    "setuid": Attempt("processes.be_root", ("EINVAL", "EPERM"), "root", given={"how": "setuid"}),
    "setgid": Attempt("processes.be_root", ("EINVAL", "EPERM"), "root", given={"how": "setgid"}),
    "setgroups": Attempt("processes.be_root", ("EPERM",), "root", given={"how": "setgroups"}),
    "capset": Attempt("processes.be_root", ("EPERM",), "root", given={"how": "capset"}),
    "PR_CAP_AMBIENT_RAISE": Attempt("processes.be_root", ("EPERM",), "root", given={"how": "ambient"}),
    "a filter that allows all": Attempt("processes.loosen_the_filter", ("EPERM",), "user"),
}


@each(RANK)
def test_it_cannot_rise(refused, attempt, thread):
    refused(attempt, thread)


def root_has(capability: int) -> bool:
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return bool(int(held.split()[1], 16) >> capability & 1)


CAP_SYS_RESOURCE = 24
LIMITS = {
    "RLIMIT_RTPRIO": Attempt(
        "processes.raise_a_limit", ("EPERM",), "root", given={"kind": resource.RLIMIT_RTPRIO, "most": 10}
    ),
    "RLIMIT_MEMLOCK": Attempt(
        "processes.raise_a_limit", ("EPERM",), "root", given={"kind": resource.RLIMIT_MEMLOCK, "most": 1 << 40}
    ),
    "oom_score_adj": Attempt("processes.be_spared_by_oom", ("EACCES",), "root"),
}


@pytest.mark.skipif(not root_has(CAP_SYS_RESOURCE), reason="this host's root lacks CAP_SYS_RESOURCE itself")
@each(LIMITS)
def test_its_limits_cannot_be_raised(refused, attempt, thread):
    refused(attempt, thread)


@pytest.fixture(scope="module")
def programs(place):
    """Programs with bits and capabilities, of root and of a stranger, in the pocket's own directory."""
    directory = place / "prisoner"
    made = {}
    for name, uid, gid, mode in (("of-root", 0, 0, 0o4755), ("of-a-stranger", 999, 999, 0o6755)):
        made[name] = directory / name
        shutil.copy("/usr/bin/true", made[name])
        os.chown(made[name], uid, gid)
        made[name].chmod(mode)
    made["capable"] = directory / "capable"
    shutil.copy("/usr/bin/true", made["capable"])
    # linux/capability.h: VFS_CAP_REVISION_2 with the effective flag; CAP_SYS_ADMIN permitted
    os.setxattr(made["capable"], "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 21, 0, 0, 0))
    return made


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize(
    "program, attempt",
    [("of-root", "gain_euid"), ("of-a-stranger", "gain_egid"), ("capable", "gain_capabilities")],
)
def test_bits_and_capabilities_of_programs_in_its_directory_give_nothing(
    pockets, controls, programs, program, attempt, thread
):
    path = str(programs[program])
    pocket = pockets("prisoner")
    # With the bounding set of a user's own shell, not the controls'.
    kind = "shell" if attempt == "gain_capabilities" else "user"
    assert controls(kind).attempt(f"processes.{attempt}", path=path) == {"value": True}
    assert pocket.attempt(f"processes.{attempt}", thread, path=path) == {"value": False}


@pytest.mark.parametrize("thread", THREADS)
def test_a_setuid_program_of_the_service_gives_nothing(prisoner, controls, thread):
    found = [p for p in Path("/usr/bin").iterdir() if not p.is_symlink() and setuid_root(p)]
    if not found:
        pytest.skip("no program in this host's /usr/bin is setuid root")
    for path in map(str, found):
        assert controls("user").attempt("processes.gain_euid", path=path) == {"value": True}
        assert outcome(prisoner.attempt("processes.gain_euid", thread, path=path)) is False, path


def setuid_root(path):
    status = path.stat()
    return status.st_uid == 0 and status.st_mode & stat.S_ISUID and status.st_mode & stat.S_IXOTH


@pytest.mark.parametrize("thread", THREADS)
def test_no_descriptor_but_its_own_three(pockets, controls, place, thread):
    inherited = os.open(place, os.O_RDONLY)
    try:
        fresh = pockets(f"fresh-{thread}")  # attempts that are refused half-way leave some of their own
        assert fresh.attempt("processes.descriptors", thread) == {"value": [0, 1, 2]}
        assert fresh.attempt("processes.visible", thread) == {"value": [1, 2]}
        seen = subprocess.run(
            ["ls", "/proc/self/fd"], pass_fds=[inherited], capture_output=True, text=True, check=True
        ).stdout.split()
        assert str(inherited) in seen  # what is left open does show there
    finally:
        os.close(inherited)


def test_the_resident_thread_is_one_that_the_template_has(daemon, pockets):
    """By the kernel: the thread that the worker's stamp names is there in the template, and still waits."""
    stamps = [pockets(name).attempt("processes.stamp", "resident")["value"] for name in ("prisoner", "neighbour")]
    assert len({(s["pid"], s["tid"], s["at"]) for s in stamps}) == 1  # one thread, revived in two workers
    main = pockets("prisoner").attempt("processes.stamp", "main")["value"]
    assert main["now"] == main["pid_now"] and stamps[0]["now"] not in (main["now"], stamps[0]["tid"])
    (template,) = [t for t in daemon.ps()["templates"] if t["service"] == "plain"]
    threads = {}
    for task in Path(f"/proc/{template['pid']}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        at = int(status["NSpid"].split()[-1])
        threads[at] = (int(status["NStgid"].split()[-1]), int(status["CapEff"], 16) != 0)
    assert threads[stamps[0]["tid"]] == (stamps[0]["pid"], True)  # there, with its privileges
    assert int(pockets("prisoner").attempt("processes.thread_status", "resident")["value"]["CapEff"], 16) == 0
