"""A call with no Python frame beneath it, as the interpreter itself makes one.

A program sees the frames that it runs in: in faulthandler's words, traceback.print_stack(), inspect.stack(), and where
a warning with a stacklevel points. Beneath its `<module>` there must be none of ours.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Callable, Dict, List, Tuple

_WORD = ctypes.sizeof(ctypes.c_void_p)
ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p


_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
# The first fields of a thread's state after `prev`, `next`, `interp`, by CPython's version (cpython/pystate.h).
_LAYOUTS: Dict[Tuple[int, int], List[Any]] = {
    (3, 9): [("frame", _POINTER)],
    (3, 10): [("frame", _POINTER)],
    (3, 11): [("status", _INT * 2), ("remaining", _INT), ("limit", _INT), ("others", _INT * 3), ("cframe", _POINTER)],
    (3, 12): [("status", _INT), ("remaining", _INT), ("limit", _INT), ("others", _INT * 4), ("cframe", _POINTER)],
    (3, 13): [("eval_breaker", _POINTER), ("status", _INT * 3), ("remaining", _INT), ("limit", _INT)]
    + [("others", _INT * 4), ("frame", _POINTER)],
}


class _State(ctypes.Structure):
    _fields_ = [("prev", _POINTER), ("next", _POINTER), ("interp", _POINTER), *_LAYOUTS.get(sys.version_info[:2], [])]


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
