"""An interpreter as it was before a rehearsal: what that changed in it is put back.

What the rehearsal bound in the program's own modules, what it set in the interpreter and in the standard library, and
the states of random generators.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import sys
import warnings
import weakref
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from runtime import carried, fingerprints, seeds, settings, state


class Snapshot:
    """What a rehearsal may change and what is put back after it. `tops`: where the program's own files are; `local`:
    names of the function that it stands in; `drawn`: how many operations of TensorFlow it has given a seed so far."""

    def __init__(self, tops: Tuple[str, ...], local: Mapping[str, Any], drawn: int):
        self.tops = tops
        self.names = {name: dict(vars(module)) for name, module in self._own()}
        self.own = frozenset((*self.names, "__main__"))
        self.state = state.State(self.own.__contains__, [*self.names.items(), ("", dict(local))])
        self.others = fingerprints.Things(self.state.others)
        self.settings = settings.Settings()
        self.drawn = drawn
        self.operations = seeds.Seeds()
        self.operations.watch_operations()
        self.warned = {name: dict(names.get("__warningregistry__", ())) for name, names in self.names.items()}
        self.filters = list(warnings.filters)
        self.collecting = gc.isenabled()
        self.finalizers = dict(_finalizers())
        self.modules = set(sys.modules)
        self.lazy: List[str] = []
        self.nice = os.getpriority(os.PRIO_PROCESS, 0)
        self.processors = os.sched_getaffinity(0)
        self.environment = dict(os.environb)
        self.path = list(sys.path)
        self.process = carried.state()
        self.handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
        self.limit = sys.getrecursionlimit()
        self.random = states()
        self.loggers = _loggers()

    def _own(self) -> Iterator[Tuple[str, Any]]:
        for name, module in list(sys.modules.items()):
            path = getattr(module, "__file__", None)
            if name == "__main__" or (isinstance(path, str) and path.startswith(self.tops)):
                yield name, module

    def restore(self) -> Optional[str]:
        """Put back all of it. What cannot be, in words; None where there is nothing."""
        for name, module in list(self._own()):
            if name not in self.modules:
                del sys.modules[name]  # imported again, by each run
            elif name in self.names:
                there, had = vars(module), self.names[name]
                self.state.lazy += state.loaded({**dict.fromkeys(there, there), **had}, there, self.own.__contains__)
                for key in [key for key in there if key not in had]:
                    del there[key]
                there.update(had)
                if "__warningregistry__" in had:
                    had["__warningregistry__"].clear()
                    had["__warningregistry__"].update(self.warned[name])
        self.operations.end()
        left = self.state.restore()
        self.lazy = self.state.lazy
        self.settings.restore()
        del self.state, self.settings
        for variable in [variable for variable in os.environb if variable not in self.environment]:
            del os.environb[variable]
        for variable, text in self.environment.items():
            if os.environb.get(variable) != text:
                os.environb[variable] = text
        sys.path[:] = self.path
        carried.put(carried.differing(self.process, carried.state()))
        os.sched_setaffinity(0, self.processors)
        lowered = [*carried.differing(self.process, carried.state())]
        lowered += ["its priority"] if os.getpriority(os.PRIO_PROCESS, 0) != self.nice else []
        left = left or ", ".join(lowered) or None
        warnings.filters[:] = self.filters  # type: ignore[index]
        warnings._filters_mutated()  # type: ignore[attr-defined]
        for finalizer in [f for f in _finalizers() if f not in self.finalizers]:
            finalizer.detach()
        _finalizers().update({f: about for f, about in self.finalizers.items() if about.weakref() is not None})
        (gc.enable if self.collecting else gc.disable)()
        for number, handler in self.handlers.items():
            if handler is not None and signal.getsignal(number) is not handler and number not in _FIXED:
                signal.signal(number, handler)
        sys.setrecursionlimit(self.limit)
        _put_loggers(self.loggers)
        gc.collect()
        put_back(self.random)
        left = left or self.others.changed()
        if not self.operations.operations:
            return left
        if self.drawn:
            return left or "the state of operations of TensorFlow that have a seed, as some before its checkpoint have"
        _forget_kernels()
        return left


_LOGGER = ("level", "propagate", "disabled", "handlers", "filters")


def _loggers() -> Dict[Any, Dict[str, Any]]:
    """What is set of each logger that there is, the root's too: what a program says by logging.basicConfig is said of
    the process, and only where nothing has been said yet."""
    logging = sys.modules.get("logging")
    if not logging:
        return {}
    known = (logging.root, *logging.root.manager.loggerDict.values())
    loggers = [logger for logger in known if isinstance(logger, logging.Logger)]  # others only hold a place
    return {logger: {name: _copy(vars(logger)[name]) for name in _LOGGER} for logger in loggers}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _put_loggers(known: Dict[Any, Dict[str, Any]]) -> None:
    for logger in _loggers():
        had = known.get(logger) or {**_NEW, "level": 30 if logger.parent is None else 0}  # a root's is WARNING
        for name, value in had.items():
            if isinstance(value, list):
                getattr(logger, name)[:] = value
            else:
                setattr(logger, name, value)
        logger.manager._clear_cache()


_NEW = {"level": 0, "propagate": True, "disabled": False, "handlers": [], "filters": []}


def _finalizers() -> Any:
    return weakref.finalize._registry  # type: ignore[attr-defined]


_FIXED = (signal.SIGKILL, signal.SIGSTOP)


def states() -> Dict[str, Any]:
    """Of every global random generator of this process, its state."""
    found: Dict[str, Any] = {"random": random.getstate()}
    numpy_random, torch = sys.modules.get("numpy.random"), sys.modules.get("torch")
    if numpy_random:
        found["numpy"] = numpy_random.get_state()
    if torch:
        found["torch"] = torch.get_rng_state()
    context = _context()
    if context is not None:
        rng = getattr(context, "_rng", None)
        found["tensorflow"] = (context._seed, rng.getstate() if rng else None)
    found["own"] = [(g, g._bit_generator.state) for g in seeds.generators()]
    found["own random"] = [(g, g.getstate()) for g in seeds.own_randoms()]
    found["keras"] = [(g, g.state.numpy()) for g in seeds.layers()]
    return found


def put_back(found: Dict[str, Any]) -> None:
    random.setstate(found["random"])
    if "numpy" in found:
        sys.modules["numpy.random"].set_state(found["numpy"])
    if "torch" in found:
        sys.modules["torch"].set_rng_state(found["torch"])
    for g, drawn in found["own"]:
        g._bit_generator.state = drawn
    for g, drawn in found["own random"]:
        g.setstate(drawn)
    for g, drawn in found["keras"]:
        g.state.assign(drawn)
    context = _context()
    if context is not None and "tensorflow" in found:
        seed, drawn = found["tensorflow"]
        context._seed = seed
        if drawn is not None:
            context._rng.setstate(drawn)
        elif getattr(context, "_rng", None) is not None and seed is None:
            context._rng = None


def _forget_kernels() -> None:
    """As tf.random.set_seed() does: an operation with a seed that has run has a kernel, which has a state."""
    context, bound = _context(), sys.modules.get("tensorflow.python.pywrap_tfe")
    if bound and context is not None and context._context_handle is not None:
        bound.TFE_ContextClearCaches(context._context_handle)


def _context() -> Any:
    module = sys.modules.get("tensorflow.python.eager.context")
    return module.context_safe() if module else None
