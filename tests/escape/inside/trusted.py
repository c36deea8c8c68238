"""Preloaded by a service of the tests': makes attempts in its templates, as root there, when it is imported and again
when the models template calls its factory. Which, the service's environment says."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from typing import Any

from tests.escape.inside import program

FOUND: dict[str, list[dict[str, Any]]] = {}
SHARED: list[mmap.mmap] = []


def attempt(where: str) -> None:
    asked: list[dict[str, Any]] = json.loads(os.environ.get("ASKED", "[]"))
    FOUND[where] = [program.answer(request) for request in asked]


def share() -> None:
    """What libraries leave behind (`import onnxruntime` does): writable shared mappings, of memory and of a file."""
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        SHARED[:] = mmap.mmap(-1, 4096), mmap.mmap(file.fileno(), 4096)
    for mapping in SHARED:
        mapping[:6] = b"before"


def writable_shared() -> int:
    with open("/proc/self/maps") as file:
        return sum("rw-s" in line for line in file)


def model() -> object:
    attempt("models")
    return object()


if "ASKED" in os.environ:
    attempt("root")
    share()
    MAPPED = writable_shared()
