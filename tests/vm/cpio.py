"""Archives for initramfs images, in the "newc" format.

The kernel's Documentation/driver-api/early-userspace/buffer-format.rst has its description.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import PurePosixPath


def archive(files: Mapping[str, bytes]) -> bytes:
    """Executable files by their paths without a leading slash, and every directory on the way to them."""
    directories = dict.fromkeys(str(p) for name in files for p in reversed(PurePosixPath(name).parents) if p.name)
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in directories]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    entries.append(("TRAILER!!!", 0, b""))
    parts = []
    for number, (name, mode, data) in enumerate(entries, 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % f for f in fields) + name.encode() + b"\0"
        parts += [head + b"\0" * (-len(head) % 4), data + b"\0" * (-len(data) % 4)]
    return b"".join(parts)
