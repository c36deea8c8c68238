"""System calls that no pocket has a use for are refused in every thread; without the confinement each would succeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsutil import namespaces as n
from tests.escape.attempt import Attempt, each

EPERM, ENOSYS = ("EPERM",), ("ENOSYS",)

FILTERED = {
    "ptrace a child": Attempt("calls.trace_a_child", EPERM),
    "PTRACE_TRACEME": Attempt("calls.be_traced", EPERM, through=True),
    "process_vm_readv": Attempt("calls.read_a_child", EPERM, through="of the child"),
    "process_vm_writev": Attempt("calls.write_a_child", EPERM, through=7),
    "pidfd_getfd": Attempt("calls.take_a_descriptor", EPERM),
    "kcmp": Attempt("calls.compare_with_a_child", EPERM),
    "process_madvise": Attempt("calls.advise_by_pidfd", EPERM, "root"),  # whose own it is not before 6.13
    "move_pages": Attempt("calls.move_pages", EPERM),
    "keyctl": Attempt("calls.name_the_session_keyring", EPERM),
    "add_key": Attempt("calls.add_a_key", EPERM),
    "request_key": Attempt("calls.request_a_key", EPERM),
    "userfaultfd": Attempt("calls.handle_faults", EPERM),
    "io_uring_setup": Attempt("calls.make_a_ring", ENOSYS),
    "io_setup": Attempt("calls.make_an_aio_context", ENOSYS),
    "perf_event_open": Attempt("calls.count_events", EPERM, "root"),
    "fanotify_init": Attempt("calls.hear_of_files", EPERM),
    "quotactl": Attempt("calls.ask_for_quotas", EPERM),
    "unshare a user namespace": Attempt("calls.unshare", EPERM, given={"flag": n.CLONE_NEWUSER}),
    "clone a user namespace": Attempt("calls.clone", EPERM, given={"flag": n.CLONE_NEWUSER}),
    "clone3 a user namespace": Attempt("calls.clone3", ENOSYS, given={"flag": n.CLONE_NEWUSER}),
    "be uid 0 by a uid_map": Attempt("calls.map_root", EPERM),
    "ADDR_NO_RANDOMIZE": Attempt("calls.be_another_personality", ENOSYS, given={"persona": 0x0040000}),
    "ADDR_COMPAT_LAYOUT": Attempt("calls.be_another_personality", ENOSYS, given={"persona": 0x0200000}),
    "READ_IMPLIES_EXEC": Attempt("calls.be_another_personality", ENOSYS, given={"persona": 0x0400000 | 5 << 32}),
}

ROOTS = {
    "setns a namespace's file": Attempt("calls.join_by_file", EPERM, "root"),
    "setns a pidfd": Attempt("calls.join_by_pidfd", EPERM, "root"),
    "mount a tmpfs": Attempt("calls.mount_tmpfs", EPERM, "root"),
    "mount a proc without masks": Attempt("calls.mount_proc", EPERM, "root"),
    "mount cgroup2 and move there": Attempt("calls.mount_cgroups", EPERM, "root"),
    "bind": Attempt("calls.bind", EPERM, "root"),
    "remount writable": Attempt("calls.remount_writable", EPERM, "root"),
    "umount what masks": Attempt("calls.uncover", EPERM, "root"),
    "pivot_root": Attempt("calls.pivot", EPERM, "root"),
    "chroot": Attempt("calls.change_root", EPERM, "root"),
    "fsopen": Attempt("calls.open_a_file_system", EPERM, "root"),
    "open_tree": Attempt("calls.copy_a_tree", EPERM, "root"),
    "move_mount": Attempt("calls.move_a_tree", EPERM, "root"),
    "mount_setattr": Attempt("calls.set_mount_writable", EPERM, "root"),
    "open_by_handle_at": Attempt("calls.open_by_handle", EPERM, "root", "by handle"),
    "syslog": Attempt("calls.read_the_kernels_log", EPERM, "root"),
    "sethostname": Attempt("calls.name_the_host", EPERM, "root"),
    "settimeofday": Attempt("calls.set_the_clock", EPERM, "root"),
    # Those whose success would change the host get so far, for root, that the kernel finds nothing to do it with.
    "swapon": Attempt("calls.swap_on", EPERM, "root", "ENOENT"),
    "acct": Attempt("calls.account", EPERM, "root", "ENOENT"),
}

HARMFUL = {
    "bpf": Attempt("calls.make_a_map", EPERM, "host"),
    "reboot": Attempt("calls.restart", EPERM, "host", "EINVAL"),
    "clock_settime": Attempt("calls.set_the_clock_for_real", EPERM, "host"),
}

MODULES = {"init_module": Attempt("calls.load_a_module", EPERM, "root", "ENOEXEC")}

SPACES = {
    "mount": n.CLONE_NEWNS, "pid": n.CLONE_NEWPID, "network": n.CLONE_NEWNET, "ipc": n.CLONE_NEWIPC,
    "uts": n.CLONE_NEWUTS, "cgroup": n.CLONE_NEWCGROUP, "time": n.CLONE_NEWTIME,
}  # fmt: skip


@each(FILTERED)
def test_what_any_user_may_call_a_pocket_may_not(refused, attempt, thread):
    refused(attempt, thread)


@each(ROOTS)
def test_what_root_may_call_a_pocket_may_not(refused, attempt, thread):
    refused(attempt, thread)


@pytest.mark.oldest
@pytest.mark.harmful
@each(HARMFUL)
def test_what_would_change_the_host(refused, attempt, thread):
    refused(attempt, thread)


@pytest.mark.skipif(not Path("/proc/modules").exists(), reason="this host's kernel loads no modules")
@each(MODULES)
def test_what_loads_modules(refused, attempt, thread):
    refused(attempt, thread)


@each(
    {
        f"unshare a {kind} namespace": Attempt("calls.unshare", EPERM, "root", given={"flag": f})
        for kind, f in SPACES.items()
    }
)
def test_unshare(refused, attempt, thread):
    refused(attempt, thread)


# clone(2) has no flag for a time namespace: the bit is part of the signal.
CLONED = {kind: flag for kind, flag in SPACES.items() if kind != "time"}


@each(
    {
        f"clone a {kind} namespace": Attempt("calls.clone", EPERM, "root", given={"flag": f})
        for kind, f in CLONED.items()
    }
)
def test_clone(refused, attempt, thread):
    refused(attempt, thread)


@each(
    {
        f"clone3 a {kind} namespace": Attempt("calls.clone3", ENOSYS, "root", given={"flag": f})
        for kind, f in SPACES.items()
    }
)
def test_clone3(refused, attempt, thread):
    refused(attempt, thread)
