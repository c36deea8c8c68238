"""How many threads a worker's libraries compute with: as many as its pocket's limits allow processors, not the host's.

Ten pockets of half a processor each, with pools for a host of 64, spend their time waiting for each other's turns.
Pools that a template has already are told by the library's own function; TensorFlow's, which is made when it is first
used, by its configuration, which a program can still change; libraries that a program loads itself, by the variables
that they go by.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any, Callable, List, Optional

# Functions that take a number of threads, by what the name of their library has in it.
_SETTERS = {
    "openblas": (
        "openblas_set_num_threads", "openblas_set_num_threads64_", "scipy_openblas_set_num_threads",
        "scipy_openblas_set_num_threads64_",
    ),
    "libgomp": ("omp_set_num_threads",),
    "libiomp": ("omp_set_num_threads",),
    "libomp": ("omp_set_num_threads",),
    "libmkl_rt": ("MKL_Set_Num_Threads",),
}  # fmt: skip

Setter = Callable[[int], Any]


def find() -> List[Setter]:
    """The functions of the libraries that this process has loaded. Looked up by a template, for its workers."""
    found: List[Setter] = []
    seen = set()
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        paths = {line.split(None, 5)[5].rstrip("\n") for line in file if line.count("/") and ".so" in line}
    for path in sorted(paths):
        name = os.path.basename(path)
        for part, functions in _SETTERS.items():
            if part not in name or name in seen:
                continue
            seen.add(name)
            try:
                library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            except OSError:
                continue
            found += [getattr(library, function) for function in functions if hasattr(library, function)]
    return found


# What those libraries go by that a program loads itself, by C's getenv.
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def hint(count: Optional[int]) -> None:
    """Say so in the environment, that of C alone: to Python it is the caller's. After it was made the caller's."""
    if not count or count >= (os.cpu_count() or 1):
        return
    for name in _VARIABLES:
        if name not in os.environ:
            os.putenv(name, str(count))


def limit(count: int, setters: List[Setter]) -> None:
    """Compute with `count` threads from here on, where that is less than this host's processors."""
    if count >= (os.cpu_count() or 1):
        return
    for setter in setters:
        setter(count)
    torch = sys.modules.get("torch")
    if torch:
        torch.set_num_threads(count)
    module: Any = sys.modules.get("tensorflow.python.eager.context")
    if module:
        context = module.context()
        if context._context_handle is None:  # its pools are not made yet
            context._intra_op_parallelism_threads = context._intra_op_parallelism_threads or count
            context._inter_op_parallelism_threads = context._inter_op_parallelism_threads or count
