"""What a worker gives up before its first line of app code, while it has one thread: for good, and for all its threads.

In the order that the kernel wants: a user namespace of its own while it still may write the maps, ids and capabilities,
no_new_privs, Landlock, and the system call filter last, since it refuses what the others need.
"""

from __future__ import annotations

import fcntl
import os
import resource
import stat
from typing import Callable, Iterable, List, Sequence, Tuple

from nsutil import landlock, mounts, namespaces, privileges, seccomp
from pocketd.wire import Message

# What podman masks and makes read-only in a container's /proc (containers/common, pkg/config): what tells of the host,
# or sets it. /sys is masked once for the whole service (runtime.container).
_MASKED = (
    "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi",
    "/proc/timer_list", "/proc/timer_stats",
)  # fmt: skip
_READ_ONLY = ("/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
EMPTY = "/run/pocketd/empty"  # a directory with nothing in it (runtime.container)
# Hard limits beyond which no caller's soft limit goes: no real time, and little memory that cannot be swapped.
_LIMITS = ((resource.RLIMIT_RTPRIO, 0), (resource.RLIMIT_NICE, 0), (resource.RLIMIT_MEMLOCK, 8 << 20))


class Masks:
    """What of /proc is hidden or read-only, looked up once, in a template: every proc file system has the same."""

    def __init__(self) -> None:
        self._hidden = [(path, EMPTY if os.path.isdir(path) else "/dev/null") for path in _MASKED if _there(path)]
        self._fixed = [path for path in _READ_ONLY if _there(path)]

    def apply(self) -> None:
        for path, cover in self._hidden:
            mounts.mount(cover, path, None, mounts.MS_BIND)
        for path in self._fixed:
            mounts.mount(path, path, None, mounts.MS_BIND | mounts.MS_REC)
            mounts.set_attributes(mounts.AT_FDCWD, mounts.MOUNT_ATTR_RDONLY, path=path)


def _there(path: str) -> bool:
    return os.path.lexists(path)


def is_way_out(fd: int) -> bool:
    """A directory of another mount namespace is a way up to that one's root, and so is a path opened for no more."""
    return stat.S_ISDIR(os.fstat(fd).st_mode) or bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH)


def confine(message: Message, filters: Sequence[bytes]) -> None:
    """Give up everything. `message`: the worker's orders."""
    for _, step in steps(message, filters):
        step()
    os.close(message["self"])


def steps(message: Message, filters: Sequence[bytes]) -> Tuple[Tuple[str, Callable[[], object]], ...]:
    """Each step with its name, in the one order that works."""
    uid, gid = message["uid"], message["gid"]
    return (
        ("oom_score_adj", lambda: oom(message["self"], 0)),  # before the change of uid, after which the file is root's
        ("limits", limit),
        ("keyring", privileges.new_session_keyring),
        ("no_new_privs", privileges.no_new_privileges),
        ("groups", privileges.leave_groups),
        ("ids", lambda: privileges.become(uid, gid, keep=True)),
        ("user namespace", lambda: alone(uid, gid, message["self"])),
        *((("no user namespace beneath", lambda: seal_off(message["hold"]["sysctl"])),) if "hold" in message else ()),
        ("capabilities", privileges.drop_capabilities),
        ("dumpable", lambda: privileges.dumpable(False)),  # until app code starts
        ("Landlock", lambda: landlock.restrict(*places(message)) if landlock.abi() else None),
        ("seccomp", lambda: seccomp.install(filters)),
    )


def alone(uid: int, gid: int, proc: int) -> None:
    """A user namespace without other ids, where there can be one."""
    if namespaces.own_user(uid, gid, proc):
        privileges.drop_bounding_set()  # full again in a new one


def homes_of(message: Message) -> List[str]:
    """Its caller's home; a pocket's template has one for each caller that its definition names."""
    return message.get("homes") or [message["home"]] if message["home"] or message.get("homes") else []


def seal_off(sysctl: int) -> None:
    """No user namespace can be made in this one any more: a template must be let call clone3, whose flags no filter
    sees, and all others want a capability. `sysctl` (worker.prepare_to_hold) is closed. Raises OSError where this
    process has no user namespace of its own."""
    fd = os.open("user/max_user_namespaces", os.O_WRONLY | os.O_CLOEXEC, dir_fd=sysctl)
    os.close(sysctl)
    os.write(fd, b"0")
    os.close(fd)


def places(message: Message) -> Tuple[List[str], Iterable[str]]:
    """What a worker may change, and what it may write to: devices, and the files of its own processes in /proc."""
    writable = ["/tmp", "/dev/shm", "/dev/mqueue"]
    writable += homes_of(message)
    for place in message["mounts"]:
        if place.get("writable"):
            writable += [path for path in (place["target"], place.get("alias")) if path]
    writable += [f"/proc/self/fd/{fd}" for fd in message.get("hold", {}).get("shown", ())]
    return writable, ("/proc", "/dev")


def limit() -> None:
    for kind, most in _LIMITS:
        soft, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))


def oom(proc: int, score: int) -> None:
    """Workers are killed before their template (design, "Cgroups")."""
    try:
        fd = os.open("oom_score_adj", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)  # open() writes to many pages
        os.write(fd, b"%d" % score)
        os.close(fd)
    except OSError:
        pass  # it was not raised above what an unprivileged process may set
