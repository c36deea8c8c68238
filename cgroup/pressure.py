"""Pressure stall information: how much of the time work waits for memory (kernel document accounting/psi)."""

from __future__ import annotations

import os
import re
import select
from pathlib import Path

HOST = "/proc/pressure/memory"


def stalled(kind: str = "full", path: str = HOST) -> float | None:
    """Percent of the last ten seconds in which some, or all ("full") that could run waited for memory; None without PSI
    (not in this kernel, or switched off by psi=0)."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    found = re.search(rf"^{kind} avg10=([0-9.]+)", text, re.MULTILINE)
    return float(found[1]) if found else None


def totals(text: str) -> dict[str, int]:
    """Of the text of a memory.pressure file: microseconds in which "some", and in which all ("full"), waited, since
    boot or since the cgroup was made."""
    return {kind: int(total) for kind, total in re.findall(r"^(some|full) .*total=([0-9]+)$", text, re.MULTILINE)}


class Trigger:
    """Tells when work has waited for memory for `stall` out of `window` seconds: a descriptor that is readable then.
    That is told once: the kernel takes the event back as it is looked at (psi_trigger_poll).

    `fd`: a memory.pressure file, of the host or a cgroup, open for reading and writing; the trigger takes it over and
    lives as long. Raises OSError where the kernel has no triggers (CONFIG_PSI), for windows outside 0.5 to 10 s, and,
    without CAP_SYS_RESOURCE, for those that are no multiple of 2 s.
    """

    def __init__(self, fd: int, stall: float, window: float):
        self._file = fd
        try:
            os.write(fd, f"some {int(stall * 1e6)} {int(window * 1e6)}\0".encode())
            # Ready for EPOLLPRI, which neither select(2) nor asyncio can wait for; an epoll descriptor can be.
            self._epoll = select.epoll()
            self._epoll.register(fd, select.EPOLLPRI)
        except BaseException:
            os.close(fd)
            raise

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        if not self._epoll.closed:
            self._epoll.close()
            os.close(self._file)
