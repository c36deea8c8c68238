"""Who seeded which random generator before a program was held.

A generator that the program seeded goes on from its state in each child, as the program asked. One that nobody seeded
is another in each run of plain Python, and so it is made another in each child. Which is which cannot be read off a
generator afterwards, so seeding is watched.
"""

from __future__ import annotations

import gc
import random
import sys
import time
import weakref
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

from runtime.imports import Finder
from runtime.randomness import STREAMS

# Modules whose functions set a global generator: names of functions, and of the generator as `randomness.renew` has it.
_SETTERS: Dict[str, Tuple[Tuple[str, ...], str]] = {
    "numpy.random": (("seed", "set_state"), "numpy"),
    "torch.random": (("manual_seed", "set_rng_state"), "torch"),
}
_instance: random.Random = random._inst  # whose methods are the module's functions
_KERAS = "keras.src.random.seed_generator"
_DATASETS = "tensorflow.python.data.util.random_seed"
_OPERATIONS = "tensorflow.python.framework.random_seed"
_WATCHED = (*_SETTERS, _KERAS, STREAMS, _DATASETS, _OPERATIONS)


class Seeds:
    """Watches from `begin` to `end`; `renew` is for each child. `kept`: the global generators that were seeded."""

    def __init__(self) -> None:
        self.kept: Set[str] = set()
        self.unsure: List[str] = []  # generators of which it is not known, as words
        self._drawn: Set[int] = set()  # numbers of 128 bits from the kernel: seeds of nobody's choice
        self._unseeded: "weakref.WeakSet[random.Random]" = weakref.WeakSet()
        self._before: Set[int] = set()
        self._arrays: List[Any] = []  # numpy's generators that nobody seeded
        self._layers: List[Any] = []  # Keras' SeedGenerators, the same
        self._defaults: Set[int] = set()
        self._streams: List[Any] = []  # TensorFlow's Generators, the same
        self._keys: Set[int] = set()  # theirs when they were made
        self._datasets = 0  # that draw, and were made without a seed
        self.operations = 0  # of TensorFlow, that were given a seed: each has a state from then on
        self._context: Any = None
        self._begun = 0.0
        self._finder = Finder(_WATCHED.__contains__, self._watch)
        self._undo: List[Callable[[], object]] = []

    def begin(self) -> None:
        self._random()
        for name in _WATCHED:
            module = sys.modules.get(name)
            if module:
                self._watch(module)
        sys.meta_path.insert(0, self._finder)
        self._context = _tensorflow_seed()
        self._begun = time.monotonic()
        self._before = {id(g) for g in generators()}

    def end(self) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def find(self) -> None:
        """What there is by now that nobody seeded, and that `renew` has to make another."""
        seed, ago = _tensorflow_seed(), time.monotonic() - self._begun
        if seed != self._context and not drawn_from_clock(seed, ago):
            self.kept.add("tensorflow")
        for g in generators():
            if id(g) in self._before:
                continue
            sequence = getattr(g._bit_generator, "_seed_seq", None)
            entropy = getattr(sequence, "entropy", None)
            if isinstance(entropy, int) and (entropy in self._drawn or drawn_from_clock(entropy, ago)):
                self._arrays.append(g)
            elif isinstance(entropy, int) and entropy.bit_length() > 64:
                self.unsure.append(f"{type(g).__name__} of numpy, seeded with a number of {entropy.bit_length()} bits")
        keras = sys.modules.get(_KERAS)
        if keras and not self.kept & {"random", "keras"}:
            self._layers = [g for g in layers() if _number(g) in self._defaults]
        if self._keys:
            self._streams = [g for g in streams() if _key(g.state) in self._keys]
        one_for_all = getattr(sys.modules.get(STREAMS), "global_generator", None)
        if one_for_all is not None and not any(g is one_for_all for g in self._streams):
            self.kept.add("tf.random.get_global_generator")
        if self._datasets and "tensorflow" not in self.kept:
            self.unsure.append("dataset of TensorFlow that draws without a seed")

    def renew(self) -> None:
        for generator in list(self._unseeded):
            if generator is not random._inst:
                generator.seed()
        for g in self._arrays:
            g._bit_generator.state = type(g._bit_generator)().state
        for g in self._layers:
            g.state.assign([random.SystemRandom().randrange(1, 1 << 31), 0])
        for g in self._streams:
            g.reset_from_seed(random.SystemRandom().getrandbits(63))

    # -- watching

    def _set(self, holder: Any, name: str, value: Any) -> None:
        old = getattr(holder, name)
        setattr(holder, name, value)
        self._undo.append(lambda: setattr(holder, name, old) if getattr(holder, name, None) is value else None)

    def _random(self) -> None:
        urandom, seed = random._urandom, random.Random.seed  # type: ignore[attr-defined]

        def drawn(count: int) -> bytes:
            got: bytes = urandom(count)
            if count == 16:  # as numpy's SeedSequence takes its entropy
                self._drawn.update((int.from_bytes(got, "big"), int.from_bytes(got, "little")))
            return got

        def seeded(generator: random.Random, a: Any = None, version: int = 2) -> None:
            seed(generator, a, version)
            self.kept.discard("random") if generator is random._inst else None
            if a is None or drawn_from_clock(a):
                self._unseeded.add(generator)
                return
            self._unseeded.discard(generator)
            self.kept.add("random") if generator is random._inst else None

        state = _instance.setstate

        def restored(to: Any) -> None:
            state(to)
            self.kept.add("random")

        self._set(random, "_urandom", drawn)
        self._set(random.Random, "seed", seeded)
        # The module's functions are bound to the class's as it was.
        self._set(random, "seed", _instance.seed)
        self._set(random, "setstate", restored)

    def _watch(self, module: Any) -> None:
        others = {
            _KERAS: self._keras,
            STREAMS: self._tensorflow,
            _DATASETS: self._data,
            _OPERATIONS: self.count_operations,
        }
        if module.__name__ in others:
            others[module.__name__](module)
            return
        functions, generator = _SETTERS[module.__name__]
        for name in functions:
            self._set(module, name, self._noting(getattr(module, name), generator))
        for parent in ("torch",):  # torch.manual_seed is torch.random's
            holder = sys.modules.get(parent)
            if holder and module.__name__.startswith(parent + ".") and hasattr(holder, "manual_seed"):
                self._set(holder, "manual_seed", module.manual_seed)

    def _noting(self, function: Any, generator: str) -> Any:
        def noting(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            given = args[0] if args else next(iter(kwargs.values()), None)
            unseeded = given is None or drawn_from_clock(given)
            (self.kept.discard if unseeded else self.kept.add)(generator)
            return result

        noting.__name__, noting.__doc__ = getattr(function, "__name__", "seed"), function.__doc__
        return noting

    def _keras(self, module: Any) -> None:
        plain = module.make_default_seed

        def default() -> int:
            number: int = plain()
            self._defaults.add(number)
            return number

        self._set(module, "make_default_seed", default)

    def _tensorflow(self, module: Any) -> None:
        plain = module.non_deterministic_ints

        def drawn(*args: Any, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            key = _key(found)
            self._keys.update(() if key is None else [key])
            return found

        self._set(module, "non_deterministic_ints", drawn)

    def _data(self, module: Any) -> None:
        plain = module.get_seed

        def get_seed(seed: Any) -> Any:
            self._datasets += seed is None
            return plain(seed)

        self._set(module, "get_seed", get_seed)

    def count_operations(self, module: Any) -> None:
        plain = module.get_seed
        asked = getattr(plain, "plain", plain)  # beneath randomness.renew's

        def get_seed(op_seed: Any) -> Any:
            found = asked(op_seed)
            if found == (None, None):
                return plain(op_seed)
            self.operations += 1
            return found

        self._set(module, "get_seed", get_seed)

    def watch_operations(self) -> None:
        """Watch those alone, until `end`."""
        module = sys.modules.get(_OPERATIONS)
        if module:
            self.count_operations(module)


def drawn_from_clock(seed: Any, ago: float = 0.0) -> bool:
    """Whether a seed is the time, of now or of at most `ago` seconds before, in a usual unit, also modulo 2 ** 32: its
    program wants other numbers in each run. By chance a number is that once in a million."""
    if isinstance(seed, bool) or not isinstance(seed, (int, float)):
        return False
    now = time.time()
    span = ago + 2.0
    for unit in (1.0, 1e3, 1e6, 1e9):
        if 0 <= (now + 1) * unit - seed <= (span + 1) * unit:
            return True
    return isinstance(seed, int) and any((int(now * unit) + 1 - seed) % (1 << 32) <= span * unit for unit in (1, 1e3))


def _number(generator: Any) -> Optional[int]:
    found = getattr(generator, "_initial_seed", None)
    return found if isinstance(found, int) else None


def layers() -> List[Any]:
    """Keras' generators, of layers such as Dropout."""
    keras = sys.modules.get(_KERAS)
    return [o for o in gc.get_objects() if type(o) is keras.SeedGenerator] if keras else []


def _key(state: Any) -> Optional[int]:
    """What of a Generator's state stays the same when it draws, and no other has by chance: its last number. None in a
    graph, where it is not known yet."""
    try:
        return int(state.numpy().flat[-1])
    except AttributeError:
        return None


def streams() -> List[Any]:
    """TensorFlow's generators that somebody made."""
    operations = sys.modules.get(STREAMS)
    return [o for o in gc.get_objects() if type(o) is operations.Generator] if operations else []


def own_randoms() -> List[random.Random]:
    kinds = random.Random, random.SystemRandom  # which has no state
    return [o for o in gc.get_objects() if issubclass(type(o), kinds[0]) and not issubclass(type(o), kinds[1])]


def generators() -> List[Any]:
    """Numpy's generators that somebody made."""
    numpy_random = sys.modules.get("numpy.random")
    if not numpy_random:
        return []
    kinds = (numpy_random.Generator, numpy_random.RandomState)
    the_global = getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None)
    return [o for o in gc.get_objects() if type(o) in kinds and o is not the_global]


def _tensorflow_seed() -> Any:
    module = sys.modules.get("tensorflow.python.eager.context")
    context = module.context_safe() if module else None
    return getattr(context, "_seed", None)
