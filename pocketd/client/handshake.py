"""Logging in: the session's sockets made, the start message queued, pocketd asked to introduce us.

Both ways to use pocketd go through `open_login`: the client library with mode "client", `pocket run` with mode
"program". What the caller sends to its worker (argv, environment, directory) is queued on the session's own socket
before pocketd is asked, so it passes through no other process.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

from nsutil import messages
from pocketd import wire
from pocketd.client import errors
from pocketd.client.control import Control, Lost

Queued = Tuple[Dict[str, Any], Iterable[int]]

# How long a pocketd that died in mid-call may take to come back when the caller gave no time of its own.
RESTART = 10.0


class Login(NamedTuple):
    """An accepted login. The caller owns both sockets: closing `hold` ends the worker."""

    session: socket.socket
    hold: socket.socket
    reply: Dict[str, Any]
    id: str
    asked: float = 0.0  # when its request went out (CLOCK_MONOTONIC)


def environment() -> List[Tuple[bytes, bytes]]:
    """This process's environment as it travels."""
    return list(os.environb.items())


def open_login(
    control: Control,
    *,
    mode: str,
    name: Optional[str],
    directory: Optional[str],
    start: Dict[str, Any],
    fds: Iterable[int] = (),
    after: Iterable[Queued] = (),
    shared: Iterable[Tuple[str, int]] = (),
    progress: Optional[Callable[[str], None]] = None,
    timeout: Optional[float] = None,
    patience: float = RESTART,
    slow: Optional[Callable[[], None]] = None,
    **fields: Any,
) -> Login:
    """Log in to the service or pocket called `name` (None: pocketd chooses) and return the session.

    `start` is the start message without "op" and "mode"; `fds` are sent with it (a program's 0, 1, 2) and `after` are
    messages queued behind it; `shared` are further descriptors for the request, each with its role; all descriptors
    stay the caller's. `directory` is where an ad hoc pocket's files are: it is opened here, so that pocketd and we
    cannot mean two different ones; None for a pocket that has a definition.
    `fields` go into the request as they are. `timeout` in seconds is for all of it, retries included: when pocketd ends
    in mid-call, the same login is sent to the next one, which attaches to what there is. Without a `timeout` that one
    may take `patience` seconds to come. `slow` is called when no answer has come for a quarter of a second.

    Raises the errors of `Control.call`; LoginRefused for error codes without a type; OSError when `directory` cannot be
    opened.
    """
    with ExitStack() as stack:
        session, worker_end = messages.pair()
        stack.enter_context(session)
        hold, init_end = messages.pair()
        stack.enter_context(hold)
        roles, sent = ["session", "hold"], [worker_end.fileno(), init_end.fileno()]
        with worker_end, init_end, ExitStack() as until_reply:
            wire.send(session, {"op": "start", "mode": mode, **start}, fds)
            for message, extra in after:
                wire.send(session, message, extra)
            if directory is not None:
                fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                until_reply.callback(os.close, fd)
                roles.append("dir")
                sent.append(fd)
            for role, fd in shared:
                roles.append(role)
                sent.append(fd)
            request = {
                "session": os.urandom(16).hex(),
                "mode": mode,
                "name": name,
                "path": os.path.abspath(directory) if directory is not None else None,
                "roles": roles,
                **fields,
            }
            asked = time.monotonic()
            reply = ask(control, "login", request, sent, progress, timeout, patience, slow)
        stack.pop_all()
        return Login(session, hold, reply, str(request["session"]), asked)


def ask(
    control: Control,
    op: str,
    request: Dict[str, Any],
    fds: Iterable[int] = (),
    progress: Optional[Callable[[str], None]] = None,
    timeout: Optional[float] = None,
    patience: float = RESTART,
    slow: Optional[Callable[[], None]] = None,
) -> Dict[str, Any]:
    """Make a call that may be made twice, again on the next pocketd when one ends before its reply.

    `timeout` is for all of it; without one, each pocketd may take `patience` seconds to come back.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    again: Optional[Control] = None
    lost: Optional[errors.NotRunning] = None
    try:
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise lost or errors.Timeout(f"pocketd did not answer {op!r} within {timeout:g} s")
            try:
                return (again or control).call(op, fds, progress, left, slow, **request)
            except Lost as e:
                lost = e
            if slow:
                slow()
            if again:
                again.close()
            again = reach(os.path.dirname(control.path), patience if left is None else left, lost)
    except errors.PocketError as e:
        # A code that has no type here is pocketd's own reason to refuse.
        raise (errors.LoginRefused(e.message, e.code, **e.detail) if type(e) is errors.PocketError else e) from None
    finally:
        if again:
            again.close()


def reach(directory: Optional[str], patience: float, lost: Optional[errors.NotRunning] = None) -> Control:
    """Connect to a pocketd that may take `patience` seconds to start. Raises `lost`, or else NotRunning."""
    until = time.monotonic() + patience
    while True:
        try:
            return Control(directory, max(0.01, until - time.monotonic()))
        except errors.NotRunning as e:
            # A socket that does not exist yet cannot be polled; inotify is not worth its code for this rare case.
            if time.monotonic() + 0.05 > until:
                raise (lost or e) from None
            time.sleep(0.05)
