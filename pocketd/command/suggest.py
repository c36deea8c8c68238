"""`pocket suggest`: a pocket's program run once under observation, and where it could be held."""

from __future__ import annotations

import json
import os
from contextlib import suppress
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
        seen = observed(login)
        text = json.dumps(seen) if as_json else words(name, arguments, seen)
        os.write(out, f"{text}\n".encode())

    with Control(runtime_dir) as control:
        login = run.log_in(control, request, present)
    run.hold(login, ended)


def observed(login: Login) -> dict[str, Any]:
    """What was said last: when the program first looked, or at its end."""
    login.session.setblocking(False)
    seen = {"checkpoint": None, "why": "it ended in a way of its own (os._exit, a signal) before it looked at anything"}
    with suppress(EOFError, OSError, MessageError):
        while True:
            message, fds = wire.receive(login.session)
            fds.close()
            if message.get("op") == "observed":
                seen = {k: v for k, v in message.items() if k not in ("v", "op")}
    return seen


def words(name: str, arguments: list[str], seen: dict[str, Any]) -> str:
    if not seen["checkpoint"]:
        return f"{name} has no place to be held in: {seen['why']}"
    of_all = "it ended in a way of its own" if seen["whole"] is None else f"of this run's {seen['whole']:.2f} s"
    lines = [
        f"# {name} first looks at {seen['looked']} in {seen['at']}; held before that,",
        f"# {seen['saves']:.2f} s are done ahead of time ({of_all})",
        f"# (whether it can be held there, says: pocket warm {name})",
        f"checkpoint = {json.dumps(seen['checkpoint'])}",
    ]
    if seen["rehearse"]:
        lines += [
            "# and, so that what follows is warm too, with arguments of a sample:",
            f"rehearse = {json.dumps(arguments)}",
        ]
    return "\n".join(lines)
