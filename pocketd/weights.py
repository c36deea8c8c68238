"""A service's private copies of model files, STATE_DIR/models/DIGEST/NAME, so that nobody's `cp` tears a mapped file.

`python -m pocketd.weights SOURCE DIRECTORY` makes one and prints its path: a process of its own, as hashing gigabytes
would stop the daemon's loop.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from pocketd import environment, spawn
from pocketd.wire import Error

_PIECE = 1 << 20
_TRIES = 3


async def copy(source: Path, directory: Path, name: str) -> Path:
    """The copy of `source` (a file or a directory) as it is now. `name` is the model's, for messages. Raises Error."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-s", "-m", "pocketd.weights", str(source), str(directory)]
    status, said = await spawn.output(command, {**spawn.BARE, "PYTHONPATH": environment.CODE}, 3600.0)
    text = said.decode(errors="surrogateescape").strip()
    if status:
        raise Error("model", f"model {name}: {source} cannot be copied to {directory}: {text}")
    return Path(text)


def collect(directory: Path, used: Collection[str]) -> None:
    """Remove the copies that none of `used` (paths of copies) is."""
    kept = {Path(path).parent.name for path in used}
    for entry in directory.iterdir() if directory.is_dir() else ():
        if entry.name not in kept:
            shutil.rmtree(entry, ignore_errors=True)


def _make(source: Path, directory: Path) -> Path:
    for _ in range(_TRIES):
        before = _identity(source)
        temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=directory))
        try:
            digest = hashlib.sha256(os.fsencode(source.name) + b"\0")  # the copy has it, too
            for path in _files(source):
                target = temporary / source.name / path.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                digest.update(f"{path.relative_to(source)}\0{path.stat().st_size}\0".encode(errors="surrogateescape"))
                _copy_file(path, target, digest)
            if _identity(source) != before:
                continue  # somebody writes to it
            final = directory / digest.hexdigest()
            if not (final / source.name).exists():
                temporary.chmod(0o700)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
            return final / source.name
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    raise OSError("it changes while it is read; load it when it is whole")


def _copy_file(source: Path, target: Path, digest: hashlib._Hash) -> None:
    with open(source, "rb", buffering=0) as read, open(target, "wb", buffering=0) as write:
        os.fchmod(write.fileno(), 0o600)
        while piece := read.read(_PIECE):
            digest.update(piece)
            view = memoryview(piece)
            while view:
                view = view[write.write(view) :]
        os.fsync(write.fileno())


def _files(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        yield source
        return
    for parent, directories, names in os.walk(source):
        directories.sort()
        for name in sorted(names):
            yield Path(parent) / name


def _identity(source: Path) -> list[tuple[str, int, int, int]]:
    found = []
    for path in _files(source):
        s = path.stat()
        found.append((str(path), s.st_mtime_ns, s.st_size, s.st_ino))
    return found


if __name__ == "__main__":
    try:
        print(os.fspath(_make(Path(sys.argv[1]), Path(sys.argv[2]))))
    except OSError as e:
        sys.exit(e.strerror or str(e))
