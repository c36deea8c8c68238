"""Which runtimes there are. One small interface (runtime.interface), one file each."""

from __future__ import annotations

import importlib
from typing import Any

from pocketd.wire import Error
from runtime import exec as exec_runtime  # here, since its launcher may run where no file of ours can be read

NAMES = ("tensorflow", "python", "exec")


def get(name: str) -> Any:
    """The runtime's module. Raises Error for a name that is none."""
    if name not in NAMES:
        raise Error("config", f"there is no runtime {name!r}; there are {', '.join(NAMES)}")
    if name == "exec":
        return exec_runtime
    return importlib.import_module(f"runtime.{name}")
