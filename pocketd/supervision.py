"""What a service manager and its daemon say to each other: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import os
import socket
import time

from pocketd import events


def notify(state: str) -> None:
    """Tell the service manager, where there is one."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            try:
                s.connect("\0" + path[1:] if path.startswith("@") else path)
                s.send(state.encode())
            except OSError as e:  # who started us is gone, or never listened; the work goes on
                events.emit("notify-failed", "warning", why=str(e))


def reloading() -> None:
    """The configuration is being read again; `notify("READY=1")` ends that. systemd.service(5), Type=notify-reload."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def listening_socket() -> socket.socket | None:
    """The socket that a socket unit passed; None where there is none, or where it was for another process.

    The caller owns it. Further descriptors are closed.
    """
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return None
    count = int(os.environ.pop("LISTEN_FDS", "0") or 0)
    os.environ.pop("LISTEN_FDNAMES", None)
    for fd in range(3, 3 + count):
        os.set_inheritable(fd, False)
    for fd in range(4, 3 + count):
        os.close(fd)
    return socket.socket(fileno=3) if count else None


async def watchdog() -> None:
    """Say WATCHDOG=1 at half the interval that the manager asks for, as long as this event loop turns."""
    pid, interval = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdigit() or (pid and pid != str(os.getpid())):
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(int(interval) / 2e6)
