"""What processes have used, as the kernel counts it: processor time, page faults, memory of the host, energy."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_TICK = os.sysconf("SC_CLK_TCK")
_POWERCAP = Path("/sys/class/powercap")


class Used(NamedTuple):
    cpu: float = 0.0  # seconds
    faults: int = 0  # minor ones

    def plus(self, other: Used) -> Used:
        return Used(self.cpu + other.cpu, self.faults + other.faults)

    def less(self, other: Used) -> Used:
        return Used(self.cpu - other.cpu, self.faults - other.faults)


def total(parts: list[Used]) -> Used:
    return Used(sum(part.cpu for part in parts), sum(part.faults for part in parts))


def process(pid: int, *, children: bool = True) -> Used:
    """Of a process so far, with those of its children that it has waited for (proc_pid_stat(5)): in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    faults, faults_waited, user, system, user_waited, system_waited = (int(fields[n]) for n in (7, 8, 11, 12, 13, 14))
    if not children:
        faults_waited = user_waited = system_waited = 0
    return Used((user + system + user_waited + system_waited) / _TICK, faults + faults_waited)


def joules() -> float | None:
    """Used by the processors' packages so far, where the host can tell (power/powercap/powercap.rst)."""
    packages = [path for path in _POWERCAP.glob("intel-rapl:*") if path.name.count(":") == 1]
    try:
        counted = [int((path / "energy_uj").read_text()) for path in packages]
    except OSError:
        return None
    return sum(counted) / 1e6 if counted else None


def available() -> int:
    """Bytes that the host could still give (proc_meminfo(5))."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not say what memory is available")


def anonymous(pids: Iterable[int]) -> int:
    """Bytes that processes hold of what is no file's, shared pages once (proc_pid_smaps(5)): what they keep from being
    available. Those that have just ended hold nothing."""
    held = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        held += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return held


class Peak:
    """`with Peak() as peak:` by how many bytes what is available fell at the most, looked at every 20 ms: the whole
    host's, so that nobody's memory is forgotten, and what else runs there counts too."""

    def __init__(self) -> None:
        self._before = self._least = available()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    @property
    def bytes(self) -> int:
        return max(0, self._before - self._least)

    def _look(self) -> None:
        while not self._over.wait(0.02):
            self._least = min(self._least, available())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, where: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
