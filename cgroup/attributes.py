"""The files of a cgroup as typed attributes.

cgroupspy's `BaseFileInterface` is a Python descriptor over one file of a node. Its own types are made for cgroup v1:
its IntegerFile cannot read "max", and writes -1 for None. These are the forms that cgroup v2 has (kernel document
admin-guide/cgroup-v2, "Conventions": "Format"), on the same base.

An attribute whose file is not there raises FileNotFoundError, as its controller is not enabled for that cgroup or this
kernel does not have the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, Self, TypeVar, overload

from cgroupspy.interfaces import BaseFileInterface

T = TypeVar("T")


class _Files(Protocol):
    """What has files: how an attribute reads and writes them."""

    def get_property(self, filename: bytes) -> str: ...

    def set_property(self, filename: bytes, value: str) -> None: ...


class Attribute(BaseFileInterface, Generic[T]):
    """One file of a cgroup that reads as a T. `sanitize_get` and `sanitize_set` are cgroupspy's names."""

    filename: bytes

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: _Files, owner: type) -> T: ...

    def __get__(self, instance: _Files | None, owner: type) -> Self | T:
        if instance is None:  # cgroupspy's own base has no answer when asked on the class
            return self
        value: T = super().__get__(instance, owner)
        return value

    # mypy wants __set__ beside a typed __get__; the base would accept anything.
    def __set__(self, instance: _Files, value: T) -> None:
        super().__set__(instance, value)


class Line(Attribute[str]):
    """A single line of text: cgroup.type, cpuset.cpus."""

    def sanitize_get(self, value: str) -> str:
        return value.strip()


class Words(Attribute[tuple[str, ...]]):
    """Words separated by spaces: cgroup.controllers. Read only."""

    readonly = True

    def sanitize_get(self, value: str) -> tuple[str, ...]:
        return tuple(value.split())


class Integers(Attribute[tuple[int, ...]]):
    """One number a line: cgroup.procs. Read only: writing a pid there migrates a process, which no launch does."""

    readonly = True

    def sanitize_get(self, value: str) -> tuple[int, ...]:
        return tuple(map(int, value.split()))


class Integer(Attribute[int]):
    """One number."""

    def sanitize_get(self, value: str) -> int:
        return int(value)

    def sanitize_set(self, value: int) -> str:
        return str(int(value))


class MaxOrInteger(Attribute["int | None"]):
    """One number, or None for the kernel's "max": no limit."""

    def sanitize_get(self, value: str) -> int | None:
        return None if value.strip() == "max" else int(value)

    def sanitize_set(self, value: int | None) -> str:
        return "max" if value is None else str(int(value))


class Boolean(Attribute[bool]):
    """0 or 1: cgroup.freeze. cgroupspy's FlagFile takes any value for true; this one takes bool alone."""

    def sanitize_get(self, value: str) -> bool:
        return {"0": False, "1": True}[value.strip()]

    def sanitize_set(self, value: bool) -> str:
        if not isinstance(value, bool):
            raise TypeError(f"{self.filename.decode()} is True or False, not {value!r}")
        return "1" if value else "0"


class Quota(Attribute["tuple[int | None, int]"]):
    """cpu.max: microseconds of cpu time in each period, or None for no limit, and the period in microseconds."""

    def sanitize_get(self, value: str) -> tuple[int | None, int]:
        quota, period = value.split()
        return (None if quota == "max" else int(quota)), int(period)

    def sanitize_set(self, value: tuple[int | None, int]) -> str:
        quota, period = value
        return f"{'max' if quota is None else int(quota)} {int(period)}"


class FlatKeyed(Attribute["dict[str, int]"]):
    """ "KEY NUMBER" on each line: cpu.stat, memory.events. Read only."""

    readonly = True

    def sanitize_get(self, value: str) -> dict[str, int]:
        pairs = (line.split() for line in value.splitlines())
        return {key: int(number) for key, number in pairs}


class NestedKeyed(Attribute["dict[str, dict[str, int | None]]"]):
    """ "KEY NAME=NUMBER NAME=NUMBER ..." on each line, None for "max": io.max, io.stat.

    The kernel takes one KEY in each write(2), so setting makes one write a key.
    """

    def sanitize_get(self, value: str) -> dict[str, dict[str, int | None]]:
        read: dict[str, dict[str, int | None]] = {}
        for line in value.splitlines():
            key, *pairs = line.split()
            named = (pair.split("=", 1) for pair in pairs)
            read[key] = {name: None if number == "max" else int(number) for name, number in named}
        return read

    def __set__(self, instance: _Files, value: Mapping[str, Mapping[str, int | None]]) -> None:
        for key, named in value.items():
            pairs = (f"{name}={'max' if number is None else int(number)}" for name, number in named.items())
            instance.set_property(self.filename, f"{key} {' '.join(pairs)}")


class Attributes:
    """The files of cgroup v2 that pocketd reads and writes. Sizes are bytes, times microseconds."""

    def get_property(self, filename: bytes) -> str:
        raise NotImplementedError

    def set_property(self, filename: bytes, value: str) -> None:
        raise NotImplementedError

    controllers = Words("cgroup.controllers")
    subtree_control = Words("cgroup.subtree_control")
    type = Line("cgroup.type", readonly=True)
    events = FlatKeyed("cgroup.events")
    procs = Integers("cgroup.procs")
    threads = Integers("cgroup.threads")
    freeze = Boolean("cgroup.freeze")

    cpu_stat = FlatKeyed("cpu.stat")
    cpu_max = Quota("cpu.max")
    cpu_weight = Integer("cpu.weight")
    cpuset_cpus = Line("cpuset.cpus")
    cpuset_cpus_effective = Line("cpuset.cpus.effective", readonly=True)

    memory_current = Integer("memory.current", readonly=True)
    memory_peak = Integer("memory.peak", readonly=True)  # since Linux 5.19
    memory_max = MaxOrInteger("memory.max")
    memory_high = MaxOrInteger("memory.high")
    memory_low = MaxOrInteger("memory.low")
    memory_min = MaxOrInteger("memory.min")
    memory_swap_max = MaxOrInteger("memory.swap.max")
    memory_events = FlatKeyed("memory.events")
    memory_stat = FlatKeyed("memory.stat")

    pids_current = Integer("pids.current", readonly=True)
    pids_max = MaxOrInteger("pids.max")
    pids_events = FlatKeyed("pids.events")

    io_max = NestedKeyed("io.max")
    io_stat = NestedKeyed("io.stat", readonly=True)
