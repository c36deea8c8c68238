"""What a tensor is on the wire: a handle (arena, offset, dtype, shape, strides) and the checks that make it safe.

A handle is received from another process, so everything in it is checked before memory is touched: a fixed table of
dtypes, bounded rank, 64-byte alignment, and bounds computed with Python's integers, which cannot overflow. Error texts
speak of the handle that was sent and never of other arenas or of addresses.

Standard library and msgpack only; numpy is used when it is there.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import msgpack

from pocketd import wire

# TensorFlow's from_dlpack aborts the process on an address that is not a multiple of this (EIGEN_MAX_ALIGN_BYTES).
ALIGNMENT = 64
# numpy 1.x holds at most 32 dimensions.
MAX_RANK = 32

# dtype -> (bytes per item, struct format for memoryview.cast or None). The names are numpy's.
DTYPES: Dict[str, Tuple[int, Optional[str]]] = {
    "bool": (1, "?"),
    "int8": (1, "b"),
    "uint8": (1, "B"),
    "int16": (2, "h"),
    "uint16": (2, "H"),
    "int32": (4, "i"),
    "uint32": (4, "I"),
    "int64": (8, "q"),
    "uint64": (8, "Q"),
    "float16": (2, None),  # memoryview has no half precision before Python 3.12
    "bfloat16": (2, None),
    "float32": (4, "f"),
    "float64": (8, "d"),
    "complex64": (8, None),
    "complex128": (16, None),
}


# msgpack.packb makes one of these for each call, which costs more than packing.
_PACKER = msgpack.Packer()


class BadTensor(wire.Error):
    """A handle, a shape, a dtype or an arena that cannot be used. code "bad-tensor"."""

    def __init__(self, message: str, **detail: Any):
        super().__init__("bad-tensor", message, **detail)


class Handle(NamedTuple):
    """Where a tensor lies: bytes `offset` of arena number `arena`; `strides` in bytes, None for C order."""

    arena: int
    offset: int
    dtype: str
    shape: Tuple[int, ...]
    strides: Optional[Tuple[int, ...]] = None


def itemsize(dtype: str) -> int:
    """Bytes of one item. Raises BadTensor for a dtype that does not travel."""
    known = DTYPES.get(dtype) if isinstance(dtype, str) else None
    if known is None:
        raise BadTensor(f"dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}")
    return known[0]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor in C order. Raises BadTensor for a dtype or a shape that does not travel."""
    size = itemsize(dtype)
    if len(shape) > MAX_RANK:
        raise BadTensor(f"a tensor of {len(shape)} dimensions; at most {MAX_RANK} are accepted")
    for n in shape:
        if type(n) is not int or n < 0:
            raise BadTensor(f"{n!r} is not the length of a dimension")
        size *= n
    return size


def encode(handle: Handle) -> bytes:
    """The handle's bytes on the wire: a msgpack array of its five fields."""
    packed: bytes = _PACKER.pack(handle)
    return packed


def decode(data: bytes) -> Handle:
    """The handle in `data`, its types checked but not its bounds (see `check`). Raises BadTensor."""
    try:
        arena, offset, dtype, shape, strides = msgpack.unpackb(data, use_list=False, max_ext_len=0)
    except Exception:  # ValueError, TypeError and msgpack's own: whatever it is, it is no handle
        raise BadTensor("a tensor handle must be an array of arena, offset, dtype, shape, strides") from None
    if type(arena) is not int or type(offset) is not int or type(shape) is not tuple:
        raise BadTensor("a tensor handle has an arena, an offset or a shape of the wrong type")
    if strides is not None and (type(strides) is not tuple or len(strides) != len(shape)):
        raise BadTensor("a tensor handle's strides must be as many as its dimensions")
    return Handle(arena, offset, dtype, shape, strides)


def check(handle: Handle, size: int) -> int:
    """The bytes of `handle` in C order, once it is known to lie wholly within an arena of `size` bytes.

    Raises BadTensor otherwise, and for an offset that is not a multiple of ALIGNMENT.
    """
    total = nbytes(handle.dtype, handle.shape)
    offset = handle.offset
    if offset < 0 or offset % ALIGNMENT:
        raise BadTensor(f"the tensor's offset {offset} is not a multiple of {ALIGNMENT}")
    if handle.strides is None:
        first, end = offset, offset + total
    else:
        first, end = extent(handle)
    if first < 0 or end > size or offset > size:
        raise BadTensor(
            f"a tensor {handle.dtype} {list(handle.shape)} at offset {offset} does not lie within its arena "
            f"of {size} bytes"
        )
    return total


def extent(handle: Handle) -> Tuple[int, int]:
    """First byte and the byte after the last of a tensor with strides."""
    item = itemsize(handle.dtype)
    first = last = handle.offset
    for n, stride in zip(handle.shape, handle.strides or ()):
        if type(stride) is not int or stride % item:
            raise BadTensor(f"a stride of {stride!r} bytes for items of {item}")
        if n == 0:
            return handle.offset, handle.offset
        first, last = first + min(0, (n - 1) * stride), last + max(0, (n - 1) * stride)
    return first, last + item


def numpy() -> Any:
    """numpy, or None where it is not installed."""
    if "numpy" not in sys.modules:
        try:
            import numpy  # noqa: F401  (sys.modules is what is asked)
        except ImportError:
            return None
    return sys.modules["numpy"]


def numpy_dtype(np: Any, name: str) -> Any:
    """numpy's dtype of that name. Raises BadTensor for bfloat16 without the ml_dtypes package."""
    known = _NUMPY_DTYPES.get(name)
    if known is None:
        if name == "bfloat16":
            try:
                import ml_dtypes
            except ImportError:
                raise BadTensor("numpy has no bfloat16; install ml_dtypes, or use buffer()") from None
            known = np.dtype(ml_dtypes.bfloat16)
        else:
            itemsize(name)
            known = np.dtype(name)
        _NUMPY_DTYPES[name] = known
    return known


_NUMPY_DTYPES: Dict[str, Any] = {}


def buffer(owner: Any, dtype: str, shape: Sequence[int]) -> memoryview:
    """A memoryview of a tensor's bytes in C order, with its shape and format where memoryview has that format.

    Without one (float16, bfloat16, complex) and for empty tensors it is flat bytes. It keeps `owner` alive.
    """
    flat = memoryview(owner).cast("B")
    form = DTYPES[dtype][1]
    if form is None or not len(flat):
        return flat
    return flat.cast(form, shape=list(shape)) if shape else flat.cast(form, shape=[])  # type: ignore[call-overload,no-any-return]


def owned(base: Any, offset: int, size: int, keep: Any) -> Any:
    """An object with `base`'s bytes [offset, offset + size) as its buffer, which keeps `keep` alive with every view."""
    owner: Any = (ctypes.c_ubyte * size).from_buffer(base, offset)
    owner.keep = keep
    return owner
