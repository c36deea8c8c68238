"""Cold runs: a fresh process in the same sandbox, for what a fork cannot undo.

A runtime reads some environment variables when it is imported. A caller whose values differ, or a program that sets
one itself before its import, would not get what it asked for from a fork, so it is executed as `python PROGRAM` in its
sandbox, with one line on standard error that names the variable. The `exec` runtime always comes this way.
"""

from __future__ import annotations

import ast
import errno
import fnmatch
import os
import re
import shutil
import signal
import sys
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Pattern, Sequence, Tuple

from nsutil import privileges
from pocketd import wire
from pocketd.wire import Message
from runtime import interpreter

# Read by the interpreter or the loader at their own start.
INTERPRETER = (
    "PYTHONHASHSEED", "PYTHONOPTIMIZE", "PYTHONDEVMODE", "PYTHONMALLOC", "PYTHONMALLOCSTATS", "PYTHONTRACEMALLOC",
    "PYTHONPROFILEIMPORTTIME", "PYTHONHOME", "PYTHONVERBOSE", "PYTHONINSPECT", "PYTHONNODEBUGRANGES", "PYTHONDEBUG",
    "PYTHONASYNCIODEBUG", "PYTHONSAFEPATH", "PYTHONWARNDEFAULTENCODING", "PYTHONINTMAXSTRDIGITS",
    "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "LD_DEBUG", "GLIBC_TUNABLES", "MALLOC_*",
)  # fmt: skip
# Terraform's and Azure Pipelines' variables, which only look like TensorFlow's.
OTHERS = (
    "TF_CLI_*", "TF_VAR_*", "TF_LOG", "TF_LOG_*", "TF_INPUT", "TF_DATA_DIR", "TF_WORKSPACE", "TF_IN_AUTOMATION",
    "TF_BUILD", "TF_REGISTRY_*", "TF_IGNORE", "TF_PLUGIN_*", "TF_REATTACH_PROVIDERS", "TF_TOKEN_*", "TF_STATE_*",
    "TF_CLOUD_*",
)  # fmt: skip
_SOURCE_LIMIT = 4 << 20


def reason(runtime: Any, begin: Message, start: Message) -> Optional[str]:
    """Why this start cannot be a fork: None if it can; otherwise the line to print, which may be empty."""
    if start["mode"] != "program":
        return None
    if begin["runtime"] == "exec":
        return ""
    if wire.field(start, "cold", bool, False):
        return ""
    pattern = expression(runtime)
    had: Dict[str, str] = begin["environment"]
    name = differing(os.environ, had, pattern)
    if name:
        return f"{name} differs from the service's, which read it at import"
    return set_by_program(runtime, begin, start)


def set_by_program(runtime: Any, begin: Message, start: Message) -> Optional[str]:
    """Why a program is not for a fork by its own text, as a line, or None."""
    had: Dict[str, str] = begin["environment"]
    pattern = expression(runtime)
    modules = tuple(begin["preload"]) or (begin["runtime"],)
    for name, value in assigned_before_import(start, modules):
        if pattern.match(name) and had.get(name) != value:
            return f"the program sets {name} before its imports"
    return None


def expression(runtime: Any) -> Pattern[str]:
    """One expression for all variables that a runtime and its interpreter read at their start; made once."""
    name = runtime.__name__
    if name not in _EXPRESSIONS:
        _EXPRESSIONS[name] = compiled((*INTERPRETER, *runtime.VARIABLES))
    return _EXPRESSIONS[name]


_EXPRESSIONS: Dict[str, Pattern[str]] = {}


def compiled(patterns: Sequence[str]) -> Pattern[str]:
    def either(some: Sequence[str]) -> str:
        return "|".join(fnmatch.translate(p) for p in some)

    return re.compile(f"(?!{either(OTHERS)})(?:{either(patterns)})")


def differing(caller: Any, service: Dict[str, str], pattern: Pattern[str]) -> Optional[str]:
    """The first variable of the caller that a pattern names and that the service's templates saw otherwise."""
    for name in sorted(caller):
        if pattern.match(name) and caller[name] != service.get(name):
            return str(name)
    return None


def assigned_before_import(start: Message, modules: Sequence[str]) -> List[Tuple[str, Optional[str]]]:
    """Environment variables with constant names that the program sets at its top level before it imports a module."""
    kind, name = start["kind"], start["program"]
    if kind == "code":
        source = name
    elif kind == "file":
        try:
            with open(name, "rb") as f:
                source = f.read(_SOURCE_LIMIT)
        except OSError:
            return []
    else:
        return []
    if b"environ" not in source and b"putenv" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    found: List[Tuple[str, Optional[str]]] = []
    for statement in tree.body:
        if imports(statement, modules):
            break
        found += assignments(statement)
    return found


def imports(statement: ast.stmt, modules: Sequence[str]) -> bool:
    tops = {m.partition(".")[0] for m in modules} | ({"keras"} if "tensorflow" in modules else set())
    for node in ast.walk(statement):
        if isinstance(node, ast.Import) and any(a.name.partition(".")[0] in tops for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in tops:
            return True
    return False


def assignments(statement: ast.stmt) -> Iterator[Tuple[str, Optional[str]]]:
    """os.environ["A"] = "x", os.environ.setdefault/update(...), os.putenv(...) in one statement."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Subscript) and _is_environ(target.value):
                    key = _text(target.slice)
                    if key:
                        yield key, _text(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method, where = node.func.attr, node.func.value
            if method == "setdefault" and _is_environ(where) and len(node.args) == 2:
                key = _text(node.args[0])
                if key and key not in os.environ:
                    yield key, _text(node.args[1])
            elif method == "putenv" and len(node.args) == 2:
                key = _text(node.args[0])
                if key:
                    yield key, _text(node.args[1])
            elif method == "update" and _is_environ(where):
                for argument in node.args:
                    if isinstance(argument, ast.Dict):
                        for k, v in zip(argument.keys, argument.values):
                            key = _text(k) if k else None
                            if key:
                                yield key, _text(v)
                for keyword in node.keywords:
                    if keyword.arg:
                        yield keyword.arg, _text(keyword.value)


def _is_environ(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "environ") or (
        isinstance(node, ast.Name) and node.id == "environ"
    )


def _text(node: ast.expr) -> Optional[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def run(begin: Message, start: Message, why: str) -> NoReturn:
    """Execute the program in this sandbox, in place of this process."""
    if why and interpreter.is_open(2):
        os.write(2, f"pocket: {why}; running it cold\n".encode())
    environment = interpreter.environment(start)  # and nothing that this interpreter added to its own
    arguments: List[Any] = wire.field(start, "arguments", list, [])
    program, kind = wire.field(start, "program", bytes), wire.field(start, "kind", str)
    interpreter.block(start)
    privileges.dumpable(True)
    if begin["runtime"] == "exec":
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program does not expect that
            if number not in start.get("ignored", ()):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN if signal.SIGINT in start.get("ignored", ()) else signal.SIG_DFL)
        execute(program, arguments, environment)
    if "packages" in start:
        paths = (os.fsencode(start["packages"]), environment.get(b"PYTHONPATH"))
        environment[b"PYTHONPATH"] = b":".join(filter(None, paths))
    flags = {"module": [b"-m"], "code": [b"-c"]}.get(kind, [])
    if flags or not program.startswith(b"-"):
        command = [os.fsencode(sys.executable), *flags, program, *arguments]
    else:
        command = [os.fsencode(sys.executable), b"./" + program, *arguments]
    os.execve(command[0], command, environment)


def execute(program: bytes, arguments: List[bytes], environment: Dict[bytes, bytes]) -> NoReturn:
    """Execute a program as a shell would find it. 127: not found; 126: not runnable."""
    name = os.fsdecode(program)
    path = shutil.which(name, path=os.environ.get("PATH", "/usr/bin:/bin")) or name
    try:
        os.execve(path, [program, *arguments], environment)
    except OSError as e:
        os.write(2, b"pocket: " + program + f": {e.strerror}\n".encode())
        os._exit(127 if e.errno == errno.ENOENT else 126)
