"""The program that a pocket runs, and a control without one: makes the attempts that it is told to, one a line.

A request: {"attempt": "module.function", "thread": "main" or "resident", "given": {...}}. The reply: {"value": ...}, or
{"errno": name} where the kernel refused, or {"failed": text} for an attempt that is itself wrong. As a control
(`-m ... program control`) each attempt has a child of its own, so that one which succeeds leaves no trace.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import sys
import traceback
from typing import Any

from tests.escape.inside import kernel

_CLONE_NEWNS, _CLONE_NEWNET, _MS_REC_PRIVATE = 0x20000, 0x40000000, 0x44000


def answer(request: dict[str, Any]) -> dict[str, Any]:
    module, _, name = request["attempt"].partition(".")
    try:
        function = getattr(importlib.import_module(f"tests.escape.inside.{module}"), name)
        if request.get("thread") == "resident":
            return {"value": importlib.import_module("resident").ask(function, request["given"])}
        return {"value": function(**request["given"])}
    except OSError as e:
        if e.errno is None:
            return {"failed": traceback.format_exc()}
        return {"errno": errno.errorcode.get(e.errno, str(e.errno)), "text": str(e)}
    except BaseException:
        return {"failed": traceback.format_exc()}


def in_a_child(request: dict[str, Any]) -> dict[str, Any]:
    """The same in a child with a mount and a network namespace of its own, where it may have them."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)  # what it signals by group ends here
        with contextlib.suppress(OSError):
            kernel.call("unshare", _CLONE_NEWNS | _CLONE_NEWNET)
            kernel.call("mount", b"none", b"/", b"", _MS_REC_PRIVATE, 0)
        os.write(writer, json.dumps(answer(request)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(text) if text else {"failed": f"the control's child ended with {status:#x}"}


def main() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # for processes.kill_own_group
    act = in_a_child if "control" in sys.argv else answer
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # What the next attempts find is made in the process itself.
        print(json.dumps((answer if request.get("stay") else act)(request)), flush=True)


if __name__ == "__main__":
    main()
