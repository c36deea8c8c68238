"""Whether KVM runs a kernel here. /dev/kvm alone tells nothing: a nested one may accept a machine and then fail in the
middle of it, so the only probe is a kernel's first words."""

from __future__ import annotations

import os
import select
import subprocess
import time

SECONDS = 15.0  # a kernel that runs says its version within half a second


def works(qemu: list[str], kernel: str, environment: dict[str, str]) -> bool:
    """`qemu` is its command without accelerator, console and kernel; `kernel` boots without a root until it panics."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    command = [*qemu, "-accel", "kvm", "-cpu", "host", "-m", "256", "-serial", "stdio", "-no-reboot", "-kernel", kernel]
    command += ["-append", "console=ttyS0 panic=-1"]
    said = b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        output, deadline = process.stdout.fileno(), time.monotonic() + SECONDS
        # QEMU stops the machine and stays after an internal error.
        while b"Linux version" not in said and b"KVM internal error" not in said:
            if not select.select([output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            got = os.read(output, 4096)
            if not got:
                break
            said += got
        process.kill()
    return b"Linux version" in said
