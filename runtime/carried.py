"""What a program set in its process before it was held, and each run has again, on top of what is its caller's."""

from __future__ import annotations

import locale
import os
import resource
import signal
import time
from contextlib import suppress
from typing import Any, Dict

from runtime.interpreter import RLIMITS, current_umask

_CATEGORIES = ("LC_CTYPE", "LC_COLLATE", "LC_TIME", "LC_MONETARY", "LC_NUMERIC", "LC_MESSAGES")

# A handler that a program sets stands above a signal that its caller ignores, as under nohup.
_SIGNALS = {s.name: s for s in signal.Signals if s not in (signal.SIGKILL, signal.SIGSTOP)}


class Carried:
    """Compares the process as it is when this is made with what it is at `end`. What was set to what it was already
    cannot be seen, and is each caller's."""

    def __init__(self) -> None:
        self._before = state()
        self._set: Dict[str, Any] = {}

    def end(self) -> None:
        self._set = differing(state(), self._before)

    def put_back(self) -> None:
        """In a child that has its caller's environment, directory, limits, blocked signals."""
        if "blocked" in self._set:
            self._set["blocked"] |= signal.pthread_sigmask(signal.SIG_BLOCK, [])
        put(self._set)


def differing(there: Dict[str, Any], known: Dict[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in there.items() if value != known[key]}


def put(values: Dict[str, Any]) -> None:
    for key, value in values.items():
        with suppress(OSError, ValueError, locale.Error):  # a limit may be below it by now
            if key == "umask":
                os.umask(value)
            elif key == "blocked":
                signal.pthread_sigmask(signal.SIG_SETMASK, value)
            elif key == "directory":
                os.chdir(value)
            elif key == "zone":
                time.tzset()
            elif key in _SIGNALS:
                if value is not None:  # None: not Python's to set
                    signal.signal(_SIGNALS[key], value)
            elif key in _CATEGORIES:
                locale.setlocale(getattr(locale, key), value)
            else:
                resource.setrlimit(getattr(resource, key), value)


def state() -> Dict[str, Any]:
    return {
        "umask": current_umask(),
        "blocked": set(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "directory": os.readlink("/proc/self/cwd"),
        "zone": time.tzname,
        **{name: locale.setlocale(getattr(locale, name)) for name in _CATEGORIES},
        **{name: signal.getsignal(number) for name, number in _SIGNALS.items()},
        **{name: resource.getrlimit(getattr(resource, name)) for name in RLIMITS},
    }
