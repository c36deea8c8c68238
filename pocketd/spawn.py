"""Processes that pocketd starts beside itself: born in a cgroup, awaited by pidfd, never by SIGCHLD."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence

from nsutil import clone, signals

BARE = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def spawn(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    cgroup: int | None = None,
) -> clone.Child:
    """Execute `command`, in `cgroup` from its first instruction. Descriptors stay the caller's; so does the pidfd.

    What cannot be executed ends with 127 and says why on its standard error.
    """
    child = clone.fork(cgroup=cgroup)
    if child is not None:
        return child
    try:
        signals.reset()
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        null = os.open("/dev/null", os.O_RDWR)
        for number, fd in enumerate((stdin, stdout, stderr)):
            os.dup2(null if fd is None else fd, number)
        os.closerange(3, 1 << 16)
        os.execve(command[0], list(command), dict(environment))
    except BaseException as e:
        os.write(2, f"{command[0]}: {e}\n".encode())
    finally:
        os._exit(127)


async def ended(child: clone.Child, timeout: float) -> int:
    """Await the end of `child` and reap it: its wait status. Closes the pidfd. Killed after `timeout` seconds."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    loop.add_reader(child.pidfd, done.set)
    try:
        async with asyncio.timeout(timeout):
            await done.wait()
    except TimeoutError:
        signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)
    finally:
        loop.remove_reader(child.pidfd)
        os.close(child.pidfd)
    return os.waitpid(child.pid, 0)[1]


async def output(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> tuple[int, bytes]:
    """Run `command` and return its wait status and what it wrote, standard error included (at most 1 MiB)."""
    read, write = os.pipe2(os.O_CLOEXEC)
    loop = asyncio.get_running_loop()
    os.set_blocking(read, False)
    try:
        child = spawn(command, environment, stdout=write, stderr=write)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    text = bytearray()
    finished = asyncio.Event()

    def readable() -> None:
        part = os.read(read, 65536)
        text.extend(part[: max(0, (1 << 20) - len(text))])
        if not part:
            loop.remove_reader(read)
            finished.set()

    loop.add_reader(read, readable)
    try:
        status = await ended(child, timeout)
        async with asyncio.timeout(1.0):
            await finished.wait()
    except TimeoutError:
        pass  # a grandchild holds the pipe
    finally:
        loop.remove_reader(read)
        os.close(read)
    return status, bytes(text)
