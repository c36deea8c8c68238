"""Limits as people write them, made into what the kernel's files take.

Names are the kernel's (admin-guide/cgroup-v2). Values are the kernel's too, with two additions that users of systemd
know: sizes with binary suffixes ("800M", systemd.resource-control(5) MemoryMax=) and cpu.max as N% of one cpu
(CPUQuota=). Nothing here touches the kernel; `Cgroup.apply` writes the result.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping

# A kernel file's name to the text that is written to it; several lines are several writes (io.max, one a device).
Limits = Mapping[str, str]

PERIOD = 100_000  # microseconds: the kernel's own default for cpu.max, and systemd's


class LimitError(ValueError):
    """A limit that cannot be what it was asked to be; the message says what would be right."""


_SUFFIX = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}
_MOST = (1 << 63) - 1


def _size(least: int, example: str) -> Callable[[object], str]:
    """A number of bytes of at least `least`, or "max"."""

    def parse(value: object) -> str:
        right = f'a size such as "{example}" (suffixes K M G T, of 1024), a number of bytes, or "max"'
        if value == "max":
            return "max"
        if not isinstance(value, (int, str)):  # True is an int, but str(True) is no number
            raise LimitError(f"is not a size; write {right}")
        found = re.fullmatch(r"([0-9]{1,19})(\.[0-9]{1,9})?([KMGTPE]?)", str(value))
        if not found or (found[2] and not found[3]):
            raise LimitError(f"is not a size; write {right}")
        unit = _SUFFIX[found[3]]
        size = int(found[1]) * unit + (int(float("0" + found[2]) * unit) if found[2] else 0)
        if size > _MOST:
            raise LimitError(f'is more than any machine has; write {right}, "max" for no limit')
        if size < least:
            raise LimitError(f"is less than one page of memory ({least} bytes), in which nothing runs; write {right}")
        return str(size)

    return parse


def _number(least: int, most: int, example: str, unlimited: bool = False) -> Callable[[object], str]:
    def parse(value: object) -> str:
        right = f"a whole number from {least} to {most} such as {example}" + (', or "max"' if unlimited else "")
        if unlimited and value == "max":
            return "max"
        if not isinstance(value, (int, str)) or not re.fullmatch("[0-9]{1,19}", str(value)):
            raise LimitError(f"is not a number; write {right}")
        if not least <= int(value) <= most:
            raise LimitError(f"is out of range; write {right}")
        return str(int(value))

    return parse


def _cpu_max(value: object) -> str:
    right = (
        '"50%" (of one cpu; "200%" is two), the kernel\'s own "50000 100000" (microseconds in each period), or "max"'
    )
    if not isinstance(value, str):
        raise LimitError(f"is not a share of cpu time; write {right}")
    if found := re.fullmatch(r"([0-9]{1,7}(?:\.[0-9]{1,4})?)%", value):
        quota, period = round(float(found[1]) * PERIOD / 100), PERIOD
    elif found := re.fullmatch(r"(max|[0-9]{1,12})(?: ([0-9]{1,12}))?", value):
        period = int(found[2] or PERIOD)
        if not 1_000 <= period <= 1_000_000:
            raise LimitError(
                f"has a period that the kernel does not take (1000 to 1000000 microseconds); write {right}"
            )
        if found[1] == "max":
            return f"max {period}"
        quota = int(found[1])
    else:
        raise LimitError(f"is not a share of cpu time; write {right}")
    if quota < 1_000:  # kernel/sched/core.c, min_cfs_quota_period: 1 ms
        raise LimitError(f"is less than the kernel gives (1000 microseconds in a period, 1%); write {right}")
    return f"{quota} {period}"


def _cpus(value: object) -> str:
    right = 'cpu numbers such as "0-3,6"'
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 100_000:
        value = str(value)
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*", value):
        raise LimitError(f"is not a set of cpus; write {right}")
    for part in value.split(","):
        first, _, last = part.partition("-")
        if last and int(first) > int(last):
            raise LimitError(f"has a range that ends before it begins, {part}; write {right}")
    return value


_DEVICE = r"(?:0|[1-9][0-9]{0,6}):(?:0|[1-9][0-9]{0,6})"


def _per_device(parse: Callable[[str], str]) -> Callable[[object], str]:
    """A line, or a list of lines, one a device."""

    def parse_lines(value: object) -> str:
        given = value if isinstance(value, list) else [value]
        if not given:
            raise LimitError("is empty; leave it out instead")
        # A number is the weight for every device.
        texts = [str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in given]
        return "\n".join(parse(text if isinstance(text, str) else "") for text in texts)

    return parse_lines


def _io_max(text: str) -> str:
    right = '"8:0 rbps=10M wbps=10M riops=1000 wiops=max": a device MAJOR:MINOR as lsblk shows it, then limits'
    device, *pairs = text.split() or [""]
    if not re.fullmatch(_DEVICE, device) or not pairs:
        raise LimitError(f"is not a limit for a device; write {right}")
    parsed = []
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name in ("rbps", "wbps"):
            parse = _size(1, "10M")
        elif name in ("riops", "wiops"):
            parse = _number(1, _MOST, "1000", unlimited=True)
        else:
            raise LimitError(f"has {pair!r}, which is none of rbps= wbps= riops= wiops=; write {right}")
        try:
            parsed.append(f"{name}={parse(number)}")
        except LimitError as e:
            raise LimitError(f"has {pair!r}, which {e}") from None
    return " ".join([device, *parsed])


def _io_weight(text: str) -> str:
    right = 'a number from 1 to 10000 such as 100, or "8:0 200" for one device'
    found = re.fullmatch(rf"(?:(default|{_DEVICE}) )?([0-9]{{1,5}})", text)
    if not found or not 1 <= int(found[2]) <= 10_000:
        raise LimitError(f"is not a weight; write {right}")
    return f"{found[1] or 'default'} {int(found[2])}"


_PAGE = os.sysconf("SC_PAGE_SIZE")
_PARSERS: dict[str, Callable[[object], str]] = {
    "memory.max": _size(_PAGE, "800M"),
    "memory.high": _size(_PAGE, "700M"),
    "memory.low": _size(0, "200M"),
    "memory.min": _size(0, "200M"),
    "memory.swap.max": _size(0, "1G"),
    "cpu.max": _cpu_max,
    "cpu.weight": _number(1, 10_000, "100"),
    "cpuset.cpus": _cpus,
    "pids.max": _number(1, 4_194_304, "256", unlimited=True),  # the most that kernel.pid_max can be
    "io.max": _per_device(_io_max),
    "io.weight": _per_device(_io_weight),
}
# Their names, but for those of huge pages, which have the page's size in them.
NAMES = frozenset(_PARSERS)
_HUGETLB = re.compile(r"hugetlb\.[0-9]{1,4}[KMG]B\.max")
_HUGETLB_NAME = "hugetlb.2MB.max"

# The controllers that these limits belong to: what pocketd enables for its own cgroups where the host has them.
CONTROLLERS = frozenset({"memory", "cpu", "cpuset", "pids", "io", "hugetlb"})


def parse(name: str, value: object) -> str:
    """What is to be written to the file `name` for `value` as it stands in a definition (a TOML value).

    Raises LimitError; its text goes on from "NAME = VALUE ".
    """
    if name in _PARSERS:
        return _PARSERS[name](value)
    if _HUGETLB.fullmatch(name):
        return _size(0, "64M")(value)
    known = [*_PARSERS, _HUGETLB_NAME]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise LimitError(f"is not a limit that is known; {hint}limits are {', '.join(known)}")


def lifted(name: str, text: str) -> str:
    """What is to be written to the file `name` so that `text`, which was, holds no more: the kernel's default."""
    if name == "io.max":
        return "\n".join(f"{line.split()[0]} rbps=max wbps=max riops=max wiops=max" for line in text.splitlines())
    if name == "io.weight":
        return "default 100"
    return {"cpu.weight": "100", "memory.low": "0", "memory.min": "0", "cpuset.cpus": "\n"}.get(name, "max")


def controller(limit: str) -> str:
    """The controller that has the file `limit`."""
    return limit.partition(".")[0]


def missing_controllers(limits: Iterable[str], available: Collection[str]) -> list[tuple[str, str]]:
    """Those of `limits` whose controller is not among `available`, each with that controller."""
    return [(limit, controller(limit)) for limit in limits if controller(limit) not in available]


def explain_missing(limit: str, legacy: Mapping[str, str], disabled: Collection[str] = ()) -> str:
    """Why `limit` cannot be enforced where cgroup2 lacks its controller, and what to do. Names both.

    `legacy` maps controllers that a cgroup v1 hierarchy holds to its mount point; `disabled` are those that the kernel
    has and that are switched off.
    """
    name = controller(limit)
    v1 = {"io": "blkio"}.get(name, name)
    text = f"the host's cgroup2 lacks the controller {name!r}, so {limit} cannot be enforced"
    if v1 in legacy:
        text += f" (the cgroup v1 hierarchy at {legacy[v1]} holds it: boot with cgroup_no_v1={v1}, or cgroup v2 alone)"
    elif v1 in disabled or name in disabled:
        text += f" (it is switched off: put cgroup_enable={v1} on the kernel command line"
        text += ", as a Raspberry Pi needs it)" if name == "memory" else ")"
    elif name == "memory":
        text += " (a Raspberry Pi needs cgroup_enable=memory on the kernel command line)"
    return f"{text}; leave the limit out, or enable the controller"


def processors(limits: Mapping[str, str]) -> int | None:
    """How many processors these parsed limits allow at once (cpu.max, rounded up; cpuset.cpus). None: all there are."""
    found = []
    quota, _, period = limits.get("cpu.max", "max").partition(" ")
    if quota != "max":
        found.append(-(-int(quota) // int(period or PERIOD)))
    if limits.get("cpuset.cpus"):
        ends = [part.partition("-") for part in limits["cpuset.cpus"].split(",")]
        found.append(sum(int(last or first) - int(first) + 1 for first, _, last in ends))
    return max(1, min(found)) if found else None
