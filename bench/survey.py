"""What a confined process can still do, found out by trying: run inside a worker, a container, or nothing at all.

Prints one JSON object. The standard library alone, so that any Python can run it anywhere. Nothing it tries does harm:
system calls are made with arguments that cannot be right, each in a child of its own with an alarm.
"""

import ctypes
import errno
import json
import os
import signal
import socket
import sys

HIGHEST = 462  # mseal, Linux 6.10: the last that the tables of this list's time have
BLOCKING = 2  # seconds until a call that waits is taken for one that is allowed
SKIPPED = {  # calls that end or stop the caller, whatever their arguments
    15: "rt_sigreturn", 56: "clone", 57: "fork", 58: "vfork", 60: "exit", 231: "exit_group", 34: "pause",
}  # fmt: skip
PROBED = (
    "/proc/acpi", "/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/kcore", "/proc/keys", "/proc/kmsg",
    "/proc/latency_stats", "/proc/sched_debug", "/proc/scsi", "/proc/sys", "/proc/sysrq-trigger", "/proc/timer_list",
    "/sys/dev/block", "/sys/firmware", "/sys/fs/cgroup", "/sys/fs/selinux", "/sys/kernel/security",
)  # fmt: skip
PLACES = (
    "/", "/dev", "/dev/mqueue", "/dev/shm", "/etc", "/home", "/mnt", "/opt", "/pocket", "/proc", "/root", "/run",
    "/run/lock", "/srv", "/sys", "/sys/fs/cgroup", "/tmp", "/usr", "/usr/local", "/usr/local/lib", "/var", "/var/lib",
    "/var/tmp",
)  # fmt: skip
libc = ctypes.CDLL(None, use_errno=True)


def call(number):
    """How a system call with impossible arguments ends: an errno's name, "0", or how its process ended."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(BLOCKING)
        bad = ctypes.c_long(-1)
        result = libc.syscall(ctypes.c_long(number), bad, bad, bad, bad, bad, bad)
        code = ctypes.get_errno() if result < 0 else 0
        os.write(write, (errno.errorcode.get(code, str(code)) if code else "0").encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 100).decode()
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if said:
        return said
    return "waits" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else f"ended {status}"


def status():
    with open("/proc/self/status") as file:
        found = dict(line.split(":\t", 1) for line in file if ":\t" in line)
    keys = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
    return {key: found.get(key, "").strip() for key in keys}


def state(path):
    """Whether something can be learnt or changed at a path: "absent", "empty", "closed", "readable", "writable"."""
    try:
        if os.path.isdir(path):
            entries = os.listdir(path)
            if not entries:
                return "empty"
            deep = next((os.path.join(path, e) for e in entries), path)
            return "writable" if os.access(path, os.W_OK) and writes(path) else "readable" if deep else "empty"
        if not os.path.lexists(path):
            return "absent"
        try:
            os.close(os.open(path, os.O_WRONLY))
            if os.stat(path).st_rdev != os.makedev(1, 3):
                return "writable"
        except OSError:
            pass
        with open(path, "rb") as file:
            return "readable" if file.read(1) else "empty"
    except OSError:
        return "closed"


def writes(directory):
    name = f"{directory}/survey-{os.getpid()}"
    try:
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        os.unlink(name)
        return True
    except OSError:
        return False


def writable_places():
    """The usual directories in which a file can be made, and how many files of /proc/sys can be written."""
    places = [place for place in PLACES if writes(place)]
    sysctls = 0
    for top, _, files in os.walk("/proc/sys"):
        for name in files:
            try:
                os.close(os.open(os.path.join(top, name), os.O_WRONLY))
                sysctls += 1
            except OSError:
                pass
    return places, sysctls


def sockets():
    """Unix sockets that take a connection: by path, and abstract."""
    found = []
    for top, _, files in os.walk("/run"):
        for name in files:
            path = os.path.join(top, name)
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                with socket.socket(socket.AF_UNIX, kind) as s:
                    try:
                        s.connect(path)
                        found.append(path)
                        break
                    except OSError:
                        pass
    try:
        with open("/proc/self/net/unix") as file:
            return found, sum(line.split()[-1].startswith("@") for line in file)
    except OSError as e:
        return found, e.strerror


def setuid_programs():
    """How many setuid programs would gain their owner's id here (an exec away: nosuid and no_new_privs stop them)."""
    count = 0
    for directory in ("/usr/bin", "/usr/sbin", "/bin", "/sbin"):
        try:
            names = os.listdir(directory)
        except OSError:
            continue
        for name in names:
            try:
                path = os.path.join(directory, name)
                if os.lstat(path).st_mode & 0o4000 and not os.statvfs(path).f_flag & os.ST_NOSUID:
                    count += 1
            except OSError:
                pass
    return count


def main():
    places, sysctls = writable_places()
    by_path, abstract = sockets()
    with open("/proc/self/uid_map") as file:
        uid_map = [line.split() for line in file]
    print(
        json.dumps(
            {
                "status": status(),
                "uid_map": uid_map,
                "namespaces": {
                    kind: os.readlink(f"/proc/self/ns/{kind}") for kind in sorted(os.listdir("/proc/self/ns"))
                },
                "calls": {n: call(n) for n in range(HIGHEST + 1) if n not in SKIPPED},
                "paths": {path: state(path) for path in PROBED},
                "writable": places,
                "sysctls": sysctls,
                "sockets": by_path,
                "abstract": abstract,
                "interfaces": sorted(name for _, name in socket.if_nameindex()),
                "devices": sorted(os.listdir("/dev")),
                "setuid": setuid_programs(),
                "processes": sum(name.isdigit() for name in os.listdir("/proc")),
                "descriptors": sorted(os.listdir("/proc/self/fd")),
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
