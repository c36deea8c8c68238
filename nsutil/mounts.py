"""Mounts: the calls, and the few operations that services and workers are made of.

Sources: mount(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2), linux/mount.h.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
import struct
from typing import Iterable

from nsutil.beneath import open_as_named
from nsutil.syscalls import (
    SYS_MOUNT_SETATTR,
    SYS_MOVE_MOUNT,
    SYS_OPEN_TREE,
    SYS_PIVOT_ROOT,
    check,
    libc,
    syscall,
)

# linux/mount.h
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_STRICTATIME = 0x20, 0x1000, 0x4000, 0x40000, 0x1000000
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x4, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_IDMAP = 0x1, 0x2, 0x4, 0x00100000
# linux/fcntl.h
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE = -100, 0x1000, 0x8000


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, data: str | None = None) -> None:
    words = [os.fsencode(w) if w is not None else None for w in (source, target, kind, data)]
    check(libc.mount(words[0], words[1], words[2], flags, words[3]), "mount", f"{kind or 'flags'} on {target}")


def unmount(target: str) -> None:
    """Detach what is mounted at `target`; it goes when nobody uses it any more."""
    check(libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW), "umount2", target)


def private() -> None:
    """Let no mount of this namespace propagate anywhere."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)


def pivot(root: str) -> None:
    """Make `root`, a mount point, the root of this mount namespace and drop the old one."""
    os.chdir(root)
    here = ctypes.c_char_p(b".")
    syscall(SYS_PIVOT_ROOT, here, here, call="pivot_root", detail=root)  # pivot_root(".", "."), see its man page
    unmount(".")
    os.chdir("/")


def open_tree(path: str | bytes, *, at: int = AT_FDCWD, recursive: bool = False) -> int:
    """A detached copy of the mount at `path` (or of descriptor `at` itself, when `path` is empty), from there down.

    Returns a descriptor that the caller owns; closing it before it was attached undoes everything. EINVAL when the
    descriptor belongs to another mount namespace.

    The copy is private. A copy of a shared mount (with systemd every mount of the host is, mount_namespaces(7)) is
    its peer: what was mounted on one worker's copy would appear on the host and in every other worker, and each of
    those twice at the next.
    """
    name = os.fsencode(path)
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (0 if name else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    detail = os.fsdecode(name) or f"descriptor {at}"
    tree = syscall(SYS_OPEN_TREE, at, ctypes.c_char_p(name), flags, call="open_tree", detail=detail)
    try:
        set_attributes(tree, 0, propagation=MS_PRIVATE, recursive=recursive)
    except BaseException:
        os.close(tree)
        raise
    return tree


def set_attributes(
    tree: int,
    set_: int,
    *,
    clear: int = 0,
    propagation: int = 0,
    userns: int | None = None,
    recursive: bool = False,
    path: str = "",
) -> None:
    """Change MOUNT_ATTR_* of a detached tree, or of the mount at `path`. `userns`: see namespaces.id_map."""
    if userns is not None:
        set_ |= MOUNT_ATTR_IDMAP
    block = ctypes.create_string_buffer(struct.pack("4Q", set_, clear, propagation, userns or 0), 32)
    flags = (0 if path else AT_EMPTY_PATH) | (AT_RECURSIVE if recursive else 0)
    name = ctypes.c_char_p(os.fsencode(path))
    syscall(SYS_MOUNT_SETATTR, tree, name, flags, block, 32, call="mount_setattr", detail=path or f"tree {tree}")


def attach(tree: int, target: str) -> None:
    """Attach a detached tree at `target`. The descriptor stays the caller's."""
    empty, name = ctypes.c_char_p(b""), ctypes.c_char_p(os.fsencode(target))
    syscall(SYS_MOVE_MOUNT, tree, empty, AT_FDCWD, name, MOVE_MOUNT_F_EMPTY_PATH, call="move_mount", detail=target)


def attach_as_named(tree: int, target: str) -> None:
    """The same where others have a say in what stands on the way: OSError (ELOOP) if a part of `target` is a link."""
    place = open_as_named(target, os.O_PATH)
    try:
        empty, flags = ctypes.c_char_p(b""), MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
        syscall(SYS_MOVE_MOUNT, tree, empty, place, empty, flags, call="move_mount", detail=target)
    finally:
        os.close(place)


def bind(source: str, target: str, *, read_only: bool = True, extra: int = 0, recursive: bool = False) -> None:
    """Show `source` at `target` as well. `extra`: further MOUNT_ATTR_*."""
    tree = open_tree(source, recursive=recursive)
    try:
        wanted = (MOUNT_ATTR_RDONLY if read_only else 0) | extra
        if wanted:
            set_attributes(tree, wanted, recursive=recursive)
        attach(tree, target)
    finally:
        os.close(tree)


def tmpfs(
    target: str, *, size: int, mode: int = 0o755, flags: int = MS_NOSUID | MS_NODEV, owner: tuple[int, int] = (0, 0)
) -> None:
    """An empty file system of `owner`'s in memory, of at most `size` bytes, charged to the cgroup of who writes."""
    data = f"size={size},mode={mode:o},uid={owner[0]},gid={owner[1]}"
    mount("tmpfs", target, "tmpfs", flags, data)


def point(target: str, like: str) -> None:
    """Make a mount point for a bind of `like`: a directory for a directory, an empty file for anything else."""
    if stat.S_ISDIR(os.stat(like).st_mode):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o644))


def make_room(target: str, made: list[str], owner: tuple[int, int], scratch: str) -> None:
    """Make it possible for `owner` to create `target`, which does not exist, where the file system does not let it.

    The nearest directory above it that does exist gets a small tmpfs of `owner`'s, in which everything that stood there
    is shown again as it was. It is made at `scratch`, an empty directory, and attached as a whole: others may have a
    say in what stands on the way. Each tmpfs made so is added to `made`; close them with `seal`.
    """
    above = os.path.dirname(target)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    old = open_as_named(above, os.O_RDONLY | os.O_DIRECTORY)
    try:
        tmpfs(scratch, size=1 << 20, owner=owner)
        try:
            for name in os.listdir(old):
                show(f"/proc/self/fd/{old}/{name}", f"{scratch}/{name}")
            tree = open_tree(scratch, recursive=True)
        finally:
            unmount(scratch)
        try:
            attach_as_named(tree, above)
        finally:
            os.close(tree)
    finally:
        os.close(old)
    made.append(above)


def writable_root(made: list[str], owner: tuple[int, int]) -> None:
    """A root of this mount namespace's own that shows all that stood in the old one, for `owner`'s new directory at the
    top."""
    place = "/tmp"
    tmpfs(place, size=1 << 20, owner=owner)
    for name in os.listdir("/"):
        if f"/{name}" == place:
            os.mkdir(f"{place}/{name}", 0o1777)
        else:
            show(f"/{name}", f"{place}/{name}")
    pivot(place)
    made.append("/")


def cover(
    directory: str, *, size: int, mode: int = 0o755, flags: int = MS_NOSUID | MS_NODEV, owner: tuple[int, int] = (0, 0)
) -> None:
    """A tmpfs over `directory`, with everything that stands there shown in it as it is."""
    old = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        entries = os.listdir(old)
        tmpfs(directory, size=size, mode=mode, flags=flags, owner=owner)
        for name in entries:
            show(f"/proc/self/fd/{old}/{name}", f"{directory}/{name}")
    finally:
        os.close(old)


def show(source: str, target: str) -> None:
    """Show one directory entry at `target`, whatever it is; a symbolic link is copied."""
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    point(target, source)
    tree = open_tree(source, recursive=True)
    try:
        attach(tree, target)
    finally:
        os.close(tree)


def overlay(directory: str, lower: int, scratch: str) -> None:
    """Mount over `directory` what the directory open as `lower` holds, so that what is written there goes to `scratch`,
    an empty directory of a tmpfs. linux/Documentation/filesystems/overlayfs.rst. Raises OSError where the file system
    of `lower` cannot be a lower layer."""
    status = os.fstat(lower)
    upper, work = f"{scratch}/upper", f"{scratch}/work"
    for path in (upper, work):
        os.mkdir(path, stat.S_IMODE(status.st_mode))
        os.chown(path, status.st_uid, status.st_gid)
        os.chmod(path, stat.S_IMODE(status.st_mode) & 0o1777)
    quoted = [re.sub(r"([\\,:])", r"\\\1", path) for path in (f"/proc/self/fd/{lower}", upper, work)]
    options = "lowerdir={},upperdir={},workdir={}".format(*quoted)
    place = open_as_named(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        mount("overlay", f"/proc/self/fd/{place}", "overlay", MS_NOSUID | MS_NODEV, options)
    finally:
        os.close(place)


def seal(made: Iterable[str]) -> None:
    """Make what `make_room` made read-only."""
    for path in made:
        set_attributes(AT_FDCWD, MOUNT_ATTR_RDONLY, path=path)
