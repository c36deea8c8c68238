"""Random state that a child has in common with its template and with every other child of it, made its own.

A live fork copies it, and runs no fork handler (os.register_at_fork would reseed `random`). Only what the process has
imported is touched, and TensorFlow only if its eager context exists: making one costs 20 ms and starts its threads.

What cannot be reached stays the template's: the hash seed, generators that a program made itself (`default_rng()`), and
the state inside stateful random operations of a tf.function that was traced before the fork.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any, Collection


def _number(bits: int) -> int:
    return int.from_bytes(os.urandom((bits + 7) // 8), "little") >> -bits % 8


def _module(name: str) -> Any:
    return sys.modules.get(name)


def renew(kept: Collection[str] = ()) -> None:
    """Reseed, from os.urandom, every global generator of this process but those in `kept` (runtime.seeds). Call it in
    each child, after `clone.revive()`: TensorFlow's and Keras' states are variables, set by operations."""
    if "random" not in kept:
        random.seed()  # without an argument: from os.urandom
    if tempfile := _module("tempfile"):
        tempfile._name_sequence = None  # made anew at the next name; by itself it only looks whether getpid() changed
    if _ssl := _module("_ssl"):
        _ssl.RAND_add(os.urandom(32), 32.0)  # mixed in; OpenSSL itself only looks whether getpid() changed
    if "numpy" not in kept and (numpy_random := _module("numpy.random")):
        numpy_random.seed([_number(32) for _ in range(8)])
    if "torch" not in kept and (torch := _module("torch")):
        torch.default_generator.manual_seed(_number(63))
    if "tensorflow" not in kept and (context := _module("tensorflow.python.eager.context")):
        _renew_tensorflow(context)


def _renew_tensorflow(context: Any) -> None:
    eager = context.context_safe()
    if eager is None or eager._context_handle is None:  # not initialised: it will draw its own seeds
        return
    # As Context._set_global_seed, but without TFE_ContextClearCaches: that would drop every traced function's kernels,
    # which are what a template is for. A seed that is not None makes eager operations take theirs from _rng; without,
    # each takes its cached kernel's state, or std::mt19937's (tsl/platform/random.cc): both are the template's.
    eager._seed, eager._rng = _number(31), random.Random(_number(64))
    operations = _module("tensorflow.python.ops.stateful_random_ops")
    if operations and operations.global_generator is not None:
        operations.global_generator.reset_from_seed(_number(63))
    seeds, state = _module("keras.src.random.seed_generator"), _module("keras.src.backend.common.global_state")
    if seeds and state:
        generator = state.get_global_attribute(seeds.GLOBAL_SEED_GENERATOR)
        if generator is not None:
            generator.state.assign([_number(31), 0])
