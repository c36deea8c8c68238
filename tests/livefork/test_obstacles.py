"""What a fork does not carry over is found, and remedied where it can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nsutil.obstacles import Obstacle, named

Python = Callable[..., str]


def test_each_obstacle_is_found_with_its_remedy(python: Python, tmp_path: Path) -> None:
    python(
        f"""
import ctypes, mmap, select, socket
libc = ctypes.CDLL(None, use_errno=True)
before = {{str(o) for o in clone.inspect(())}}
assert all(o.kind in ("pipe", "device", "socket") for o in clone.inspect(())), before
file = open({str(tmp_path / "file")!r}, "w+")
epoll = select.epoll()
eventfd, inotify, timerfd = libc.eventfd(0, 0), libc.inotify_init1(0), libc.timerfd_create(1, 0)
pair = socket.socketpair()
pipe = os.pipe()
null = os.open("/dev/null", os.O_RDWR)
full = os.open("/dev/full", os.O_RDWR)
real = [d for d in ("/dev/net/tun", "/dev/kmsg", "/dev/fuse", "/dev/loop-control") if os.path.exists(d)]
device = os.open(real[0], os.O_RDONLY)
path = os.open("/usr", os.O_PATH)
pidfd = os.pidfd_open(os.getpid())
shared = mmap.mmap(-1, 3 * mmap.PAGESIZE)
timer = ctypes.c_void_p()
assert libc.timer_create(1, None, ctypes.byref(timer)) == 0
assert libc.mlock(ctypes.c_void_p(id(0) & -mmap.PAGESIZE), ctypes.c_size_t(1)) == 0
found = [o for o in clone.inspect({{pipe[1]}}) if str(o) not in before]
kinds = {{(o.kind, o.fd): o.remedy for o in found}}
for fd, kind, remedy in [
    (file.fileno(), "file", "reopen"), (epoll.fileno(), "epoll", "remake"), (eventfd, "eventfd", "remake"),
    (inotify, "inotify", "refuse"), (timerfd, "timerfd", "refuse"), (pair[0].fileno(), "socket", "refuse"),
    (pipe[0], "pipe", "refuse"), (null, "device", "ignore"), (full, "device", "ignore"), (device, "device", "refuse"),
    (path, "directory", "ignore"), (pidfd, "pidfd", "ignore"),
]:
    assert kinds.pop((kind, fd)) == remedy, (fd, kind, remedy, kinds)
assert kinds.pop(("socket", pair[1].fileno())) == "refuse"
assert kinds == {{("mapping", None): "privatize", ("timer", None): "refuse", ("locked memory", None): "refuse"}}, kinds
"""
    )


def test_a_shared_mapping_becomes_private_with_its_contents(python: Python, tmp_path: Path) -> None:
    """Also where the file is shorter than the mapping: reading there is SIGBUS."""
    file = tmp_path / "database"
    file.write_bytes(b"kept" * 1024)
    python(
        f"""
import mmap, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
descriptor = os.open({str(file)!r}, os.O_RDWR)
os.ftruncate(descriptor, 16 * mmap.PAGESIZE)
mapped = mmap.mmap(descriptor, 16 * mmap.PAGESIZE)
os.ftruncate(descriptor, 4096)
anonymous = mmap.mmap(-1, mmap.PAGESIZE)
anonymous[:5] = b"hello"
assert len([o for o in clone.inspect(()) if o.remedy == "privatize"]) == 2
names = clone.privatize_shared_mappings()
assert {str(file)!r} in names and len(names) == 2, names
assert mapped[:4096] == b"kept" * 1024 and mapped[-1] == 0 and anonymous[:5] == b"hello"
mapped[:4] = anonymous[:4] = b"mine"
def act():
    clone.revive()
    mapped[:4] = anonymous[:4] = b"ours"
    return True
assert child_says(act)
assert mapped[:4] == anonymous[:4] == b"mine"
assert os.pread(descriptor, 4, 0) == b"kept"
assert not [o for o in clone.inspect(()) if o.kind == "mapping"]
"""
    )


def test_a_file_open_for_writing_is_copied(python: Python, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    python(
        f"""
import fcntl
descriptor, only = os.open({str(file)!r}, os.O_RDWR | os.O_APPEND), os.open({str(file)!r}, os.O_WRONLY)
os.unlink({str(file)!r})
assert os.read(descriptor, 4) == b"0123"
def act():
    clone.revive()
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    clone.renew((descriptor, only))
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) == flags and not os.get_inheritable(descriptor)
    os.write(only, b"x")
    found = os.read(descriptor, 100)
    os.write(descriptor, b"more")
    return found.decode(), os.pread(only, 100, 0).decode(), os.pread(descriptor, 100, 0).decode()
assert child_says(act) == ["456789", "x123456789", "0123456789more"]
assert os.pread(descriptor, 100, 0) == b"0123456789"
"""
    )


def test_a_reopened_file_has_an_offset_of_its_own(python: Python, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    python(
        f"""
import fcntl
descriptor = os.open({str(file)!r}, os.O_RDONLY | os.O_APPEND)
os.unlink({str(file)!r})
assert os.read(descriptor, 4) == b"0123"
def act():
    clone.revive()
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    for obstacle in clone.inspect(()):
        if obstacle.remedy == "reopen":
            clone.renew([obstacle.fd])
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) == flags and not os.get_inheritable(descriptor)
    return os.read(descriptor, 100).decode()
assert child_says(act) == "456789"
assert os.read(descriptor, 100) == b"456789"
"""
    )


def test_what_threads_wait_for_events_with_is_made_again(python: Python) -> None:
    """An epoll set that watches event descriptors and another set, with a thread in epoll_wait: each child's own."""
    python(
        """
import queue, select, threading
woken, semaphore = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), os.eventfd(5, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
inner, outer = select.epoll(), select.epoll()
inner.register(woken, select.EPOLLIN | select.EPOLLET)
outer.register(inner.fileno(), select.EPOLLIN)
os.set_inheritable(semaphore, True)
seen = queue.Queue()
def wait():
    while True:
        outer.poll()
        for fd, _ in inner.poll(0):
            seen.put((os.getpid(), fd, os.eventfd_read(fd)))
threading.Thread(target=wait, daemon=True).start()
os.eventfd_write(woken, 3)
assert seen.get(timeout=30) == (os.getpid(), woken, 3)
renewed = [o.fd for o in clone.inspect(()) if o.remedy == "remake"]
assert sorted(renewed) == sorted([woken, semaphore, inner.fileno(), outer.fileno()])
def act():
    clone.renew(renewed)
    clone.revive()
    assert [os.eventfd_read(semaphore) for _ in range(5)] == [1] * 5
    assert os.get_inheritable(semaphore) and not os.get_inheritable(woken)
    os.eventfd_write(woken, 7)
    return seen.get(timeout=30) == (os.getpid(), woken, 7)
for _ in range(20):
    assert child_says(act)
assert seen.empty() and [os.eventfd_read(semaphore) for _ in range(5)] == [1] * 5
os.eventfd_write(woken, 9)
assert seen.get(timeout=30) == (os.getpid(), woken, 9)
"""
    )


def test_a_set_that_watches_what_is_closed_cannot_be_made_again(python: Python) -> None:
    python(
        """
import select
reader, writer = os.pipe()
epoll = select.epoll()
epoll.register(reader, select.EPOLLIN)
other = os.dup(reader)
os.dup2(os.open("/dev/null", os.O_RDONLY), reader)
assert [o.remedy for o in clone.inspect(()) if o.kind == "epoll"] == ["refuse"]
"""
    )


def test_a_pipe_of_which_both_ends_are_here_is_made_again(python: Python) -> None:
    """With one, a thread wakes another: each child's own, with what is in it, its size and its flags."""
    python(
        """
import fcntl, queue, threading
reader, writer = os.pipe()
full, into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
again = os.dup(into)
fcntl.fcntl(full, 1031, 1 << 16 << 1)  # F_SETPIPE_SZ
os.set_inheritable(full, True)
packets, sent = os.pipe2(os.O_DIRECT)
os.write(sent, b"one"), os.write(sent, b"two")
os.write(into, b"x" * 100000)
alone = os.pipe()
os.close(alone[1])
seen = queue.Queue()
def wait():
    while True:
        said = os.read(reader, 100)
        seen.put((os.getpid(), said))
threading.Thread(target=wait, daemon=True).start()
os.write(writer, b"first")
assert seen.get(timeout=30) == (os.getpid(), b"first")
renewed = [o.fd for o in clone.inspect(()) if o.remedy == "remake"]
assert sorted(renewed) == sorted([reader, writer, full, into, again, packets, sent]), renewed
assert [o.remedy for o in clone.inspect({into, again}) if o.fd == full] == ["refuse"]
assert [o.remedy for o in clone.inspect(()) if o.fd == alone[0]] == ["refuse"]
def act():
    clone.renew(renewed)
    clone.revive()
    assert os.get_inheritable(full) and not os.get_inheritable(into)
    assert not os.get_blocking(into) and os.get_blocking(writer)
    assert os.read(packets, 100) == b"one" and os.read(packets, 100) == b"two"
    os.write(again, b"y")
    assert b"".join(iter(lambda: os.read(full, 1 << 16) if read_some(full) else b"", b"")) == b"x" * 100000 + b"y"
    assert fcntl.fcntl(full, 1032) == 1 << 17
    os.write(writer, b"mine")
    return seen.get(timeout=30) == (os.getpid(), b"mine")
def read_some(fd):
    import select
    return bool(select.select([fd], [], [], 0)[0])
for _ in range(10):
    assert child_says(act)
assert seen.empty()
os.write(writer, b"still")
assert seen.get(timeout=30) == (os.getpid(), b"still")
assert os.read(packets, 100) == b"one" and len(os.read(full, 1 << 17)) == 100000
"""
    )


def test_one_file_s_many_descriptors_and_mappings_are_named_once() -> None:
    device = [Obstacle("device", "/dev/x", n, None, 0, "refuse") for n in range(9)]
    maps = [Obstacle("device", "/dev/x", None, (n, n + 1), 3, "refuse") for n in range(2)]
    other = Obstacle("socket", "socket:[1]", 12, None, 0, "refuse")
    assert named([*device, other, *maps]) == (
        "descriptors 0, 1, 2, 3, ... and 2 mappings (device: /dev/x); descriptor 12 (socket: socket:[1])"
    )
    assert named([other]) == "descriptor 12 (socket: socket:[1])"
    assert named(device[:2]) == "descriptors 0, 1 (device: /dev/x)"
    assert named(maps) == "2 mappings (device: /dev/x)"
