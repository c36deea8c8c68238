"""The VM is the machine that the other tests here take it for."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

ROOT_CGROUP = Path("/sys/fs/cgroup")
SCRATCH = Path("/var/lib/vm-scratch")
pytestmark = pytest.mark.oldest


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def mount_options(point: Path) -> tuple[str, set[str]]:
    """The type and the super block's options of what is mounted at `point`."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == str(point):
            kind, _, options = after.split(" ")
            return kind, set(options.split(","))
    raise AssertionError(f"nothing is mounted at {point}")


def test_systemd_is_the_first_process_and_every_unit_came_up():
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    assert run("systemctl", "is-system-running", "--wait") == "running"


def test_the_kernel_is_the_one_whose_modules_are_there():
    release = os.uname().release
    assert Path(f"/lib/modules/{release}/modules.dep").exists()
    subprocess.run(["modprobe", "veth"], check=True)


def test_the_root_cgroup_hands_every_controller_on():
    wanted = {"cpu", "cpuset", "io", "memory", "pids", "hugetlb"}
    assert wanted <= set((ROOT_CGROUP / "cgroup.controllers").read_text().split())
    assert wanted <= set((ROOT_CGROUP / "cgroup.subtree_control").read_text().split())


def test_cgroup2_is_mounted_alone_and_with_delegation_at_namespaces():
    kind, options = mount_options(ROOT_CGROUP)
    assert kind == "cgroup2" and "nsdelegate" in options
    assert " cgroup cgroup " not in Path("/proc/self/mountinfo").read_text()


def test_pressure_is_measured():
    assert Path("/proc/pressure/memory").read_text().startswith("some avg10=")
    probe = ROOT_CGROUP / "vm-test-pressure"
    probe.mkdir()
    try:
        assert (probe / "memory.pressure").read_text().startswith("some ")
    finally:
        probe.rmdir()


def test_the_scratch_disk_is_ext4_on_a_block_device_of_its_own():
    kind, _ = mount_options(SCRATCH)
    assert kind == "ext4"
    device = SCRATCH.stat().st_dev
    assert Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name == "vda"


def test_what_is_written_to_the_root_stays_in_the_vm():
    kind, _ = mount_options(Path("/"))
    assert kind == "overlay"
    Path("/etc/vm-test-written").write_text("gone with the VM")


def test_there_is_no_network_but_loopback():
    assert [name for _, name in socket.if_nameindex()] == ["lo"]
