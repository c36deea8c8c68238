"""Time-outs and cancellation: the client is free at once, the worker is interrupted, the session goes on."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client import Cancelled, Session, Timeout
from pocketd.client.core import CANCEL
from pocketd.client.handshake import Login
from tests.conftest import TIMEOUT


def test_a_call_has_a_time_limit_and_is_interrupted_there(session: Session) -> None:
    began = time.monotonic()
    with pytest.raises(Timeout, match=r"0\.1 s"):
        session.call("detector:nap", 30, timeout=0.1)
    assert session.call("detector:add", 1, 2) == 3
    assert time.monotonic() - began < 5


def test_a_session_has_a_time_limit_for_its_calls(open_session: Callable[..., Session]) -> None:
    session = open_session(call_timeout=0.1)
    with pytest.raises(Timeout):
        session.call("detector:nap", 30)
    assert session.call("detector:nap", 0.3, timeout=5) == "rested"


def test_a_timeout_is_a_timeout_error_of_python(session: Session) -> None:
    with pytest.raises(TimeoutError):
        session.call("detector:nap", 30, timeout=0.05)


def test_another_thread_can_cancel(session: Session) -> None:
    threading.Timer(0.1, session.cancel).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        session.call("detector:nap", 30)
    assert session.call("detector:add", 1, 2) == 3
    assert time.monotonic() - began < 5


def test_cancelling_nothing_does_nothing(session: Session) -> None:
    session.cancel()
    assert session.call("detector:add", 1, 2) == 3


def test_ctrl_c_cancels_the_call(session: Session) -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.call("detector:nap", 30)
    assert session.call("detector:add", 1, 2) == 3
    assert time.monotonic() - began < 5


def test_code_that_will_not_be_interrupted_delays_the_next_call_only(session: Session) -> None:
    with pytest.raises(Timeout):
        session.call("detector:stubborn", 0.6, timeout=0.1)
    with pytest.raises(Timeout):
        session.call("detector:add", 1, 2, timeout=0.05)  # waits behind it
    assert session.call("detector:add", 1, 2) == 3


def test_late_results_are_dropped_and_their_memory_used_again(session: Session) -> None:
    for _ in range(5):
        with pytest.raises(Timeout):
            session.call("detector:stubborn", 0.1, timeout=0.01)  # returns an array, late
    session.call("detector:add", 1, 2)
    session.call("detector:add", 1, 2)
    core = session._core
    assert not core._calls and not core._abandoned and not core._freed and len(core._theirs) == 1


def test_a_cancel_that_comes_while_a_result_is_copied_leaks_nothing(session: Session) -> None:
    session.call("detector:grow", 200)
    for n in range(60):
        for target, size in (("grow", 200), ("lists", 2000)):
            with contextlib.suppress(Timeout):
                session.call(f"detector:{target}", size, timeout=0.002 * (n % 30 + 1))
    session.call("detector:add", 1, 2)
    gc.collect()
    session.call("detector:add", 1, 2)
    assert session.call("detector:used") == 0


def test_calls_that_nobody_cancelled_do_not_fail(open_session: Callable[..., Session]) -> None:
    """Cancels of others come one upon the other, in the midst of each other's handling."""
    session = open_session()
    for n in range(1, 3000):
        os.write(session._cancel, CANCEL.pack(n + 100000))
        if n % 3 == 0:
            assert session.call("detector:add", n, 1) == n + 1


def test_a_cancelled_calls_input_is_kept_until_the_worker_is_done_with_it(session: Session) -> None:
    with pytest.raises(Timeout):
        session.call("detector:stubborn", 0.3, timeout=0.05)
    first = np.full(1000, 1, np.uint8)
    with pytest.raises(Timeout):
        session.call("detector:total", first, timeout=0.01)  # queued; its copy must not be overwritten
    held = session._core._calls
    assert len(held) == 2 and all(block is not None for keep in held.values() for block in keep)
    a = session.tensor((1000,), "uint8")
    assert a._block.offset != next(iter(held[max(held)])).offset
    assert session.call("detector:add", 1, 2) == 3


def test_time_limits_hold_when_the_socket_is_full(session: Session) -> None:
    """A worker that reads nothing, and calls until nothing more fits: each still returns in time, none is lost."""
    with pytest.raises(Timeout):
        session.call("detector:stubborn", 1.5, timeout=0.01)
    for _ in range(40):
        began = time.monotonic()
        with pytest.raises(Timeout):
            session.call("detector:echo", b"x" * 20_000, np.zeros(1 << 18), timeout=0.01)
        assert time.monotonic() - began < 0.5
    assert session._unsent
    [back] = session.call("detector:echo", np.full(5, 3))
    assert back.tolist() == [3] * 5 and not session._unsent and not session._core._calls


def test_a_worker_that_waits_for_us_to_read_is_read_while_we_wait_to_send() -> None:
    """Both sockets full at once, by a worker that answers at length whatever was cancelled."""
    ours, theirs = messages.pair()
    hold, init = messages.pair()
    reader, cancel = os.pipe()
    os.close(reader)
    session = Session(Login(ours, hold, {}, ""), cancel)
    for _ in range(600):
        with pytest.raises(Timeout):
            session.call("x:y", b"x" * 1000, timeout=0)
    assert session._unsent

    def work() -> None:
        while True:
            message, _ = wire.receive(theirs)
            wire.send(theirs, {"id": message["id"], "ok": True, "value": b"x" * 20_000})
            if message["id"] == 601:
                return

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    assert session.call("x:y", timeout=20) == b"x" * 20_000
    worker.join()
    session.close()
    theirs.close()
    init.close()


def test_hundreds_of_cancelled_calls_leave_the_session_well(session: Session) -> None:
    for n in range(300):
        with pytest.raises(Timeout):
            session.call("detector:nap", 5, timeout=0.001 * (n % 3))
    assert session.call("detector:add", 1, 2) == 3
    assert session.call("detector:status")[2] == 1


def test_a_cancel_of_a_short_call_is_not_the_next_ones(session: Session) -> None:
    """It may come too late for its call. One that is waited for with all else hears nothing of it."""
    for _ in range(20):
        ends: list[object] = []

        def short(ends: list[object] = ends) -> None:
            try:
                ends.append(session.call("detector:nap", 0.012))
            except Cancelled as e:
                ends.append(e)

        thread = threading.Thread(target=short)
        thread.start()
        while session._current is None and thread.is_alive():
            pass
        session.cancel()
        thread.join(TIMEOUT)
        assert len(ends) == 1
        session.call("detector:nap", 0.05)
