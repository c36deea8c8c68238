"""Attempts on other processes, on one's own rank among them, and by programs that give rank."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import resource
import select
import signal
import struct

from tests.escape.inside.kernel import call, checked, first_errno, in_child, libc, victim

_FILES = ("mem", "environ", "maps", "root/etc/passwd", "cwd/.", "fd/0", "ns/mnt", "oom_score_adj")


def kill_by_pid(pids: list[int]) -> list[int]:
    """Of `pids`, or of a victim where there are none, those that died of it, or that there were."""
    with victim() as pid:
        reached = []
        for each in pids or [pid]:
            if pids and (each in (1, pid) or os.path.exists(f"/proc/self/task/{each}")):
                continue  # a number of one's own pid namespace
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
                reached.append(each if pids else 0)
        return reached


def kill_by_group(groups: list[int]) -> list[int]:
    with victim() as pid:
        os.setpgid(pid, pid)
        reached = []
        for each in groups or [pid]:
            if groups and each in (1, os.getpgrp(), pid):
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each, signal.SIGKILL)
                reached.append(each if groups else 0)
        return reached


def signal_pid_1(how: str) -> bool:
    """The first process of the pid namespace; with the right to it SIGURG is ignored there."""
    if how == "kill":
        os.kill(1, signal.SIGURG)
    elif how == "tgkill":
        call("tgkill", 1, 1, signal.SIGURG)
    elif how == "rt_sigqueueinfo":
        call(
            "rt_sigqueueinfo",
            1,
            signal.SIGURG,
            struct.pack("iii4xii104x", signal.SIGURG, 0, -1, os.getpid(), os.getuid()),
        )
    else:
        call("pidfd_send_signal", os.pidfd_open(1), signal.SIGURG, 0, 0)
    return True


def leave_a_bystander() -> int:
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    return pid


def kill_all() -> bool:
    """Everything that is visible, but for oneself and PID 1: whether there was anything."""
    os.kill(-1, signal.SIGKILL)
    return True


def kill_own_group() -> bool:
    """SIGUSR1, by which a template would end: whether it came to a child in this process's group."""
    with victim() as pid:
        os.kill(0, signal.SIGUSR1)
        return os.waitpid(pid, 0)[1] == signal.SIGUSR1


def lead_a_group() -> bool:
    return os.getpgrp() == os.getsid(0) == os.getpid()


def open_of(pids: list[int], name: str) -> bool:
    """A file of another's in /proc; of PID 1 where no pids are given."""
    others = [pid for pid in pids if not os.path.exists(f"/proc/self/task/{pid}")] or [1]
    numbers = first_errno([functools.partial(open_and_close, f"/proc/{pid}/{name}") for pid in others])
    if all(numbers):
        raise OSError(numbers[0], os.strerror(numbers[0]))
    return True


def open_and_close(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def write_of_1(name: str, text: str) -> bool:
    with open(f"/proc/1/{name}", "w") as file:
        file.write(text)
    return True


def limit_1() -> bool:
    """Read and set a limit of PID 1's, to what it is."""
    old = ctypes.create_string_buffer(16)
    call("prlimit64", 1, resource.RLIMIT_CORE, 0, old)
    return call("prlimit64", 1, resource.RLIMIT_CORE, old, 0) == 0


def pin_1() -> bool:
    os.sched_setaffinity(1, os.sched_getaffinity(0))
    return True


def renice_1() -> bool:
    os.setpriority(os.PRIO_PROCESS, 1, 1)
    return True


def be_nicer() -> bool:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    return True


def be_real_time() -> bool:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


def have_real_time_io() -> bool:
    return call("ioprio_set", 1, 0, 1 << 13) == 0  # IOPRIO_CLASS_RT


def raise_a_limit(kind: int, most: int) -> bool:
    return call("prlimit64", 0, kind, struct.pack("QQ", most, most), 0) == 0


def be_spared_by_oom() -> bool:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-500")
    return True


def be_root(how: str) -> bool:
    """One's own ids, groups and capabilities, in a child."""
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0), 8)
    acts = {
        "setuid": lambda: call("setuid", 0),
        "setgid": lambda: call("setgid", 0),
        "setgroups": lambda: call("setgroups", 1, struct.pack("I", 0)),
        "capset": lambda: call("capset", header, struct.pack("6I", 1 << 21, 1 << 21, 0, 0, 0, 0)),
        "ambient": lambda: checked("prctl", libc.prctl(47, 2, 21, 0, 0)),  # PR_CAP_AMBIENT_RAISE
    }
    if how == "ambient":
        with contextlib.suppress(OSError):
            call("capset", header, struct.pack("6I", 1 << 21, 1 << 21, 1 << 21, 0, 0, 0))
    return in_child(acts[how]) == 0


def after_executing(path: str) -> dict[str, str]:
    """What the kernel says of a child that has executed `path`: its zombie keeps its credentials."""
    pid = os.fork()
    if pid == 0:
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        with contextlib.suppress(OSError):
            os.execv(path, [path, "--version"])
        os._exit(127)
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [])
    os.close(pidfd)
    with open(f"/proc/{pid}/status") as file:
        status = dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 127, f"{path} was not executed"
    return status


def gain_euid(path: str) -> bool:
    """Whether a program's setuid bit made its process root."""
    return after_executing(path)["Uid"].split()[1] == "0"


def gain_egid(path: str) -> bool:
    return after_executing(path)["Gid"].split()[1] != str(os.getgid())


def gain_capabilities(path: str) -> bool:
    return int(after_executing(path)["CapEff"], 16) != 0


def loosen_the_filter() -> bool:
    """A filter of one's own that allows everything, and then a call that was refused."""

    def act() -> None:
        checked("prctl", libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
        code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), 8)  # return SECCOMP_RET_ALLOW
        call("seccomp", 1, 0, struct.pack("HxxxxxxQ", 1, ctypes.addressof(code)))
        call("ptrace", 0, 0, 0, 0)

    return in_child(act) == 0


def descriptors() -> list[int]:
    """All that are open, but for the one that looks."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    return [fd for fd in sorted(found) if os.path.lexists(f"/proc/self/fd/{fd}")]


def kinds_of_descriptors() -> list[str]:
    """What else than 0, 1 and 2 is open, by the kernel's names without their numbers."""
    found = {os.readlink(f"/proc/self/fd/{fd}").partition("[")[0] for fd in descriptors() if fd > 2}
    return sorted(found)


def descriptor_of_the_template(pids: list[int]) -> bool:
    return open_of(pids, "fd")


def visible() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def stamp() -> dict[str, int]:
    """What the resident thread knew of itself when it began, and what it is now."""
    import importlib
    import threading

    return {**importlib.import_module("resident").STAMP, "now": threading.get_native_id(), "pid_now": os.getpid()}


def thread_status() -> dict[str, str]:
    with open("/proc/thread-self/status") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)
