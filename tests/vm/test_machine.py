"""The VM's own ways to fail: a guest that hangs, a QEMU that dies at boot, a command that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.vm import initramfs, machine

KERNEL = "newest"


pytestmark = pytest.mark.skipif(not machine.QEMU.exists(), reason="the VM is not fetched: deploy/prepare vm")


def boot(command: list[str], **options) -> machine.Result:
    kernel = machine.find_kernel(KERNEL)
    return machine.run(kernel, initramfs.build(kernel, command, Path("/"), {}), **options)


def test_a_guest_that_hangs_at_boot_is_ended_and_its_console_is_shown():
    with pytest.raises(machine.GuestFailed) as raised:
        boot(["true"], words="vm.hang=initramfs", boot_seconds=30)
    assert "did not come up within 30 s and was ended" in str(raised.value)
    assert "init: hanging as asked" in str(raised.value)


def test_a_qemu_that_dies_at_boot_is_started_again_and_the_guests_exit_status_comes_back(tmp_path, monkeypatch, capfd):
    tried = tmp_path / "tried"
    dying = tmp_path / "qemu"
    dying.write_text(f'#!/bin/sh\n[ -e {tried} ] && exec {machine.QEMU} "$@"\ntouch {tried}\necho dying >&2\nexit 3\n')
    dying.chmod(0o755)
    monkeypatch.setattr(machine, "QEMU", dying)
    shown = bytearray()
    # An accelerator is named, so that the first start is not spent on looking for one.
    result = boot(
        ["sh", "-c", "echo said in the guest; exit 7"], hardware=machine.Hardware(accel="tcg"), show=shown.extend
    )
    assert (result.status, result.boots) == (7, 2)
    assert b"said in the guest" in shown
    assert b"systemd" in result.files["journal.txt"]
    assert "start 1 of 3: QEMU ended with 3" in capfd.readouterr().err


def test_a_qemu_that_always_dies_at_boot_is_given_up(tmp_path, monkeypatch):
    dying = tmp_path / "qemu"
    dying.write_text("#!/bin/sh\necho no such machine >&2\nexit 1\n")
    dying.chmod(0o755)
    monkeypatch.setattr(machine, "QEMU", dying)
    with pytest.raises(machine.GuestFailed, match="(?s)no guest came up in 3 starts.*no such machine"):
        boot(["true"], hardware=machine.Hardware(accel="tcg"))


def test_nothing_of_a_boot_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(machine.GuestFailed):
        boot(["true"], words="vm.hang=initramfs", boot_seconds=1)
    assert os.listdir(tmp_path) == []
    mine = str(tmp_path).encode()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mine in p.read_bytes()]


def test_what_is_not_fetched_is_named_with_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "QEMU", machine.ROOT / "missing")
    with pytest.raises(machine.NoMachine, match="not there: missing.*deploy/prepare vm"):
        machine.find_kernel(KERNEL)
