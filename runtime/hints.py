"""The last line of a program that failed for want of a right: which one, and how its owner gives it.

Only from what the exception itself says; whether the right would have been enough nobody knows.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import Iterator, Optional, Union

from pocketd.wire import Message
from runtime import interpreter

_DEPTH = 20
_NO_DEVICES = ("/dev/fd/", "/dev/stdin", "/dev/stdout", "/dev/stderr")  # descriptors, by other names
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EADDRNOTAVAIL)


def hint(e: BaseException, orders: Message) -> Optional[str]:
    """One line without its end, or None."""
    for cause in _chain(e):
        said = _of(cause, orders)
        if said:
            right, why = said
            name = orders["hostname"]
            if orders.get("defined"):
                return f"pocket: {why}; to allow it, as root: pocket allow {name} {right}"
            if right.startswith("mount="):
                return f"pocket: {why}; to show it: pocket run --mount {right.partition('=')[2]}"
            return f"pocket: {why}; a pocket with a definition can have it (allow, in pocketd.conf)"
    return None


def _of(e: BaseException, orders: Message) -> Optional["tuple[str, str]"]:
    if isinstance(e, socket.gaierror) or (isinstance(e, OSError) and e.errno in _UNREACHABLE):
        return ("network=host", "this pocket has no network") if orders["network"] == "none" else None
    if isinstance(e, OSError) and isinstance(e.filename, (str, bytes)):
        path = os.path.abspath(os.fsdecode(e.filename))
        if e.errno == errno.EROFS and orders.get("defined"):
            for top in (orders["directory"], "/pocket"):
                if path.startswith(f"{top}/"):
                    return f"write={path[len(top) + 1 :]}", f"this pocket may not write {path}"
        device = path.startswith("/dev/") and not path.startswith(_NO_DEVICES)
        if e.errno in (errno.ENOENT, errno.EACCES, errno.EPERM) and device:
            return f"device={path}", f"this pocket has no device {path}"
        if e.errno == errno.ENOENT:
            return _not_seen(e.filename, orders)
    return None


def _not_seen(name: Union[str, bytes], orders: Message) -> Optional["tuple[str, str]"]:
    """A file that the caller has named by an argument, who may see it where the pocket does not."""
    given = getattr(sys, "argv", None)  # what a program may have made anything of
    if type(given) is not list or not any(type(word) is str and word == os.fsdecode(name) for word in given[1:]):
        return None
    path = os.path.normpath(os.path.join(interpreter.elsewhere or os.getcwd(), os.fsdecode(name)))
    seen = [top for place in orders["mounts"] for top in (place["target"], place.get("alias")) if top]
    if any(f"{path}/".startswith(f"{top}/") for top in (*seen, "/pocket", "/proc", "/sys", "/dev")) or ":" in path:
        return None
    return f"mount={path}", f"this pocket does not see {path}, if there is one"


def _chain(e: Optional[BaseException]) -> Iterator[BaseException]:
    for _ in range(_DEPTH):
        if e is None:
            return
        yield e
        e = e.__cause__ or e.__context__
