"""The part of this package that is in C: livefork.so, a plain shared library beside this file."""

from __future__ import annotations

import ctypes
import os
from typing import Any


def load() -> Any:
    """By `PyDLL`, which keeps the interpreter lock. Raises ImportError with how to build it."""
    try:
        return ctypes.PyDLL(os.path.join(os.path.dirname(os.path.abspath(__file__)), "livefork.so"))
    except OSError as reason:
        raise ImportError(f"{reason}; build it with: python setup.py build_livefork") from None
