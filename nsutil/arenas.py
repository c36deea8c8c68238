"""Python's own memory in few, large pages. The C half is arenas.c."""

from __future__ import annotations

import ctypes

from nsutil.library import load


class _Allocator(ctypes.Structure):
    """PyObjectArenaAllocator (cpython/objimpl.h)."""

    _fields_ = [("context", ctypes.c_void_p), ("alloc", ctypes.c_void_p), ("free", ctypes.c_void_p)]


def on_huge_pages() -> None:
    """Let this interpreter make its objects on huge pages from now on, where the kernel has some: a fork copies fewer
    page tables then. Children have it too. What is there already stays where it is."""
    library = load()
    alloc, free = (ctypes.cast(f, ctypes.c_void_p).value for f in (library.arenas_alloc, library.arenas_free))
    ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(_Allocator(None, alloc, free)))
