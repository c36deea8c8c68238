"""Users' subordinate uids (subuid(5)): whoever has one counts as their owner, where shares are by user.

newuidmap(1) lets a user have processes of all of them, by default 65536, which keep the user's groups.
"""

from __future__ import annotations

import bisect
import functools
import os
import pwd
from typing import NamedTuple

FILE = "/etc/subuid"


class Range(NamedTuple):
    first: int
    size: int
    owner: str  # a name, or a uid


def owner_of(uid: int) -> int:
    """The uid as which `uid` counts: its owner's, or itself where it is nobody's. Never root's, which has no shares: a
    range of root's, or of nobody's who is known, counts as the first uid in it."""
    ranges = _read(FILE, _state(FILE))
    at = bisect.bisect_right(ranges, uid, key=lambda r: r.first) - 1
    if uid == 0 or at < 0 or uid >= ranges[at].first + ranges[at].size:
        return uid
    return _uid(ranges[at].owner) or ranges[at].first or uid


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        s = os.stat(path)
    except OSError:
        return None
    return s.st_mtime_ns, s.st_size, s.st_ino


@functools.lru_cache(1)
def _read(path: str, state: object) -> list[Range]:
    """The ranges, sorted. `state`: of the file, which is read again when that is another. Lines that are none are left
    out, as newuidmap does."""
    found = []
    try:
        with open(path, errors="surrogateescape") as file:
            for line in file:
                owner, _, numbers = line.rstrip("\n").partition(":")
                first, _, size = numbers.partition(":")
                if first.isdecimal() and size.isdecimal():
                    found.append(Range(int(first), int(size), owner))
    except OSError:
        pass  # a host without has no such users
    return sorted(found)


def _uid(owner: str) -> int | None:
    try:
        return int(owner) if owner.isdecimal() else pwd.getpwnam(owner).pw_uid
    except KeyError:
        return None
