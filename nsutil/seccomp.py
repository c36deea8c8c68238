"""Installing system call filters that somebody else compiled. seccomp(2), linux/seccomp.h, linux/filter.h."""

from __future__ import annotations

import ctypes
import struct
from typing import Sequence

from nsutil.syscalls import SYS_SECCOMP, syscall

_SECCOMP_SET_MODE_FILTER = 1
_INSTRUCTION = 8  # bytes: struct sock_filter


def install(programs: Sequence[bytes]) -> None:
    """Filter every system call of this thread, and of all that it makes, from now on and for good.

    `programs`: classic BPF, in the order of installation; of all that refuse a call the last one's error is returned.
    Needs no_new_privs or CAP_SYS_ADMIN. Raises OSError.
    """
    for program in programs:
        code = ctypes.create_string_buffer(program, len(program))
        head = struct.pack("HxxxxxxQ", len(program) // _INSTRUCTION, ctypes.addressof(code))  # struct sock_fprog
        block = ctypes.create_string_buffer(head, len(head))
        syscall(SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, 0, block, call="seccomp(SECCOMP_SET_MODE_FILTER)")
