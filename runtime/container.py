"""A service container: namespaces, a read-only root, and PID 1 in it.

Run by pocketd as a fresh process, born in the service's SCOPE: `python -m runtime.container`, with one SEQPACKET socket
as descriptor 0 on which the specification arrives with its descriptors. It makes the container, forks `runtime.init` as
PID 1 into SCOPE/init, says so, and ends; what goes wrong is said on the same socket. The daemon's interpreter runs
init, so a root file system needs no Python of its own.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
from dataclasses import dataclass
from typing import Any, Dict, NoReturn, Tuple

from nsutil import clone, mounts, namespaces, privileges, seccomp
from pocketd import wire
from runtime import confinement, init

# What `rootfs = "host"` shows of the host's /etc. None of these holds a secret on any distribution.
ETC = (
    "alternatives", "adjtime", "bash.bashrc", "debian_version", "environment", "fonts", "group", "host.conf", "hosts",
    "inputrc", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "locale.alias", "locale.conf", "localtime", "login.defs",
    "magic", "mime.types", "networks", "nsswitch.conf", "os-release", "passwd", "profile", "protocols", "python3",
    "python3.11", "python3.12", "python3.13", "resolv.conf", "rpc", "services", "shells", "ssl/certs",
    "ssl/openssl.cnf", "terminfo", "timezone", "vulkan", "xdg", "OpenCL", "ca-certificates", "pki/tls/certs",
)  # fmt: skip
SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Made fresh for every service; never the host's nor the root file system's own.
OWN = ("dev", "proc", "sys", "run", "tmp", "pocket")
# Where pockets' directories mostly are: a worker needs no root of its own to show them at their own paths.
PLACES = ("home", "root", "srv", "opt", "mnt", "media", "var")
MASKED = ("/sys/dev/block", "/sys/firmware", "/sys/fs/selinux")  # as podman does in its containers
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
LIBRARY = "/run/pocketd/lib"
# What init and its templates may. Only KILL is for them, since init passes signals on: by the others their workers take
# their places, before they give all up. SYS_ADMIN: mounts, namespaces, the pid (set_tid) of a clone. NET_ADMIN: a
# loopback interface. SETUID, SETGID, SETPCAP: an identity. CHOWN, FOWNER, MKNOD: homes, credentials, devices.
# SYS_CHROOT: setns(2) to a mount namespace (runtime.holding). DAC_OVERRIDE: directories, files of a service's python
# and cgroups that are not root's.
KEPT = frozenset(
    (
        *(privileges.CAP_SYS_ADMIN, privileges.CAP_NET_ADMIN, privileges.CAP_SETUID, privileges.CAP_SETGID),
        *(privileges.CAP_SETPCAP, privileges.CAP_CHOWN, privileges.CAP_FOWNER, privileges.CAP_MKNOD),
        *(privileges.CAP_DAC_OVERRIDE, privileges.CAP_KILL, privileges.CAP_SYS_CHROOT),
    )
)


class ContainerError(Exception):
    """The container cannot be made as it was asked for; the text says what to change."""


@dataclass(frozen=True)
class Specification:
    """What pocketd asks for. Paths are the host's, checked by the configuration before."""

    name: str
    rootfs: str  # "host" or a directory
    shown: Tuple[str, ...]  # further host paths to show where they are: the python environment
    library: Tuple[Tuple[str, str], ...]  # (host path, name beneath LIBRARY): our own code for templates
    place: str  # a directory of the host on which the new root is mounted, in this mount namespace only
    filters: Tuple[bytes, ...]  # what no process of the service may call (pocketd.filters)

    @classmethod
    def unwire(cls, m: Dict[str, Any]) -> Specification:
        pairs = tuple((str(a), str(b)) for a, b in m["library"])
        return cls(m["name"], m["rootfs"], tuple(m["shown"]), pairs, m["place"], tuple(m["filters"]))


def build_root(spec: Specification) -> None:
    """Mount the service's root at spec.place: a small tmpfs with read-only binds, and directories to mount on."""
    root = spec.place
    mounts.tmpfs(root, size=1 << 20, flags=mounts.MS_NOSUID)
    if spec.rootfs == "host":
        show_host(root)
    else:
        show_directory(spec.rootfs, root)
    for name in OWN:
        os.makedirs(f"{root}/{name}", exist_ok=True)
    for name in PLACES:
        os.makedirs(f"{root}/{name}", exist_ok=True)
    mounts.tmpfs(f"{root}/tmp", size=64 << 20, mode=0o1777)
    for path in spec.shown:
        show_path(path, root)
    make_devices(f"{root}/dev")
    os.makedirs(f"{root}{confinement.EMPTY}")
    mounts.mount("sysfs", f"{root}/sys", "sysfs", mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV)
    for path in MASKED:
        if os.path.isdir(f"{root}{path}"):
            mounts.bind(f"{root}{confinement.EMPTY}", f"{root}{path}")
    for path, name in spec.library:
        target = f"{root}{LIBRARY}/{name}"
        mounts.point(target, path)
        mounts.bind(path, target, extra=mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV)


def show_host(root: str) -> None:
    for name in SYSTEM:
        bind_entry(f"/{name}", f"{root}/{name}")
    for name in ETC:
        bind_entry(f"/etc/{name}", f"{root}/etc/{name}")


def show_directory(directory: str, root: str) -> None:
    if not os.path.isdir(directory):
        raise ContainerError(f"rootfs = {directory!r} is not a directory; give an unpacked root file system or 'host'")
    for entry in sorted(os.listdir(directory)):
        if entry not in OWN:
            bind_entry(f"{directory}/{entry}", f"{root}/{entry}")


def bind_entry(source: str, target: str) -> None:
    """One entry, read-only and nosuid, with mounts beneath it. A link is copied; what is missing is left out."""
    try:
        status = os.lstat(source)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        link = os.readlink(source)
        if not os.path.lexists(target):
            os.symlink(link, target)
        # /etc/localtime -> /usr/share/... works as a link; a link out of what is shown becomes what it leads to
        if os.path.exists(source) and not visible(os.path.realpath(source)):
            os.unlink(target)
            bind_entry(os.path.realpath(source), target)
        return
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        return
    mounts.point(target, source)
    flags = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV
    mounts.bind(source, target, extra=flags, recursive=True)


def visible(path: str) -> bool:
    return path.split("/")[1] in (*SYSTEM, "etc")


def show_path(path: str, root: str) -> None:
    """Show a host path where it is, with each symbolic link on the way to it; its parents become plain directories."""
    if not path.startswith("/") or path == "/":
        raise ContainerError(f"cannot show {path!r} in a service")
    inside = f"{root}{path}"
    if os.path.lexists(inside) and spec_covers(root, path):
        return
    bind_entry(path, inside)


def spec_covers(root: str, path: str) -> bool:
    """Whether `path` inside `root` is already the host's own file."""
    try:
        return os.path.samefile(f"{root}{path}", path)
    except OSError:
        return False


def make_devices(dev: str) -> None:
    mounts.tmpfs(dev, size=1 << 16, flags=mounts.MS_NOSUID)
    for name in DEVICES:
        with open(f"{dev}/{name}", "wb"):
            pass
        tree = mounts.open_tree(f"/dev/{name}")
        mounts.attach(tree, f"{dev}/{name}")
        os.close(tree)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink(f"/proc/self/fd{target}", f"{dev}/{name}")
    os.symlink("pts/ptmx", f"{dev}/ptmx")
    os.mkdir(f"{dev}/shm", 0o1777)
    os.mkdir(f"{dev}/pts")
    os.mkdir(f"{dev}/mqueue")


def main() -> None:
    talk = socket.socket(fileno=os.dup(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    message, fds = wire.receive(talk)
    try:
        spec = Specification.unwire(message)
        with fds:
            listener, log, leaf = fds.take(), fds.take(), fds.take()
        os.setsid()
        os.umask(0o022)
        n = namespaces
        # Not CLONE_NEWCGROUP: where cgroup2 is mounted nsdelegate, as systemd does, a template could then not fork into
        # an adopted cgroup (ENOENT, also for root). Each worker has a cgroup namespace of its own, rooted at its leaf.
        n.unshare(n.CLONE_NEWNS | n.CLONE_NEWIPC | n.CLONE_NEWUTS | n.CLONE_NEWNET)
        mounts.private()
        namespaces.set_hostname(spec.name)
        namespaces.loopback_up()
        build_root(spec)
        child = clone.fork(flags=n.CLONE_NEWPID, cgroup=leaf)
        if child is None:
            os.close(leaf)
            become_init(spec, talk, listener, log)
    except Exception as e:
        refuse(talk, e)
        sys.exit(1)


def refuse(talk: socket.socket, e: Exception) -> None:
    wire.send(talk, {"op": "failed", "error": wire.Error("container", f"{type(e).__name__}: {e}").wire()})


def become_init(spec: Specification, talk: socket.socket, listener: int, log: int) -> NoReturn:
    """PID 1: its own /proc, the read-only root, no way back, and the privileges that its workers begin with."""
    try:
        mounts.mount("proc", f"{spec.place}/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
        mounts.pivot(spec.place)
        mounts.set_attributes(mounts.AT_FDCWD, mounts.MOUNT_ATTR_RDONLY, path="/")
        confinement.Masks().apply()
        privileges.set_name("pocket-init")
        privileges.drop_bounding_set(KEPT)
        privileges.drop_capabilities(KEPT)
        privileges.no_new_privileges()
        seccomp.install(spec.filters)
        wire.send(talk, {"op": "made"})
    except Exception as e:
        refuse(talk, e)
        os._exit(1)
    talk.close()
    try:
        init.main(socket.socket(fileno=listener), log)
    except BaseException as e:
        os.write(log, f"init: {type(e).__name__}: {e}\n".encode())
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
