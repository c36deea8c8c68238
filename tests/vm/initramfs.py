"""The VM's initramfs: a static busybox, the modules that the root needs, and the job that systemd is to run."""

from __future__ import annotations

import lzma
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm import cpio

HERE = Path(__file__).parent
BUSYBOX = Path("/bin/busybox")
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_rng", "virtiofs", "overlay")

# Ended by systemd as soon as the job is: nothing in this VM needs an orderly end, unless `build` is told so. The
# target's job queue is empty while the job runs (Type=exec), so that `systemctl is-system-running` says what it would
# on a host. Delegate= keeps every controller that systemd knows enabled in the root cgroup, where it would turn off
# what no unit needs.
UNITS = {
    "units/vm.target": b"""\
[Unit]
DefaultDependencies=no
AllowIsolate=yes
Wants=multi-user.target vm-job.service
After=multi-user.target
""",
    "units/vm-job.service": b"""\
[Unit]
After=multi-user.target
SuccessAction=poweroff-immediate
FailureAction=poweroff-immediate
[Service]
Type=exec
Delegate=yes
ExecStart=/bin/sh /run/vm/job
StandardError=journal+console
TimeoutStopSec=10
OOMPolicy=continue
LimitNOFILE=65536
""",
}


@dataclass(frozen=True)
class Kernel:
    """A Debian kernel package that was unpacked in `tree`."""

    tree: Path

    @property
    def image(self) -> Path:
        (found,) = (self.tree / "boot").glob("vmlinuz-*")
        return found

    @property
    def release(self) -> str:
        return self.image.name.removeprefix("vmlinuz-")

    def modules(self) -> dict[str, bytes]:
        """MODULES and what they depend on, unpacked, in the order to load them in; not what is built in."""
        found: dict[str, bytes] = {}
        for name in MODULES:
            command = ["modprobe", "-d", str(self.tree), "-S", self.release, "--show-depends", name]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for path in (Path(line.split()[1]) for line in said.splitlines() if line.startswith("insmod ")):
                data = path.read_bytes()
                found[path.name.removesuffix(".xz")] = lzma.decompress(data) if path.suffix == ".xz" else data
        return found


def build(
    kernel: Kernel, command: Sequence[str], directory: Path, environment: Mapping[str, str], orderly: bool = False
) -> bytes:
    """An image that runs `command` in the guest's `directory`, with `environment` beside what systemd gives.

    `orderly`: the guest powers off as `systemctl poweroff` does it, and stops what the command left running.
    """
    modules = kernel.modules()
    end = b"poweroff" if orderly else b"poweroff-immediate"
    units = {name: text.replace(b"poweroff-immediate", end) for name, text in UNITS.items()}
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
    files = {
        "init": (HERE / "init").read_bytes(),
        "busybox": BUSYBOX.read_bytes(),
        "modules/order": "".join(f"{name}\n" for name in modules).encode(),
        **{f"modules/{name}": data for name, data in modules.items()},
        **units,
        "job/job": (HERE / "job").read_bytes(),
        "job/modules": f"{kernel.tree}/lib/modules\n".encode(),
        "job/environment": exports.encode(),
        "job/command": f"cd {shlex.quote(str(directory))} && {shlex.join(command)}\n".encode(),
    }
    return cpio.archive(files)
