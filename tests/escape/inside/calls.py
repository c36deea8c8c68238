"""Attempts by system calls that no pocket has a use for: tracing, keys, namespaces, mounts, the kernel's switches."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import tempfile

from tests.escape.inside.kernel import AT_FDCWD, call, checked, in_child, libc, victim

# linux/ptrace.h, linux/sched.h, linux/keyctl.h, linux/mount.h, linux/userfaultfd.h
_TRACEME, _SEIZE = 0, 0x4206
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWUSER = 0x20000, 0x04000000, 0x10000000
_GET_KEYRING_ID, _SESSION_KEYRING, _PROCESS_KEYRING = 0, -3, -2
_MS_REMOUNT_BIND, _MNT_DETACH, _OPEN_TREE_CLONE = 0x1020, 2, 1
_UFFD_USER_MODE_ONLY, _FAN_REPORT_FID = 1, 0x200


def trace_a_child() -> bool:
    with victim() as pid:
        return call("ptrace", _SEIZE, pid, 0, 0) == 0


def be_traced() -> bool:
    return in_child(lambda: call("ptrace", _TRACEME, 0, 0, 0)) == 0


def read_a_child() -> str:
    """The child has this process's memory, a copy."""
    text, into = ctypes.create_string_buffer(b"of the child"), ctypes.create_string_buffer(12)
    local = struct.pack("QQ", ctypes.addressof(into), 12)
    remote = struct.pack("QQ", ctypes.addressof(text), 12)
    with victim() as pid:
        call("process_vm_readv", pid, local, 1, remote, 1, 0)
    return into.raw.decode()


def write_a_child() -> int:
    text = ctypes.create_string_buffer(b"changed")
    vector = struct.pack("QQ", ctypes.addressof(text), 7)
    with victim() as pid:
        return call("process_vm_writev", pid, vector, 1, vector, 1, 0)


def take_a_descriptor() -> bool:
    with victim() as pid:
        taken = call("pidfd_getfd", os.pidfd_open(pid), 0, 0)
    os.close(taken)
    return True


def compare_with_a_child() -> bool:
    with victim() as pid:
        return call("kcmp", os.getpid(), pid, 1, 0, 0) >= 0  # KCMP_VM


def advise_by_pidfd() -> bool:
    page = mmap.mmap(-1, 4096)
    at = struct.pack("QQ", ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096)
    return call("process_madvise", os.pidfd_open(os.getpid()), at, 1, 20, 0) == 4096  # MADV_COLD


def move_pages() -> bool:
    page = mmap.mmap(-1, 4096)
    page[0] = 1
    at = struct.pack("Q", ctypes.addressof(ctypes.c_char.from_buffer(page)))
    return call("move_pages", 0, 1, at, 0, ctypes.create_string_buffer(4), 0) == 0


def name_the_session_keyring() -> bool:
    return call("keyctl", _GET_KEYRING_ID, _SESSION_KEYRING, 1) > 0


def add_a_key() -> bool:
    return call("add_key", b"user", b"escape", b"x", 1, _PROCESS_KEYRING) > 0


def request_a_key() -> bool:
    with contextlib.suppress(OSError):
        call("add_key", b"user", b"escape", b"x", 1, _PROCESS_KEYRING)
    return call("request_key", b"user", b"escape", 0, 0) > 0


def make_a_map() -> bool:
    attributes = struct.pack("IIII112x", 2, 4, 4, 1)  # BPF_MAP_TYPE_ARRAY
    return call("bpf", 0, attributes, len(attributes)) > 0


def handle_faults() -> bool:
    os.close(call("userfaultfd", _UFFD_USER_MODE_ONLY))
    return True


def make_a_ring() -> bool:
    os.close(call("io_uring_setup", 1, ctypes.create_string_buffer(120)))
    return True


def make_an_aio_context() -> bool:
    context = ctypes.c_ulong(0)
    call("io_setup", 1, ctypes.byref(context))
    call("io_destroy", context.value)
    return True


def count_events() -> bool:
    # struct perf_event_attr: type software, size, config cpu-clock; disabled, exclude_kernel, exclude_hv
    attributes = struct.pack("IIQ24xQ64x", 1, 112, 0, 1 | 1 << 5 | 1 << 6)
    os.close(call("perf_event_open", attributes, 0, -1, -1, 0))
    return True


def unshare(flag: int) -> bool:
    return call("unshare", flag) == 0


def clone(flag: int) -> bool:
    pid = call("clone", flag | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def clone3(flag: int) -> bool:
    arguments = ctypes.create_string_buffer(struct.pack("QQQQQQQQ", flag, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    pid = call("clone3", arguments, 64)
    if pid == 0:
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def join_by_file() -> bool:
    with open("/proc/self/ns/uts") as file:
        return call("setns", file.fileno(), 0) == 0


def join_by_pidfd() -> bool:
    return call("setns", os.pidfd_open(1), _CLONE_NEWUTS) == 0


def map_root() -> bool:
    """Be uid 0 of a user namespace: a new one where there may be one, else the one that is there."""
    uid = os.geteuid()

    def write() -> None:
        with contextlib.suppress(OSError):
            call("unshare", _CLONE_NEWUSER)
        with open("/proc/self/uid_map", "w") as file:
            file.write(f"0 {uid} 1")

    return in_child(write) == 0


def mount_tmpfs() -> bool:
    return call("mount", b"none", b"/tmp", b"tmpfs", 0, 0) == 0


def mount_cgroups() -> bool:
    """cgroup2 of one's own cgroup namespace, and a process moved there."""
    place = tempfile.mkdtemp().encode()
    try:
        call("mount", b"none", place, b"cgroup2", 0, 0)
        with open(place + b"/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
        call("umount2", place, _MNT_DETACH)
    finally:
        os.rmdir(place)
    return True


def mount_proc() -> bool:
    """A /proc without the masks."""
    return call("mount", b"proc", b"/tmp", b"proc", 0, 0) == 0


def bind() -> bool:
    return call("mount", b"/", b"/tmp", b"", 0x1000, 0) == 0


def remount_writable() -> bool:
    return call("mount", b"none", b"/proc", b"", _MS_REMOUNT_BIND, 0) == 0


def uncover() -> bool:
    return call("umount2", b"/proc", _MNT_DETACH) == 0


def pivot() -> bool:
    with contextlib.suppress(OSError):
        call("mount", b"none", b"/tmp", b"tmpfs", 0, 0)
    os.chdir("/tmp")
    try:
        return call("pivot_root", b".", b".") == 0
    finally:
        with contextlib.suppress(OSError):
            os.chdir("/pocket")


def change_root() -> bool:
    return call("chroot", b"/") == 0


def open_a_file_system() -> bool:
    os.close(call("fsopen", b"tmpfs", 1))
    return True


def copy_a_tree() -> bool:
    os.close(call("open_tree", AT_FDCWD, b"/", _OPEN_TREE_CLONE))
    return True


def move_a_tree() -> bool:
    tree = AT_FDCWD
    with contextlib.suppress(OSError):
        tree = call("open_tree", AT_FDCWD, b"/", _OPEN_TREE_CLONE)
    return call("move_mount", tree, b"", AT_FDCWD, b"/tmp", 4) == 0


def set_mount_writable() -> bool:
    return call("mount_setattr", AT_FDCWD, b"/proc", 0, struct.pack("4Q", 0, 1, 0, 0), 32) == 0


def hear_of_files() -> bool:
    os.close(call("fanotify_init", _FAN_REPORT_FID, 0))
    return True


def open_by_handle() -> str:
    """A file of the mount by its handle, past every directory that leads to it."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"by handle")
        file.flush()
        handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
        call("name_to_handle_at", AT_FDCWD, file.name.encode(), handle, ctypes.create_string_buffer(8), 0)
        mount = os.open(os.path.dirname(file.name), os.O_RDONLY)
        fd = call("open_by_handle_at", mount, handle, os.O_RDONLY)
        return os.read(fd, 100).decode()


def ask_for_quotas() -> bool:
    return call("quotactl", 0x80000100 - (1 << 32), 0, 0, 0) == 0  # QCMD(Q_SYNC, USRQUOTA) of all file systems


def read_the_kernels_log() -> bool:
    return call("syslog", 10, 0, 0) > 0  # SYSLOG_ACTION_SIZE_BUFFER


def swap_on() -> bool:
    return call("swapon", b"/no/such/file", 0) == 0


def load_a_module() -> bool:
    return call("init_module", b"", 0, b"") == 0


def account() -> bool:
    return call("acct", b"/no/such/directory/file") == 0


def restart() -> bool:
    return call("reboot", 0, 0, 0, 0) == 0  # no magic


def name_the_host() -> bool:
    return call("sethostname", b"escaped", 7) == 0


def set_the_clock() -> bool:
    """To nothing: the kernel asks for the right first, and then changes nothing."""
    return call("settimeofday", 0, 0) == 0


def set_the_clock_for_real() -> bool:
    now = ctypes.create_string_buffer(16)
    checked("clock_gettime", libc.clock_gettime(0, now))
    return call("clock_settime", 0, now) == 0


def be_another_personality(persona: int) -> bool:
    """ADDR_NO_RANDOMIZE, ADDR_COMPAT_LAYOUT and READ_IMPLIES_EXEC make the next program an easier prey."""

    def change() -> None:
        call("personality", persona)

    return in_child(change) == 0
