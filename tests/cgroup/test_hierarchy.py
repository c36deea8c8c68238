"""Finding cgroup2, and saying what it cannot do."""

from __future__ import annotations

import os
import secrets

import pytest

from cgroup.hierarchy import Hierarchy, Mount, parse_mountinfo, path_of
from cgroup.node import Cgroup

UNIFIED = "26 20 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


def test_cgroup2_alone_is_found_with_nsdelegate():
    assert parse_mountinfo(UNIFIED) == Mount("/sys/fs/cgroup", True, {})


def test_a_hybrid_host_shows_where_cgroup2_is_and_what_v1_holds():
    assert parse_mountinfo(HYBRID) == Mount(
        "/sys/fs/cgroup/unified",
        False,
        {
            "memory": "/sys/fs/cgroup/memory",
            "cpu": "/sys/fs/cgroup/cpu,cpuacct",
            "cpuacct": "/sys/fs/cgroup/cpu,cpuacct",
        },
    )


def test_no_cgroup2_is_none():
    assert parse_mountinfo(HYBRID.rsplit("\n", 2)[0] + "\n") is None


def test_a_read_only_mount_and_a_bound_part_are_passed_over():
    part = "50 1 0:23 /system.slice/x /elsewhere rw - cgroup2 cgroup2 rw\n"
    read_only = "51 1 0:23 / /run/ro ro - cgroup2 cgroup2 rw\n"
    found = parse_mountinfo(UNIFIED + part + read_only)
    assert found is not None and found.path == "/sys/fs/cgroup"


def test_a_mount_point_with_a_space_is_decoded():
    found = parse_mountinfo("26 20 0:23 / /my\\040cgroup rw - cgroup2 none rw\n")
    assert found is not None and found.path == "/my cgroup"


def test_a_mount_point_ends_no_line():
    found = parse_mountinfo("26 20 0:23 / /my\u2028cgroup rw - cgroup2 none rw\n")
    assert found is not None and found.path == "/my\u2028cgroup"


def test_the_hierarchy_found_is_the_kernels(hierarchy):
    with open(f"{hierarchy.mount.path}/cgroup.controllers") as file:
        assert hierarchy.controllers == set(file.read().split())
    assert os.path.samestat(os.fstat(hierarchy.root.fd), os.stat(hierarchy.mount.path))


def test_a_base_is_made_on_every_level_and_offers_the_controllers_that_there_are(hierarchy: Hierarchy):
    top = f"pocketd-test-{secrets.token_hex(6)}"
    with hierarchy.base(f"/{top}/a/b") as base:
        assert base.kernel_path == f"/{top}/a/b"
        with hierarchy.base(f"{top}/a/b"):  # once more, by a restarted daemon
            pass
        wanted = {"memory", "cpu", "cpuset", "pids", "io", "hugetlb"} & hierarchy.controllers
        assert wanted <= set(base.subtree_control)
        with base.create("leaf") as leaf:
            assert wanted <= set(leaf.controllers)
    hierarchy.open(top).remove()
    assert top not in hierarchy.root.names()


@pytest.mark.parametrize("path", ["", "/", "../x", "a/../b", "./a", "a/.b"])
def test_a_base_that_is_the_root_or_leaves_it_is_refused(hierarchy, path):
    before = hierarchy.root.names()
    with pytest.raises(ValueError):
        hierarchy.base(path)
    assert hierarchy.root.names() == before


@pytest.mark.parametrize("path", ["/", "", "/..", "/../x", "/a/../b", "a\0b"])
def test_open_refuses_a_path_that_leaves_the_hierarchy(hierarchy, path):
    with pytest.raises(ValueError, match="is not a cgroup beneath"):
        hierarchy.open(path)


def test_open_of_a_cgroup_that_is_not_there_names_it(hierarchy):
    with pytest.raises(FileNotFoundError, match="pocketd-nobody"):
        hierarchy.open("/pocketd-nobody/x")


def test_a_process_is_found_by_the_path_that_the_kernel_shows(base, hierarchy, sleeper):
    with base.create("leaf") as leaf:
        pid = sleeper(leaf)
        assert path_of(pid) == leaf.kernel_path
        with hierarchy.open(path_of(pid)) as found:
            assert found.procs == (pid,)


def test_a_line_is_what_ends_by_a_newline_and_nothing_else(base, hierarchy, sleeper):
    """The kernel refuses that one character in a name; whoever has a cgroup delegated chooses all others."""
    name = "x\u20280::\x0b\x85"
    with base.create("leaf") as leaf:
        os.mkdir(f"{leaf.directory}/{name}")
        try:
            with Cgroup(f"leaf/{name}", base) as forging:
                assert path_of(sleeper(forging)) == f"{leaf.kernel_path}/{name}"
        finally:
            leaf.kill()
            leaf.wait_empty(10)
            os.rmdir(f"{leaf.directory}/{name}")


def test_missing_controllers_are_refused_by_name_and_offered_ones_are_not(base, hierarchy):
    limits = {"memory.max": "1", "cpu.max": "1", "cpuset.cpus": "0", "pids.max": "1", "io.max": "1"}
    refused = dict(hierarchy.refusals(limits, base.files()))
    for limit in limits:
        controller = limit.split(".")[0]
        if controller not in hierarchy.controllers:
            assert f"lacks the controller '{controller}', so {limit} cannot be enforced" in refused[limit]
        elif limit in base.files():
            assert limit not in refused


def test_a_page_size_that_this_host_lacks_is_refused(base, hierarchy):
    [(limit, reason)] = hierarchy.refusals(["hugetlb.3MB.max"], base.files())
    assert limit == "hugetlb.3MB.max"
    assert "hugetlb.3MB.max" in reason and "cannot be enforced" in reason
