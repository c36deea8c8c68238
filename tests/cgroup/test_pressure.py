"""Triggers of pressure stall information are heard by who waits for their descriptor, as an event loop does."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

from cgroup.pressure import Trigger
from tests.conftest import TIMEOUT

CPU = "/proc/pressure/cpu"  # there is no need to be short of memory: the kernel has one code for all


@pytest.fixture
def trigger():
    try:
        made = Trigger(os.open(CPU, os.O_RDWR | os.O_NONBLOCK), 0.1, 2.0)
    except OSError as e:
        pytest.skip(f"no triggers of pressure: {e}")
    yield made
    made.close()


def test_it_is_told_each_time(trigger):
    async def heard(times: int) -> None:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[None]()
        loop.add_reader(trigger.fileno(), queue.put_nowait, None)
        try:
            async with asyncio.timeout(TIMEOUT):
                for _ in range(times):
                    await queue.get()
        finally:
            loop.remove_reader(trigger.fileno())

    count = 2 + 2 * len(os.sched_getaffinity(0))
    waiting = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        asyncio.run(heard(2))
    finally:
        for process in waiting:
            process.kill()
            process.wait()
