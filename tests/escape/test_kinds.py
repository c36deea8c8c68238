"""The same attempts from every kind of process that runs a pocket's code (tests.escape.kinds)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.escape.attempt import THREADS, Attempt, outcome
from tests.escape.kinds import Prisoner
from tests.escape.test_calls import FILTERED, ROOTS
from tests.escape.test_files import KERNELS
from tests.escape.test_held import CLONE3
from tests.escape.test_modes import CALLS, MODES, STRIPPED, has
from tests.escape.test_processes import LIMITS, ON_PID_1, RANK
from tests.escape.test_talking import ABIS, FAMILIES, NETWORK, PAIRS

TABLES = {
    "calls that a filter stops": {name: attempt for name, attempt in FILTERED.items() if "clone3" not in name},
    "calls that root may make": ROOTS,
    "namespaces by clone3": CLONE3,
    "the kernel's files": KERNELS,
    "PID 1": ON_PID_1,
    "rank": RANK,
    "limits": LIMITS,
    "the network": NETWORK,
    "families": FAMILIES,
    "pairs": PAIRS,
    "i386": ABIS,
}


@pytest.mark.parametrize("table", TABLES)
def test_it_gets_no_further(prisoner: Prisoner, through: Callable[[Attempt], Any], table: str) -> None:
    attempts = TABLES[table]
    requests = [
        {"attempt": attempt.name, "thread": thread, "given": attempt.given}
        for attempt in attempts.values()
        for thread in THREADS
    ]
    names = [(name, thread) for name in attempts for thread in THREADS]
    wrong, proven = {}, 0
    for (name, thread), reply in zip(names, prisoner.answers(requests), strict=True):
        assert "failed" not in reply, (name, reply["failed"])
        proven += through(attempts[name]) == attempts[name].through  # else this host lacks what it is about
        if outcome(reply) not in attempts[name].refused:
            wrong[name, thread] = reply
    assert not wrong
    if table not in ("limits", "families"):  # of which many hosts lack some; each has a test of its own
        assert proven > len(requests) // 2


def test_a_template_sets_no_setuid_bit(prisoners: Callable[[str], Prisoner], place: Path) -> None:
    """In what it may write, whose files are shown as its own."""
    out = place / "early/out"
    ways = [how for how in CALLS if has(how)]
    wanted = [("openat", 0o755, "main"), *itertools.product(ways, MODES.values(), THREADS)]
    requests = []
    for number, (how, mode, thread) in enumerate(wanted):
        directory = out / f"{number}"
        directory.mkdir(parents=True)
        given = {"how": how, "mode": mode, "directory": str(directory)}
        requests.append({"attempt": "files.set_bits", "thread": thread, "given": given})
    first, *answers = prisoners("template").answers(requests)
    assert first == {"value": 0}
    for (how, mode, thread), reply in zip(wanted[1:], answers, strict=True):
        expected = ("EPERM", "ENOSYS", 0) if how in STRIPPED else ("EPERM", "ENOSYS")
        assert outcome(reply) in expected, (how, mode, thread, reply)
    for path in out.rglob("*"):
        assert not (path.is_file() and path.lstat().st_mode & 0o6000), path
