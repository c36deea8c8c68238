"""What of the host a service must show for its python, and for our own code that runs in it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import msgpack

import nsutil
import runtime
from pocketd import spawn, wire
from pocketd.wire import Error

# Where our packages are: the child of pocketd that makes containers imports them from here.
CODE = str(Path(nsutil.__file__).parent.parent)

_PROBE = """
import json, os, sys
print(json.dumps([list(sys.version_info[:3]), sys.executable, os.path.realpath(sys.executable),
                  sys.prefix, sys.base_prefix, sys.exec_prefix, *[p for p in sys.path if p]]))
"""


def copy_library(place: Path) -> list[list[str]]:
    """Copy our code that a service imports to `place`: (host path, name beneath the service's library directory).

    A service goes on with the code that it was made with when another version is installed over it. Raises Error where
    there is no room for it.
    """
    copied = []
    try:
        for path, name in library():
            target = place / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.isdir(path):
                shutil.copytree(path, target, dirs_exist_ok=True, copy_function=_copy)
            else:
                shutil.copy2(path, target)
            copied.append([str(target), name])
    except OSError as e:
        why = e.args[0][0][2] if isinstance(e, shutil.Error) else e.strerror  # that of the first of many
        raise Error("state", f"the service's own code cannot be copied to {place}: {why}; make room there") from None
    return copied


def _copy(source: str, target: str) -> None:
    """Bytecode may be written anew just now, by whoever runs its source; what cannot be copied of it is not needed."""
    try:
        shutil.copy2(source, target)
    except OSError:
        if not source.endswith(".pyc"):
            raise
        Path(target).unlink(missing_ok=True)


def library() -> list[list[str]]:
    """(host path, name beneath the service's library directory) of our code that a service imports: no daemon in it."""
    here = Path(wire.__file__).parent
    shared = [[str(here / name), f"pocketd/{name}"] for name in SHARED]
    packages = [[str(Path(m.__file__).parent), m.__name__] for m in (nsutil, runtime, msgpack) if m.__file__]
    return shared + packages


# The wire format and what client and worker share; the rest of the package stays outside.
SHARED = ("__init__.py", "wire.py", "arena.py", "arrays.py", "tensors.py", "values.py")


async def python_paths(python: Path | None) -> tuple[str, list[str]]:
    """The interpreter to execute in a service, and the host paths it lives from.

    Asked of the interpreter itself: its prefix, the python that made its virtual environment, also one under somebody's
    home directory, and whatever its search path adds. Raises Error when it cannot be run or is too old.
    """
    command = str(python) if python else sys.executable
    if not os.access(command, os.X_OK):
        raise Error("config", f"python = {command!r} cannot be executed; give the path of an interpreter")
    status, text = await spawn.output([command, "-c", _PROBE], {**spawn.BARE, "HOME": "/"}, 30.0)
    try:
        if status:
            raise ValueError(text.decode(errors="replace").strip())
        version, executable, real, *paths = json.loads(text)
    except ValueError as e:
        raise Error("config", f"python = {command!r} does not run: {e}") from None
    if version < [3, 9]:
        raise Error("config", f"python = {command!r} is {version[0]}.{version[1]}; services need 3.9 or later")
    shown = {str(Path(real).parent), *(p for p in paths if os.path.isdir(p) and os.path.realpath(p) != CODE)}
    minimal = [p for p in shown if not any(p != q and p.startswith(q + "/") for q in shown)]
    links = [p for p in paths if os.path.realpath(p) != p and os.path.isdir(p) and os.path.realpath(p) != CODE]
    return executable, sorted({os.path.realpath(p) for p in minimal} | set(links))
