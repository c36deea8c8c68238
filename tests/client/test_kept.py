"""Arguments that the worker's code keeps after its call: they stay what they were, and the arena is used again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketd.client import Session


def test_arrays_that_a_function_keeps_stay_as_they_were(session: Session) -> None:
    """The next call's argument lies where this one's did."""
    for n in range(1, 9):
        session.call("detector:keep", np.full(1000 * n, n, "int32"))
        session.call("detector:nothing_of", np.zeros(1000 * n, "int32"))
    assert [set(kept) for kept in session.call("detector:kept")] == [{n} for n in range(1, 9)]


@pytest.mark.parametrize("how", ["view", "slice", "turned", "buffer"])
def test_what_is_made_of_them_without_a_copy_too(session: Session, how: str) -> None:
    for n in range(1, 5):
        session.call("detector:keep", np.full((40, 50), n, "uint8"), how)
        session.call("detector:nothing_of", np.zeros((40, 50), "uint8"))
    assert [set(kept) for kept in session.call("detector:kept")] == [{n} for n in range(1, 5)]


def test_arrays_of_one_page_and_of_two_calls(session: Session) -> None:
    for n in range(1, 5):
        session.call("detector:keep_some", [np.full(3, n + 10 * i, "int64") for i in range(5)], n)
        session.call("detector:nothing_of", [np.zeros(3, "int64") for _ in range(5)])
    kept = session.call("detector:kept")
    assert sorted(kept) == sorted([n + 10 * i] * 3 for n in range(1, 5) for i in range(n))


def test_a_tensor_of_ours_is_ours_again_after_the_call(session: Session) -> None:
    """What is written to it then the worker's code does not see; what the next call writes is seen here."""
    ours = session.tensor((100,), "float32")
    ours[:] = 1
    session.call("detector:keep", ours)
    ours[:] = 2
    assert session.call("detector:total", ours) == 200
    assert session.call("detector:kept") == [[1.0] * 100]
    session.call("detector:paint", ours)
    assert set(ours.tolist()) == {7.0} and session.call("detector:kept") == [[1.0] * 100]


def test_a_strided_view_of_ours(session: Session) -> None:
    ours = session.tensor((64, 64), "int32")
    ours[:] = np.arange(64 * 64).reshape(64, 64)
    expected = ours.numpy()[::2, 16:32].tolist()
    session.call("detector:keep", ours.numpy()[::2, 16:32])
    ours[:] = 0
    assert session.call("detector:kept") == [sum(expected, [])]


def test_a_result_that_comes_back_as_an_argument_and_is_kept(session: Session) -> None:
    for n in range(1, 5):
        made = session.call("detector:add", np.zeros(5000, "int32"), n)
        session.call("detector:keep", made)
        del made
        assert set(session.call("detector:add", np.zeros(5000, "int32"), 9).tolist()) == {9}
    assert [set(kept) for kept in session.call("detector:kept")] == [{n} for n in range(1, 5)]


def test_an_exception_that_is_kept_keeps_its_frames_arguments(session: Session) -> None:
    for n in range(1, 4):
        with pytest.raises(Exception, match="kept"):
            session.call("detector:keep_error", np.full(100, n, "int32"))
        session.call("detector:nothing_of", np.zeros(100, "int32"))
    assert session.call("detector:kept_errors") == [[n] * 100 for n in range(1, 4)]


def test_what_is_not_kept_costs_no_memory(open_session: Callable[..., Session]) -> None:
    session = open_session()
    ours = session.tensor((1 << 20,), "uint8")
    session.call("detector:add", ours, 1)
    before = arenas(session.pid)
    for _ in range(20):
        session.call("detector:total", ours)
        session.call("detector:add", ours, 1)
        session.call("detector:drop_kept")
    assert arenas(session.pid) == before


def test_what_is_not_kept_any_more_goes(open_session: Callable[..., Session]) -> None:
    session = open_session()
    for n in range(50):
        session.call("detector:keep", np.full(1000, n, "int32"))
    assert arenas(session.pid) > 50
    session.call("detector:drop_kept")
    session.call("detector:total", np.zeros(1000))
    assert arenas(session.pid) < 5
    assert session.call("detector:status")[0] < 40  # descriptors


def arenas(pid: int | None) -> int:
    assert pid and pid != os.getpid()
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:arena")
