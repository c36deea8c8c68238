"""One boot of the VM: QEMU and the virtiofs daemon, watched until the guest has brought its results and powered off."""

from __future__ import annotations

import io
import os
import selectors
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.vm import kvm
from tests.vm.initramfs import Kernel

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "vm"
LIBRARIES = CACHE / "qemu" / "usr" / "lib" / "x86_64-linux-gnu"
QEMU = CACHE / "qemu" / "usr" / "bin" / "qemu-system-x86_64"
VIRTIOFSD = CACHE / "virtiofsd" / "usr" / "lib" / "qemu" / "virtiofsd"
KERNELS = {"newest": CACHE / "kernel-newest", "6.1": CACHE / "kernel-6.1"}
BOOTS = 3  # how often a QEMU that dies before the job is started

# Without mitigations an emulated kernel is a little faster.
KERNEL_WORDS = (
    "console=ttyS0 panic=-1 quiet mitigations=off"
    " systemd.unit=vm.target systemd.show_status=no systemd.getty_auto=no systemd.firstboot=no"
)


class NoMachine(Exception):
    """The VM cannot be made here: what is missing, and what to do."""


class GuestFailed(Exception):
    """The guest hung, or died before its job: the message ends with its console's last lines."""


@dataclass(frozen=True)
class Hardware:
    """What a boot has. `accel` and `cpu` are QEMU's words, and `accel` is found by trying when it is empty."""

    accel: str = field(default_factory=lambda: os.environ.get("ACCEL", ""))
    cpu: str = field(default_factory=lambda: os.environ.get("CPU", ""))
    memory: int = 4096  # MiB
    processors: int = 2
    scratch: int = 8 << 30  # bytes, of which a sparse file takes what is written

    def flags(self, kernel: Kernel) -> list[str]:
        accel = self.accel or ("kvm" if kvm.works(qemu(), str(kernel.image), environment()) else "tcg")
        # Five-level page tables are slow to emulate, and nothing here has that much memory.
        cpu = self.cpu or ("host" if accel == "kvm" else "max,la57=off")
        return [
            *("-accel", "tcg,thread=multi" if accel == "tcg" else accel, "-cpu", cpu, "-smp", str(self.processors)),
            # The virtiofs daemon reads and writes the guest's memory.
            *("-object", f"memory-backend-memfd,id=ram,size={self.memory}M,share=on"),
            *("-m", f"{self.memory}M", "-machine", "q35,memory-backend=ram"),
        ]


@dataclass
class Result:
    """What a guest brought back."""

    status: int
    files: dict[str, bytes]
    console: str
    boots: int
    up: float  # seconds from power-on to the job's first word


def qemu() -> list[str]:
    data = CACHE / "qemu" / "usr" / "share"
    paths = ["-L", str(data / "qemu"), "-L", str(data / "seabios")]
    return [str(QEMU), *paths, "-no-user-config", "-nodefaults", "-display", "none"]


def environment() -> dict[str, str]:
    """QEMU's: libraries and modules from the cache before the host's."""
    return {**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES), "QEMU_MODULE_DIR": str(LIBRARIES / "qemu")}


def find_kernel(name: str) -> Kernel:
    """One of KERNELS; NoMachine when it, or the emulator, was not fetched."""
    kernel = Kernel(KERNELS[name])
    if missing := [str(p.relative_to(ROOT)) for p in (QEMU, VIRTIOFSD, kernel.tree) if not p.exists()]:
        raise NoMachine(f"not there: {', '.join(missing)}; run: deploy/prepare vm")
    return kernel


class _Boot:
    """One QEMU with its virtiofs daemon, in a directory of its own."""

    def __init__(self, place: Path, kernel: Kernel, image: bytes, hardware: list[str], scratch: int, words: str):
        self.console = place / "console"
        self.stack = ExitStack()
        (place / "initramfs").write_bytes(image)
        with open(place / "scratch", "wb") as disk:
            disk.truncate(scratch)
        with ExitStack() as stack:
            self.output, output = self._pair(stack)
            self.results, results = self._pair(stack)
            with socket.socket(socket.AF_UNIX) as listener, open(place / "virtiofsd.log", "wb") as log:
                listener.bind(str(place / "virtiofs"))
                listener.listen()
                self.daemon = self._start(
                    # Files are looked up by path beneath /: the daemon's root is the host's own.
                    [str(VIRTIOFSD), "-f", f"--fd={listener.fileno()}", "-o", "source=/,sandbox=chroot,cache=auto"],
                    stack, (listener.fileno(),), log,
                )  # fmt: skip
            command = [
                *qemu(), *hardware, "-no-reboot", "-kernel", str(kernel.image), "-initrd", str(place / "initramfs"),
                *("-append", f"{KERNEL_WORDS} {words}"),
                *("-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"),
                *("-chardev", f"socket,id=fs,path={place / 'virtiofs'}"),
                *("-device", "vhost-user-fs-pci,chardev=fs,tag=host,queue-size=1024"),
                *("-chardev", f"socket,id=output,fd={output.fileno()}", "-device", "virtio-serial-pci"),
                *("-device", "virtserialport,chardev=output,name=output"),
                *("-chardev", f"socket,id=results,fd={results.fileno()}"),
                *("-device", "virtserialport,chardev=results,name=results"),
                # Nobody reads this disk after the VM: it need not reach the host's.
                *("-drive", f"if=none,id=scratch,format=raw,cache=unsafe,discard=unmap,file={place / 'scratch'}"),
                *("-device", "virtio-blk-pci,drive=scratch", "-device", "virtio-rng-pci"),
            ]  # fmt: skip
            with open(place / "qemu.log", "wb") as log:
                self.qemu = self._start(command, stack, (output.fileno(), results.fileno()), log)
            output.close()
            results.close()
            self.qemu_log, self.daemon_log = place / "qemu.log", place / "virtiofsd.log"
            self.stack = stack.pop_all()

    @staticmethod
    def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
        ours, theirs = socket.socketpair()
        return stack.enter_context(ours), stack.enter_context(theirs)

    @staticmethod
    def _start(command: list[str], stack: ExitStack, fds: tuple[int, ...], log: io.BufferedWriter) -> subprocess.Popen:
        """A process that ends with the stack, and with this one even if this one is killed."""
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds, env=environment(),
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    def tail(self, lines: int = 40) -> str:
        """The end of what the guest's console and the two processes said."""
        parts = []
        for name, path in (("console", self.console), ("QEMU", self.qemu_log), ("virtiofsd", self.daemon_log)):
            text = path.read_text(errors="replace") if path.exists() else ""
            parts += [f"-- {name}, the end:", *text.splitlines()[-lines:]]
        return "\n".join(parts)


def run(
    kernel: Kernel,
    image: bytes,
    *,
    hardware: Hardware | None = None,
    boot_seconds: float = 180.0,
    job_seconds: float = 3600.0,
    words: str = "",
    show: Callable[[bytes], None] = lambda data: None,
) -> Result:
    """Boot `image` and wait for its job. `show` gets what the job writes as it comes, `words` go to the kernel.

    A QEMU that ends before the job's first word is started again, BOOTS times in all. GuestFailed when it never comes
    that far, or when a deadline passes.
    """
    hardware = hardware or Hardware()
    flags = hardware.flags(kernel)
    for attempt in range(1, BOOTS + 1):
        with tempfile.TemporaryDirectory(prefix="pocketd-vm-") as place:
            began = time.monotonic()
            boot = _Boot(Path(place), kernel, image, flags, hardware.scratch, words)
            with boot.stack:
                up, archive = _watch(boot, began, boot_seconds, job_seconds, show)
                if up is None:
                    failure = f"QEMU ended with {boot.qemu.wait()} before the guest's job began\n{boot.tail()}"
                    print(f"vm: start {attempt} of {BOOTS}: {failure}", file=sys.stderr, flush=True)
                    continue
                files = _unpack(archive)
                if "exit" not in files:
                    raise GuestFailed(f"the guest ended in the middle of its job\n{boot.tail()}")
                console = boot.console.read_text(errors="replace")
                return Result(int(files.pop("exit")), files, console, attempt, up - began)
    raise GuestFailed(f"no guest came up in {BOOTS} starts; the last: {failure}")


def _watch(
    boot: _Boot, began: float, boot_seconds: float, job_seconds: float, show: Callable[[bytes], None]
) -> tuple[float | None, bytes]:
    """Read both ports until QEMU ends: when the job's first word came, and the archive of its results."""
    up, archive = None, bytearray()
    with selectors.DefaultSelector() as selector:
        for port in (boot.output, boot.results):
            selector.register(port, selectors.EVENT_READ)
        # The end of QEMU is the end of both ports.
        while selector.get_map():
            deadline = began + boot_seconds if up is None else up + job_seconds
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                phase = "did not come up" if up is None else "did not end its job"
                limit = boot_seconds if up is None else job_seconds
                boot.qemu.send_signal(signal.SIGKILL)
                raise GuestFailed(f"the guest {phase} within {limit:g} s and was ended\n{boot.tail()}")
            for key, _ in ready:
                try:
                    data = key.fileobj.recv(1 << 16)
                except ConnectionResetError:  # QEMU was killed
                    data = b""
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is boot.results:
                    archive += data
                else:
                    up = up or time.monotonic()
                    show(data)
    return up, bytes(archive)


def _unpack(archive: bytes) -> dict[str, bytes]:
    """The regular files of the guest's archive by their names; none when it is cut off."""
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                if member.isfile():
                    files[member.name.removeprefix("./")] = tar.extractfile(member).read()
    except tarfile.ReadError:
        return {}
    return files
