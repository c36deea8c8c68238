"""`pocket suggest`: a pocket's program run once under observation, and where it could be held."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

from nsutil.messages import MessageError
from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import Login
from pocketd.command import run


def main(name: str, arguments: list[str], runtime_dir: str | None, as_json: bool) -> NoReturn:
    """Ends this process as the program ended. What the program prints goes to standard error, the proposal to standard
    output."""
    present = run.standard_streams()
    out = os.dup(1)
    os.dup2(2, 1)
    request = run.Request(name=name, pocket=True, arguments=arguments, observe=True)

    def ended(login: Login) -> None:
        text = json.dumps(seen) if (seen := observed(login)) and as_json else words(name, arguments, seen)
        os.write(out, f"{text}\n".encode())

    with Control(runtime_dir) as control:
        login = run.log_in(control, request, present)
    run.hold(login, ended)


def observed(login: Login) -> dict[str, Any] | None:
    login.session.setblocking(False)
    try:
        message, fds = wire.receive(login.session)
        fds.close()
    except (EOFError, OSError, MessageError):
        return None
    return {k: v for k, v in message.items() if k not in ("v", "op")} if message.get("op") == "observed" else None


def words(name: str, arguments: list[str], seen: dict[str, Any] | None) -> str:
    if seen is None:
        return f"{name} ended in a way of its own (os._exit, a signal), so that nothing was seen of it"
    if not seen["checkpoint"]:
        return f"{name} has no place to be held in: {seen['why']}"
    lines = [
        f"# {name} first looks at {seen['looked']} in {seen['at']}; held before that, {seen['saves']:.2f} s of",
        f"# this run's {seen['whole']:.2f} s are done ahead of time",
        f"# (whether it can be held there, says: pocket warm {name})",
        f"checkpoint = {json.dumps(seen['checkpoint'])}",
    ]
    if seen["rehearse"]:
        lines += [
            "# and, so that what follows is warm too, with arguments of a sample:",
            f"rehearse = {json.dumps(arguments)}",
        ]
    return "\n".join(lines)
