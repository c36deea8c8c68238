"""What people write for a limit, and what the kernel is given."""

from __future__ import annotations

import pytest

from cgroup import limits
from cgroup.limits import LimitError


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("memory.max", "800M", "838860800"),
        ("memory.max", "1.5G", "1610612736"),
        ("memory.max", 4096, "4096"),
        ("memory.max", "max", "max"),
        ("memory.high", "4K", "4096"),
        ("memory.low", 0, "0"),
        ("memory.swap.max", "0", "0"),
        ("hugetlb.2MB.max", "64M", "67108864"),
        ("hugetlb.1GB.max", "max", "max"),
        ("cpu.max", "50%", "50000 100000"),
        ("cpu.max", "12.5%", "12500 100000"),
        ("cpu.max", "800%", "800000 100000"),
        ("cpu.max", "50000 100000", "50000 100000"),
        ("cpu.max", "50000", "50000 100000"),
        ("cpu.max", "max 20000", "max 20000"),
        ("cpu.weight", 100, "100"),
        ("cpu.weight", "100", "100"),
        ("pids.max", 256, "256"),
        ("pids.max", "max", "max"),
        ("cpuset.cpus", "0-3,6", "0-3,6"),
        ("cpuset.cpus", 2, "2"),
        ("io.weight", 100, "default 100"),
        ("io.weight", ["default 100", "8:16 200"], "default 100\n8:16 200"),
        ("io.max", "8:0 rbps=10M wiops=max", "8:0 rbps=10485760 wiops=max"),
        ("io.max", ["8:0 rbps=1M", "8:16 riops=4294967296"], "8:0 rbps=1048576\n8:16 riops=4294967296"),
    ],
)
def test_a_good_value_becomes_the_kernels_text(name, value, written):
    assert limits.parse(name, value) == written


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("memory.max", "800 M", '"800M"'),
        ("memory.max", "800MB", '"800M"'),
        ("memory.max", "800m", '"800M"'),
        ("memory.max", "1.5", '"800M"'),
        ("memory.max", -1, '"800M"'),
        ("memory.max", True, '"800M"'),
        ("memory.max", 1.5, '"800M"'),
        ("memory.max", None, '"800M"'),
        ("memory.max", [], '"800M"'),
        ("memory.max", 800, "less than one page"),
        ("memory.max", "99999999999E", '"max" for no limit'),
        ("cpu.max", 50, '"50%"'),
        ("cpu.max", "half", '"50%"'),
        ("cpu.max", "0%", "1%"),
        ("cpu.max", "-5%", '"50%"'),
        ("cpu.max", "50000 999", "1000 to 1000000"),
        ("cpu.max", "999 100000", "1000 microseconds"),
        ("cpu.weight", 0, "from 1 to 10000"),
        ("cpu.weight", 10001, "from 1 to 10000"),
        ("cpu.weight", "max", "from 1 to 10000"),
        ("cpu.weight", True, "such as 100"),
        ("pids.max", 0, "from 1 to"),
        ("pids.max", "64K", "such as 256"),
        ("cpuset.cpus", "3-1", "ends before it begins"),
        ("cpuset.cpus", "0,", '"0-3,6"'),
        ("cpuset.cpus", True, '"0-3,6"'),
        ("io.weight", 0, "from 1 to 10000"),
        ("io.weight", True, "from 1 to 10000"),
        ("io.max", "8:0", "MAJOR:MINOR"),
        ("io.max", "sda rbps=1M", "MAJOR:MINOR"),
        ("io.max", "8:0 speed=1M", "rbps= wbps= riops= wiops="),
        ("io.max", "8:0 rbps=fast", '"10M"'),
        ("io.max", [], "leave it out"),
        ("io.max", ["8:0 rbps=1M\n8:1 rbps=1M"], "rbps"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_be_right(name, value, right):
    with pytest.raises(LimitError) as refused:
        limits.parse(name, value)
    assert right in str(refused.value)


@pytest.mark.parametrize(
    ("name", "near"), [("memory.mx", "memory.max"), ("cpu.maxx", "cpu.max"), ("pid.max", "pids.max")]
)
def test_an_unknown_limit_is_refused_with_the_nearest(name, near):
    with pytest.raises(LimitError, match=f"did you mean '{near}'"):
        limits.parse(name, "1")


@pytest.mark.parametrize("name", ["cgroup.procs", "../memory.max", "memory.max/..", "hugetlb..max", "cgroup.kill", ""])
def test_files_that_are_no_limits_are_refused(name):
    with pytest.raises(LimitError, match="is not a limit"):
        limits.parse(name, 1)


def test_missing_controllers_are_named_with_their_limits():
    asked = ["memory.max", "memory.swap.max", "pids.max", "hugetlb.2MB.max"]
    assert limits.missing_controllers(asked, {"pids", "hugetlb"}) == [
        ("memory.max", "memory"),
        ("memory.swap.max", "memory"),
    ]


def test_the_reason_names_limit_controller_and_what_to_do():
    plain = limits.explain_missing("memory.max", {})
    assert "'memory'" in plain and "memory.max" in plain and "cgroup_enable=memory" in plain
    disabled = limits.explain_missing("memory.max", {}, {"memory"})
    assert "switched off" in disabled and "cgroup_enable=memory" in disabled
    legacy = limits.explain_missing("io.max", {"blkio": "/sys/fs/cgroup/blkio"})
    assert "'io'" in legacy and "/sys/fs/cgroup/blkio" in legacy and "cgroup_no_v1=blkio" in legacy
