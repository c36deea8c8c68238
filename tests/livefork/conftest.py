"""A live fork that goes wrong hangs or crashes its process. So what is under test runs in a Python of its own, in a
process group of its own that a time-out ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 300.0  # seconds: a hang, not slowness


@pytest.fixture(scope="session", autouse=True)
def library() -> None:
    """nsutil/livefork.so, not older than its source."""
    built = ROOT / "nsutil" / "livefork.so"
    sources = [*(ROOT / "nsutil").glob("*.c"), *(ROOT / "nsutil").glob("*.h")]
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        subprocess.run([sys.executable, "setup.py", "build_livefork"], cwd=ROOT, check=True)


def run_command(command: list[str], timeout: float = TIMEOUT, **environment: str) -> str:
    """What it wrote to stdout; AssertionError with all its output when it failed, or did not end in time."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"not ended after {timeout:g} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"status {process.returncode}\n{out}\n{err}"
    return out


@pytest.fixture
def python() -> Callable[..., str]:
    """Run a script that may use tests/livefork/family.py; returns its stdout."""

    def run(script: str, timeout: float = TIMEOUT, **environment: str) -> str:
        prelude = "from nsutil import clone, namespaces\nfrom tests.livefork.family import *\n"
        return run_command([sys.executable, "-c", prelude + script], timeout, **environment)

    return run
