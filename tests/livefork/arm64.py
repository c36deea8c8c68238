"""A machine to run an aarch64 program on: qemu-system-aarch64 under TCG, Debian's cloud kernel, an initramfs.

Needs, from the host's distribution: qemu-system-aarch64 (Debian: qemu-system-arm), aarch64-linux-gnu-gcc with a static
libc (Debian: gcc-aarch64-linux-gnu and what it recommends), apt-get and dpkg-deb. The kernel is fetched once, by apt
from the host's own sources into a state directory of its own under .cache/. qemu-user cannot stand in: live fork hangs
in it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.vm import cpio

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "arm64"
KERNEL_PACKAGES = ("linux-image-cloud-arm64", "linux-image-arm64")  # Debian's; the first has fewer modules
NEEDS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}


def check_tools() -> None:
    """Raise AssertionError that names every missing program and the Debian package that has it."""
    missing = [f"{program} (Debian: {package})" for program, package in NEEDS.items() if not shutil.which(program)]
    assert not missing, "the aarch64 test needs " + ", ".join(missing)


def _run(*command: str, cwd: Path | None = None, timeout: float = 300) -> str:
    done = subprocess.run(
        command, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(command)}: status {done.returncode}\n{output}"
    return output


def kernel() -> Path:
    """An arm64 kernel image, fetched once."""
    kept = CACHE / "vmlinuz"
    if kept.exists():
        return kept
    place = CACHE / "apt"
    for directory in ("state/lists/partial", "cache/archives/partial", "got"):
        (place / directory).mkdir(parents=True, exist_ok=True)
    (place / "status").touch()
    # The host's own sources (Dir::Etc) for another architecture; nothing of the host's state is read or written.
    options = [
        *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64", "-o", "APT::Sandbox::User=root"),
        *("-o", f"Dir::State={place}/state", "-o", f"Dir::State::status={place}/status"),
        *("-o", f"Dir::Cache={place}/cache", "-o", "Acquire::Languages=none"),
    ]
    _run("apt-get", *options, "update")
    for package in KERNEL_PACKAGES:
        depends = subprocess.run(["apt-cache", *options, "depends", package], capture_output=True, text=True).stdout
        names = [line.split()[1] for line in depends.splitlines() if line.split()[:1] == ["Depends:"]]
        names = [name for name in names if name.startswith("linux-image-")]
        if names:
            break
    else:
        raise AssertionError(f"none of {', '.join(KERNEL_PACKAGES)} is in the host's apt sources for arm64")
    _run("apt-get", *options, "download", names[0], cwd=place / "got")
    (archive,) = (place / "got").glob(f"{names[0]}_*.deb")
    _run("dpkg-deb", "-x", str(archive), str(place / "root"))
    (image,) = (place / "root" / "boot").glob("vmlinuz-*")
    image.rename(kept)
    shutil.rmtree(place)
    return kept


def build(sources: list[Path], to: Path) -> None:
    """A static aarch64 program of C sources."""
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread", "-I", str(ROOT / "nsutil")]
    _run("aarch64-linux-gnu-gcc", *flags, "-o", str(to), *(str(s) for s in sources))


def run(program: Path, arguments: list[str], place: Path, timeout: float) -> str:
    """Boot a machine that runs `program`; what its console said. AssertionError unless the program ended with 0."""
    init = place / "init"
    build([Path(__file__).parent / "init.c"], init)
    ramdisk = place / "initramfs"
    ramdisk.write_bytes(cpio.archive({"init": init.read_bytes(), "try": program.read_bytes()}))
    command = [
        *("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a57", "-smp", "2", "-m", "512", "-accel", "tcg"),
        *("-nographic", "-nic", "none", "-no-reboot", "-kernel", str(kernel()), "-initrd", str(ramdisk)),
        *("-append", "console=ttyAMA0 quiet panic=-1 -- " + " ".join(arguments)),
    ]
    said = _run(*command, timeout=timeout)
    assert "TRY ENDED 0" in said, said
    return said
