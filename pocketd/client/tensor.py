"""Tensors as an app holds them: a place in shared memory, with a shape and a dtype."""

from __future__ import annotations

import math
from typing import Any, Deque, Iterable, Optional, Tuple

from pocketd import arrays, tensors
from pocketd.arena import Arena
from pocketd.client import errors


class Block:
    """A range of an arena that is in use. When the last tensor and the last view of it are gone, it is given back."""

    __slots__ = ("_freed", "arena", "offset")

    def __init__(self, arena: Arena, offset: int, freed: Deque[Tuple[int, int]]):
        self.arena = arena
        self.offset = offset
        self._freed = freed

    def __del__(self) -> None:
        # Any thread, any moment: appending to a deque is all that is safe. The session looks at it in its next call.
        self._freed.append((self.arena.id, self.offset))


class Tensor:
    """A tensor in memory that the worker maps too. Made by `Session.tensor`, or by a model as its result.

    It stays valid after the session has ended, as long as it or a view of it is referenced. `numpy()` and `buffer()`
    are views: what is written there, the worker sees in a call, and what a function of the worker's writes into its
    argument then is seen here. numpy need not be installed for anything but `numpy()` and indexing by slices.
    """

    __slots__ = ("__weakref__", "_array", "_block", "_owner", "_wire", "dtype", "nbytes", "shape")

    shape: Tuple[int, ...]
    dtype: str
    nbytes: int

    def __init__(self, block: Block, dtype: str, shape: Tuple[int, ...], nbytes: int, wire: Optional[bytes] = None):
        self._block = block
        self.dtype = dtype
        self.shape = shape
        self.nbytes = nbytes
        self._wire = wire
        self._owner: Any = None
        self._array: Any = None

    def handle(self) -> bytes:
        """What travels instead of the bytes."""
        if self._wire is None:
            self._wire = tensors.encode(
                tensors.Handle(self._block.arena.id, self._block.offset, self.dtype, self.shape)
            )
        return self._wire

    def numpy(self) -> Any:
        """A writable numpy array over the tensor's memory. Raises errors.BadTensor when there is no numpy for it."""
        if self._array is None:
            np = tensors.numpy()
            if np is None:
                raise errors.BadTensor("numpy is not installed here; use buffer()")
            try:
                dtype = tensors.numpy_dtype(np, self.dtype)
            except tensors.BadTensor as e:
                raise errors.of(e) from None
            self._array = np.ndarray(self.shape, dtype, buffer=self._owned())
        return self._array

    def buffer(self) -> memoryview:
        """A writable memoryview with the tensor's shape and format; flat bytes where memoryview has no such format."""
        return tensors.buffer(self._owned(), self.dtype, self.shape)

    def _owned(self) -> Any:
        if self._owner is None:
            self._owner = tensors.owned(self._block.arena.map, self._block.offset, self.nbytes, self._block)
        return self._owner

    def tolist(self) -> Any:
        """The items as nested lists of Python numbers."""
        if tensors.DTYPES[self.dtype][1] is None or not self.nbytes:
            return self.numpy().tolist()
        return self.buffer().tolist()

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> Any:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    @property
    def __array_interface__(self) -> Any:
        if self.dtype == "bfloat16":
            raise AttributeError("bfloat16 has no array interface")
        kind = {"b": "b", "i": "i", "u": "u", "f": "f", "c": "c"}[self.dtype[0]]
        address = self._block.arena.address + self._block.offset
        typestr = f"{'|' if tensors.itemsize(self.dtype) == 1 else '<'}{kind}{tensors.itemsize(self.dtype)}"
        return {"version": 3, "shape": self.shape, "typestr": typestr, "data": (address, False)}

    def __dlpack__(self, **options: Any) -> Any:
        return self.numpy().__dlpack__(**options)

    def __dlpack_device__(self) -> Tuple[int, int]:
        return (1, 0)  # kDLCPU, dlpack.h

    def __getitem__(self, key: Any) -> Any:
        return self.numpy()[key] if tensors.numpy() else self.buffer()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        if tensors.numpy():
            self.numpy()[key] = value
        else:
            self.buffer()[key] = value

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def item(self) -> Any:
        """The number of a tensor that has one. Raises ValueError for others."""
        if math.prod(self.shape) != 1:
            raise ValueError(f"a tensor of shape {list(self.shape)} is not one number")
        found = self.tolist()
        while isinstance(found, list):
            found = found[0]
        return found

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __complex__(self) -> complex:
        return complex(self.item())

    def __index__(self) -> int:
        found = self.item()
        if self.shape or not isinstance(found, int):
            raise TypeError(f"a tensor {self.dtype} of shape {list(self.shape)} is no index")
        return found

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec and not self.shape else format(str(self), spec)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.numpy().copy()  # memory of a session cannot be had twice

    def __iter__(self) -> Any:
        return iter(self.numpy() if tensors.numpy() else self.tolist())

    def __repr__(self) -> str:
        return f"Tensor({list(self.shape)}, {self.dtype})"


def view_of(array: Any, arenas: Iterable[Arena]) -> Optional[tensors.Handle]:
    """The handle of a numpy array that lies in one of these arenas; None when it does not, or what travels is not what
    lies there: it is not aligned, of the other byte order, or masked."""
    if not array.dtype.isnative or arrays.is_masked(array):
        return None
    interface = array.__array_interface__
    address = interface["data"][0]
    for arena in arenas:
        offset = address - arena.address
        if 0 <= offset < arena.size:
            if offset % tensors.ALIGNMENT or not array.nbytes:
                return None
            strides = interface["strides"]
            try:
                handle = tensors.Handle(arena.id, offset, array.dtype.name, tuple(array.shape), strides)
                tensors.check(handle, arena.size)
            except tensors.BadTensor:
                return None
            return handle
    return None
