"""The heap: ranges never overlap, what is freed is used again, empty arenas go."""

from __future__ import annotations

import os
import random

import pytest

from pocketd.arena import FIRST_ARENA, Arena, Heap
from pocketd.tensors import ALIGNMENT, BadTensor


def take(heap: Heap) -> None:
    """Do as a sender does with new arenas."""
    while heap.fresh:
        os.close(heap.fresh.pop()[1])


def test_ranges_never_overlap_and_are_aligned() -> None:
    chance, heap = random.Random(3), Heap(1)
    live: dict[tuple[int, int], int] = {}
    for _ in range(20_000):
        if live and chance.random() < 0.5:
            place = chance.choice(list(live))
            del live[place]
            heap.free(*place)
            continue
        size = chance.choice((0, 1, 64, 65, 1000, 4096, 100_000, 700_000))
        arena, offset = heap.allocate(size)
        take(heap)
        end = offset + max(size, 1)
        assert offset % ALIGNMENT == 0 and end <= arena.size and (arena.id, offset) not in live
        assert not any(a == arena.id and o < end and offset < o + max(n, 1) for (a, o), n in live.items())
        live[arena.id, offset] = size
        if len(live) > 60:
            for place in list(live)[:40]:
                del live[place]
                heap.free(*place)
    assert len(heap.arenas) < 8


def test_the_same_place_is_used_again() -> None:
    heap = Heap(1)
    arena, offset = heap.allocate(1000)
    heap.free(arena.id, offset)
    assert heap.allocate(1000) == (arena, offset)
    heap.close()


def test_a_range_is_freed_once() -> None:
    heap = Heap(1)
    arena, offset = heap.allocate(10)
    heap.free(arena.id, offset)
    for place in ((arena.id, offset), (arena.id, offset + 1), (7, 0)):
        with pytest.raises(BadTensor):
            heap.free(*place)
    heap.close()


def test_pieces_are_joined_when_something_larger_is_asked_for() -> None:
    heap = Heap(1)
    places = [heap.allocate(FIRST_ARENA // 4) for _ in range(4)]
    assert len(heap.arenas) == 1
    for arena, offset in places:
        heap.free(arena.id, offset)
    heap.allocate(FIRST_ARENA)
    assert len(heap.arenas) == 1
    heap.close()


def test_an_empty_arena_goes_when_a_larger_one_is_there() -> None:
    heap = Heap(1)
    arena, offset = heap.allocate(10)
    take(heap)
    heap.free(arena.id, offset)
    larger, _ = heap.allocate(FIRST_ARENA * 4)
    assert heap.dropped == [arena.id] and list(heap.arenas) == [larger.id]
    heap.close()


def test_a_tensor_larger_than_all_memory_is_an_error() -> None:
    with pytest.raises(BadTensor):
        Heap(1).allocate(1 << 50)


def place_of(allocated: tuple[Arena, int]) -> tuple[int, int]:
    return allocated[0].id, allocated[1]


def test_what_rests_goes_back_to_the_kernel_and_what_is_in_use_stays() -> None:
    heap, size = Heap(1), 16 << 20
    heap.free(*place_of(heap.allocate(4 * size)))  # one arena for all
    places = [heap.allocate(size) for _ in range(4)]
    take(heap)
    for arena, offset in places:
        arena.map[offset : offset + size] = b"x" * size
    for arena, offset in places[1:]:
        heap.free(arena.id, offset)
    heap.relax(rest=1e6)
    assert all(arena.map[offset] for arena, offset in places)
    heap.relax(rest=0.0)
    assert [arena.map[offset + at] for arena, offset in places for at in (0, size - 1)] == [ord("x")] * 2 + [0] * 6
    assert heap.allocate(3 * size)[1] % ALIGNMENT == 0 and not heap.dropped
