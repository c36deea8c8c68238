"""Structured logs: one line an event, `event key=value ...`, with a priority that journald understands.

Where standard error is the journal's each line starts with `<N>`, sd-daemon(3), which the journal takes off.
"""

from __future__ import annotations

import json
import os
import sys
import time


def _to_the_journal() -> bool:
    """Whether standard error is what JOURNAL_STREAM names, as device and inode: a process that systemd's started may
    have another one (systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


_PREFIXED = _to_the_journal()
_PRIORITY = {"debug": 7, "info": 6, "notice": 5, "warning": 4, "error": 3}


def emit(event: str, level: str = "info", **fields: object) -> None:
    """Write one event to standard error. Values are quoted where they need it, so that a line stays one line."""
    words = [event, *(f"{key}={_quote(value)}" for key, value in fields.items() if value is not None)]
    start = f"<{_PRIORITY[level]}>" if _PREFIXED else time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime())
    try:
        sys.stderr.write(f"{start}{level if not _PREFIXED else ''}{'' if _PREFIXED else ' '}{' '.join(words)}\n")
        sys.stderr.flush()
    except OSError:
        pass  # a log that nobody can read is no reason to end


def _quote(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, (list, dict)) else str(value)
    return text if text and all(c.isalnum() or c in "._:/@+-,%" for c in text) else json.dumps(text)
