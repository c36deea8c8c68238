"""Copying arrays into a heap: the one copy that a tensor takes on its way out.

An array is a numpy array or a buffer with a numeric format, such as array.array (msgpack sends a
memoryview as bytes). numpy is used when it has been
imported already, and not needed for buffers.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, Optional, Tuple

from pocketd import tensors
from pocketd.arena import Arena, Heap
from pocketd.tensors import DTYPES, BadTensor, Handle

_OF_FORMAT = {form: name for name, (_, form) in DTYPES.items() if form}
# memoryview names C's own types apart: long is 64 bits wide on every machine that pocketd runs on.
_OF_FORMAT.update({"l": "int64", "L": "uint64", "c": "uint8", "e": "float16"})
_OF_NUMPY: Dict[Any, str] = {}


def is_array(value: Any) -> bool:
    """Whether it is a numpy array."""
    np = sys.modules.get("numpy")
    return np is not None and isinstance(value, np.ndarray)


def is_masked(array: Any) -> bool:
    ma = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(array, ma.MaskedArray)


def scalar(value: Any) -> Any:
    """A numpy scalar as a Python number; anything else as it is."""
    np = sys.modules.get("numpy")
    return value.item() if np and isinstance(value, np.generic) and value.dtype.kind in "biufSU" else value


def words(value: Any) -> Any:
    """An array of str or bytes as nested lists of them, which is how words travel; anything else as it is."""
    if not is_array(value) or value.dtype.kind not in "SUO":
        return value
    if value.dtype.kind == "O" and not all(type(item) in (str, bytes) for item in value.flat):
        return value
    return value.tolist()


def store(heap: Heap, value: Any) -> Optional[Handle]:
    """Allocate in `heap` and copy `value` there in C order; None when it is not an array.

    The range is the caller's to free. Raises BadTensor for a dtype that does not travel.
    """
    np = sys.modules.get("numpy")
    if np is not None and isinstance(value, np.generic):
        value = np.asarray(value)  # as a buffer it would be one of bytes
    if np is not None and isinstance(value, np.ndarray):
        dtype = value.dtype
        if is_masked(value):
            raise BadTensor("a masked array cannot travel, for its mask would not; pass its filled(), or data and mask")
        name = _OF_NUMPY.get(dtype) or _name(dtype)
        arena, offset = heap.allocate(value.nbytes)
        try:
            view(np, arena, offset, name, value.shape)[...] = value
        except BaseException:  # a ^C, for one
            heap.free(arena.id, offset)
            raise
        return Handle(arena.id, offset, name, value.shape)
    try:
        buffer = memoryview(value)
    except TypeError:
        return None
    name = _OF_FORMAT.get(buffer.format.lstrip("@=<" if sys.byteorder == "little" else "@="), "")
    if not name or DTYPES[name][0] != buffer.itemsize:
        raise BadTensor(f"a buffer of format {buffer.format!r} cannot travel as a tensor")
    arena, offset = heap.allocate(buffer.nbytes)
    try:
        if buffer.nbytes:
            flat = buffer.cast("B") if buffer.c_contiguous else buffer.tobytes()
            memoryview(arena.map)[offset : offset + buffer.nbytes] = flat
    except BaseException:
        heap.free(arena.id, offset)
        raise
    return Handle(arena.id, offset, name, tuple(buffer.shape or ()))


def view(np: Any, arena: Arena, offset: int, dtype: str, shape: Tuple[int, ...], strides: Any = None) -> Any:
    """A writable numpy array over a place in an arena that has been checked. It keeps the mapping, not the range."""
    return np.ndarray(shape, tensors.numpy_dtype(np, dtype), arena.map, offset, strides)


def _name(dtype: Any) -> str:
    """The wire's name of a numpy dtype, of either byte order. Raises BadTensor."""
    name: str = dtype.name
    if name not in DTYPES:
        raise BadTensor(f"an array of dtype {name} cannot travel; those that can: {', '.join(DTYPES)}")
    _OF_NUMPY[dtype] = name
    return name
