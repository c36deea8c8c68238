"""Which files a template is made of, so that pocketd can tell when one of them is another one by now."""

from __future__ import annotations

import os
import sys
from typing import Any, List

import msgpack

from nsutil import memory

_OURS = "/run/pocketd/lib/"


def snapshot(since: float) -> int:
    """A sealed memfd with [path, mtime_ns, size, inode, late, real path] of each file that a module was imported from.

    `late`: it changed after `since` (seconds, time.time()), when loading began, so what was imported may be another.
    Our own library is left out: a service has a copy of it that nobody changes. The caller owns the descriptor.
    """
    found: List[List[Any]] = []
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or not path.startswith("/") or path.startswith(_OURS):
            continue
        try:
            s = os.stat(path)
        except OSError:
            continue  # an archive's member, or a name that a module made up
        real = os.path.realpath(path)  # a link that leads from "/" leads elsewhere where the root is another
        found.append([path, s.st_mtime_ns, s.st_size, s.st_ino, s.st_ctime > since, real])
    packed: bytes = msgpack.packb(found, use_bin_type=True, unicode_errors="surrogateescape")
    return memory.sealed(packed, "imported")
