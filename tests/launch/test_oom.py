"""Which limit a worker's death is put down to, by the kernel's files. The kernel's own doing: tests/vm/guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runtime import oom

M = 1 << 20


@pytest.fixture
def cgroups(tmp_path):
    """A function that writes a cgroup's files: its limit, how often that was reached, its peak."""

    def make(name, limit="max", reached=0, kills=0, peak=None):
        place = tmp_path / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\n")
        (place / "memory.events.local").write_text(f"low 0\noom {reached}\noom_kill {kills}\n")
        if peak is not None:
            (place / "memory.peak").write_text(f"{peak}\n")
        return place

    return make


def error(place: Path, **note):
    leaf = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = oom.error(leaf, {"pocket": "detect", "leaf": f"/{place.parent.name}/{place.name}", **note})
    finally:
        os.close(leaf)
    assert found.code == "memory" and found.detail["pocket"] == "detect"
    return found.message, {k: v for k, v in found.detail.items() if k != "pocket"}


def test_the_limit_of_the_pocket_is_the_one_of_the_cgroup_above(cgroups):
    cgroups("pocket", 200 * M, 1, 1, 200 * M)
    assert error(cgroups("pocket/session", kills=1)) == (
        "pocket detect was ended by its memory.max of 200.0M (peak 200.0M)",
        {"limit": 200 * M, "peak": 200 * M, "cgroup": "/pocket"},
    )


def test_the_limit_of_a_held_pocket_is_above_its_template(cgroups):
    cgroups("pocket", 200 * M, 1, 1)
    cgroups("pocket/template-1")
    leaf = cgroups("pocket/template-1/session", kills=1)
    message, detail = error(leaf, leaf="/pocket/template-1/session", held=1048577)
    assert message == "pocket detect was ended by its memory.max of 200.0M"
    assert detail == {"limit": 200 * M, "peak": None, "cgroup": "/pocket"}


def test_without_a_peak_none_is_said(cgroups):
    """Before Linux 5.19."""
    cgroups("pocket", 200 * M, 1)
    message, detail = error(cgroups("pocket/session"))
    assert message.endswith("memory.max of 200.0M") and detail["peak"] is None


def test_a_limit_that_was_not_reached_is_not_named(cgroups):
    """The kernel counts a process there as well that it has ended since all memory was short."""
    cgroups("pocket", 200 * M)
    message, detail = error(cgroups("pocket/session", 100 * M))
    assert "the host, or a cgroup above /pocket/session, is out of memory" in message and detail["limit"] is None


def test_an_adopted_cgroups_limit_is_named_and_nothing_above_it_is_looked_at(cgroups):
    cgroups("slice", 100 * M)
    message, detail = error(cgroups("slice/unit", 1536 * M, 1, 1, 1536 * M), adopted=True)
    assert message == "pocket detect was ended by the memory.max of 1.5G of /slice/unit (peak 1.5G)"
    assert detail["cgroup"] == "/slice/unit"
    message, detail = error(cgroups("slice/other"), adopted=True)
    assert "the host, or a cgroup above /slice/other, is out of memory" in message
    assert detail == {"limit": None, "peak": None, "cgroup": None}


@pytest.mark.parametrize("inner, outer, cgroup", [(1, 0, "/unit/session"), (0, 1, "/unit")])
def test_of_two_limits_the_one_that_was_reached_is_named(cgroups, inner, outer, cgroup):
    cgroups("unit", 300 * M, outer)
    message, detail = error(cgroups("unit/session", 200 * M, inner), unit="/unit")
    assert detail["cgroup"] == cgroup
    assert message == (
        "pocket detect was ended by its memory.max of 200.0M"
        if inner
        else "pocket detect was ended by the memory.max of 300.0M of /unit"
    )


def test_kills_are_counted(cgroups, tmp_path):
    leaf = os.open(cgroups("leaf", kills=3), os.O_RDONLY)
    nothing = os.open(tmp_path, os.O_RDONLY)
    try:
        assert (oom.kills(leaf), oom.kills(nothing)) == (3, 0)
    finally:
        os.close(leaf)
        os.close(nothing)


@pytest.mark.parametrize("number, text", [(512, "512"), (4096, "4.0K"), (200 * M, "200.0M"), (3 << 39, "1.5T")])
def test_sizes_are_short(number, text):
    assert oom.size(number) == text


@pytest.mark.parametrize("where", [".", "session"])
def test_a_limit_on_threads_is_named_whose_event_is_counted_where_it_stands_or_where_the_process_was(tmp_path, where):
    (tmp_path / "session").mkdir()
    (tmp_path / "pids.max").write_text("3\n")
    (tmp_path / "session/pids.max").write_text("max\n")
    leaf = os.open(tmp_path / "session", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert oom.threads(leaf, {"pocket": "detect"}) is None
        (tmp_path / where / "pids.events").write_text("max 2\n")
        found = oom.threads(leaf, {"pocket": "detect"})
        assert found and (found.code, found.detail["limit"]) == ("limit", 3)
        assert found.message == "pocket detect has reached its pids.max of 3, and pids.max counts threads"
        adopted = oom.threads(leaf, {"pocket": "detect", "adopted": True})
        assert adopted is None  # what stands above such a cgroup is not the pocket's
    finally:
        os.close(leaf)
