"""What the kernel says of processes' memory, and the size of what an app needs deployed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes. `private` is held by one process alone; `shared` are pages that others map as well, each counted in full;
    `pss` is the proportional set size: shared pages divided among those who map them, so that it adds up."""

    private: int
    shared: int
    pss: int

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.private + other.private, self.shared + other.shared, self.pss + other.pss)


def memory(pids: Iterable[int]) -> Memory:
    """The sum over processes, from /proc/PID/smaps_rollup (proc(5)). Raises OSError when one has ended."""
    total = Memory(0, 0, 0)
    for pid in pids:
        fields = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":", 1)
            fields[name] = int(value.split()[0]) * 1024
        total += Memory(
            private=fields["Private_Clean"] + fields["Private_Dirty"],
            shared=fields["Shared_Clean"] + fields["Shared_Dirty"],
            pss=fields["Pss"],
        )
    return total


def distributions_size(names: Iterable[str]) -> int:
    """Bytes that these distributions and all that they require install, compiled Python left out."""
    total, seen, wanted = 0, set(), list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # a requirement for another platform, whose marker is not evaluated here
        for file in distribution.files or ():
            if file.suffix != ".pyc":
                try:
                    total += Path(str(distribution.locate_file(file))).stat().st_size
                except FileNotFoundError:
                    continue
        wanted += [
            re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
            for requirement in distribution.requires or ()
            if "extra ==" not in requirement
        ]
    return total
