"""Attempts on files: of the host, of other pockets, of the service, of the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import stat
import struct

from tests.escape.inside.kernel import AT_FDCWD, GARBAGE, call


def read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 4).decode("latin-1")
    finally:
        os.close(fd)


def something_in(path: str) -> bool:
    """Whether a file that can be opened says anything."""
    return bool(read(path))


def open_to_write(path: str) -> bool:
    """Nothing is written."""
    os.close(os.open(path, os.O_WRONLY))
    return True


def open_and_close(path: str) -> bool:
    os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    return True


def create_in(path: str) -> bool:
    os.close(os.open(f"{path}/made", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(f"{path}/made")
    return True


def climb(directory: str, marker: str) -> bool:
    """A file by its host path, from a directory up: ".." more often than there are directories."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.close(os.open("../" * 64 + marker.lstrip("/"), os.O_RDONLY, dir_fd=fd))
    finally:
        os.close(fd)
    return True


def climb_from_descriptor(fd: int, marker: str) -> bool:
    """The same from a directory that was passed."""
    os.close(os.open("../" * 64 + marker.lstrip("/"), os.O_RDONLY, dir_fd=fd))
    return True


def climb_by_magic_link(link: str, marker: str) -> bool:
    return climb(f"/proc/self/{link}", marker)


def climb_from_own_descriptor(marker: str) -> bool:
    fd = os.open("/proc/self/cwd", os.O_PATH | os.O_DIRECTORY)
    try:
        return climb(f"/proc/thread-self/fd/{fd}", marker)
    finally:
        os.close(fd)


def openat2(marker: str, resolve: int) -> bool:
    how = struct.pack("QQQ", os.O_RDONLY, 0, resolve)
    os.close(call("openat2", AT_FDCWD, b"../" * 64 + marker.lstrip("/").encode(), how, 24))
    return True


def open_a_mapping() -> bool:
    """A file of a mapping, past its directories, by /proc/self/map_files."""
    name = os.listdir("/proc/self/map_files")[0]
    os.close(os.open(f"/proc/self/map_files/{name}", os.O_RDONLY))
    return True


def make_node(major: int, minor: int, block: bool) -> bool:
    """In each place where it may write: a node that could be opened."""
    path = "/tmp/node"
    os.mknod(path, (stat.S_IFBLK if block else stat.S_IFCHR) | 0o666, os.makedev(major, minor))
    os.unlink(path)
    return True


def have_capable_file() -> bool:
    """The xattr that gives a program capabilities."""
    path = "/tmp/capable"
    with open(path, "w"):
        pass
    try:
        os.setxattr(path, "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 21, 0, 0, 0))
    finally:
        os.unlink(path)
    return True


def give_to_root() -> bool:
    path = "/tmp/given"
    with open(path, "w"):
        pass
    try:
        os.chown(path, 0, 0)
    finally:
        os.unlink(path)
    return True


# Bits by every call. Each gets a fresh directory and returns the mode of what there is at last.


def _path(directory: str) -> bytes:
    return os.path.join(directory, "bits").encode()


def _file(path: bytes) -> int:
    return call("open", path, os.O_RDWR | os.O_CREAT, 0o600)


def set_bits(how: str, directory: str, mode: int, garbage: bool = False) -> int:
    """Of a file in `directory`, by the call `how`; `garbage`: in the half of the register that the kernel cuts off."""
    path, asked = _path(directory), mode | (GARBAGE if garbage else 0)
    make, tmpfile = os.O_RDWR | os.O_CREAT, os.O_RDWR | os.O_TMPFILE
    extra = GARBAGE if garbage else 0
    if os.path.lexists(path):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    fd = -1
    if how in ("chmod", "fchmod", "fchmodat", "fchmodat2"):
        fd = _file(path)
    old = os.umask(0)
    try:
        if how == "chmod":
            call("chmod", path, asked)
        elif how == "fchmod":
            call("fchmod", fd, asked)
        elif how == "fchmodat":
            call("fchmodat", AT_FDCWD, path, asked)
        elif how == "fchmodat2":
            call("fchmodat2", AT_FDCWD, path, asked, 0)
        elif how == "open":
            fd = call("open", path, make | extra, asked)
        elif how == "openat":
            fd = call("openat", AT_FDCWD, path, make | extra, asked)
        elif how == "O_TMPFILE":
            fd = call("openat", AT_FDCWD, directory.encode(), tmpfile | extra, asked)
        elif how == "open O_TMPFILE" and not garbage:
            fd = call("open", directory.encode(), tmpfile, asked)
        elif how == "open O_TMPFILE":
            fd = call("open", directory.encode(), tmpfile | extra, asked)
        elif how == "creat":
            fd = call("creat", path, asked)
        elif how == "mkdir":
            call("mkdir", path, asked)
        elif how == "mkdirat":
            call("mkdirat", AT_FDCWD, path, asked)
        elif how == "mknod":
            call("mknod", path, stat.S_IFREG | asked, 0)
        elif how == "mknodat":
            call("mknodat", AT_FDCWD, path, stat.S_IFREG | asked, 0)
        elif how == "openat2":
            fd = call("openat2", AT_FDCWD, path, struct.pack("QQQ", make, mode, 0), 24)
        return (os.fstat(fd) if fd >= 0 else os.stat(path)).st_mode & 0o7000
    finally:
        os.umask(old)
        if fd >= 0:
            os.close(fd)


# What is mapped from files.


def _open(path: str) -> tuple[int, bool]:
    try:
        return os.open(path, os.O_RDWR), True
    except OSError:
        return os.open(path, os.O_RDONLY), False


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mremap.restype = ctypes.c_void_p
_FAILED = ctypes.c_void_p(-1).value


def write_mapping(path: str, how: str) -> bool:
    """Through a shared mapping of a file that is open for reading, or for writing where that is allowed."""
    fd, writable = _open(path)
    try:
        write = how == "mmap" or (how == "/proc/self/mem" and writable)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
        at = _libc.mmap(None, 4096, protection, mmap.MAP_SHARED, fd, 0)
        if at == _FAILED:
            raise OSError(ctypes.get_errno(), "mmap")
        try:
            if how == "mremap":  # a second mapping of the same pages
                at = _libc.mremap(ctypes.c_void_p(at), ctypes.c_size_t(0), ctypes.c_size_t(4096), 1)
                if at == _FAILED:
                    raise OSError(ctypes.get_errno(), "mremap")
            if how in ("mprotect", "mremap") and _libc.mprotect(ctypes.c_void_p(at), 4096, 3):
                raise OSError(ctypes.get_errno(), "mprotect")
            if how == "/proc/self/mem":
                with open("/proc/self/mem", "r+b", buffering=0) as memory:
                    memory.seek(at)
                    memory.write(ctypes.string_at(at, 1))
        finally:
            _libc.munmap(ctypes.c_void_p(at), 4096)
    finally:
        os.close(fd)
    return True


def connect(path: str) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with socket.socket(socket.AF_UNIX, kind) as s:
            try:
                s.connect(path)
            except OSError as e:
                if kind == socket.SOCK_STREAM and e.errno == 91:  # EPROTOTYPE: it is the other kind
                    continue
                raise
            return True
    return False
