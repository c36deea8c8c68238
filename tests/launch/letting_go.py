"""How connections are let go, by pocketd's own code in a process of one thread (test_descriptors)."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import tempfile
from typing import cast

from nsutil import messages
from pocketd import apart, control, wire
from pocketd.daemon import Daemon
from tests.launch.test_faults import children
from tests.launch.test_wire_limits import NOBODY, connect


def refused(s: socket.socket) -> bool:
    return bool(select.select([s], [], [], 0)[0])


def most_children() -> int:
    """The most children that there were at once, and before the last was gone, for a hundred connections."""

    async def counted() -> int:
        connections = []
        for _ in range(100):
            ours, theirs = messages.pair()
            with ours, open("/dev/null") as null:
                messages.send(ours, b"", [null.fileno()])
            connections.append(theirs)
        for connection in connections:
            apart.let_go(connection)
        most = 0
        while any(connection.fileno() >= 0 for connection in connections):
            most = max(most, len(children(os.getpid())))
            await asyncio.sleep(0)
        most = max(most, len(children(os.getpid())))
        while children(os.getpid()):
            await asyncio.sleep(0)
        return most

    return asyncio.run(counted())


def accepted() -> int:
    """Of sixty connections how many are accepted while none can be let go; all are in the end."""
    apart.BEARERS, apart.LADEN, control.SHARE = 0, 20, 0
    control.BACKLOG = 60  # in a full queue who connects sleeps, and it is this thread that has to accept
    os.chdir(tempfile.mkdtemp(prefix="pocketd-test-"))
    os.chmod(".", 0o755)

    async def counted() -> int:
        listening = control.Control(cast(Daemon, None), f"{os.getcwd()}/pocketd.sock", None)
        os.chmod("pocketd.sock", 0o666)
        callers = [connect(NOBODY) for _ in range(60)]  # the loop does not turn meanwhile
        with open("/dev/null") as null:
            for caller in callers:
                wire.send(caller, {"id": 1, "op": "ps"}, [null.fileno()])
        for _ in range(1000):
            await asyncio.sleep(0)
        at_first = sum(map(refused, callers))
        apart.BEARERS = 8
        while not all(map(refused, callers)):
            await asyncio.sleep(0.01)
        apart.LADEN = 1
        while apart.burdened() or children(os.getpid()):
            await asyncio.sleep(0.01)
        for caller in callers:
            caller.close()
        listening.close()
        return at_first

    found = asyncio.run(counted())
    for name in os.listdir("."):
        os.unlink(name)
    os.rmdir(os.getcwd())
    return found
