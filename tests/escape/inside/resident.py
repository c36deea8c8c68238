"""Preloaded by the tests' service: a thread of the template that does what it is asked in whatever became of it.

It waits in a system call, as a runtime's own threads do, and comes back in each worker by the live fork.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

ASKED: queue.SimpleQueue[tuple[Callable[..., Any], dict[str, Any]]] = queue.SimpleQueue()
ANSWERED: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
# Which thread it is, by the kernel, in the template: its pid and id there, and when.
STAMP: dict[str, int] = {}
# Stands for a model's weights: pages of the template that no worker has written.
WEIGHTS = bytearray(b"weight--" * 8192)


def live() -> None:
    STAMP.update(pid=os.getpid(), tid=threading.get_native_id(), at=time.monotonic_ns())
    while True:
        function, arguments = ASKED.get()
        try:
            ANSWERED.put((True, function(**arguments)))
        except BaseException as e:
            ANSWERED.put((False, e))


def ask(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Have the resident thread call `function`; its result, or its exception."""
    ASKED.put((function, arguments))
    done, value = ANSWERED.get()
    if not done:
        raise value
    return value


def model() -> object:
    """For a service that loads models alone: this module is one of them, for its thread's sake."""
    return object()


threading.Thread(target=live, name="resident", daemon=True).start()
