"""Which of the host's paths a pocket may be given: its directory, and mounts beside it.

Decided on text alone. Whoever opens a path does so without following symbolic links, or resolves it first and asks
about what it resolved to.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Directories that hold many owners' files: a pocket may be given one beneath them, not them.
_SHARED = frozenset(
    "/ /home /srv /opt /mnt /media /tmp /var /var/tmp /var/lib /var/opt /var/local /var/cache /var/spool "
    "/run/user".split()
)
# The system's own, with all beneath them. A pocket that may write would write the system.
_SYSTEM = ("/usr", "/bin", "/sbin", "/boot", "/etc", "/proc", "/sys", "/dev", "/run", "/var")
# Beneath those, where users and services keep files of their own: "*" is one directory.
_EXCEPT = (
    "/usr/local/src/*",
    "/run/user/*/*",
    "/run/media/*/*",
    "/var/tmp/*",
    "/var/lib/*",
    "/var/opt/*",
    "/var/local/*",
    "/var/cache/*",
    "/var/spool/*",
    "/var/www",
)
# Where a worker has its own, so that nothing can be mounted there.
_OWN = ("/proc", "/sys", "/dev", "/run/pocketd")


@dataclass(frozen=True)
class Mount:
    """A file or directory of the host that a pocket sees beside its own, read-only unless `writable`."""

    source: Path
    target: Path
    writable: bool


def _beneath(path: str, top: str) -> bool:
    return path == top or path.startswith(top.rstrip("/") + "/")


def _excepted(path: str) -> bool:
    parts = path.split("/")
    for pattern in _EXCEPT:
        wanted = pattern.split("/")
        if len(parts) >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False)):
            return True
    return False


def refuse_directory(path: str | Path) -> str | None:
    """Why the directory `path` cannot be a pocket's, or None when it can.

    `path` must be absolute and resolved: no symbolic link, no "..", as /proc/self/fd/N shows an opened directory.
    """
    text = os.fspath(path)
    if not text.startswith("/") or os.path.normpath(text) != text or text.startswith("//"):
        return "is not an absolute path without '.' and '..'"
    if text in _SHARED:
        return "holds files of the whole host; give the pocket a directory of its own beneath it"
    top = "/" + text.split("/")[1]
    if (_is_system(text) or top.startswith("/lib")) and not _excepted(text):
        return f"is part of the system ({top}); give the pocket a directory of its own, such as /srv/NAME"
    return None


def _is_system(text: str) -> bool:
    return any(_beneath(text, top) for top in _SYSTEM)


def parse_mount(text: str) -> Mount:
    """SRC[:DST][:rw] as `mounts` and --mount have it; DST is SRC where it is left out.

    Raises ValueError; its text goes on from the value. That SRC exists is for the caller to see.
    """
    right = "write SRC[:DST][:rw], absolute paths without a colon, read-only unless :rw is there"
    first, *rest = text.split(":")
    writable = rest[-1:] == ["rw"]
    if writable:
        rest.pop()
    if rest[-1:] == ["ro"]:
        raise ValueError("ends in ':ro', which mounts are anyway; leave it out")
    if len(rest) > 1:
        raise ValueError(f"has too many parts; {right}")
    source, target = first, rest[0] if rest else first
    for path in (source, target):
        if not path.startswith("/") or os.path.normpath(path) != path or path.startswith("//") or "\0" in path:
            raise ValueError(f"has {path!r}, which is not an absolute path without '.' and '..'; {right}")
    for path in (source, target):
        if path == "/" or any(_beneath(path, top) for top in _OWN):
            raise ValueError(f"has {path!r}, which cannot be mounted in a pocket; name a file or a directory of yours")
    if any(_beneath(top, target) for top in _OWN):
        raise ValueError(f"would cover {target!r}, in which a pocket has what is its own; name a place beneath it")
    if writable and (refusal := refuse_directory(source)):
        raise ValueError(f"would let the pocket write to {source!r}, which {refusal}")
    return Mount(Path(source), Path(target), writable)
