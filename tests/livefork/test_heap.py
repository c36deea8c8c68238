"""The heap of a process to be forked: as its children will need it, until it is trimmed."""

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


def test_the_first_words_of_a_child_take_no_huge_page_each(python: Callable[..., str]) -> None:
    own = python(
        """
import ctypes, re
from nsutil import pages
from nsutil.syscalls import libc
end, blocks = pages.heap_end(), []
while pages.heap_end() == end:  # until nothing is left of it, and the next word is in a huge page that is not there
    end, blocks = pages.heap_end(), [*blocks, libc.malloc(4000)]
    if len(blocks) > 2000:
        break
for _ in range(int((pages.heap_end() - blocks[-1]) / 4016) - 2):
    libc.malloc(4000)
pages.prepare_heap()
child = clone.live_fork()
if child is None:
    clone.revive()
    for _ in range(100):
        ctypes.memset(libc.malloc(4000), 1, 4000)
    own, name = 0, ""
    for line in open("/proc/self/smaps"):
        found = re.match(r"[0-9a-f]+-[0-9a-f]+ \\S+ \\S+ \\S+ \\d+\\s*(.*)", line)
        name = found[1] if found else name
        if name == "[heap]" and line.startswith("Private_Dirty:"):
            own += int(line.split()[1])
    print(own, flush=True)
    os._exit(0)
os.waitpid(child.pid, 0)
""",
        GLIBC_TUNABLES="glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
    )
    assert 400 <= int(own) < 2048  # KiB
