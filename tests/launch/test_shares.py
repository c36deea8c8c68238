"""What one uid gets of pocketd's time, by the clock of an event loop: no daemon is needed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from pocketd.control import BURST, PART, RATE, Share
from pocketd.turns import AT_ONCE, Turns

UID = 60001


def keeping(seconds: float) -> Callable[[], Coroutine[Any, Any, None]]:
    """A request that keeps the loop for so long, waits for something, which is free, and keeps it for as long again."""

    async def request() -> None:
        time.sleep(seconds)
        await asyncio.sleep(0.2)
        time.sleep(seconds)

    return request


def test_a_uid_pays_for_the_time_that_its_requests_keep_the_loop() -> None:
    async def run(uid: int) -> float:
        share = Share(uid)
        await share.serve(keeping(0.5)())
        return share.wait()

    due = 2 * 0.5 * PART - BURST / RATE
    assert due - 0.8 < asyncio.run(run(UID)) <= due + 0.5  # what passed meanwhile is paid for by then
    assert asyncio.run(run(0)) == 0


def test_requests_of_a_uid_begin_one_in_a_turn_of_the_loop() -> None:
    """A hundred that come together are not served together, with everybody else's request behind them."""
    turns: list[int] = []

    async def run() -> int:
        share, turn = Share(UID), 0

        async def request() -> None:
            turns.append(turn)

        tasks = [asyncio.ensure_future(share.serve(request())) for _ in range(100)]
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            turn += 1
        return turn

    asyncio.run(run())
    assert len(turns) == 100 and len(set(turns)) == 100


def test_what_a_request_raises_or_is_told_goes_through() -> None:
    async def run() -> list[str]:
        seen = []

        async def fails() -> None:
            await asyncio.sleep(0)
            raise RuntimeError("as it is")

        async def waits() -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        share = Share(UID)
        with pytest.raises(RuntimeError, match="as it is"):
            await share.serve(fails())
        task = asyncio.ensure_future(share.serve(waits()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    assert asyncio.run(run()) == ["cancelled"]


def test_launches_of_a_uid_wait_for_each_other_and_for_nobody_else() -> None:
    async def run() -> tuple[list[bool], bool, bool, list[bool], dict[int, Any]]:
        turns = Turns()
        mine = [asyncio.ensure_future(turns.take(UID)) for _ in range(AT_ONCE + 2)]
        others, roots = (asyncio.ensure_future(turns.take(uid)) for uid in (UID + 1, 0))
        await asyncio.sleep(0.01)
        before = [task.done() for task in mine]
        mine[-1].cancel()  # who waits may give up
        turns.give(UID)
        await asyncio.sleep(0.01)
        after = [task.done() for task in mine]
        for uid in (*[UID] * AT_ONCE, UID + 1, 0):
            turns.give(uid)
        return before, others.done(), roots.done(), after, turns._of

    before, others, roots, after, left = asyncio.run(run())
    assert before == [True] * AT_ONCE + [False, False]
    assert others and roots and all(after)
    assert left == {}
