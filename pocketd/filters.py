"""The system calls that a worker may make, as a filter for the kernel (seccomp(2)), compiled once by libseccomp.

The list began as what podman and docker allow a container without capabilities (containers/common, seccomp.json), less
what such a worker has no use for: mounts, namespaces, tracing, other processes' memory and descriptors, keyrings,
io_uring, and the older io_setup and its like, as all users share one count of what they may have (fs.aio-max-nr). Where
an argument decides, the rule says which values are let through; `openat2`, `clone3` and io_uring pass theirs in memory,
where no filter sees them, so they are answered as by a kernel that lacks them, and libc falls back.
"""

from __future__ import annotations

import errno
import functools
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from nsutil import namespaces
from pocketd.wire import Error

_FILES = """
    access chdir chown close close_range copy_file_range dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate fchdir
    fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstatfs fsync ftruncate
    futimesat getcwd getdents getdents64 getxattr inotify_add_watch inotify_init inotify_init1 inotify_rm_watch lchown
    lgetxattr link linkat listxattr llistxattr lremovexattr lseek lsetxattr lstat newfstatat pipe pipe2 pread64 preadv
    preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename renameat renameat2
    rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync sync_file_range syncfs tee truncate umask
    unlink unlinkat utime utimensat utimes write writev name_to_handle_at
"""
_MEMORY = """
    brk madvise mbind membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect mremap msync munlock
    munlockall munmap pkey_alloc pkey_free pkey_mprotect get_mempolicy set_mempolicy shmat shmctl shmdt shmget
"""
_PROCESSES = """
    arch_prctl capget capset execve execveat exit exit_group fork futex futex_waitv get_robust_list get_thread_area
    getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit
    getrusage getsid gettid getuid ioprio_get ioprio_set kill pidfd_open pidfd_send_signal prctl prlimit64
    process_mrelease restart_syscall rseq sched_get_priority_max sched_get_priority_min sched_getaffinity
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid
    setfsuid setgid setgroups setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid
    sysinfo tgkill times tkill uname vfork wait4 waitid landlock_add_rule landlock_create_ruleset
    landlock_restrict_self
"""
_SIGNALS_AND_TIME = """
    alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep pause rt_sigaction rt_sigpending
    rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo setitimer sigaltstack
    signalfd signalfd4 time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create
    timerfd_gettime timerfd_settime adjtimex clock_adjtime
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 poll ppoll pselect6 select
"""
_TALKING = """
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg sendmsg
    sendto setsockopt shutdown getrandom
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
    msgctl msgget msgrcv msgsnd semctl semget semop semtimedop
"""
ALLOWED = " ".join((_FILES, _MEMORY, _PROCESSES, _SIGNALS_AND_TIME, _WAITING, _TALKING)).split()

# Refused as not permitted. What stands in neither list is answered as by a kernel that does not know it (ENOSYS).
REFUSED = """
    acct add_key bpf chroot clock_settime create_module delete_module fanotify_init fanotify_mark finit_module fsconfig
    fsmount fsopen fspick get_kernel_syms init_module ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie
    memfd_secret migrate_pages modify_ldt mount mount_setattr move_mount move_pages nfsservctl open_by_handle_at
    open_tree perf_event_open pidfd_getfd pivot_root process_madvise process_vm_readv process_vm_writev ptrace
    query_module quotactl quotactl_fd reboot remap_file_pages request_key setdomainname sethostname setns settimeofday
    swapoff swapon sysfs syslog umount umount2 unshare uselib userfaultfd ustat vhangup vmsplice
""".split()

# Of the refused, what templates do themselves, or their children until the filters are installed: a worker takes its
# place by mounts and namespaces; a live fork reads its own memory by process_vm_readv (livefork.c).
_TEMPLATES = """
    keyctl mount mount_setattr move_mount open_tree pivot_root process_vm_readv sethostname setns umount2 unshare
""".split()

_SETUID, _SETGID = 0o4000, 0o2000
_CREATES = (0o100, 0o20000000)  # O_CREAT, and the bit of O_TMPFILE that is its own
# Calls that set a file's mode: the argument with the mode, and the one with the flags that decide whether it counts.
MODES: dict[str, tuple[int, int | None]] = {
    "chmod": (1, None), "fchmod": (1, None), "fchmodat": (2, None), "fchmodat2": (2, None), "creat": (1, None),
    "mkdir": (1, None), "mkdirat": (2, None), "mknod": (1, None), "mknodat": (2, None), "open": (2, 1),
    "openat": (3, 2),
}  # fmt: skip
# socket(2): local, inet and inet6, and rtnetlink alone of AF_NETLINK. No vsock, which no net namespace bounds.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0
_AF_MAX = 64
_PERSONALITIES = (
    0x0,
    0x8,
    0x20000,
    0x20008,
    0xFFFFFFFF,
)  # as containers/common: PER_LINUX, PER_LINUX32, UNAME26, query
# Terminals: typing for others (TIOCSTI, and TIOCLINUX's selections), and line disciplines, which load modules.
_IOCTLS = (0x5412, 0x541C, 0x5423)
_ALL = 0xFFFFFFFF  # the kernel looks at the low half of an int argument alone, and so must a rule


class _Add(Protocol):
    def __call__(self, action: int, name: str, *arguments: tuple[int, int, int]) -> None: ...


def compiled(*, clone3: bool = False) -> list[bytes]:
    """The filters for this machine's workers, in the order of their installation: instructions of classic BPF.

    `clone3`: for a pocket's template, which forks into its sessions' cgroups. What it could ask for beyond that wants a
    capability, or a user namespace, and its own lets none be made in it (runtime.confinement.seal_off). Raises Error
    where libseccomp is missing.
    """
    return list(_compiled(clone3))


def _library() -> Any:
    try:
        import pyseccomp
    except RuntimeError:
        raise Error("seccomp", "libseccomp.so.2 is missing; as root: apt-get install libseccomp2") from None
    return pyseccomp


@functools.cache
def _compiled(clone3: bool) -> tuple[bytes, ...]:
    library = _library()

    def allow(library: Any, add: _Add) -> None:
        _allow(library, add)
        if clone3:
            add(library.ALLOW, "clone3")

    return _program(library, library.ERRNO(errno.ENOSYS), allow), _program(library, library.ALLOW, _forbid)


@functools.cache
def of_service() -> list[bytes]:
    """The filter of a service's init, which all in the service inherit: what neither a template nor a worker calls.

    By number alone, so that the kernel remembers what it lets through and runs no filter for it (seccomp's bitmap).
    """
    library = _library()
    return [_program(library, library.ALLOW, _refuse)]


def _program(library: Any, otherwise: int, rules: Callable[[Any, _Add], None]) -> bytes:
    found = library.SyscallFilter(otherwise)
    found.set_attr(library.Attr.ACT_BADARCH, library.ERRNO(errno.ENOSYS))  # 32-bit and x32 programs do not run
    found.set_attr(library.Attr.CTL_OPTIMIZE, 2)  # a binary tree, not a chain

    def add(action: int, name: str, *arguments: tuple[int, int, int]) -> None:
        """A rule for a call whose arguments are, under a mask, equal to a value: (number, mask, value)."""
        try:
            number = library.resolve_syscall(library.Arch.NATIVE, name)
        except ValueError:
            return  # newer than this libseccomp, so the filter does not know it either
        if number >= 0:  # negative: a call that other machines have
            found.add_rule(action, number, *(library.Arg(n, library.MASKED_EQ, m, value) for n, m, value in arguments))

    rules(library, add)
    with tempfile.TemporaryFile() as file:
        found.export_bpf(file)
        file.seek(0)
        return file.read()


def _refuse(library: Any, add: _Add) -> None:
    for name in REFUSED:
        if name not in _TEMPLATES:
            add(library.ERRNO(errno.EPERM), name)
    for name in ("io_uring_setup", "io_uring_enter", "io_uring_register", "io_setup"):
        add(library.ERRNO(errno.ENOSYS), name)


def _allow(library: Any, add: _Add) -> None:
    """What is allowed; all else is unknown (ENOSYS) or refused (EPERM)."""
    for name in (*ALLOWED, *MODES, "clone", "ioctl"):
        add(library.ALLOW, name)
    for name in REFUSED:
        add(library.ERRNO(errno.EPERM), name)
    for family in (_AF_UNIX, _AF_INET, _AF_INET6):
        add(library.ALLOW, "socket", (0, _ALL, family))
    add(library.ALLOW, "socket", (0, _ALL, _AF_NETLINK), (2, _ALL, _NETLINK_ROUTE))
    add(library.ALLOW, "socketpair", (0, _ALL, _AF_UNIX))
    for persona in _PERSONALITIES:
        add(library.ALLOW, "personality", (0, _ALL, persona))


def _forbid(library: Any, add: _Add) -> None:
    """Of what is allowed, the values that are not. Of two filters' errors the kernel returns this one's, the later."""
    for flag in namespaces.ALL:
        add(library.ERRNO(errno.EPERM), "clone", (0, flag, flag))
    for name, (mode, flags) in MODES.items():
        for bit in (_SETUID, _SETGID):
            if flags is None:
                add(library.ERRNO(errno.EPERM), name, (mode, bit, bit))
            else:
                for creates in _CREATES:
                    add(library.ERRNO(errno.EPERM), name, (flags, creates, creates), (mode, bit, bit))
    for request in _IOCTLS:
        add(library.ERRNO(errno.EPERM), "ioctl", (1, _ALL, request))
    for family in set(range(_AF_MAX)) - {_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK}:
        add(library.ERRNO(errno.EAFNOSUPPORT), "socket", (0, _ALL, family))
    for family in set(range(_AF_MAX)) - {_AF_UNIX}:
        add(library.ERRNO(errno.EAFNOSUPPORT), "socketpair", (0, _ALL, family))
