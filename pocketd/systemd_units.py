"""systemd's manager over D-Bus: transient scopes, by the calls that org.freedesktop.systemd1(5) documents.

A connection lives for one call: nothing here depends on a bus that may be restarted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from jeepney import DBusAddress, DBusErrorResponse, MatchRule, MessageType, message_bus, new_method_call
from jeepney.io.asyncio import DBusRouter, Proxy, open_dbus_router

from cgroup.hierarchy import path_of
from pocketd.wire import Error

_MANAGER = DBusAddress("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
_TIMEOUT = 30.0  # seconds for a call or a job; a busy boot is slow
_NO_UNIT = "org.freedesktop.systemd1.NoSuchUnit"


def booted() -> bool:
    """Whether systemd is this host's init, sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def root() -> str:
    """The cgroup beneath which systemd has its units, with a slash at its end: PID 1 stands in ROOT/init.scope."""
    above = path_of(1).rpartition("/")[0]
    return f"{above}/"


async def start_scope(name: str, pid: int, slice: str, description: str, stop_timeout: float) -> None:
    """Make a transient scope of process `pid`, delegated with every controller. Raises Error.

    At power-off its processes get SIGTERM, and SIGKILL `stop_timeout` seconds later.
    """
    properties = [
        ("Description", ("s", description)),
        ("Slice", ("s", slice)),
        ("Delegate", ("b", True)),
        ("PIDs", ("au", [pid])),
        ("TasksMax", ("t", (1 << 64) - 1)),  # infinity: pockets have their own pids.max
        ("TimeoutStopUSec", ("t", int(stop_timeout * 1e6))),
        ("CollectMode", ("s", "inactive-or-failed")),
    ]
    async with _router() as router:
        await _job(router, "StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, []))


async def stop(name: str) -> None:
    """Stop a unit and wait for that; one that is not there is no error."""
    async with _router() as router:
        try:
            await _job(router, "StopUnit", "ss", (name, "replace"))
        except Error as e:
            if e.detail.get("name") != _NO_UNIT:
                raise


async def set_properties(name: str, properties: list[tuple[str, tuple[str, Any]]]) -> None:
    """Change a unit's properties until the next boot, as `systemctl set-property --runtime` does. Raises Error."""
    async with _router() as router:
        await _call(router, "SetUnitProperties", "sba(sv)", (name, True, properties))


@asynccontextmanager
async def _router() -> AsyncIterator[DBusRouter]:
    try:
        async with asyncio.timeout(_TIMEOUT), open_dbus_router(bus="SYSTEM") as router:
            yield router
    except TimeoutError:
        raise Error("systemd", f"systemd did not answer within {_TIMEOUT:.0f} s; is dbus well?") from None
    except (OSError, EOFError) as e:
        raise Error("systemd", f"the system bus cannot be reached: {e}; start dbus, or give --cgroup") from None


async def _job(router: DBusRouter, method: str, signature: str, arguments: tuple[Any, ...]) -> None:
    """Call a method that queues a job, and wait for the job's end."""
    rule = MatchRule(type="signal", interface=_MANAGER.interface, member="JobRemoved", path=_MANAGER.object_path)
    # The end of any job of the host comes here, and by default jeepney keeps one message and drops those behind it.
    with router.filter(rule, bufsize=0) as removed:
        await Proxy(message_bus, router).AddMatch(rule)
        await _call(router, "Subscribe", "", ())
        (job,) = await _call(router, method, signature, arguments)
        while True:
            _, path, unit, result = (await removed.get()).body
            if path == job:
                break
    if result != "done":
        raise Error("systemd", f"systemd's job {method} for {unit} ended with {result!r}; see: journalctl -u {unit}")


async def _call(router: DBusRouter, method: str, signature: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    message = new_method_call(_MANAGER, method, signature or None, arguments)
    reply = await router.send_and_get_reply(message)
    if reply.header.message_type is MessageType.error:
        refusal = DBusErrorResponse(reply)
        said = " ".join(str(part) for part in refusal.data)
        raise Error("systemd", f"systemd refused {method}: {said}", name=refusal.name)
    body: tuple[Any, ...] = reply.body
    return body
