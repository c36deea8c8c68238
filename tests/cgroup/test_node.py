"""Cgroups on the kernel that is here."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import threading
import time

import pytest

from cgroup import limits
from cgroup.limits import LimitError
from cgroup.node import Cgroup, Populated


def test_a_created_cgroup_is_there_and_its_descriptor_names_it(base):
    with base.create("leaf") as leaf:
        assert os.path.samestat(os.fstat(leaf.fd), os.stat(f"{base.directory}/leaf"))
        assert not os.get_inheritable(leaf.fd)
        assert leaf.kernel_path == f"{base.kernel_path}/leaf"
        assert base.names() == ["leaf"]


def test_a_leaf_is_not_made_twice_unless_that_is_allowed(base):
    base.create("leaf").close()
    with pytest.raises(FileExistsError, match="leaf exists already"):
        base.create("leaf")
    base.create("leaf", exist_ok=True).close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", ".hidden", "-x", "a\0b", "a\nb", "x" * 256])
def test_a_name_that_could_be_a_path_is_refused_before_the_kernel_is_asked(base, name):
    with pytest.raises(ValueError, match="cannot be the name of a cgroup"):
        base.create(name)
    assert base.names() == []


def test_a_cgroup_made_anew_is_not_taken_for_the_one_that_was_opened(base):
    with base.create("leaf") as first:
        os.rmdir(f"{base.directory}/leaf")
        with base.create("leaf"):
            with pytest.raises(OSError):
                _ = first.events


def test_a_process_shows_in_its_cgroup_and_in_those_above(base, sleeper):
    with base.create("group") as group, group.create("leaf") as leaf:
        pid = sleeper(leaf)
        assert leaf.procs == (pid,)
        assert group.procs == ()
        assert group.processes() == base.processes() == [pid]
        assert pid in leaf.threads
        assert base.events["populated"] == 1


def test_stats_say_what_the_kernel_says_and_none_for_absent_controllers(base, sleeper):
    with base.create("leaf") as leaf:
        assert not leaf.stats().populated
        sleeper(leaf)
        before, stats, after = leaf.cpu_stat, leaf.stats(), leaf.cpu_stat
        assert stats.populated
        assert before["usage_usec"] <= stats.cpu_usec <= after["usage_usec"]
        assert (stats.memory_current is None) == ("memory" not in leaf.controllers)
        assert (stats.pids_current is None) == ("pids" not in leaf.controllers)


def test_kill_ends_every_process_beneath_and_wait_empty_sees_it(base, sleeper):
    with base.create("group") as group, group.create("a") as a, group.create("b") as b:
        pids = [sleeper(a), sleeper(b)]
        assert sorted(group.processes()) == sorted(pids)
        group.kill()
        group.wait_empty(10)
        for pid in pids:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_wait_empty_gives_up_in_time_and_names_the_cgroup(base, sleeper):
    with base.create("leaf") as leaf:
        sleeper(leaf)
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="leaf"):
            leaf.wait_empty(0.2)
        assert 0.2 <= time.monotonic() - start < 5


def test_wait_empty_wakes_when_the_last_process_goes(base, sleeper):
    with base.create("leaf") as leaf:
        pid = sleeper(leaf)
        threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
        start = time.monotonic()
        leaf.wait_empty(30)
        assert 0.1 < time.monotonic() - start < 10


def test_asyncio_waits_for_emptiness_without_blocking_the_loop(base, sleeper):
    async def scenario(leaf: Cgroup) -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with leaf.watch() as watch:
            with pytest.raises(TimeoutError):
                await watch.empty(0.1)
            asyncio.get_running_loop().call_later(0.1, leaf.kill)
            await watch.empty(10)
        ticking.cancel()
        return ticks

    with base.create("leaf") as leaf:
        sleeper(leaf)
        assert asyncio.run(scenario(leaf)) >= 5


def test_asyncio_keeps_waiting_over_changes_that_are_not_emptiness(base, sleeper, monkeypatch):
    looks = []  # each time that the wait woke up

    def counted(watch: Populated) -> bool:
        looks.append(look(watch))
        return looks[-1]

    look = Populated.populated
    monkeypatch.setattr(Populated, "populated", counted)

    async def scenario(leaf: Cgroup) -> None:
        loop = asyncio.get_running_loop()
        with leaf.watch() as watch:
            loop.call_later(0.05, setattr, leaf, "freeze", True)  # cgroup.events shows it too
            loop.call_later(0.25, setattr, leaf, "freeze", False)
            threading.Timer(0.5, leaf.kill).start()  # a thread: a loop that spins would never come to it
            await watch.empty(10)

    with base.create("leaf") as leaf:
        sleeper(leaf)
        asyncio.run(scenario(leaf))
        assert not leaf.stats().populated
        assert looks.count(True) >= 2 and looks[-1] is False
        assert len(looks) <= 8  # for the changes that there were; one that spins has thousands


def test_a_watch_is_ready_once_for_a_change_and_quiet_after_it_was_read(base, sleeper):
    def ready(watch) -> bool:
        return bool(select.select([watch], [], [], 0.3)[0])

    with base.create("leaf") as leaf, leaf.watch() as watch:
        assert not watch.populated()
        assert not ready(watch)
        sleeper(leaf)
        assert ready(watch)
        assert watch.populated()
        assert not ready(watch)


def test_a_watch_of_a_removed_cgroup_says_empty(base):
    leaf = base.create("leaf")
    with leaf.watch() as watch:
        assert not watch.populated()
        leaf.remove()
        assert not watch.populated()
        watch.wait(1)


def test_remove_takes_the_whole_tree_and_closes(base):
    group = base.create("group")
    with group.create("a") as a:
        a.create("b").close()
        group.create("c").close()
    assert [c.kernel_path.rpartition("/group")[2] for c in group.descendants()] == ["/a/b", "/a", "/c"]
    group.remove()
    assert base.names() == []
    assert group.fd == -1


def test_remove_of_what_is_gone_is_no_error(base):
    leaf = base.create("leaf")
    os.rmdir(leaf.directory)
    leaf.remove()


def test_remove_of_a_populated_cgroup_says_which_and_leaves_it(base, sleeper):
    with base.create("leaf") as leaf:
        sleeper(leaf)
        with pytest.raises(OSError, match="cannot remove the cgroup .*/leaf"):
            leaf.remove()
        assert base.names() == ["leaf"]


def test_nothing_is_left_open_by_a_hundred_lives(base, sleeper):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    for number in range(100):
        with base.create(f"leaf-{number}") as leaf:
            leaf.stats()
            leaf.processes()
            leaf.wait_empty(1)
            leaf.remove()
    assert descriptors() == before
    assert base.names() == []


def test_freeze_is_a_boolean_and_nothing_else(base):
    with base.create("leaf") as leaf:
        leaf.freeze = True
        assert leaf.freeze is True
        assert leaf.get_property(b"cgroup.freeze") == "1\n"
        leaf.freeze = False
        with pytest.raises(TypeError):
            leaf.freeze = 2


def test_read_only_files_are_not_written(base):
    with pytest.raises(RuntimeError, match="readonly"):
        base.procs = (1,)


def huge_page_limit(cgroup: Cgroup) -> str:
    """The name of a hugetlb limit that this host has: on hosts where cgroup v1 holds the rest, the one that is left."""
    found = sorted(f for f in cgroup.files() if f.startswith("hugetlb.") and f.endswith("B.max"))
    if not found:
        pytest.skip("this host's cgroup2 has no hugetlb controller")
    return found[-1]


def test_limits_are_what_the_kernel_holds_after_apply(base):
    with base.create("leaf") as leaf:
        name = huge_page_limit(leaf)
        leaf.apply({name: limits.parse(name, "2G")})
        assert leaf.get_property(name.encode()).strip() == str(2 << 30)
        leaf.apply({name: limits.parse(name, "max")})
        assert leaf.get_property(name.encode()).strip() == "max"


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [
        ("memory.max", "800M", str(800 << 20)),
        ("memory.high", "max", "max"),
        ("memory.low", "64M", str(64 << 20)),
        ("memory.min", 1 << 20, str(1 << 20)),
        ("memory.swap.max", 0, "0"),
        ("cpu.max", "50%", "50000 100000"),
        ("cpu.max", "150%", "150000 100000"),
        ("cpu.max", "20000 50000", "20000 50000"),
        ("cpu.max", "max", "max 100000"),
        ("cpu.weight", 250, "250"),
        ("cpuset.cpus", "0", "0"),
        ("pids.max", 64, "64"),
        ("pids.max", "max", "max"),
        ("io.weight", 300, "default 300"),
    ],
)
def test_each_limit_is_held_by_the_kernel_as_it_was_meant(base, name, value, held):
    with base.create("leaf") as leaf:
        if name not in leaf.files():
            pytest.skip(f"this host's cgroup2 offers no {name}")
        leaf.apply({name: limits.parse(name, value)})
        assert leaf.get_property(name.encode()).strip() == held


def test_typed_limits_read_back_as_numbers_and_none(base):
    with base.create("leaf") as leaf:
        if "pids.max" not in leaf.files():
            pytest.skip("this host's cgroup2 offers no pids.max")
        leaf.pids_max = 12
        assert leaf.pids_max == 12
        leaf.pids_max = None
        assert leaf.pids_max is None


def test_a_limit_without_its_file_is_an_error_that_names_limit_and_controller(base):
    with base.create("leaf") as leaf:
        with pytest.raises(LimitError, match="hugetlb.3MB.max = '4096' cannot be enforced.*controller 'hugetlb'"):
            leaf.apply({"hugetlb.3MB.max": "4096"})


def test_a_limit_that_the_kernel_refuses_is_an_error_that_names_it(base):
    with base.create("leaf") as leaf:
        name = huge_page_limit(leaf)
        with pytest.raises(LimitError, match="'nonsense' was refused by the kernel: Invalid argument"):
            leaf.apply({name: "nonsense"})


def test_enable_takes_what_is_there_and_leaves_the_rest(base):
    with base.create("group") as group:
        enabled = group.enable({"hugetlb", "memory", "no-such-controller"})
        assert enabled == {"hugetlb", "memory"} & set(group.controllers)
        assert enabled <= set(group.subtree_control)


def test_enable_where_processes_stand_says_so(base, sleeper):
    if not base.controllers:
        pytest.skip("this host's cgroup2 has no controller")
    with base.create("leaf") as leaf:
        sleeper(leaf)
        with pytest.raises(OSError, match="processes stand in it"):
            leaf.enable(leaf.controllers)
