"""The heap of a process to be forked reaches as far as its children's calls will need it, until it is trimmed."""

from __future__ import annotations

from collections.abc import Callable


def test_a_heap_stays_as_far_as_it_was_extended_until_it_is_trimmed(python: Callable[..., str]) -> None:
    python(
        """
from nsutil import pages
from nsutil.syscalls import libc
if not pages.keep_free_memory():
    raise SystemExit(0)  # not glibc's
end = pages.heap_end() + (40 << 20)
pages.extend_heap(end)
reached = pages.heap_end()
assert reached >= end, (reached, end)
for _ in range(3):
    blocks = [libc.malloc(8 << 20) for _ in range(4)]
    assert all(block < reached for block in blocks), "what is asked for lies there"
    for block in blocks:
        libc.free(block)
    assert pages.heap_end() == reached
pages.trim()
assert pages.heap_end() < end
"""
    )
