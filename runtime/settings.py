"""Settings of the interpreter, of the standard library and of a few others, as they were before a rehearsal.

Most of them are names of modules, which are bound anew; the others are set by a function, or lie in an object.
"""

from __future__ import annotations

import copyreg
import gc
import itertools
import re
import sys
import threading
from contextlib import suppress
from typing import Any, Callable, Dict, Iterator, List, Tuple

from runtime import state
from runtime.imports import Finder
from runtime.state import is_standard

Setting = Tuple[Callable[[], Any], Callable[[Any], object]]  # how to get it, and how to set it

# Of libraries, what has names for settings alone, beside all that they keep of what is loaded at its first use.
_OF_LIBRARIES = (
    *("keras.src.backend.config", "tensorflow.python.eager.polymorphic_function.eager_function_run"),
    *("PIL.Image", "PIL.ImageFile"),
)
_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class that can be changed


class Settings:
    """All that there are now, to be put back by `restore`, and those of what is imported until then, as that leaves
    them."""

    def __init__(self) -> None:
        self._names: Dict[str, Dict[str, Any]] = {}
        self._classes: List[Tuple[Any, Dict[str, Any]]] = []
        self._modules = dict(sys.modules)
        self._values: List[Tuple[Callable[[Any], object], Any]] = []
        self._note(_functions())
        for name, module in self._modules.items():
            self._take(name, module)
        sys.meta_path.insert(0, Finder(_has_settings, self._imported))

    def _imported(self, module: Any) -> None:
        with suppress(Exception):  # it is the program's import, not ours
            self._take(module.__name__, module)

    def _take(self, name: str, module: Any) -> None:
        if not _has_settings(name) or not hasattr(module, "__dict__"):
            return
        if is_standard(name) or name in _OF_LIBRARIES:
            self._names[name] = dict(vars(module))
        for kind in list(vars(module).values()) if is_standard(name) else ():
            if isinstance(kind, type) and kind.__module__ == name and kind.__flags__ & _HEAP:
                self._classes.append((kind, state.look_class(kind)))
        if name in _OF_MODULES:
            self._note(_OF_MODULES[name](module))

    def _note(self, settings: Iterator[Setting]) -> None:
        with suppress(Exception):  # of another version of the module
            for get, put in settings:
                self._values.append((put, get()))

    def restore(self) -> None:
        for name, known in self._modules.items():
            now = sys.modules.get(name)
            if now is None or (now is not known and is_standard(name)):  # a library may put itself in its own place
                sys.modules[name] = known
        for name, module in list(sys.modules.items()):
            if name not in self._modules and _is_by_hand(name, module):
                del sys.modules[name]
            elif name in self._names:
                _put_names(name, vars(module), self._names[name])
        for kind, held in self._classes:
            if not state.identical(held, state.look_class(kind)):
                state.put_class(kind, held)
        for put, value in reversed(self._values):
            with suppress(Exception):
                put(value)


def _is_by_hand(name: str, module: Any) -> bool:
    """Whether nothing was imported by that name; what a library makes beneath its own it may need."""
    above = sys.modules.get(name.partition(".")[0])
    made = getattr(module, "__spec__", None) is None and getattr(above, "__spec__", None) is None
    return made and "cython" not in name


def _has_settings(name: str) -> bool:
    return is_standard(name) or name in _OF_LIBRARIES or name in _OF_MODULES


def _put_names(module: str, there: Dict[str, Any], had: Dict[str, Any]) -> None:
    """But for those of modules in it that are imported by now."""
    for key in [key for key in there if key not in had]:
        if there[key] is None or there[key] is not sys.modules.get(f"{module}.{key}"):
            del there[key]
    for key in [key for key, value in had.items() if there.get(key, had) is not value]:
        there[key] = had[key]


def _functions() -> Iterator[Setting]:
    yield gc.get_threshold, lambda value: gc.set_threshold(*value)
    yield sys.getswitchinterval, sys.setswitchinterval
    yield threading.stack_size, threading.stack_size
    if hasattr(sys, "get_int_max_str_digits"):
        yield sys.get_int_max_str_digits, sys.set_int_max_str_digits
    yield sys.gettrace, lambda value: None if sys.gettrace() is value else sys.settrace(value)
    yield sys.getprofile, lambda value: None if sys.getprofile() is value else sys.setprofile(value)
    for held in (sys.meta_path, sys.path_hooks, copyreg.dispatch_table, gc.callbacks):
        yield _contents(held)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "__dict__"):
            yield _contents(vars(stream))


def _contents(held: Any) -> Setting:
    def put(value: Any) -> None:
        held.clear()
        held.update(value) if isinstance(held, dict) else held.extend(value)

    return held.copy, put


def _counter(holder: Any, name: str, method: bool) -> Setting:
    """An itertools.count by which things get names (Thread-1): made anew at where it was."""

    def get() -> int:
        count = getattr(holder, name).__self__ if method else getattr(holder, name)
        return int(re.sub(r"[^0-9]", "", repr(count)))

    def put(value: int) -> None:
        if get() != value:
            count = itertools.count(value)
            setattr(holder, name, count.__next__ if method else count)

    return get, put


def _threading(threading: Any) -> Iterator[Setting]:
    yield _counter(threading, "_counter", True)


def _executors(thread: Any) -> Iterator[Setting]:
    yield _counter(thread.ThreadPoolExecutor, "_counter", True)


def _tasks(tasks: Any) -> Iterator[Setting]:
    yield _counter(tasks, "_task_name_counter", True)


def _children(process: Any) -> Iterator[Setting]:
    yield _counter(process, "_process_counter", False)


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
    counted, policy = "object_name_uids", "dtype_policy"

    def get() -> Dict[str, Any]:
        there = {k: v for k, v in vars(keras.GLOBAL_STATE_TRACKER).items() if isinstance(v, plain) or k == policy}
        return {**there, counted: dict(vars(keras.GLOBAL_STATE_TRACKER).get(counted, {}))}

    def put(had: Dict[str, Any]) -> None:
        there = vars(keras.GLOBAL_STATE_TRACKER)
        for key in [k for k, v in there.items() if (isinstance(v, plain) or k == policy) and k not in had]:
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


def _pandas(config: Any) -> Iterator[Setting]:
    def copied(held: Any) -> Any:
        return {k: copied(v) for k, v in held.items()} if type(held) is dict else held

    def put(held: Any, had: Any) -> None:
        for key, value in had.items():
            if type(value) is dict:
                put(held[key], value)
            else:
                held[key] = value

    yield lambda: copied(config._global_config), lambda value: put(config._global_config, value)


def _sklearn(config: Any) -> Iterator[Setting]:
    yield _contents(config._global_config)
    yield _contents(config._get_threadlocal_config())


def _matplotlib(matplotlib: Any) -> Iterator[Setting]:
    params = matplotlib.rcParams  # whose own methods look at what is set

    def put(value: Dict[str, Any]) -> None:
        dict.clear(params)
        dict.update(params, value)

    yield lambda: dict(dict.items(params)), put


def _figures(helpers: Any) -> Iterator[Setting]:
    yield _contents(helpers.Gcf.figs)


def _torch(torch: Any) -> Iterator[Setting]:
    yield torch.get_default_dtype, torch.set_default_dtype
    yield torch.is_grad_enabled, torch.set_grad_enabled
    yield torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    yield _if_other(torch.get_num_threads, torch.set_num_threads)


def _opencv(cv2: Any) -> Iterator[Setting]:
    yield _if_other(cv2.getNumThreads, cv2.setNumThreads)
    yield _if_other(cv2.useOptimized, cv2.setUseOptimized)


def _if_other(get: Callable[[], Any], put: Callable[[Any], object]) -> Setting:
    """Where setting it costs something."""
    return get, lambda value: None if get() == value else put(value)


# What gives settings of a module, where that is imported.
_OF_MODULES: Dict[str, Callable[[Any], Iterator[Setting]]] = {
    "logging": _logging,
    "socket": _socket,
    "threading": _threading,
    "concurrent.futures.thread": _executors,
    "asyncio.tasks": _tasks,
    "multiprocessing.process": _children,
    "csv": _csv,
    "decimal": _decimal,
    "faulthandler": _faults,
    "multiprocessing.context": _processes,
    "xml.etree.ElementTree": _trees,
    "numpy": _numpy,
    "pandas._config.config": _pandas,
    "sklearn._config": _sklearn,
    "matplotlib": _matplotlib,
    "matplotlib._pylab_helpers": _figures,
    "torch": _torch,
    "cv2": _opencv,
    "keras.src.backend.common.global_state": _keras,
    "keras.src.saving.object_registration": _registered,
}
