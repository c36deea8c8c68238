"""What a held program has taken of one moment: the time, an identity, numbers of no seed, another program's output.
Each run has it as it was then. It is found in the text, since nothing tells when the clock is read; it is said, and no
reason not to hold."""

from __future__ import annotations

import ast
import math
import os
import sys
from typing import Dict, Iterator, List, Tuple

_MOMENTS = {
    *(f"time.{name}" for name in ("time", "time_ns", "ctime", "asctime", "localtime", "gmtime", "strftime")),
    *(
        f"time.{clock}{unit}"
        for clock in ("monotonic", "perf_counter", "process_time", "thread_time")
        for unit in ("", "_ns")
    ),
    "timeit.default_timer",
    "os.urandom",
    *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
    "datetime.date.today",
    "uuid.uuid1",
    "uuid.uuid4",
    "os.getpid",
    "os.getppid",
    "os.popen",
    *(f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "getoutput", "Popen")),
    *(f"secrets.{name}" for name in ("token_bytes", "token_hex", "token_urlsafe", "randbits", "randbelow", "choice")),
}
# Drawn from generators that nobody has seeded, where no function of _SEEDS is called.
_DRAWS = {
    *(f"random.{name}" for name in ("random", "randint", "randrange", "getrandbits", "randbytes", "uniform", "gauss")),
    *(f"random.{name}" for name in ("choice", "choices", "sample", "shuffle", "normalvariate")),
    *(f"numpy.random.{name}" for name in ("rand", "randn", "randint", "random", "random_sample", "bytes", "choice")),
    *(f"numpy.random.{name}" for name in ("permutation", "shuffle", "normal", "uniform", "standard_normal")),
}
_SEEDS = {
    *("random.seed", "random.setstate", "numpy.random.seed", "numpy.random.set_state", "torch.manual_seed"),
    *("keras.utils.set_random_seed", "tensorflow.keras.utils.set_random_seed"),
}


def taken(program: str, line: int, tops: Tuple[str, ...]) -> List[str]:
    """Where, in the top level of the program above `line`, and of its own modules (beneath `tops`)."""
    files: Dict[str, float] = {program: line}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if isinstance(path, str) and path.startswith(tops) and path.endswith(".py"):
            files.setdefault(os.path.realpath(path), math.inf)
    found: List[str] = []
    drawn: List[str] = []
    seeded = False
    for path, until in files.items():
        try:
            with open(path, "rb") as file:
                tree = ast.parse(file.read(), path)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        names: Dict[str, str] = {}
        for node in _executed(tree):
            if isinstance(node, ast.Import):
                names.update({a.asname or a.name.partition(".")[0]: a.name for a in node.names})
            elif isinstance(node, ast.ImportFrom):
                names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
            elif isinstance(node, ast.Call) and node.lineno < until:
                name = _qualified(node.func, names)
                seeded = seeded or name in _SEEDS
                if name in _MOMENTS or name in _DRAWS:
                    said = f"{path}, line {node.lineno}, calls {name}() once for all runs"
                    (found if name in _MOMENTS else drawn).append(said)
    return found if seeded else found + drawn


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """What is executed when a module is: not the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in (*node.decorator_list, node.args):
                yield from _executed(part)
        elif not isinstance(node, ast.Lambda):
            yield from _executed(node)


def _qualified(node: ast.expr, names: Dict[str, str]) -> str:
    parts: List[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])
