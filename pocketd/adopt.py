"""Adopted cgroups: a worker born in its caller's own, which systemd or a container engine made and limits.

Which cgroup that is the kernel says, never the caller. An adopted cgroup is never killed and never removed here. Where
the pocket's definition has limits too, both hold, the smaller being the one that is felt: the session gets a cgroup of
its own beneath the unit's, which must have been delegated (systemd.resource-control(5), Delegate=). cgroup2 has
processes in a cgroup or controllers below it, not both, so what stands in the unit's own moves to one beside it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress

from cgroup import limits as limits_of
from cgroup.hierarchy import Hierarchy, path_of
from cgroup.limits import LimitError, Limits
from cgroup.node import Cgroup
from nsutil import processes
from pocketd.wire import Error, Message

# Where the unit's own processes, the `pocket` command first, go when the session gets a cgroup beside them.
CALLER = "caller"
# systemd marks what it delegated: src/core/cgroup.c, cgroup_xattr_apply (user.* since version 251).
_MARKS = ("trusted.delegate", "user.delegate")
_ROUNDS = 8  # of moving what forks meanwhile


def place(hierarchy: Hierarchy, peer: processes.Peer, limits: Limits, identity: str) -> tuple[Cgroup, Message]:
    """The cgroup for a session's worker, and what the session's note says of it. The caller owns the cgroup.

    Raises Error with what to change in the unit.
    """
    own = of_peer(hierarchy, peer)
    if not limits:
        return own, {"adopted": True}
    with own:
        path = own.kernel_path
        above, _, name = path.rpartition("/")
        # An earlier login of this unit moved its processes there.
        with hierarchy.open(above if name == CALLER and above.count("/") else path) as unit:
            check_delegated(unit)
            try:
                make_room(unit, limits)
                remove(unit, identity)  # of a login whose pocketd died before it could go on
                with unit.create(identity) as leaf:
                    leaf.apply(limits)
            except (LimitError, OSError) as e:
                with suppress(OSError):
                    remove(unit, identity)
                code = "limit" if isinstance(e, LimitError) else "cgroup"
                raise Error(code, f"the pocket's own limits within {unit.kernel_path}: {e}") from None
            return hierarchy.open(f"{unit.kernel_path}/{identity}"), {"unit": unit.kernel_path}


def of_peer(hierarchy: Hierarchy, peer: processes.Peer) -> Cgroup:
    """The cgroup that the kernel names for the process that connected; the caller owns it. Raises Error."""
    cgroup = None
    try:
        path = path_of(peer.pid)
        cgroup = hierarchy.open(path)
        # Had the process ended in between, the pid could have been another's when it was looked up.
        if processes.pid_of(peer.pidfd) != peer.pid or path_of(peer.pid) != path:
            raise processes.Gone("the process has moved")
    except ValueError:
        raise Error("adopt", f"there is no cgroup to adopt: the caller stands in {path}; run it in a unit") from None
    except (OSError, processes.Gone) as e:
        if cgroup:
            cgroup.close()
        raise Error("gone", f"the caller has ended or moved to another cgroup: {e}") from None
    return cgroup


def check_delegated(unit: Cgroup) -> None:
    """Raise Error unless systemd leaves what is beneath `unit` to us, and nobody but root can move what is in there."""
    if not any(_has(unit, mark) for mark in _MARKS):
        raise Error(
            "adopt",
            f"the pocket has limits of its own, so {unit.kernel_path} must be delegated: write Delegate=yes in the "
            "unit, or leave the limits out of the pocket's definition",
        )
    if os.fstat(unit.fd).st_uid != 0:
        raise Error(
            "adopt",
            f"the pocket has limits of its own, and {unit.kernel_path} belongs to a user who could lift them; run the "
            "pocket from a unit of the system, or without --adopt",
        )


def _has(cgroup: Cgroup, mark: str) -> bool:
    try:
        return os.getxattr(cgroup.fd, mark) == b"1"
    except OSError as e:
        if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return False


def remove(unit: Cgroup, identity: str) -> None:
    """Remove a session's cgroup, if it is there, that no process was ever in. Raises OSError."""
    with suppress(FileNotFoundError), Cgroup(identity, unit) as leaf:
        leaf.remove()


def make_room(unit: Cgroup, limits: Limits) -> None:
    """Let `unit` have cgroups with these limits beneath it. Moves the commands that stand in it, never a worker's way.

    Raises OSError, EBUSY when it forks faster than this moves.
    """
    with unit.create(CALLER, exist_ok=True) as caller:
        for _ in range(_ROUNDS):
            standing = unit.procs
            for pid in standing:
                with suppress(ProcessLookupError):
                    caller.set_property(b"cgroup.procs", str(pid))
            if not standing:
                break
    unit.enable({limits_of.controller(name) for name in limits})
