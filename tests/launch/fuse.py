"""A FUSE file system that stops answering, by hand: one directory, one file, a process of its own that serves them.

Sources: fuse(4), linux/fuse.h. Run as a program: `python -m tests.launch.fuse DIR`, as root; SIGUSR1 silences it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from nsutil import mounts
from tests.conftest import ROOT

# linux/fuse.h, version 7.31
LOOKUP, FORGET, GETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 1, 2, 3, 14, 15, 16, 17, 18
FLUSH, INIT, OPENDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = 25, 26, 27, 29, 36, 42
IN, OUT = struct.Struct("<IIQQIIII"), struct.Struct("<IiQ")
TOP, FILE = 1, 2  # nodes
SIZE = 4096  # of the file
ENOSYS = 38


def serve(directory: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    mounts.mount("silent", directory, "fuse", mounts.MS_NOSUID | mounts.MS_NODEV, data)
    silent = False

    def silence(number: int, frame: object) -> None:
        nonlocal silent
        silent = True
        print("silent", flush=True)

    signal.signal(signal.SIGUSR1, silence)
    print("ready", flush=True)
    while True:
        request = os.read(device, 1 << 20)
        _, operation, unique, node, *_ = IN.unpack_from(request)
        if operation in (FORGET, INTERRUPT, BATCH_FORGET) or (silent and operation != STATFS):
            continue
        error, body = answer(operation, node, request)
        os.write(device, OUT.pack(OUT.size + len(body), error, unique) + body)


def answer(operation: int, node: int, request: bytes) -> tuple[int, bytes]:
    if operation == INIT:
        return 0, struct.pack("<IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 9, 65536, 1, 16, 0, 0)
    if operation == LOOKUP:
        return 0, struct.pack("<QQQQII", FILE, 0, 1000, 0, 0, 0) + attributes(FILE)
    if operation == GETATTR:
        return 0, struct.pack("<QII", 0, 0, 0) + attributes(node)  # asked for each time
    if operation in (OPEN, OPENDIR):
        return 0, struct.pack("<QII", 1, 0, 0)
    if operation == READ:
        return 0, bytes(SIZE)
    if operation == STATFS:
        return 0, bytes(80)
    if operation in (FLUSH, RELEASE, RELEASEDIR):
        return 0, b""
    return -ENOSYS, b""


def attributes(node: int) -> bytes:
    mode = stat.S_IFDIR | 0o777 if node == TOP else stat.S_IFREG | 0o666
    size = SIZE if node == FILE else 0
    return struct.pack("<6Q10I", node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class Silent:
    """What is open of it while it still answers, and what to call when it shall not any more."""

    def __init__(self, place: Path, server: subprocess.Popen[bytes]):
        self.place = place
        self._server = server

    def silence(self) -> None:
        self._server.send_signal(signal.SIGUSR1)
        assert self._server.stdout.readline() == b"silent\n"

    def end(self) -> None:
        """Whoever waits for it gets ECONNABORTED."""
        self._server.kill()


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[Silent]:
    """One at `place`. Raises OSError where the host has no FUSE."""
    os.close(os.open("/dev/fuse", os.O_RDWR))
    command = [sys.executable, "-m", "tests.launch.fuse", str(place)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server:
        try:
            if server.stdout.readline() != b"ready\n":
                raise OSError("FUSE cannot be mounted")
            try:
                yield Silent(place, server)
            finally:
                server.kill()
                mounts.unmount(str(place))
        finally:
            server.kill()


if __name__ == "__main__":
    serve(sys.argv[1])
