"""What a service manager gave the caller, on its way to the worker: its notification socket and its credentials.

The caller opened both, so it gives away nothing that it could not reach itself; where they appear is decided here.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack

from nsutil import processes
from pocketd import trees, wire
from pocketd.wire import Error, Message


async def notify(request: Message, fd: int | None, peer: processes.Peer, stack: ExitStack) -> list[tuple[int, Message]]:
    """The notification socket as a tree with its place, as launch._files has them; none where the caller has none."""
    if fd is None:
        return []
    target = _beneath_run(request, "notify")
    tree = await trees.make_of(peer, fd, writable=False)
    stack.callback(os.close, tree.fd)
    if not stat.S_ISSOCK(tree.mode):
        raise Error("bad-request", f"NOTIFY_SOCKET={target} is not a socket")
    # It was opened by O_PATH, which asks for no right to it; the worker may have one that the caller lacks.
    if peer.uid not in (0, tree.uid) and not tree.mode & stat.S_IWOTH:
        raise Error("forbidden", f"NOTIFY_SOCKET={target} is not the caller's to write to")
    return [(tree.fd, {"target": target, "alias": None, "directory": False})]


def credentials(request: Message, fd: int | None) -> str | None:
    """Where the worker is to see the credentials, which are in a memfd that it alone reads. None: there are none."""
    return None if fd is None else _beneath_run(request, "credentials")


def _beneath_run(request: Message, name: str) -> str:
    """A path of the request: the worker makes it in a mount namespace of its own, beneath an otherwise empty /run."""
    target = os.fsdecode(wire.field(request, name, bytes))
    if os.path.normpath(target) != target or "\0" in target or not target.startswith("/run/"):
        raise Error("bad-request", f"{name!r} names {target!r}; it must be beneath /run")
    if f"{target}/".startswith("/run/pocketd/"):  # where the worker's own code is
        raise Error("bad-request", f"{name!r} cannot be {target!r}")
    return target
