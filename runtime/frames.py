"""A call with no Python frame beneath it, as the interpreter itself makes one.

A program sees the frames that it runs in: in faulthandler's words, traceback.print_stack(), inspect.stack(), and where
a warning with a stacklevel points. Beneath its `<module>` there must be none of ours.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Callable

_WORD = ctypes.sizeof(ctypes.c_void_p)
ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p


class _State(ctypes.Structure):
    """The first fields of this thread's state, by CPython's version (cpython/pystate.h)."""

    _fields_ = [("prev", ctypes.c_void_p), ("next", ctypes.c_void_p), ("interp", ctypes.c_void_p)] + {
        (3, 9): [("frame", ctypes.c_void_p)],
        (3, 10): [("frame", ctypes.c_void_p)],
        (3, 11): [("status", ctypes.c_int * 2), ("remaining", ctypes.c_int), ("limit", ctypes.c_int)]
        + [("others", ctypes.c_int * 3), ("cframe", ctypes.c_void_p)],
        (3, 12): [("status", ctypes.c_int), ("remaining", ctypes.c_int), ("limit", ctypes.c_int)]
        + [("others", ctypes.c_int * 4), ("cframe", ctypes.c_void_p)],
        (3, 13): [("eval_breaker", ctypes.c_void_p), ("status", ctypes.c_int * 3), ("remaining", ctypes.c_int)]
        + [("limit", ctypes.c_int), ("others", ctypes.c_int * 4), ("frame", ctypes.c_void_p)],
    }.get(sys.version_info[:2], [])


# What the builtins between `alone` and its function count as in 3.11, where C and Python share one depth.
_BUILTINS = 1 if sys.version_info[:2] == (3, 11) else 0


def alone(function: Callable[..., Any], *arguments: Any) -> None:
    """Call with no frame beneath, and none counted; with those there are where the layout is not as expected."""
    # A builtin, so that CPython makes a new evaluation loop of what it calls: it must not be inlined in this one.
    call = functools.partial(function, *arguments)
    state = _State.from_address(ctypes.pythonapi.PyThreadState_Get())
    here = sys._getframe()
    expected = id(here) if sys.version_info < (3, 11) else ctypes.c_void_p.from_address(id(here) + 3 * _WORD).value
    del here
    if hasattr(state, "cframe"):
        slot = ctypes.c_void_p.from_address((state.cframe or 0) + (_WORD if sys.version_info < (3, 12) else 0))
    elif hasattr(state, "frame"):
        slot = ctypes.c_void_p.from_address(ctypes.addressof(state) + _State.frame.offset)
    else:
        slot = None
    if slot is None or slot.value != expected:
        call()
        return
    depth = 0
    if getattr(state, "limit", None) == sys.getrecursionlimit():
        depth = state.limit - state.remaining + _BUILTINS
        state.remaining += depth
    slot.value = None
    try:
        call()
    finally:
        slot.value = expected
        if depth:
            state.remaining -= depth
