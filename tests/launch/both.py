"""One program, twice: under plain Python and in a pocket, in the same directory and environment."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import TIMEOUT, Pocketd


@dataclass(frozen=True)
class Ended:
    """How a process ended and what it wrote. `status` is negative for a signal, as in subprocess."""

    status: int
    out: bytes
    err: bytes

    def shown(self) -> str:
        out, err = (text[-20000:].decode(errors="backslashreplace") for text in (self.out, self.err))
        return f"status {self.status}\n{out}\n{err}"

    def masked(self, patterns: tuple[bytes, ...]) -> Ended:
        out, err = self.out, self.err
        for pattern in patterns:
            out, err = re.sub(pattern, b"*", out), re.sub(pattern, b"*", err)
        return Ended(self.status, out, err)


class Both:
    """Runs programs in `place`, under plain Python and in a pocket of one service."""

    def __init__(self, pocketd: Pocketd, place: Path, service: str = "plain"):
        self.pocketd = pocketd
        self.place = place
        self.service = service

    def write(self, name: str, source: str) -> Path:
        path = self.place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    def environment(self, env: dict[str, str] | None) -> dict[str, str]:
        """The caller's environment but for where pocketd is; with None for a variable, without that."""
        merged = {**self.pocketd.environment, **(env or {})}
        return {k: v for k, v in merged.items() if v is not None}

    def plain_command(self, *words: str | bytes) -> list[str | bytes]:
        return [sys.executable, *words]

    def pocket_command(self, *words: str | bytes, options: tuple[str, ...] = ()) -> list[str | bytes]:
        return self.pocketd.command("run", "--service", self.service, *options, *words)

    def plain(self, *words: str | bytes, env: dict[str, str] | None = None, **options: Any) -> Ended:
        environment = self.environment(env)
        environment.pop("POCKETD_RUNTIME_DIR")
        return self._run(self.plain_command(*words), environment, options)

    def pocket(
        self, *words: str | bytes, options: tuple[str, ...] = (), env: dict[str, str] | None = None, **others: Any
    ) -> Ended:
        return self._run(self.pocket_command(*words, options=options), self.environment(env), others)

    def _run(self, command: list[str | bytes], env: dict[str, str], options: dict[str, Any]) -> Ended:
        options = {"stdin": subprocess.DEVNULL, "cwd": self.place, "timeout": TIMEOUT, "env": env, **options}
        if "input" in options:
            del options["stdin"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        done = subprocess.run(command, **options)
        return Ended(done.returncode, done.stdout or b"", done.stderr or b"")

    def same(self, *words: str | bytes, mask: tuple[bytes, ...] = (), **options: Any) -> Ended:
        """Run it both ways; what it wrote and how it ended must be the same, byte for byte but for `mask`."""
        expected = self.plain(*words, **options).masked(mask)
        found = self.pocket(*words, **options).masked(mask)
        assert found == expected, f"in a pocket:\n{found.shown()}\nunder python:\n{expected.shown()}"
        return expected

    def same_program(self, source: str, *arguments: str | bytes, **options: Any) -> Ended:
        """The same for a program given as text."""
        self.write("app.py", source)
        return self.same("app.py", *arguments, **options)


def read_line(fd: int, timeout: float = TIMEOUT) -> bytes:
    """One line from a descriptor, and not a byte more; what there is at its end, or when time is up."""
    line = b""
    while not line.endswith(b"\n") and select.select([fd], [], [], timeout)[0]:
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
    return line


def finish(process: subprocess.Popen[bytes]) -> Ended:
    out, err = process.communicate(timeout=TIMEOUT)
    return Ended(process.returncode, out or b"", err or b"")


def ends(pid: int, timeout: float = TIMEOUT) -> bool:
    """Whether a process of this pid, if there is one, ends within the time-out."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], timeout)[0])
    finally:
        os.close(fd)
