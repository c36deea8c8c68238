"""A pocket's files as detached mounts: what its worker attaches in a mount namespace of its own.

No mount ever appears in the host's table: open_tree makes a copy that belongs to nobody until a worker attaches it.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import NamedTuple

from nsutil import mounts, namespaces, processes
from pocketd import wire
from pocketd.apart import Apart
from pocketd.identities import Identities
from pocketd.wire import Error

_ALWAYS = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV


class Tree(NamedTuple):
    """A detached tree, whose descriptor is its holder's to close, and what stands at its top: st_mode, owner."""

    fd: int
    mode: int
    uid: int
    gid: int

    @property
    def directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def make(fd: int, *, writable: bool) -> Tree:
    """A detached tree of the directory or file that `fd` names, a descriptor that pocketd opened."""
    status = os.fstat(fd)
    tree = mounts.open_tree("", at=fd)
    return _limited(tree, status, writable)


async def make_of(peer: processes.Peer, fd: int, *, writable: bool) -> Tree:
    """The same of a caller's descriptor. Raises Error where the caller's file system does not answer in time.

    A child does it, in the mount namespace of the caller where that is another one: open_tree wants to be there.
    """
    if peer.uid == 0:
        try:
            return make(fd, writable=writable)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise

    def work(ours: socket.socket) -> None:
        try:
            tree = make(fd, writable=writable)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            namespaces.setns(peer.pidfd, namespaces.CLONE_NEWNS)
            tree = make(fd, writable=writable)
        wire.send(ours, {"mode": tree.mode, "uid": tree.uid, "gid": tree.gid}, [tree.fd])

    child = Apart(work, [fd, peer.pidfd])
    try:
        found, fds = await child.answer()
    except Error as e:
        raise Error("mount", f"the caller's files cannot be shown: {e.message}") from None
    finally:
        child.end()
    with fds:
        return Tree(fds.take(), found["mode"], found["uid"], found["gid"])


def _limited(tree: int, status: os.stat_result, writable: bool) -> Tree:
    try:
        mounts.set_attributes(tree, _ALWAYS | (0 if writable else mounts.MOUNT_ATTR_RDONLY))
    except BaseException:
        os.close(tree)
        raise
    return Tree(tree, status.st_mode, status.st_uid, status.st_gid)


def show_as(tree: Tree, uid: int, identities: Identities) -> None:
    """Show its owner's files as this uid's, where the file system can (ext4, xfs, btrfs, tmpfs; overlayfs cannot: then
    the ids stay as they are)."""
    if tree.uid == uid:
        return
    try:
        mounts.set_attributes(tree.fd, 0, userns=identities.id_map((tree.uid, tree.gid), uid))
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.EPERM):
            raise
