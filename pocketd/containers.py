"""Making a service container: what it shows of the host, and the child of pocketd that makes it (runtime.container)."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from cgroup.node import Cgroup
from nsutil import messages
from pocketd import environment, filters, spawn, wire
from pocketd.definitions import ModelFile, Service
from pocketd.wire import Error, Message

# A template imports our code from where the container shows it, and drops the path again.
_BOOT = (
    "import sys; sys.path.insert(0, '/run/pocketd/lib'); import socket; from runtime import template; "
    "template.main(socket.socket(fileno=3))"
)


async def make(
    definition: Service, models: Mapping[str, str], leaf: Cgroup, place: Path, log_path: Path
) -> list[str] | None:
    """Make the container: PID 1 in `leaf`, listening on `place`/init.sock, logging to `log_path`. `models`: where those
    that are files have their copies; those of other services are not shown.

    Returns the command of the service's root template; None where it needs none of the root file system's (`exec`).
    Raises Error with what the container said.
    """
    words, shown = await command(definition)
    files = [models[name] for name, model in definition.models.items() if isinstance(model, ModelFile)]
    shown += sorted({os.path.dirname(path) for path in files})
    root = place / "root"
    root.mkdir(parents=True, exist_ok=True)
    ours, theirs = messages.pair()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = os.open(log_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    os.lseek(log, 0, os.SEEK_END)
    try:
        path = place / "init.sock"
        path.unlink(missing_ok=True)
        with messages.short_name(str(path)) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(16)
        bare = {**spawn.BARE, "PYTHONPATH": environment.CODE}
        maker = [sys.executable, "-s", "-m", "runtime.container"]
        child = spawn.spawn(maker, bare, stdin=theirs.fileno(), stderr=log, cgroup=leaf.fd)
        theirs.close()
        specification = {
            "name": definition.name,
            "rootfs": str(definition.rootfs) if definition.rootfs else "host",
            "shown": shown,
            "library": environment.copy_library(place / "lib"),
            "place": str(root),
            "filters": filters.of_service(),
        }
        wire.send(ours, specification, [listener.fileno(), log, leaf.fd])
        message = await _reply(ours)
        status = await spawn.ended(child, 60.0)
        if message is None:
            code = os.waitstatus_to_exitcode(status)
            raise Error("service", f"its container ended with {code}: {tail(log_path)}")
        if "error" in message:
            raise Error.unwire(message["error"])
    finally:
        for closing in (ours, theirs, listener):
            closing.close()
        os.close(log)
    return words


async def command(definition: Service) -> tuple[list[str] | None, list[str]]:
    """The root template's command, and the host paths that its python lives from."""
    if definition.runtime == "exec":
        return None, []
    if definition.rootfs is not None:
        return [str(definition.python or _python_in(definition.rootfs)), "-c", _BOOT], []
    executable, shown = await environment.python_paths(definition.python)
    return [executable, "-c", _BOOT], shown


def _python_in(rootfs: Path) -> str:
    for path in ("/usr/local/bin/python3", "/usr/bin/python3"):
        if os.path.lexists(f"{rootfs}{path}"):
            return path
    raise Error("config", f"rootfs {rootfs} has no python3 in /usr/local/bin or /usr/bin; name one by `python`")


async def _reply(ours: socket.socket) -> Message | None:
    """What the container says, or None when it ended without a word."""
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(ours, readable.set)
    try:
        async with asyncio.timeout(60.0):
            await readable.wait()
        message, fds = wire.receive(ours)
        fds.close()
        return message
    except (OSError, EOFError, messages.MessageError):
        return None
    finally:
        loop.remove_reader(ours)


def tail(log_path: Path, lines: int = 20) -> str:
    """The last lines of a service's log. A line feed alone ends one: what pockets write has other such characters."""
    try:
        with open(log_path, "rb") as f:
            f.seek(max(0, os.fstat(f.fileno()).st_size - (1 << 20)))
            text = f.read().decode(errors="replace").removesuffix("\n")
    except OSError:
        return ""
    return "\n".join(text.split("\n")[-lines:])
