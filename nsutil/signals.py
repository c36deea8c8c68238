"""Signals as messages on a descriptor, with who sent them. signalfd(2), linux/signalfd.h."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
from typing import Iterable, List, NamedTuple

from nsutil.syscalls import syscall

_SYS_SIGNALFD4 = {"x86_64": 289, "aarch64": 74}[platform.machine()]
_SYS_RT_SIGACTION = {"x86_64": 13, "aarch64": 134}[platform.machine()]
_SIZE = 128  # struct signalfd_siginfo
SI_KERNEL = 0x80  # asm-generic/siginfo.h: from the kernel, as a terminal's ^C is


class Received(NamedTuple):
    number: int
    code: int  # si_code
    pid: int  # of the sender, 0 for the kernel


def descriptor(numbers: Iterable[int]) -> int:
    """A non-blocking descriptor that is readable when one of these signals, which must be blocked, is pending.

    The caller owns it.
    """
    mask = 0
    for number in numbers:
        mask |= 1 << (number - 1)
    block = ctypes.create_string_buffer(struct.pack("Q", mask), 8)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    return syscall(_SYS_SIGNALFD4, -1, block, 8, flags, call="signalfd4")


def reset() -> None:
    """Every signal as the kernel starts a first process with it, for a child about to execute.

    By system call, as libc refuses those that it keeps for itself; and glibc's posix_spawn leaves them ignored.
    """
    default = ctypes.create_string_buffer(32)  # struct kernel_sigaction: SIG_DFL, no flags, nothing masked
    for number in range(1, 65):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            syscall(_SYS_RT_SIGACTION, number, default, 0, 8, call="rt_sigaction", detail=str(number))


def read(fd: int) -> List[Received]:
    """What has arrived since; empty when nothing has."""
    try:
        data = os.read(fd, _SIZE * 32)
    except BlockingIOError:
        return []
    return [Received(*struct.unpack_from("I4xiI", data, at)) for at in range(0, len(data), _SIZE)]
