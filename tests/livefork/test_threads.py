"""Threads of C, and what the library asks of its libc."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.livefork.conftest import ROOT, run_command


@pytest.fixture(scope="module")
def threads(tmp_path_factory: pytest.TempPathFactory) -> str:
    program = str(tmp_path_factory.mktemp("threads") / "threads")
    sources = [str(ROOT / "tests/livefork/threads.c"), str(ROOT / "nsutil/livefork.c")]
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", str(ROOT / "nsutil")]
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", program, *sources], check=True)
    return program


def test_threads_are_themselves_in_500_children_and_their_grandchildren(threads: str) -> None:
    assert "500 forks" in run_command([threads, "500"])


def test_children_of_a_process_that_allocates_all_the_time_revive_at_once(threads: str) -> None:
    assert "50 forks" in run_command([threads, "50", "busy"])


def test_the_library_loads_with_glibc_2_31() -> None:
    symbols = subprocess.run(
        ["objdump", "-T", ROOT / "nsutil" / "livefork.so"], check=True, capture_output=True, text=True
    )
    needed = [tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([0-9.]+)", symbols.stdout)]
    assert needed and max(needed) <= (2, 31), symbols.stdout


def test_the_library_is_no_python_extension() -> None:
    linked = subprocess.run(
        ["objdump", "-p", ROOT / "nsutil" / "livefork.so"], check=True, capture_output=True, text=True
    )
    assert re.findall(r"NEEDED\s+(\S+)", linked.stdout) == ["libc.so.6"]
    assert not list(Path(ROOT / "nsutil").glob("livefork.*-*.so"))
