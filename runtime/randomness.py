"""Random state that a child has in common with its template and with every other child of it, made its own.

A live fork copies it, and runs no fork handler (os.register_at_fork would reseed `random`). Only what the process has
imported is touched, and TensorFlow only if its eager context exists: making one costs 20 ms and starts its threads.

What cannot be reached stays the template's: the hash seed, and the state inside stateful random operations of a
tf.function that was traced before the fork. Generators that a program made itself, `default_rng()`, are runtime.seeds'.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import sys
from typing import Any, Collection

_LOOKS = 0x1010104F  # OpenSSL 1.1.1d and later look at getpid(), and no worker has its template's: openssl_get_fork_id
STREAMS = "tensorflow.python.ops.stateful_random_ops"  # tf.random.Generator


def _number(bits: int) -> int:
    return int.from_bytes(os.urandom((bits + 7) // 8), "little") >> -bits % 8


def _module(name: str) -> Any:
    return sys.modules.get(name)


def prepare() -> None:
    """In a template, so that no child has to: OpenSSL sets its generator up at its first use, 2.4 ms and 700 pages."""
    renew()
    if _ssl := _module("_ssl"):
        _ssl.RAND_bytes(1)


def renew(kept: Collection[str] = ()) -> None:
    """Reseed, from os.urandom, every global generator of this process but those in `kept` (runtime.seeds). Call it in
    each child, after `clone.revive()`: TensorFlow's and Keras' states are variables, set by operations."""
    if "random" not in kept:
        random.seed()  # without an argument: from os.urandom
    if tempfile := _module("tempfile"):
        tempfile._name_sequence = None  # made anew at the next name; by itself it only looks whether getpid() changed
    if (_ssl := _module("_ssl")) and _ssl.OPENSSL_VERSION_NUMBER < _LOOKS:
        _ssl.RAND_add(os.urandom(32), 32.0)
    if "numpy" not in kept and (numpy_random := _module("numpy.random")):
        numpy_random.seed([_number(32) for _ in range(8)])
    if "torch" not in kept and (torch := _module("torch")):
        torch.default_generator.manual_seed(_number(63))
    if _module("_sqlite3") and (randomness := _of_sqlite()):
        randomness(0, None)  # random() in SQL: where no bytes are asked for, it takes a seed anew (sqlite3.h)
    context = _module("tensorflow.python.eager.context")
    eager = context.context_safe() if context else None
    if eager is not None and eager._context_handle is not None:  # else nothing has been drawn, and it will seed itself
        _renew_tensorflow(kept)


@functools.lru_cache(maxsize=None)
def _of_sqlite() -> Any:
    try:
        return ctypes.CDLL("libsqlite3.so.0", os.RTLD_NOLOAD).sqlite3_randomness
    except (OSError, AttributeError):  # it is linked in, or has another name
        return None


def _renew_tensorflow(kept: Collection[str]) -> None:
    _draw_from_the_kernel()
    operations = _module(STREAMS)
    if operations and operations.global_generator is not None and "tf.random.get_global_generator" not in kept:
        operations.global_generator.reset_from_seed(_number(63))
    seeds, state = _module("keras.src.random.seed_generator"), _module("keras.src.backend.common.global_state")
    if seeds and state and "tensorflow" not in kept:
        generator = state.get_global_attribute(seeds.GLOBAL_SEED_GENERATOR)
        if generator is not None:
            generator.state.assign([_number(31), 0])


def _draw_from_the_kernel() -> None:
    """What nobody seeded TensorFlow draws from states that children have in common: of its operations' kernels, and
    std::mt19937's (tsl/platform/random.cc). From now on it has its seeds from os.urandom."""
    seeds, operations = _module("tensorflow.python.framework.random_seed"), _module(STREAMS)
    if seeds and not hasattr(seeds.get_seed, "plain"):
        seeds.get_seed = _seeds_by(seeds.get_seed)
    if operations and not hasattr(operations.non_deterministic_ints, "plain"):
        operations.non_deterministic_ints = _integers_by(operations.non_deterministic_ints)


def _seeds_by(plain: Any) -> Any:
    def get_seed(op_seed: Any) -> Any:
        found = plain(op_seed)
        return found if found[0] is not None or found[1] is not None else (_number(31), _number(31))

    get_seed.plain = plain  # type: ignore[attr-defined]
    return get_seed


def _integers_by(plain: Any) -> Any:
    def non_deterministic_ints(shape: Any, *others: Any, **named: Any) -> Any:
        drawn = plain(shape, *others, **named)
        if not hasattr(drawn, "numpy"):  # in a graph, where it is to be another each time
            return drawn
        numbers = drawn.numpy()
        fresh = _module("numpy").frombuffer(os.urandom(numbers.nbytes), numbers.dtype)
        return _module("tensorflow").constant(fresh.reshape(numbers.shape))

    non_deterministic_ints.plain = plain  # type: ignore[attr-defined]
    return non_deterministic_ints
