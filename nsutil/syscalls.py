"""libc and raw system calls by ctypes: one place that calls, one place that raises.

Constants stand beside the header that defines them. `PyDLL` keeps the GIL across a call (short calls, and calls that
must not let another Python thread in); `CDLL` lets it go (calls that block).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform

libc = ctypes.PyDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
libc.sbrk.restype = libc.malloc.restype = libc.realloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.unshare.argtypes = [ctypes.c_int]
libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]

# asm-generic/unistd.h: these have one number on every architecture (all were added after the tables were joined).
SYS_PIDFD_SEND_SIGNAL = 424
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_PIDFD_OPEN = 434
SYS_CLONE3 = 435
SYS_CLOSE_RANGE = 436
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
# asm/unistd.h: these differ.
_MACHINE = platform.machine()
if _MACHINE == "x86_64":
    SYS_PIVOT_ROOT, SYS_CAPSET, SYS_KEYCTL = 155, 126, 250
    SYS_SETGROUPS, SYS_SETRESUID, SYS_SETRESGID, SYS_SECCOMP, SYS_CAPGET = 116, 117, 119, 317, 125
    SYS_SETFSUID, SYS_SETFSGID = 122, 123
elif _MACHINE == "aarch64":
    SYS_PIVOT_ROOT, SYS_CAPSET, SYS_KEYCTL = 41, 91, 219
    SYS_SETGROUPS, SYS_SETRESUID, SYS_SETRESGID, SYS_SECCOMP, SYS_CAPGET = 159, 147, 149, 277, 90
    SYS_SETFSUID, SYS_SETFSGID = 151, 152
else:
    raise ImportError(f"pocketd runs on x86-64 and aarch64; this machine is {_MACHINE}")

# The kernel that first had each call, for the message when it is missing.
_SINCE = {
    SYS_OPEN_TREE: "5.2",
    SYS_MOVE_MOUNT: "5.2",
    SYS_PIDFD_OPEN: "5.3",
    SYS_CLONE3: "5.3",
    SYS_OPENAT2: "5.6",
    SYS_CLOSE_RANGE: "5.9",
    SYS_MOUNT_SETATTR: "5.12",
}


def error(call: str, detail: str = "", number: int | None = None) -> OSError:
    """The OSError for the last failure (or `number`), naming the call and what it was asked for."""
    code = ctypes.get_errno() if number is None else number
    said = os.strerror(code)
    return OSError(code, f"{call}: {said}" + (f" ({detail})" if detail else ""))


def check(result: int, call: str, detail: str = "") -> int:
    """Return `result`, or raise the OSError that names the call when it is negative."""
    if result < 0:
        raise error(call, detail)
    return result


def syscall(number: int, *arguments: object, call: str, detail: str = "") -> int:
    """Make a raw system call. Integers are passed as machine words; ctypes values as they are.

    Raises OSError naming `call`; for ENOSYS also the kernel version that has it.
    """
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result: int = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        code = ctypes.get_errno()
        if code == errno.ENOSYS and number in _SINCE:
            detail = f"needs Linux {_SINCE[number]}; this is {platform.release()}"
        raise error(call, detail, code)
    return result


def prctl(option: int, *arguments: int, call: str) -> int:
    """prctl(2) with its unused arguments zero, as newer options demand."""
    padded = list(arguments) + [0] * (4 - len(arguments))
    return check(libc.prctl(option, *padded), call)
