"""Whose turn it is among launches that wait for memory. tests/vm/guest/test_pressure.py has limits, and real stalls."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest

from cgroup.hierarchy import Hierarchy
from nsutil import messages
from pocketd import definitions, wire
from pocketd.admission import Launch, Room, refusal
from pocketd.daemon import Daemon
from pocketd.definitions import Config
from pocketd.host import Host
from pocketd.scopes import Scopes
from pocketd.stalls import Stall, own
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch.test_wire_limits import NOBODY, connect

MUCH = {"memory.low": str(1 << 50)}  # more than any host has


@asynccontextmanager
async def admitting(place: Path, **rules: Any) -> AsyncIterator[Daemon]:
    """What a pocketd is without services, beneath none of its tasks."""
    with Hierarchy.find() as hierarchy:
        config = Config({}, {}, admission=definitions.Admission(**rules))
        daemon = Daemon(place / "pocketd.conf", lambda: config, Host(hierarchy, cast(Scopes, None), place, place))
        try:
            yield daemon
        finally:
            daemon.authors.close()
            os.close(daemon.network)


class Waiting:
    """A launch that waits, and the end of its hold socket that its caller has."""

    def __init__(self, daemon: Daemon, name: str, limits: dict[str, str], admitted: list[str]):
        self.ours, self.theirs = messages.pair()
        self.said = asyncio.Event()
        self.task = asyncio.ensure_future(self.admit(daemon, name, limits, admitted))

    async def admit(self, daemon: Daemon, name: str, limits: dict[str, str], admitted: list[str]) -> None:
        with self.theirs:
            await daemon.admission.admit(name, limits, lambda text: self.said.set(), self.theirs.fileno())
        admitted.append(name)

    async def leaves(self) -> None:
        self.ours.close()
        with pytest.raises(wire.Error) as caught:
            await self.task
        assert caught.value.code == "gone"


def test_one_that_needs_more_than_there_is_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def both() -> None:
        admitted: list[str] = []
        async with admitting(tmp_path, wait=TIMEOUT, reserve=0, pressure=101) as daemon:
            much = Waiting(daemon, "much", MUCH, admitted)
            await much.said.wait()
            for name in ("little", "less"):
                await asyncio.wait_for(Waiting(daemon, name, {}, admitted).task, TIMEOUT / 4)
            assert admitted == ["little", "less"]
            await much.leaves()

    asyncio.run(both())


def test_the_oldest_goes_first_of_those_that_there_is_room_for(tmp_path: Path) -> None:
    async def all_of_them() -> None:
        admitted: list[str] = []
        async with admitting(tmp_path, wait=TIMEOUT, reserve=1 << 50, pressure=101) as daemon:
            waiting = []
            for name in ("much", "first", "second", "third"):
                waiting.append(Waiting(daemon, name, MUCH if name == "much" else {}, admitted))
                await waiting[-1].said.wait()
            daemon.config = replace(daemon.config, admission=replace(daemon.config.admission, reserve=0))
            await asyncio.wait_for(asyncio.gather(*(each.task for each in waiting[1:])), TIMEOUT)
            assert admitted == ["first", "second", "third"]
            await waiting[0].leaves()

    asyncio.run(all_of_them())


def test_of_one_uid_two_wait_and_anothers_place_is_free(own_pocketd: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "app").mkdir()
    text = f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}
        [pocket.open]
        service = "plain"
        dir = "{tmp_path / "app"}"
        may_run = ["nobody"]
    """
    daemon: Pocketd = own_pocketd(text)
    (daemon.runtime_dir / "pocketd.sock").chmod(0o666)
    monkeypatch.chdir(daemon.runtime_dir)
    daemon.pocket("plain", "on")
    daemon.config.write_text(f'{text}[admission]\nreserve = "1P"\nwait = 600\nqueue = 3\n')
    daemon.pocket("reload")
    with ExitStack() as stack:
        asked = [login(uid, n, stack) for n, uid in enumerate((NOBODY, NOBODY, NOBODY, NOBODY, 0))]
        waits = r"launch-waits .*waiting=(\d)"
        assert wait_for(lambda: "waiting=3" in daemon.log.read_text())
        assert re.findall(waits, daemon.log.read_text()) == ["1", "2", "3"]
        assert wire.receive(asked[-1])[0]["progress"].startswith("waiting for memory: ")
        daemon.config.write_text(text)
        daemon.pocket("reload")
        for s in asked:
            while "progress" in (reply := wire.receive(s)[0]):
                pass
            assert reply.get("ok"), reply


def login(uid: int, number: int, stack: ExitStack) -> socket.socket:
    """A client's login. `stack` has what its caller holds of it."""
    s = stack.enter_context(connect(uid))
    session, hold = messages.pair(), messages.pair()
    given = {"name": "open", "session": f"{number:032x}", "mode": "client", "roles": ["session", "hold"]}
    wire.send(s, {"op": "login", "id": 1, **given}, [session[1].fileno(), hold[1].fileno()])
    for ours, theirs in (session, hold):
        stack.enter_context(ours)
        theirs.close()
    return s


# -- stalls


HOST = Stall(some=900, full=600)


@pytest.mark.parametrize(
    ("stalls", "found"),
    [
        ({"thrashes": Stall(880, 590, 12), "other": Stall(10, 5)}, {"thrashes"}),
        ({"thrashes": Stall(880, 590, 12), "too": Stall(700, 400, 3)}, {"thrashes", "too"}),
        ({"thrashes": Stall(880, 590, 12), "waits": Stall(700, 400)}, set()),
        ({"waits": Stall(880, 590)}, set()),
        ({"reaches": Stall(300, 200, 9)}, set()),
        ({}, set()),
    ],
    ids=["one at its limit", "two", "another waits for the host", "at no limit", "less than half", "none"],
)
def test_whose_own_a_hosts_stall_is(stalls: dict[str, Stall], found: set[str]) -> None:
    assert own("full", HOST, stalls.items()) == own("some", HOST, stalls.items()) == found
    assert own("full", Stall(), stalls.items()) == set()


def test_what_a_pocket_stalls_by_itself_keeps_its_own_launches_waiting_alone() -> None:
    rules = definitions.Admission(pressure=40.0, reserve=0)
    room = Room(1 << 40, pressure=60.0)
    limits = MappingProxyType[str, str]({})
    assert "60% of the time (the limit is 40%)" in (refusal(Launch("any", limits), room, rules) or "")
    room = replace(room, own=frozenset({"thrashes"}))
    assert refusal(Launch("any", limits), room, rules) is None
    assert "most of it this pocket at its own" in (refusal(Launch("thrashes", limits), room, rules) or "")
