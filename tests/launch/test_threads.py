"""A worker's libraries compute with as many threads as its pocket's limits allow processors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cgroup.limits import parse, processors
from tests.conftest import Pocketd

# The number that OpenBLAS computes with, as its own library says (numpy's wheels bring it along).
PROGRAM = """
import ctypes, numpy
paths = {line.split(None, 5)[5].strip() for line in open("/proc/self/maps") if "openblas" in line}
library = ctypes.CDLL(paths.pop())
names = ("scipy_openblas_get_num_threads64_", "scipy_openblas_get_num_threads", "openblas_get_num_threads64_")
print(next(getattr(library, name)() for name in names if hasattr(library, name)))
"""
CONFIG = """
[service.numbers]
runtime = "python"
preload = ["numpy"]
[pocket.one]
service = "numbers"
dir = "{0}"
program = "p.py"
threads = 1
[pocket.many]
service = "numbers"
dir = "{0}"
program = "p.py"
"""


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pocketd]:
    place = tmp_path_factory.mktemp("numbers")
    (place / "app").mkdir()
    (place / "app" / "p.py").write_text(PROGRAM)
    made = Pocketd(place, CONFIG.format(place / "app"))
    made.start()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor: there is nothing to limit")
def test_as_many_as_its_definition_says(numbers: Pocketd) -> None:
    plain = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert numbers.pocket("many").stdout == plain.stdout != "1\n"
    assert numbers.pocket("one").stdout == "1\n"


@pytest.mark.parametrize(
    ("limits", "count"),
    [
        ({}, None),
        ({"cpu.max": "max"}, None),
        ({"cpu.max": "50%"}, 1),
        ({"cpu.max": "150%"}, 2),
        ({"cpu.max": "400%"}, 4),
        ({"cpuset.cpus": "0-3,8"}, 5),
        ({"cpuset.cpus": "0-3", "cpu.max": "200%"}, 2),
        ({"memory.max": "1G"}, None),
    ],
)
def test_what_limits_allow(limits: dict[str, str], count: int | None) -> None:
    assert processors({name: parse(name, value) for name, value in limits.items()}) == count
