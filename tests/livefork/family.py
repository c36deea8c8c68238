"""For the scripts that the tests run: make a child, have it do something, and see it end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsutil import clone, namespaces

PATIENCE = 45.0  # seconds


def _end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def stand() -> clone.Child:
    """The first process of a new pid namespace, which does not outlive a script that fails."""
    child = clone.pause(flags=namespaces.CLONE_NEWPID)
    atexit.register(_end, os.dup(child.pidfd))
    return child


def outcome(child: clone.Child, patience: float = PATIENCE) -> int:
    """Wait for a child of this process: its exit status, or minus its signal. One that hangs is ended, and shown."""
    try:
        if not select.select([child.pidfd], [], [], patience)[0]:
            tasks = Path(f"/proc/{child.pid}/task").iterdir()
            where = {task.name: ((task / "wchan").read_text(), (task / "syscall").read_text()) for task in tasks}
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            raise AssertionError(f"child {child.pid} hangs: {where}")
        return os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    finally:
        os.close(child.pidfd)


def _act(action: Callable[[], Any], writer: int) -> None:
    try:
        said = json.dumps(action()).encode()
        while said:
            said = said[os.write(writer, said) :]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def child_says(action: Callable[[], Any], make: Callable[..., Any] = clone.live_fork, **options: Any) -> Any:
    """What `action` returned (JSON) in a child made by `make(**options)`; AssertionError when it failed there."""
    reader, writer = os.pipe()
    child = make(**options)
    if child is None:
        os.close(reader)
        _act(action, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as said:
        if select.select([said], [], [], PATIENCE)[0]:
            text = said.read()
            status = outcome(child)
            assert status == 0, f"child ended with {status}"
            return json.loads(text)
        status = outcome(child, 0.0)
        raise AssertionError(f"child said nothing and ended with {status}")


def revived(action: Callable[[], Any]) -> Callable[[], Any]:
    """`action` after the threads have come back."""

    def act() -> Any:
        clone.revive(30)
        return action()

    return act
