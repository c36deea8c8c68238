"""Whether a rehearsal has changed a program's objects of libraries, which nobody can put back: a number for each, of
what pickle would keep of it.

Asked for in a child, since taking an object apart may change it, as loading an image does. Not looked into are what
TensorFlow, Keras and compilers have (runtime.variables, and their warmth), generators of random numbers
(runtime.seeds), threads; of what cannot be taken apart only plain values among its attributes count. An object that is
another each time, or larger than there is time for, has no number.
"""

from __future__ import annotations

import copyreg
import gc
import os
import pickle
import select
import signal
import sys
import time
import types
import zlib
from array import array
from contextlib import suppress
from typing import Any, Callable, Dict, List, Optional, Tuple

from nsutil import clone
from runtime import rehearsal

_SECONDS = 20.0  # for all
_BYTES = 1 << 30  # of all, each time
_ENOUGH = 5.0  # seconds, after which no other is begun

_NONE = -1
_SIZE = array("q").itemsize
# By the first part of a module's name, and by the whole name of a class. Compiled functions are warmth.
_LEFT_OUT = (
    *("tensorflow", "keras", "numba", "llvmlite", "jax", "jaxlib"),
    *("_thread", "threading", "weakref", "_weakref", "runtime", "nsutil", "pocketd"),
    *("datetime", "fractions", "ipaddress", "pathlib", "re", "uuid", "zoneinfo"),  # which do not change
)
# What counts how often it was used, or keeps what it was asked last.
_USED = ("sklearn.neighbors._kd_tree.", "sklearn.neighbors._ball_tree.", "pandas.core.groupby.", "joblib.parallel.")
_FIXED = ("decimal.Decimal",)
_RANDOM = ("random.", "numpy.random.", "torch._C.Generator")
_ASKED: Dict[str, Callable[[Any], Any]] = {
    "sqlite3.Connection": lambda it: (
        *(it.total_changes, it.in_transaction, it.isolation_level),
        *(id(it.row_factory), id(it.text_factory)),
    ),
    "decimal.Context": lambda it: (it.prec, it.rounding, it.Emin, it.Emax, it.capitals, it.clamp, repr(it.traps)),
    "optparse.OptionParser": lambda it: (list(map(str, it.option_list)), it.defaults, it.usage),
    "concurrent.futures.thread.ThreadPoolExecutor": lambda it: (it._shutdown, it._broken),
    "concurrent.futures.process.ProcessPoolExecutor": lambda it: it._shutdown_thread,
}
_SIMPLE = (int, float, bool, complex, str, bytes, type(None))


class Things:
    """Objects, each with what it is called by."""

    def __init__(self, found: List[Tuple[str, Any]]):
        found = [(label, thing) for label, thing in found if not _is_left_out(type(thing))]
        # Two children, for what is another each time: to take an object apart may change it there.
        numbers = zip(_in_a_child(found), _in_a_child(found))
        self._known = [(*pair, a) for pair, (a, b) in zip(found, numbers) if a == b != _NONE]

    def changed(self) -> Optional[str]:
        """The first that is not as it was, in words. Raises rehearsal.Failed when no child can be made."""
        now = _in_a_child([(label, thing) for label, thing, _ in self._known])
        for (label, thing, old), new in zip(self._known, now):
            if new != old:
                return f"{label}, or what it holds, of type {_name_of(type(thing))}"
        return None


def _in_a_child(found: List[Tuple[str, Any]]) -> List[int]:
    """The number of each, or _NONE."""
    if not found:
        return []
    answer = os.memfd_create("fingerprints", os.MFD_CLOEXEC)
    noticed = rehearsal.unnoticed()
    try:
        try:
            child = clone.live_fork()
        except OSError as e:
            raise rehearsal.Failed(f"the template could not fork: {e}") from None
        if child is None:
            try:
                clone.renew(
                    [o.fd for o in clone.inspect({answer}) if o.remedy in ("reopen", "remake") and o.fd is not None]
                )
                clone.revive()  # a table may be taken apart by several threads
                _tell(found, answer)
            finally:
                os._exit(0)
        if not select.select([child.pidfd], [], [], _SECONDS)[0]:
            os.kill(child.pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # a thread of the program has waited for it
            os.waitpid(child.pid, 0)
        os.close(child.pidfd)
        told = array("q")
        told.frombytes(os.pread(answer, len(found) * _SIZE, 0))
        return [*told, *[_NONE] * (len(found) - len(told))]
    finally:
        os.close(answer)
        noticed()


def _tell(found: List[Tuple[str, Any]], answer: int) -> None:
    """Write down each number once it is known: what kills this process, or takes too long, takes the others with it."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    gc.disable()  # a finalizer of the program's might run
    here: Any = types.ModuleType("(fingerprints)")  # where pickle finds it: a program does not see our modules
    here._name, _name.__module__, sys.modules[here.__name__] = _name, here.__name__, here
    end, left = time.monotonic() + _ENOUGH, _BYTES
    for _, thing in found:
        number = _NONE
        if time.monotonic() < end and left > 0:
            number, size = _sum(thing, left)
            left -= size
        os.write(answer, array("q", [number]).tobytes())


def _sum(thing: Any, most: int) -> Tuple[int, int]:
    sink = _Sink(most)
    try:
        _Pickler(sink).dump(thing)
    except BaseException:
        return _NONE, sink.size
    return sink.sum, sink.size


class _Sink:
    """A file for pickle, and takes what is not to be copied."""

    def __init__(self, most: int):
        self.sum = self.size = 0
        self._most = most

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        self.size += memoryview(data).nbytes
        if self.size > self._most:
            raise MemoryError
        return len(data)

    def large(self, buffer: Any) -> None:
        self.write(buffer.raw())


class _Pickler(pickle.Pickler):
    def __init__(self, sink: _Sink):
        super().__init__(sink, 5, buffer_callback=sink.large)

    def reducer_override(self, thing: Any) -> Any:
        """Classes and functions by their names, what cannot be taken apart by what can be told of it."""
        if thing is _name:
            return NotImplemented
        kind = type(thing)
        if issubclass(kind, type) or kind in _NAMED:
            return _name, (getattr(thing, "__module__", ""), getattr(thing, "__qualname__", ""))
        if _is_left_out(kind):
            return _name, (_name_of(kind),)
        torch = sys.modules.get("torch")
        if torch and isinstance(thing, torch.Tensor):
            return _name, (_name_of(kind), *_of_torch(torch, thing))
        ask = _ASKED.get(_name_of(kind))
        if ask:
            return _name, (_name_of(kind), ask(thing))
        try:
            reduce = copyreg.dispatch_table.get(kind)
            reduced = reduce(thing) if reduce else thing.__reduce_ex__(5)
        except Exception:
            plain = {k: v for k, v in getattr(thing, "__dict__", {}).items() if type(v) in _SIMPLE}
            return _name, (_name_of(kind), plain)
        return (_name, (reduced,)) if isinstance(reduced, str) else reduced


def _of_torch(torch: Any, tensor: Any) -> Tuple[Any, ...]:
    """What makes it, its memory not copied: pickle would have it written by torch.save, in memory and twice."""
    plain = tensor.detach()
    content = plain.cpu().reshape(-1).view(torch.uint8).numpy() if plain.layout == torch.strided else None
    return str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, tensor.grad, content


_NAMED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, types.MethodDescriptorType, types.CodeType)


def _name(*words: Any) -> Any:
    """Stands for what is not taken apart."""


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_left_out(kind: type) -> bool:
    if _name_of(kind).startswith((*_RANDOM, *_USED, *_FIXED)):
        return True
    return any(base.__module__.partition(".")[0] in _LEFT_OUT for base in kind.__mro__)
