"""Program mode: an unmodified program run as `__main__`, as `python PROGRAM` would run it.

Sources: CPython's Modules/main.c (pymain_run_python, pymain_run_file_obj), Python/pythonrun.c (handle_system_exit).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import io
import linecache
import marshal
import os
import pkgutil
import runpy
import signal
import stat
import sys
import types
import warnings
from typing import Any, Callable, Dict, NamedTuple, Optional

from nsutil import processes
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import frames, hints, interpreter, recorded

_HERE = os.path.dirname(__file__)


Compiler = Callable[[bytes, str], Any]


class Ahead(NamedTuple):
    """A program's file as it was some time before its run: what it was read and compiled to."""

    path: str
    source: bytes
    code: Any


_ahead: Optional[Ahead] = None


def compiled(source: bytes, path: str) -> Any:
    return compile(source, path, "exec", dont_inherit=True)


def prepare(path: str) -> None:
    """In a slot: compile the program that its run will most likely name, and go through the rest of what a run does
    first, so that those pages are copies then already."""
    global _ahead
    processes.set_command_line([os.fsencode(path)])
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) or pkgutil.get_importer(path) is not None:
            return
        source = _read(path)
        if _is_compiled(path, source):
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            code = compiled(source, path)
    except Exception:
        return  # its run says what is wrong with it
    if not said:
        _ahead = Ahead(path, source, code)
    os.path.realpath(path)


def run(start: Message, orders: Message, compiler: Compiler = compiled) -> int:
    """Run what `start` names and return its exit status. An uncaught KeyboardInterrupt ends the process by SIGINT.

    `orders`: pocketd's word about the pocket, for the hint at a failure for want of a right. `compiler`: makes code of
    a program's file.
    """
    kind, name = wire.field(start, "kind", str), os.fsdecode(wire.field(start, "program", bytes))
    arguments = [os.fsdecode(a) for a in wire.field(start, "arguments", list, [])]
    sys.argv[:] = [{"module": "-m", "code": "-c"}.get(kind, name), *arguments]
    flag = {"module": ["-m", name], "code": ["-c", name]}.get(kind, [name])
    sys.orig_argv[:] = [sys.executable, *flag, *arguments]
    processes.set_command_line([os.fsencode(word) for word in sys.orig_argv])
    apply_environment()
    if "packages" in start:
        put_packages_first(wire.field(start, "packages", str))
    interpreter.block(start)
    try:
        if kind == "file":
            return run_file(name, compiler)
        return {"module": run_module, "code": run_code}[kind](name)
    except recorded.Ours:
        raise
    except BaseException as e:
        failure = e
    code = fail(failure)
    missing = hints.hint(failure, orders)
    if missing:
        interpreter.complain(f"{missing}\n")
    return code


def apply_environment() -> None:
    """PYTHON* variables as far as a running interpreter can follow them; those that it cannot make a run cold."""
    asked = os.environ.get("PYTHONPATH", "")
    if asked:  # site.removeduppaths
        sys.path[:] = dict.fromkeys([*map(os.path.abspath, asked.split(os.pathsep)), *sys.path])
    sys.pycache_prefix = os.environ.get("PYTHONPYCACHEPREFIX") or None
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for flag, variable in (("dont_write_bytecode", "PYTHONDONTWRITEBYTECODE"), ("no_user_site", "PYTHONNOUSERSITE")):
        interpreter.set_flag(flag, bool(os.environ.get(variable)))
    asked = os.environ.get("PYTHONWARNINGS", "")
    if asked:
        sys.warnoptions[:] = asked.split(",")
        warnings._processoptions(sys.warnoptions)  # type: ignore[attr-defined]
    if os.environ.get("PYTHONFAULTHANDLER"):
        import faulthandler

        faulthandler.enable()


def put_packages_first(directory: str) -> None:
    """The pocket's own packages come before the service's. Raises Error for one that the service has imported already:
    the interpreter holds one version, and a silent second one helps nobody.
    """
    for entry in sorted(os.listdir(directory)):
        name = entry.partition(".")[0]
        module = sys.modules.get(name)
        if module is None or entry.endswith((".dist-info", ".egg-info")) or not getattr(module, "__file__", None):
            continue
        here = [m.partition("-")[2].partition(".dist")[0] for m in os.listdir(directory) if m.startswith(f"{name}-")]
        have = str(getattr(module, "__version__", "another"))
        if here != [have]:
            raise Error(
                "packages",
                f"{directory} holds {name} {' '.join(here)}, and the service has imported {name} {have} from "
                f"{module.__file__}: remove it from the pocket's packages, or choose a service without it",
            )
    sys.path.insert(0, directory)


def fail(e: BaseException) -> int:
    """What the interpreter does about an exception that nobody caught; returns the exit status."""
    strip(e)  # else its traceback and our own frame hold each other, and with them what the program's lines held
    if isinstance(e, SystemExit):
        return exit_status(e)
    code = report(e)
    if isinstance(e, KeyboardInterrupt):
        interpreter.finish_by(signal.SIGINT)
    return code


def exit_status(e: SystemExit) -> int:
    if e.code is None:
        return 0
    if isinstance(e.code, int):
        return e.code & 0xFF if -(1 << 63) <= e.code < 1 << 63 else 0xFF
    interpreter.complain(f"{e.code}\n")
    return 1


def report(e: BaseException) -> int:
    """Show the exception as the interpreter does, without the frames of ours through which it came."""
    strip(e)
    sys.last_type, sys.last_value, sys.last_traceback = type(e), e, e.__traceback__
    if sys.version_info >= (3, 12):
        sys.last_exc = e
    hook: Any = getattr(sys, "excepthook", sys.__excepthook__)
    failure: BaseException
    try:
        if not callable(hook):
            raise TypeError(f"{type(hook).__name__!r} object is not callable")
        frames.alone(hook, type(e), e, e.__traceback__)
        return 1
    except SystemExit as exit:
        return exit_status(exit)
    except recorded.Ours:
        raise
    except BaseException as f:
        failure = f
    strip(failure)
    interpreter.complain("Error in sys.excepthook:\n")
    sys.__excepthook__(type(failure), failure, failure.__traceback__)
    interpreter.complain("\nOriginal exception was:\n")
    sys.__excepthook__(type(e), e, e.__traceback__)
    return 1


def strip(e: BaseException) -> None:
    while e.__traceback__ and os.path.dirname(e.__traceback__.tb_frame.f_code.co_filename) == _HERE:
        e.__traceback__ = e.__traceback__.tb_next


def main_module(**attributes: Any) -> Dict[str, Any]:
    """A fresh `__main__`; returns its namespace."""
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=sys.modules["builtins"], __annotations__={}, **attributes)
    sys.modules["__main__"] = main
    return main.__dict__


def absolute(name: str) -> str:
    """CPython's `_Py_abspath`: nothing is normalised, since `__file__` shows what was typed."""
    if name.startswith("/"):
        return name
    return os.getcwd() if name in ("", ".") else f"{os.getcwd()}/{name}"


def run_file(name: str, compiler: Compiler) -> int:
    if name == "-":
        return run_input()
    path = absolute(name)
    known = _known(path) if compiler is compiled else None
    importer = None if known else pkgutil.get_importer(path)
    if importer is not None and _holds_main(importer):
        sys.path.insert(0, path)  # a directory or zip file with a __main__.py
        main_module()
        frames.alone(runpy._run_module_as_main, "__main__", False)  # type: ignore[attr-defined]
        return 0
    try:
        source = known.source if known else _read(path)
    except OSError as e:
        if isinstance(e, IsADirectoryError):
            interpreter.complain(f"{sys.executable}: can't find '__main__' module in {path!r}\n")
            return 1
        interpreter.complain(f"{sys.executable}: can't open file {path!r}: [Errno {e.errno}] {e.strerror}\n")
        return 2
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    namespace = main_module(__file__=path, __cached__=None)
    if _is_compiled(path, source):
        namespace["__loader__"] = importlib.machinery.SourcelessFileLoader("__main__", path)
        if source[:4] != importlib.util.MAGIC_NUMBER:
            raise RuntimeError("Bad magic number in .pyc file")
        code = marshal.loads(source[16:])
    else:
        namespace["__loader__"] = importlib.machinery.SourceFileLoader("__main__", path)
        code = known.code if known else compiler(source, path)
    execute(code, namespace)
    return 0


def _known(path: str) -> Optional[Ahead]:
    """What `prepare` made of this file, if it still says the same."""
    try:
        return _ahead if _ahead and _ahead.path == path and _ahead.source == _read(path) else None
    except OSError:
        return None


def _read(path: str) -> bytes:
    with io.open_code(path) as f:
        return f.read()


def _is_compiled(path: str, source: bytes) -> bool:
    return path.endswith(".pyc") or source[:2] == importlib.util.MAGIC_NUMBER[:2]


def execute(code: Any, namespace: Dict[str, Any]) -> None:
    try:
        frames.alone(exec, code, namespace)
    finally:
        interpreter.flush_quietly()


def _holds_main(importer: Any) -> bool:
    try:
        return importer.find_spec("__main__") is not None
    except Exception:
        return False


def run_module(name: str) -> int:
    sys.path.insert(0, os.getcwd())
    main_module()
    frames.alone(runpy._run_module_as_main, name)  # type: ignore[attr-defined]
    return 0


def run_input() -> int:
    """`python -`: the program is what stands on standard input."""
    sys.path.insert(0, "")
    namespace = main_module(__loader__=importlib.machinery.BuiltinImporter)
    source = sys.stdin.buffer.read() if sys.stdin else b""
    execute(compile(source, "<stdin>", "exec", dont_inherit=True), namespace)
    return 0


def run_code(source: str) -> int:
    sys.path.insert(0, "")
    namespace = main_module(__loader__=importlib.machinery.BuiltinImporter)
    code = compile(source, "<string>", "exec", dont_inherit=True)
    if hasattr(linecache, "_register_code"):  # from 3.13: tracebacks show its lines
        linecache._register_code(code, source, "<string>")
    frames.alone(exec, code, namespace)
    return 0
