"""The asyncio form: the same sessions, awaited."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client import (
    LoginRefused,
    NotRunning,
    RemoteError,
    ServiceFailed,
    SessionClosed,
    Timeout,
    UnknownModel,
    WorkerDied,
    aio,
)
from pocketd.client.handshake import Login


@pytest.fixture
def run(service: str, pocket: Path) -> Callable[..., None]:
    """Runs a coroutine function with a session."""

    def running(use: Callable[[aio.Session], Awaitable[None]], call_timeout: float | None = None) -> None:
        async def main() -> None:
            login = aio.login("python", directory=str(pocket), runtime_dir=service, call_timeout=call_timeout)
            async with login as session:
                await use(session)

        asyncio.run(main())

    return running


def test_calls_and_models_are_awaited(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        a = session.tensor((3,), "float32")
        a[:] = [1, 2, 3]
        assert (await session.call("detector:add", a, 1)).tolist() == [2, 3, 4]
        counter = session.model("counter")
        assert (await counter(a)).tolist() == [2, 4, 6]
        assert await counter.count(by=5) == 5
        with pytest.raises(UnknownModel):
            session.model("resnet")
        with pytest.raises(UnknownModel):
            await session.load("absent.onnx")
        with pytest.raises(RemoteError, match="ValueError"):
            await session.call("detector:boom")

    run(use)


def test_many_calls_in_flight_get_their_own_replies(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        totals = await asyncio.gather(*(session.call("detector:total", np.full(50_000, n)) for n in range(300)))
        assert totals == [50_000.0 * n for n in range(300)]

    run(use)


def test_the_loop_goes_on_during_a_call(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        nap = asyncio.ensure_future(session.call("detector:nap", 0.3))
        ticks = 0
        while not nap.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 10 and nap.result() == "rested"

    run(use)


def test_a_cancelled_task_cancels_its_call(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        began = time.monotonic()
        nap = asyncio.ensure_future(session.call("detector:nap", 30))
        waits = asyncio.ensure_future(session.call("detector:nap", 30))
        await asyncio.sleep(0.1)
        waits.cancel()  # before it has begun
        nap.cancel()
        for task in (nap, waits):
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await session.call("detector:add", 1, 2) == 3
        assert time.monotonic() - began < 5 and not session._core._calls

    run(use)


def test_a_call_has_a_time_limit(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        with pytest.raises(Timeout, match=r"0\.1 s"):
            await session.call("detector:nap", 30)
        assert await session.call("detector:add", 1, 2) == 3

    run(use, call_timeout=0.1)


def test_a_dead_worker_ends_every_call_in_flight(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        naps = [asyncio.ensure_future(session.call("detector:nap", 30)) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert session.pid
        os.kill(session.pid, signal.SIGKILL)
        for nap in naps:
            with pytest.raises(WorkerDied, match="signal 9"):
                await nap
        with pytest.raises(WorkerDied):
            await session.call("detector:pid")

    run(use)


def test_closing_ends_calls_in_flight(run: Callable[..., None]) -> None:
    async def use(session: aio.Session) -> None:
        nap = asyncio.ensure_future(session.call("detector:nap", 30))
        await asyncio.sleep(0.05)
        session.close()
        with pytest.raises(SessionClosed):
            await nap

    run(use)


def test_refusals_are_the_same_errors(service: str, pocket: Path, tmp_path: Path) -> None:
    async def use(name: str, runtime_dir: str) -> None:
        session = await aio.login(name, directory=str(pocket), runtime_dir=runtime_dir, timeout=20)
        session.close()

    for name, kind in (("missing", LoginRefused), ("broken", ServiceFailed)):
        with pytest.raises(kind):
            asyncio.run(use(name, service))
    with pytest.raises(NotRunning):
        asyncio.run(use("python", str(tmp_path)))


def test_a_workers_last_words_are_heard_when_its_end_is_told_first() -> None:
    async def use() -> None:
        ours, theirs = messages.pair()
        hold, init = messages.pair()
        reader, cancel = os.pipe()
        os.close(reader)
        session = aio.Session(Login(ours, hold, {}, ""), cancel)
        wire.send(init, {"op": "exit", "status": 125 << 8})
        wire.send(theirs, {"op": "failed", "error": wire.Error("launch", "no room for it").wire()})
        with pytest.raises(ServiceFailed, match="no room for it"):
            await session.wait_ready()
        session.close()
        theirs.close()
        init.close()

    asyncio.run(use())


def test_sessions_leave_no_descriptor_behind(service: str, pocket: Path) -> None:
    async def once() -> None:
        async with aio.login("python", directory=str(pocket), runtime_dir=service) as session:
            await session.call("detector:add", np.zeros(10), 1)

    asyncio.run(once())
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(5):
        asyncio.run(once())
    assert sorted(os.listdir("/proc/self/fd")) == before
