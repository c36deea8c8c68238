"""A plain zygote, as SOCK has it (Oakes and others, ATC 2018): a process that has imported TensorFlow and run nothing
of it, since a child of os.fork() would hang then. It forks for each request, which brings the descriptors along; it has
no namespace, no cgroup and gives up no privilege, to its advantage.
"""

from __future__ import annotations

import os
import runpy
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgpack

from bench import usage
from bench.launch import ENVIRONMENT
from bench.partner import partner
from bench.started import Started, files
from bench.usage import Used
from nsutil import messages


class Zygote:
    """A handle to it: `talk` brings each request's own socket there."""

    def __init__(self, talk: socket.socket, pid: int):
        self.talk = talk
        self.pid = pid

    def start(self, directory: Path, program: str, *words: str) -> Started:
        """From just before the request."""
        out, err = files()
        ours, theirs = messages.pair()
        body = msgpack.packb([str(directory), program, list(words)])
        began = time.monotonic()
        with theirs:
            socket.send_fds(self.talk, [body], [theirs.fileno(), out, err])

        def reap() -> tuple[int, Used]:
            said = os.read(fd, 4096)
            if not said:
                return -1, Used()
            status, cpu, faults = msgpack.unpackb(said)
            return status, Used(cpu, faults)

        fd = ours.detach()
        return Started(f"zygote's {program}", began, fd, reap, out, err)

    def used(self) -> Used:
        """By the zygote itself: what its children used is said of each."""
        return usage.process(self.pid, children=False)


@contextmanager
def zygote() -> Iterator[Zygote]:
    """One that has imported TensorFlow, ended afterwards."""
    with partner("zygote", env=ENVIRONMENT, stderr=subprocess.DEVNULL) as (ours, pid):
        ours.recv(1)
        yield Zygote(ours, pid)


def serve(talk: socket.socket) -> None:
    import tensorflow  # noqa: F401

    talk.send(b"r")
    with selectors.DefaultSelector() as selector:
        selector.register(talk, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is not talk:
                    selector.unregister(key.fileobj)
                    _over(*key.data)
                    continue
                body, fds, _, _ = socket.recv_fds(talk, 1 << 16, 3)
                if not body:
                    return
                answer, *streams = fds
                pid = os.fork()
                if not pid:
                    _be(*msgpack.unpackb(body), *streams)
                for fd in streams:
                    os.close(fd)
                pidfd = os.pidfd_open(pid)
                selector.register(pidfd, selectors.EVENT_READ, (pid, pidfd, answer))


def _over(pid: int, pidfd: int, answer: int) -> None:
    _, status, used = os.wait4(pid, 0)
    os.write(answer, msgpack.packb([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_minflt]))
    os.close(pidfd)
    os.close(answer)


def _be(directory: str, program: str, words: list[str], out: int, err: int) -> None:
    """The program, in a child."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(directory)
    sys.argv = [program, *words]
    sys.path[0] = directory
    status = 0
    try:
        runpy.run_path(f"{directory}/{program}", run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
