"""Settings of the interpreter, of the standard library and of a few others, as they were before a rehearsal.

Most of them are names of modules, which are bound anew; the others are set by a function, or lie in an object.
"""

from __future__ import annotations

import copyreg
import gc
import sys
import threading
from typing import Any, Callable, Dict, Iterator, Tuple

from runtime.state import is_standard

Setting = Tuple[Callable[[], Any], Callable[[Any], object]]  # how to get it, and how to set it

# Of libraries, what has names for settings alone, beside all that they keep of what is loaded at its first use.
_OF_LIBRARIES = ("keras.src.backend.config", "tensorflow.python.eager.polymorphic_function.eager_function_run")


class Settings:
    """All that there are now, to be put back by `restore`."""

    def __init__(self) -> None:
        self._names = {name: dict(vars(module)) for name, module in _modules()}
        self._values = [(put, get()) for get, put in _functions()]

    def restore(self) -> None:
        for name, module in _modules():
            there, had = vars(module), self._names.get(name)
            if had is None:
                continue  # it was imported meanwhile
            for key in [key for key in there if key not in had]:
                del there[key]
            for key in [key for key, value in had.items() if there.get(key, had) is not value]:
                there[key] = had[key]
        for put, value in self._values:
            put(value)


def _modules() -> Iterator[Tuple[str, Any]]:
    for name, module in list(sys.modules.items()):
        if (is_standard(name) and name != "sys" and hasattr(module, "__dict__")) or name in _OF_LIBRARIES:
            yield name, module


def _functions() -> Iterator[Setting]:
    yield gc.get_threshold, lambda value: gc.set_threshold(*value)
    yield sys.getswitchinterval, sys.setswitchinterval
    yield threading.stack_size, threading.stack_size
    if hasattr(sys, "get_int_max_str_digits"):
        yield sys.get_int_max_str_digits, sys.set_int_max_str_digits
    for held in (sys.meta_path, sys.path_hooks, copyreg.dispatch_table):
        yield _contents(held)
    for name, made in _OF_MODULES.items():
        if name in sys.modules:
            yield from made(sys.modules[name])


def _contents(held: Any) -> Setting:
    def put(value: Any) -> None:
        held.clear()
        held.update(value) if isinstance(held, dict) else held.extend(value)

    return held.copy, put


def _attribute(holder: Any, name: str) -> Setting:
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def _logging(logging: Any) -> Iterator[Setting]:
    yield _attribute(logging.root.manager, "disable")
    yield _contents(logging._levelToName)
    yield _contents(logging._nameToLevel)


def _socket(socket: Any) -> Iterator[Setting]:
    yield socket.getdefaulttimeout, socket.setdefaulttimeout


def _csv(csv: Any) -> Iterator[Setting]:
    yield csv.field_size_limit, csv.field_size_limit
    yield csv.list_dialects, lambda had: [csv.unregister_dialect(n) for n in csv.list_dialects() if n not in had]


def _decimal(decimal: Any) -> Iterator[Setting]:
    for context in (decimal.getcontext(), decimal.DefaultContext):
        yield from (_attribute(context, name) for name in ("prec", "rounding", "Emin", "Emax", "capitals", "clamp"))
        yield from (_signals(signals) for signals in (context.traps, context.flags))


def _signals(held: Any) -> Setting:
    return lambda: dict(held), held.update


def _faults(faulthandler: Any) -> Iterator[Setting]:
    yield faulthandler.is_enabled, lambda was: None if was else faulthandler.disable()


def _processes(context: Any) -> Iterator[Setting]:
    yield _attribute(context._default_context, "_actual_context")


def _trees(trees: Any) -> Iterator[Setting]:
    yield _contents(trees._namespace_map)


def _numpy(numpy: Any) -> Iterator[Setting]:
    yield numpy.get_printoptions, lambda value: numpy.set_printoptions(**value)
    yield numpy.geterr, lambda value: numpy.seterr(**value)


def _keras(keras: Any) -> Iterator[Setting]:
    """Names that it gives to what has none, and what is switched on and off."""
    plain = (bool, int, float, str, type(None))
    counted = "object_name_uids"

    def get() -> Dict[str, Any]:
        there = vars(keras.GLOBAL_STATE_TRACKER)
        return {k: dict(v) if k == counted else v for k, v in there.items() if isinstance(v, plain) or k == counted}

    def put(had: Dict[str, Any]) -> None:
        there = vars(keras.GLOBAL_STATE_TRACKER)
        for key in [k for k, v in there.items() if isinstance(v, plain) and k not in had]:
            del there[key]
        names = there.get(counted)
        if names is not None:
            names.clear()
            names.update(had.get(counted, {}))
        there.update({k: v for k, v in had.items() if k != counted})

    yield get, put


def _registered(keras: Any) -> Iterator[Setting]:
    yield _contents(keras.GLOBAL_CUSTOM_OBJECTS)
    yield _contents(keras.GLOBAL_CUSTOM_NAMES)


# What gives settings of a module, where that is imported.
_OF_MODULES: Dict[str, Callable[[Any], Iterator[Setting]]] = {
    "logging": _logging,
    "socket": _socket,
    "csv": _csv,
    "decimal": _decimal,
    "faulthandler": _faults,
    "multiprocessing.context": _processes,
    "xml.etree.ElementTree": _trees,
    "numpy": _numpy,
    "keras.src.backend.common.global_state": _keras,
    "keras.src.saving.object_registration": _registered,
}
