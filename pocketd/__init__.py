"""pocketd: a daemon that runs featherweight pockets inside warm service containers.

The three functions here are for pockets' code: where a program may be held, and what happens in each run that goes on
from there, or in each session that has a module preloaded. Anywhere else, under plain Python too, they do nothing.
"""

from __future__ import annotations

import sys
from typing import Any, Callable, TypeVar

__version__ = "0.1.0"

_Function = TypeVar("_Function", bound=Callable[[], object])


def _held() -> Any:
    """What holds this process, where a pocket's code is held (runtime.held)."""
    return getattr(sys, "_pocketd_held", None)


def checkpoint() -> None:
    """Hold the program here, when its pocket's definition says `checkpoint = "pocketd.checkpoint()"`: everything above
    has been done when a run begins."""
    held = _held()
    if held is not None:
        held.here()


def rehearsed() -> None:
    """A rehearsal with `rehearse_until = "rehearsed"` is over here."""
    held = _held()
    if held is not None:
        held.rehearsed()


def on_start(function: _Function) -> _Function:
    """Call `function` at the beginning of each run that goes on from the checkpoint, or of each session that has the
    module preloaded: to open what cannot be held. Where nothing is held it is called at once. May be a decorator."""
    held = _held()
    if held is not None and not held.child and not held.rehearsing:
        held.on_start.append(function)
    else:
        function()
    return function
