"""Models: loaded from a file by the framework's own loader, or made by a factory, and rehearsed.

A deployed model is named by an absolute path or by "module:attribute", a factory that is called without arguments. A
session's own is a path beneath its pocket's directory, resolved there by the kernel.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import sys
import traceback
from contextlib import suppress
from typing import Any, Dict, Sequence

from nsutil import clone, pages
from pocketd.wire import Error
from runtime import variables, workingset
from runtime.interface import CannotLoad, Model

FIRST_CALLS = 60.0  # seconds that a first call of each model may take


def load(runtime: Any, name: str, source: str, said: str = "") -> Model:
    """Load and rehearse a deployed model; `said` is what its definition calls it. One that fails with the zeros that it
    is rehearsed with, or whose variables cannot be put back after them, is not warm, which the log says.

    Raises Error("model"), naming it, when there is none and for what its code raises.
    """
    said = f"model {name} ({said or source})"
    model = _load(runtime, said, source)
    before = variables.Variables()
    try:
        model.rehearse()
        changed = before.restore()
    except Exception as e:
        changed = f"{type(e).__name__}: {str(e)[:500]}"
    if changed:
        print(
            f"{said} is not warm: a call with zeros, before anybody's, fails or changes it: {changed}", file=sys.stderr
        )
        model = _load(runtime, said, source)
    return model


def _load(runtime: Any, said: str, source: str) -> Model:
    try:
        return _load_path(runtime, source) if source.startswith("/") else _make(runtime, source)
    except (CannotLoad, FileNotFoundError) as e:
        raise Error("model", f"{said}: {e}") from e
    except Exception as e:
        traceback.print_exc()
        raise Error("model", f"{said} cannot be loaded: {type(e).__name__}: {e}") from e


def load_beneath(runtime: Any, directory: str, path: str) -> Model:
    """Load a model from a file of the pocket, unrehearsed. Raises Error("unknown-model") and the loader's errors."""
    # The worker's rights are its pocket's by now, and openat2 is none of them: this helps whoever mistypes a path.
    top = os.path.realpath(directory)
    try:
        found = os.path.realpath(os.path.join(top, path), strict=True)
        if not found.startswith(f"{top}/"):
            raise ValueError("it leads out of it")
    except (OSError, ValueError) as e:
        said = e.strerror if isinstance(e, OSError) else str(e)
        raise Error(
            "unknown-model", f"no model can be loaded from {path!r} beneath the pocket's directory: {said}"
        ) from None
    try:
        return _load_path(runtime, found)
    except CannotLoad as e:
        raise Error("unknown-model", f"no model can be loaded from {path!r}: {e}") from None


def _load_path(runtime: Any, path: str) -> Model:
    if not os.path.exists(path):
        raise CannotLoad("there is no such file")
    if path.endswith((".pkl", ".pickle", ".joblib", ".pth")):
        raise CannotLoad(
            "a pickle runs code when it is read, so it is never loaded; use a factory that makes the model"
        )
    model: Model = runtime.load_file(path)
    return model


def _make(runtime: Any, source: str) -> Model:
    module, _, attribute = source.partition(":")
    if not attribute:
        raise CannotLoad("neither an absolute path nor a factory module:attribute")
    made: Any = importlib.import_module(module)
    for name in attribute.split("."):
        try:
            made = getattr(made, name)
        except AttributeError:
            raise CannotLoad(f"module {module} has no {attribute}") from None
    made = made()
    return runtime.adopt_object(made) or Model(made)


def pages_of_first_calls(known: Dict[str, Any], reopen: Sequence[int]) -> workingset.WorkingSet:
    """The pages that a worker's first call of each model makes its own, as seen in a child that makes them; none where
    that comes to no end. `reopen`: descriptors that each worker renews. This process's heap reaches as far then as the
    child's did, and does not shrink, so that a call finds its place there and the pages can be made ahead of time."""
    if not known:
        return workingset.WorkingSet()
    keeps = pages.keep_free_memory()
    report = os.memfd_create("pages", os.MFD_CLOEXEC)
    heap = os.memfd_create("heap", os.MFD_CLOEXEC)
    try:
        try:
            child = clone.live_fork()
        except clone.CloneError:
            return workingset.WorkingSet()  # each launch will say why
        if child is None:
            try:
                clone.renew(reopen)
                clone.revive()
                for model in known.values():
                    model.rehearse()
                workingset.note(report)
                os.write(heap, b"%d" % pages.heap_end())
            finally:
                os._exit(0)
        if not select.select([child.pidfd], [], [], FIRST_CALLS)[0]:
            os.kill(child.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # a handler of a pocket's has waited for it, or it ignores SIGCHLD
            os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        if keeps:
            pages.extend_heap(int(os.pread(heap, 32, 0) or 0))
        return workingset.WorkingSet.read(report).here()
    finally:
        os.close(report)
        os.close(heap)
