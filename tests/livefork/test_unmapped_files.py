"""Pages of libraries that only their import looked at are in no page table of a process that is to be forked."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsutil import pages
from nsutil.syscalls import libc
from tests.conftest import Pocketd

PAGES = 256
SIZE = PAGES * mmap.PAGESIZE
READ, WRITE = 1, 2  # PROT_*, asm-generic/mman-common.h


class Mapping:
    """A private mapping of a file of which each page has been read."""

    def __init__(self, path: Path):
        path.write_bytes(b"".join(n.to_bytes(4, "little") * (mmap.PAGESIZE // 4) for n in range(PAGES)))
        fd = os.open(path, os.O_RDONLY)
        self.start = libc.mmap(None, SIZE, READ, mmap.MAP_PRIVATE, fd, 0)
        os.close(fd)
        assert self.numbers() == [*range(PAGES)]

    def numbers(self) -> list[int]:
        data = ctypes.string_at(self.start, SIZE)
        return [int.from_bytes(data[at : at + 4], "little") for at in range(0, SIZE, mmap.PAGESIZE)]

    def resident(self) -> int:
        """Bytes (proc_pid_smaps(5))."""
        found = re.search(
            rf"(?m)^{self.start:x}-.*\n(?:\w+: .*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text()
        )
        assert found
        return int(found[1]) << 10

    def protect(self, protection: int) -> None:
        assert libc.mprotect(ctypes.c_void_p(self.start), ctypes.c_size_t(SIZE), protection) == 0


@pytest.fixture
def mapping(tmp_path: Path) -> Iterator[Mapping]:
    made = Mapping(tmp_path / "file")
    yield made
    libc.munmap(ctypes.c_void_p(made.start), ctypes.c_size_t(SIZE))


def test_what_was_read_is_mapped_no_more_and_there_when_asked_for(mapping: Mapping) -> None:
    assert mapping.resident() == SIZE
    pages.unmap_files()
    assert mapping.resident() == 0
    assert mapping.numbers() == [*range(PAGES)]


def test_what_was_changed_stays(mapping: Mapping) -> None:
    """As a dynamic linker changes a library's tables of addresses, and then protects them."""
    mapping.protect(READ | WRITE)
    ctypes.memmove(mapping.start + 7 * mmap.PAGESIZE, b"\xff\0\0\0", 4)
    mapping.protect(READ)
    pages.unmap_files()
    assert mapping.numbers() == [*range(7), 255, *range(8, PAGES)]


def test_a_template_has_few_pages_of_the_library_that_it_has_loaded(pocketd: Pocketd, tmp_path: Path) -> None:
    """An import of TensorFlow reads more than 200 MB of it."""
    code = "import tensorflow as tf; print(float(tf.reduce_sum(tf.ones((2, 3)))))"
    assert pocketd.pocket("run", "--service", "tensorflow", "-c", code, cwd=tmp_path).stdout == "6.0\n"
    pids = [template["pid"] for template in pocketd.ps()["templates"] if template["service"] == "tensorflow"]
    assert pids
    for pid in pids:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        fields = {name: int(kb) for name, kb in re.findall(r"(?m)^(\w+): +(\d+) kB", text)}
        assert fields["Rss"] - fields["Anonymous"] < 64 << 10, fields
