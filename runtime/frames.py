"""A call with no Python frame beneath it, as the interpreter itself makes one.

A program sees the frames that it runs in: in faulthandler's words, traceback.print_stack(), inspect.stack(), and where
a warning with a stacklevel points. Beneath its `<module>` there must be none of ours.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Callable, Optional

_WORD = ctypes.sizeof(ctypes.c_void_p)
ctypes.pythonapi.PyThreadState_Get.restype = ctypes.c_void_p


def _current() -> Optional[int]:
    """The address at which CPython keeps the innermost frame of this thread; None for a version not known here.

    cpython/pystate.h: `frame` up to 3.10, `cframe->current_frame` in 3.11 and 3.12, `current_frame` from 3.13.
    """
    state = ctypes.pythonapi.PyThreadState_Get()
    if sys.version_info < (3, 11):
        return int(state) + 3 * _WORD
    if sys.version_info < (3, 13):
        inner = ctypes.c_void_p.from_address(state + 7 * _WORD).value
        return (inner or 0) + (_WORD if sys.version_info < (3, 12) else 0)
    return int(state) + 9 * _WORD if sys.version_info < (3, 14) else None


def alone(function: Callable[..., Any], *arguments: Any) -> None:
    """Call with no frame beneath; with the frames there are where this interpreter's layout is not as expected."""
    # A builtin, so that CPython makes a new evaluation loop of what it calls: it must not be inlined in this one.
    call = functools.partial(function, *arguments)
    address = _current()
    if address is None:
        call()
        return
    here = sys._getframe()
    expected = id(here) if sys.version_info < (3, 11) else ctypes.c_void_p.from_address(id(here) + 3 * _WORD).value
    del here
    slot = ctypes.c_void_p.from_address(address)
    mine = slot.value
    if mine != expected:
        call()
        return
    slot.value = None
    try:
        call()
    finally:
        slot.value = mine
