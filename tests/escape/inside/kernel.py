"""System calls by their numbers, past every libc wrapper; and children to try them on.

What is in this directory runs in workers, and as controls outside of them: standard library and ctypes alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from collections.abc import Callable, Iterator
from typing import Any

# asm/unistd_64.h; asm-generic/unistd.h, which aarch64 has: None where only the former has the call.
_BOTH: dict[str, tuple[int, int | None]] = {
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "capset": (126, 91), "chmod": (90, None),
    "chroot": (161, 51), "clock_settime": (227, 112), "clone": (56, 220), "creat": (85, None),
    "fanotify_init": (300, 262),
    "fchmod": (91, 52), "fchmodat": (268, 53), "getpid": (39, 172), "init_module": (175, 105), "ioprio_set": (251, 30),
    "io_destroy": (207, 1), "io_setup": (206, 0),
    "kcmp": (312, 272), "keyctl": (250, 219), "kill": (62, 129), "mkdir": (83, None), "mkdirat": (258, 34),
    "mknod": (133, None), "mknodat": (259, 33), "mount": (165, 40), "move_pages": (279, 239),
    "name_to_handle_at": (303, 264),
    "open": (2, None), "open_by_handle_at": (304, 265), "openat": (257, 56), "perf_event_open": (298, 241),
    "personality": (135, 92), "pivot_root": (155, 41), "prlimit64": (302, 261), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "ptrace": (101, 117), "quotactl": (179, 60), "reboot": (169, 142),
    "request_key": (249, 218), "rt_sigqueueinfo": (129, 138), "sched_setaffinity": (203, 122), "seccomp": (317, 277),
    "sethostname": (170, 161), "setns": (308, 268), "setpriority": (141, 140), "settimeofday": (164, 170),
    "setuid": (105, 146), "swapon": (167, 224), "syslog": (103, 116), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282), "setxattr": (188, 5), "setgroups": (116, 159), "setgid": (106, 144),
    "tgkill": (234, 131),
}  # fmt: skip
# These have one number everywhere.
_SAME = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "clone3": 435,
    "openat2": 437, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "landlock_create_ruleset": 444,
    "landlock_add_rule": 445, "landlock_restrict_self": 446, "fchmodat2": 452,
}  # fmt: skip
X86_64 = platform.machine() == "x86_64"
NUMBERS = {**{name: pair[not X86_64] for name, pair in _BOTH.items()}, **_SAME}

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
AT_FDCWD = -100
GARBAGE = 0x5EED << 32  # in the half of an int argument at which the kernel does not look


def call(name: str, *arguments: Any) -> int:
    """One system call. Integers are whole registers; bytes and ctypes values are passed by address. Raises OSError."""
    number = NUMBERS[name]
    assert number is not None, f"this machine has no {name}"
    return checked(name, libc.syscall(ctypes.c_long(number), *(_register(a) for a in arguments)))


def _register(value: Any) -> Any:
    return ctypes.c_long(ctypes.c_ulong(value).value) if isinstance(value, int) else value


def checked(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


@contextlib.contextmanager
def victim() -> Iterator[int]:
    """A child that waits to be hurt: what kind of end it had is the kernel's to say."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # tests.escape.inside.program ignores it
        os.close(writer)  # the last end: it is where it is wanted
        while True:
            signal.pause()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def in_child(function: Callable[[], object]) -> int:
    """Do what cannot be undone in a child of this thread. Raises the OSError that it met there; else its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(128 if function() is False else 0)
        except OSError as e:
            os._exit(e.errno or 127)
        finally:
            os._exit(127)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if 0 < code < 127:
        raise OSError(code, os.strerror(code))
    return code


def first_errno(attempts: list[Callable[[], object]]) -> list[int]:
    """The error of each attempt, 0 for one that was let through."""
    found = []
    for attempt in attempts:
        try:
            attempt()
            found.append(0)
        except OSError as e:
            found.append(e.errno or -1)
    return found
