"""Another Python process that serves one socket of this one's."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsutil import messages


@contextmanager
def partner(module: str, **options: Any) -> Iterator[tuple[socket.socket, int]]:
    """A process that runs `serve` of a module of bench with its end of a socket pair: our end and its pid. It ends when
    our end is closed, which is waited for. `options` are those of subprocess.Popen."""
    ours, theirs = messages.pair()
    with ours:
        with theirs:
            code = f"import socket; from bench import {module}; {module}.serve(socket.socket(fileno={theirs.fileno()}))"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=Path(__file__).resolve().parents[1],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                **options,
            )
        try:
            yield ours, process.pid
        finally:
            ours.close()
            process.wait(30)
