"""Arenas: sealed memfds that client and worker both map, and the heap that places tensors in one's own.

Each side allocates in its own arenas only, so that nothing about free space needs to be agreed. The client's arenas
have odd numbers, the worker's even ones. An arena is announced once, with its descriptor; from then on handles name it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from typing import Dict, List, Optional, Tuple

from nsutil import memory, pages
from pocketd.tensors import ALIGNMENT, BadTensor, Handle, check

# Address space only: pages exist once they are touched.
MAX_ARENA = 1 << 40
# Descriptors: each side holds one for each arena (Python's mmap keeps its own copy).
MAX_ARENAS = 64
FIRST_ARENA = 1 << 20
# New arenas double until here; a single tensor may be larger than this.
LARGEST_STEP = 1 << 28
# Memory of free ranges goes back to the kernel when that much of it, in ranges of that much, has rested so long.
RESTING, RANGE, REST = 32 << 20, 1 << 20, 1.0  # bytes, bytes, seconds


class Arena:
    """One mapped arena. The mapping lives as long as anything that views it; it is never unmapped by hand."""

    __slots__ = ("address", "fd", "id", "map", "size")

    def __init__(self, id: int, fd: int, size: int, renewable: bool = False):
        """Map `fd`, whose seals and size have been checked. The descriptor stays the caller's; `renewable`: with one of
        its own, it can be mapped once more."""
        self.fd = -1
        self.id = id
        self.size = size
        self.map = mmap.mmap(fd, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if renewable:
            self.fd = os.dup(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def own(self, first: int, end: int) -> None:
        """Make the pages with these bytes this process's own where they are mapped: what views them keeps what it sees
        now, whatever is written to the arena. Raises OSError."""
        pages.own(self.address + first, self.address + end)

    def again(self) -> Arena:
        """The same arena in another place, none of whose pages is this process's own. Raises OSError."""
        return Arena(self.id, self.fd, self.size, True)

    @classmethod
    def create(cls, id: int, size: int, renewable: bool = False) -> Tuple[Arena, int]:
        """A new arena and its descriptor, which the caller owns (send it, then close it)."""
        fd = memory.create(size, "arena")
        try:
            return cls(id, fd, size, renewable), fd
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def receive(cls, id: int, fd: int, renewable: bool = False) -> Arena:
        """Map an arena that the peer sent, once the kernel has said that it cannot shrink under us.

        The descriptor stays the caller's. Raises BadTensor for one that is no sealed memfd of a sane size.
        """
        try:
            size = memory.check_sealed(fd, memory.ARENA_SEALS, MAX_ARENA)
            if not size:
                raise BadTensor("an arena of no bytes")
            return cls(id, fd, size, renewable)
        except memory.SealError as e:
            raise BadTensor(f"the arena is refused: {e}") from None
        except OSError as e:
            raise BadTensor(f"the arena cannot be mapped: {os.strerror(e.errno or 0)}") from None


class Arenas:
    """The peer's arenas, by number. `parity` is the remainder of its numbers by two; `renewable`: see `renew`."""

    def __init__(self, parity: int, renewable: bool = False):
        self._parity = parity
        self._renewable = renewable
        self._arenas: Dict[int, Arena] = {}
        self._refused: Dict[int, BadTensor] = {}

    def receive(self, id: int, fd: int) -> None:
        """Take up an announced arena. A bad one is remembered, and whoever uses it is told why. Raises BadTensor for
        a number that cannot be announced. The descriptor stays the caller's."""
        if id < 1 or id % 2 != self._parity or id in self._arenas:
            raise BadTensor("an arena was announced under a number that is not the sender's to give")
        if len(self._arenas) + len(self._refused) >= MAX_ARENAS:
            raise BadTensor(f"more than {MAX_ARENAS} arenas at once")
        try:
            self._arenas[id] = Arena.receive(id, fd, self._renewable)
            self._refused.pop(id, None)
        except BadTensor as e:
            self._refused[id] = e

    def drop(self, id: int) -> None:
        """Forget an arena that its owner gave up. Views of it that live on keep its memory."""
        self._arenas.pop(id, None)
        self._refused.pop(id, None)

    def find(self, handle: Handle) -> Tuple[Arena, int]:
        """The arena in which `handle` lies wholly, and its bytes in C order. Raises BadTensor."""
        arena = self._arenas.get(handle.arena)
        if arena is None:
            raise self._refused.get(handle.arena) or BadTensor("the tensor's arena is not one of this session")
        return arena, check(handle, arena.size)

    def renew(self, arena: Arena) -> None:
        """From now on views are of another mapping than this one. Raises OSError."""
        if self._arenas.get(arena.id) is arena:
            self._arenas[arena.id] = arena.again()

    def close(self) -> None:
        """Forget all. Mappings go with their last view."""
        self._arenas.clear()

    def __len__(self) -> int:
        return len(self._arenas)


class Heap:
    """One's own arenas, and what is free in them.

    A freed range waits in a bin of its exact size, so that a loop over tensors of the same shapes allocates in constant
    time and touches the same pages; bins are merged back when nothing else fits, and when much has been free for long
    (`relax`). A wholly free arena is given up when another of at least its size remains.
    """

    def __init__(self, first: int, renewable: bool = False):
        self._next = first
        self._renewable = renewable
        self.arenas: Dict[int, Arena] = {}
        self.fresh: List[Tuple[int, int]] = []
        """(number, descriptor) of arenas not yet announced; whoever takes one closes its descriptor."""
        self.dropped: List[int] = []
        """Numbers given up and not yet announced."""
        self._used: Dict[Tuple[int, int], int] = {}
        self._bins: Dict[int, List[Tuple[int, int]]] = {}
        self._free: Dict[int, List[Tuple[int, int]]] = {}
        self.resting = 0
        """Bytes that were freed, not used again, and not given back to the kernel."""
        self._moved = 0.0  # when a large range was allocated or freed last

    def allocate(self, nbytes: int) -> Tuple[Arena, int]:
        """An arena and the offset in it of `nbytes` bytes, aligned. Raises BadTensor when no arena can be made."""
        size = (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT or ALIGNMENT
        ready = self._bins.get(size)
        place = ready.pop() if ready else self._carve(size)
        if place is None:
            self._merge()
            place = self._carve(size) or self._grow(size)
        self._used[place] = size
        self.resting = max(0, self.resting - size)
        self._move(size)
        return self.arenas[place[0]], place[1]

    def free(self, id: int, offset: int) -> None:
        """Give a range back. Raises BadTensor when it is not one that was allocated."""
        size = self._used.pop((id, offset), None)
        if size is None:
            raise BadTensor("a range was freed that is not in use")
        self._bins.setdefault(size, []).append((id, offset))
        self.resting += size
        self._move(size)

    def _move(self, size: int) -> None:
        if size >= RANGE:
            self._moved = time.monotonic()

    def relax(self, rest: float = REST) -> None:
        """Give the kernel back what large ranges that have been free for `rest` seconds hold; they stay ours, and read
        as zeros. madvise(2), MADV_REMOVE: of a memfd's pages, for both who map it."""
        if self.resting < RESTING or time.monotonic() - self._moved < rest:
            return
        self.resting = 0
        self._merge()
        for id, ranges in self._free.items():
            for offset, length in ranges:
                first = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
                length = (offset + length) // mmap.PAGESIZE * mmap.PAGESIZE - first
                if length >= RANGE:
                    self.arenas[id].map.madvise(mmap.MADV_REMOVE, first, length)

    def renew(self, arena: Arena) -> None:
        """From now on views are of another mapping than this one. Raises OSError."""
        if self.arenas.get(arena.id) is arena:
            self.arenas[arena.id] = arena.again()

    def close(self) -> None:
        """Let go of everything; nothing is allocated any more. Mappings go with their last view."""
        for _, fd in self.fresh:
            os.close(fd)
        self.fresh.clear()
        self.arenas.clear()

    def _carve(self, size: int) -> Optional[Tuple[int, int]]:
        for id, ranges in self._free.items():
            for i, (offset, length) in enumerate(ranges):
                if length >= size:
                    if length == size:
                        del ranges[i]
                    else:
                        ranges[i] = (offset + size, length - size)
                    return id, offset
        return None

    def _grow(self, size: int) -> Tuple[int, int]:
        if len(self.arenas) >= MAX_ARENAS:
            raise BadTensor(f"tensors of this session fill {MAX_ARENAS} arenas; drop some that are no longer used")
        largest = max((a.size for a in self.arenas.values()), default=FIRST_ARENA // 2)
        whole = max(min(2 * largest, LARGEST_STEP), -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        if whole > MAX_ARENA:
            raise BadTensor(f"a tensor of {size} bytes; at most {MAX_ARENA} are possible")
        id, self._next = self._next, self._next + 2
        try:
            self.arenas[id], fd = Arena.create(id, whole, self._renewable)
        except OSError as e:
            raise BadTensor(f"no shared memory for a tensor of {size} bytes: {e.strerror}") from None
        self.fresh.append((id, fd))
        self._free[id] = [(size, whole - size)] if whole > size else []
        self._give_up()
        return id, 0

    def _merge(self) -> None:
        for size, places in self._bins.items():
            for id, offset in places:
                self._free[id].append((offset, size))
        self._bins.clear()
        for id, ranges in self._free.items():
            ranges.sort()
            merged: List[Tuple[int, int]] = []
            for offset, length in ranges:
                if merged and sum(merged[-1]) == offset:
                    merged[-1] = (merged[-1][0], merged[-1][1] + length)
                else:
                    merged.append((offset, length))
            self._free[id] = merged
        self._give_up()

    def _give_up(self) -> None:
        for arena in sorted(self.arenas.values(), key=lambda a: a.size):
            others = [a.size for a in self.arenas.values() if a is not arena]
            announced = all(id != arena.id for id, _ in self.fresh)
            if announced and self._free[arena.id] == [(0, arena.size)] and max(others, default=0) >= arena.size:
                del self.arenas[arena.id], self._free[arena.id]
                self.dropped.append(arena.id)
