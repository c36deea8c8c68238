"""What a service manager gave this process and the program is to have: sd_notify(3), sd_watchdog_enabled(3),
sd_listen_fds(3), and the credentials of systemd.exec(5).

Descriptors travel, never names that somebody else would open: what this process may not read, the program does not get.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from nsutil import memory, messages
from pocketd import wire
from pocketd.client import errors

CREDENTIALS = 1 << 20  # bytes, all together: systemd's own limit (systemd.exec(5), LoadCredential=)
# One message carries them with the three standard streams, and may need one descriptor for its text.
LISTENING = messages.MAX_FDS - 4


@dataclass
class Given:
    """`shared` and `fields` are for the login request, `start` for the start message, `listening` goes with that."""

    shared: list[tuple[str, int]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    listening: list[int] = field(default_factory=list)


def take(environment: dict[bytes, bytes], stack: ExitStack, say: Callable[[str], None]) -> Given:
    """Find what this process was given by `environment`, which is changed where the program must be told otherwise.

    `stack` closes what was opened. Raises PocketError, OSError.
    """
    given = Given()
    own = str(os.getpid()).encode()
    pids = [name for name in (b"WATCHDOG_PID", b"LISTEN_PID") if environment.get(name) == own]
    if pids:
        given.start["own_pid"] = pids  # the worker puts its own there
    if b"LISTEN_PID" in pids:
        given.listening = listening(environment)
        given.start["listen"] = len(given.listening)
    notify(environment, given, stack, say)
    credentials(environment, given, stack, say)
    return given


def listening(environment: dict[bytes, bytes]) -> list[int]:
    environment.pop(b"LISTEN_PIDFDID", None)  # the same as LISTEN_PID in another way, and no longer true
    try:
        count = int(environment.get(b"LISTEN_FDS", b"0"))
        found = list(range(3, 3 + count))
        for fd in found:
            os.fstat(fd)
    except (ValueError, OSError) as e:
        raise errors.PocketError(f"LISTEN_FDS={environment.get(b'LISTEN_FDS')!r} is not what is there: {e}") from None
    if count > LISTENING:
        raise errors.PocketError(f"{count} sockets by LISTEN_FDS; at most {LISTENING} can be passed on")
    return found


def notify(environment: dict[bytes, bytes], given: Given, stack: ExitStack, say: Callable[[str], None]) -> None:
    named = environment.get(b"NOTIFY_SOCKET", b"")
    if named.startswith(b"@"):  # unix(7): abstract names belong to a network namespace
        say(f"the program cannot reach NOTIFY_SOCKET={os.fsdecode(named)}: an abstract socket stays in its network")
    if not named.startswith(b"/"):
        return
    path = os.path.realpath(named)
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return  # nobody listens there
    stack.callback(os.close, fd)
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return
    if not path.startswith(b"/run/"):
        say(f"the program cannot reach NOTIFY_SOCKET={os.fsdecode(named)}: only sockets beneath /run are passed on")
        return
    environment[b"NOTIFY_SOCKET"] = path
    given.shared.append(("notify", fd))
    given.fields["notify"] = path


def credentials(environment: dict[bytes, bytes], given: Given, stack: ExitStack, say: Callable[[str], None]) -> None:
    """Copies of the credentials in a sealed memfd, which only the worker reads.

    Not the directory itself: the worker would read it as root, so any directory could be passed for one.
    """
    named = environment.get(b"CREDENTIALS_DIRECTORY", b"")
    if not named.startswith(b"/"):
        return
    path = os.path.realpath(named)
    try:
        found = read(os.fsdecode(path))
    except FileNotFoundError:
        return
    if not path.startswith(b"/run/"):
        say(f"the program does not see CREDENTIALS_DIRECTORY={os.fsdecode(named)}: only what is beneath /run")
        return
    if sum(map(len, found.values())) > CREDENTIALS:
        raise errors.PocketError(f"{os.fsdecode(path)} holds more than the {CREDENTIALS} bytes that are passed on")
    fd = memory.sealed(wire.pack({"files": found}), "credentials")
    stack.callback(os.close, fd)
    environment[b"CREDENTIALS_DIRECTORY"] = path
    given.shared.append(("credentials", fd))
    given.fields["credentials"] = path


def read(directory: str) -> dict[str, bytes]:
    """The regular files of a directory, each up to one byte more than all of them may have."""
    found = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                with open(entry.path, "rb", buffering=0) as file:
                    found[entry.name] = file.read(CREDENTIALS + 1)
    return found
