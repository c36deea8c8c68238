"""What an attempt must meet in a pocket, and that it is no empty one: the same code elsewhere gets through."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.conftest import TIMEOUT
from tests.launch.both import read_line

THREADS = ("main", "resident")
# In namespaces of its own, and with nothing of the host's in /tmp and /dev/shm.
NAMESPACES = (
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--ipc", "--uts", "--net", "--cgroup"),
    *("sh", "-ec", 'for d in /tmp /dev/shm; do mount -t tmpfs -o mode=1777 none $d; done; exec "$@"', "sh"),
)
UID = 54_331  # no other test's: some count the processes of theirs


class Inside:
    """A running tests.escape.inside.program: in a pocket, or a control in less than one."""

    def __init__(self, command: list[Any], **options: Any):
        self._said = tempfile.TemporaryFile()
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said, **options}
        self.process = subprocess.Popen(command, **options)
        line = read_line(self.process.stdout.fileno())
        if line != b"ready\n":
            raise AssertionError(f"{line!r}, {self.end()!r}")

    def attempt(self, name: str, /, thread: str = "main", stay: bool = False, **given: Any) -> dict[str, Any]:
        request = {"attempt": name, "thread": thread, "given": given, "stay": stay}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        text = read_line(self.process.stdout.fileno())
        if not text:
            raise AssertionError(f"{name} took its process along: {self.end()!r}")
        reply: dict[str, Any] = json.loads(text)
        assert "failed" not in reply, reply["failed"]
        return reply

    def make(self, name: str, /, **given: Any) -> Any:
        """Something for others to find, made in the process itself, where it must succeed."""
        reply = self.attempt(name, stay=True, **given)
        assert "value" in reply, reply
        return reply["value"]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> bytes:
        """Let it end; what it said on its standard error."""
        self.process.stdin.close()
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self.process.stdout.close()
        with self._said as said:
            said.seek(0)
            return said.read()


@dataclass(frozen=True)
class Attempt:
    """`refused`: in a pocket, the kernel's error by name, or what is seen in place of what was sought; several where
    layers stand one behind the other and kernels differ in the first. `control`: who gets through ("user": no
    privileges and no confinement, "root": root in namespaces of its own, "host": root in none); `through`: with what.
    """

    name: str
    refused: tuple[Any, ...]
    control: str = "user"
    through: Any = True
    given: dict[str, Any] = field(default_factory=dict)
    elsewhere: dict[str, Any] | None = None  # what the control is given instead


def outcome(reply: dict[str, Any]) -> Any:
    return reply["errno"] if "errno" in reply else reply["value"]


def each(table: dict[str, Attempt]) -> Any:
    """Parametrizes a test by a table's attempts, each from both threads."""
    return pytest.mark.parametrize(
        "attempt, thread",
        [pytest.param(a, t, id=f"{text} - {t} thread") for text, a in table.items() for t in THREADS],
    )
