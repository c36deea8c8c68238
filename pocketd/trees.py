"""A pocket's files as detached mounts: what its worker attaches in a mount namespace of its own.

No mount ever appears in the host's table: open_tree makes a copy that belongs to nobody until a worker attaches it.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import NoReturn

from nsutil import clone, messages, mounts, namespaces
from pocketd import wire
from pocketd.identities import Identities
from pocketd.wire import Error

_ALWAYS = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV


def make(fd: int, pidfd: int | None, *, writable: bool, uid: int | None, identities: Identities) -> int:
    """A detached tree of the directory or file that `fd` names. The caller owns the descriptor returned.

    `pidfd`: the process whose mount namespace `fd` is from, when it is not ours. `uid`: show the owner's files as this
    uid's, where the file system can (ext4, xfs, btrfs, tmpfs; overlayfs cannot: then the ids stay as they are).
    """
    status = os.fstat(fd)
    try:
        tree = mounts.open_tree("", at=fd)
    except OSError as e:
        if e.errno != errno.EINVAL or pidfd is None:
            raise
        tree = _from_namespace(fd, pidfd)
    try:
        mounts.set_attributes(tree, _ALWAYS | (0 if writable else mounts.MOUNT_ATTR_RDONLY))
        if uid is not None and status.st_uid != uid:
            try:
                mounts.set_attributes(tree, 0, userns=identities.id_map(status, uid))
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.EPERM):
                    raise
    except BaseException:
        os.close(tree)
        raise
    return tree


def _from_namespace(fd: int, pidfd: int) -> int:
    """The same in another process's mount namespace: open_tree wants to be there, and pocketd stays where it is."""
    ours, theirs = messages.pair()
    with ours, theirs:
        child = clone.fork()
        if child is None:
            _help(theirs, fd, pidfd)
        os.close(child.pidfd)
        theirs.close()
        try:
            ours.settimeout(10.0)
            message, fds = wire.receive(ours)
        except (OSError, EOFError) as e:
            raise Error("mount", f"the helper that joins the caller's mount namespace ended: {e}") from None
        finally:
            os.waitpid(child.pid, 0)
        with fds:
            if "error" in message:
                raise Error.unwire(message["error"])
            return fds.take()


def _help(theirs: socket.socket, fd: int, pidfd: int) -> NoReturn:
    try:
        namespaces.setns(pidfd, namespaces.CLONE_NEWNS)
        wire.send(theirs, {"ok": True}, [mounts.open_tree("", at=fd)])
    except BaseException as e:
        wire.send(theirs, {"error": Error("mount", f"the caller's directory cannot be shown: {e}").wire()})
    finally:
        os._exit(0)
