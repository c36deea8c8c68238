"""A call with no Python frame beneath it, as the interpreter itself makes one.

A program sees the frames that it runs in: in faulthandler's words, traceback.print_stack(), inspect.stack(), and where
a warning with a stacklevel points. Beneath its `<module>` there must be none of ours.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Callable, Dict, List, Tuple

from nsutil import library

_WORD = ctypes.sizeof(ctypes.c_void_p)
_python: Any = ctypes.PyDLL(None)  # of its own: what is said of functions of ctypes.pythonapi, the program sees
_python.PyThreadState_Get.restype = ctypes.c_void_p


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
_BUILTINS = 2 if sys.version_info[:2] == (3, 11) else 0

# Called by ctypes, which no trace or profile function hears of, as it does of builtins.
_python.PyObject_CallNoArgs.restype, _python.PyObject_CallNoArgs.argtypes = ctypes.py_object, [ctypes.py_object]
_set_trace, _set_profile = _python.PyEval_SetTrace, _python.PyEval_SetProfile
_set_trace.restype = _set_profile.restype = None
_set_trace.argtypes = _set_profile.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_call: Any = library.load().frames_call
_call.restype, _call.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_void_p, ctypes.py_object]
_CALL = ctypes.cast(_python.PyObject_CallNoArgs, ctypes.c_void_p)

# The program's functions for sys.settrace and sys.setprofile, while it does not run.
_traced: Tuple[Any, Any] = (None, None)


def alone(function: Callable[..., Any], *arguments: Any) -> None:
    """Call with no frame beneath, and none counted; with those there are where the layout is not as expected.

    The functions that trace and profile the program hear of nothing else: they are put aside at the end, and set again
    for the next call.
    """
    global _traced
    # A builtin, so that CPython makes a new evaluation loop of what it calls: it must not be inlined in this one.
    call = functools.partial(function, *arguments)
    state = _State.from_address(_python.PyThreadState_Get())
    here = sys._getframe()
    expected = id(here) if sys.version_info < (3, 11) else ctypes.c_void_p.from_address(id(here) + 3 * _WORD).value
    del here
    if hasattr(state, "cframe"):
        slot = ctypes.c_void_p.from_address((state.cframe or 0) + (_WORD if sys.version_info < (3, 12) else 0))
    elif hasattr(state, "frame"):
        slot = ctypes.c_void_p.from_address(ctypes.addressof(state) + _State.frame.offset)
    else:
        slot = ctypes.c_void_p()
    if slot.value != expected:
        slot = ctypes.c_void_p()  # nothing is beneath that
    depth = 0
    if slot and getattr(state, "limit", None) == sys.getrecursionlimit():
        depth = state.limit - state.remaining + _BUILTINS
        state.remaining += depth
    at, traced, _traced = ctypes.addressof(slot), _traced, (None, None)
    if traced[0] is not None:
        sys.settrace(traced[0])
    if traced[1] is not None:
        sys.setprofile(traced[1])
    try:
        _call(at, _CALL, call)
    finally:
        _traced = (_python.PyObject_CallNoArgs(sys.gettrace), _python.PyObject_CallNoArgs(sys.getprofile))
        _set_trace(None, None)
        _set_profile(None, None)
        if depth:
            state.remaining -= depth


def untraced() -> None:
    """What is called from here on is not traced."""
    global _traced
    _traced = (None, None)
