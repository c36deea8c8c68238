"""What callers and programs can do to a service's init: it costs them what they have there, and nobody else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client import errors, login
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.launch.test_wire_limits import control_of, program

APP = "def one():\n    return 1\n"


@pytest.fixture
def serves(pocketd: Pocketd, tmp_path: Path) -> Any:
    """Whether another's session goes on, new ones begin, and init and its templates are the same as before."""
    (tmp_path / "other.py").write_text(APP)

    def of_plain() -> list[int]:
        shown = pocketd.ps()
        rows = [*shown["services"], *shown["templates"]]
        return [row["pid"] for row in rows if "plain" in (row.get("service"), row.get("name"))]

    def enter() -> Any:
        return login("plain", directory=str(tmp_path), runtime_dir=str(pocketd.runtime_dir), timeout=TIMEOUT)

    with enter() as before:
        there = of_plain()

        def check() -> bool:
            for _ in range(5):
                with enter() as session:
                    assert session.call("other:one") == 1
            return bool(before.call("other:one") == 1) and of_plain() == there

        assert check()
        yield check


@pytest.mark.parametrize("number", [1 << 40, (1 << 64) - 1, -1, 0, 65, 1000, -(1 << 40)])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_that_there_is_not(pocketd: Pocketd, tmp_path: Path, serves: Any, number: int, group: bool) -> None:
    with program(pocketd, tmp_path) as session:
        wire.send(session.hold, {"op": "signal", "signal": number, "group": group})
        wire.send(session.hold, {"op": "signal", "signal": signal.SIGCONT, "group": group})
        assert serves()


def test_a_stop_of_a_program_whose_name_is_no_text(pocketd: Pocketd, tmp_path: Path, serves: Any) -> None:
    text = (
        b"import ctypes, time\nctypes.CDLL(None).prctl(15, b'\\xff', 0, 0, 0)\nprint(1, flush=True)\ntime.sleep(1000)"
    )
    with program(pocketd, tmp_path, text) as session:
        name = Path(f"/proc/{session.reply['pid']}/comm")
        assert name.read_bytes() == b"\xff\n"
        wire.send(session.hold, {"op": "signal", "signal": signal.SIGTSTP, "group": False})
        assert serves()


def _path(place: Path) -> int:
    return os.open(place, os.O_PATH | os.O_CLOEXEC)


def _memory(place: Path) -> int:
    fd = os.memfd_create("session", os.MFD_CLOEXEC)
    os.write(fd, b"x")
    return fd


def _pipe(place: Path) -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize("make", [_path, _memory, _pipe])
def test_a_session_that_is_no_socket(pocketd: Pocketd, tmp_path: Path, serves: Any, make: Any) -> None:
    """It is refused, and no process of the launch is left to take those of others."""
    for number in range(4):
        hold, init = messages.pair()
        fd, place = make(tmp_path), _path(tmp_path)
        with control_of(pocketd) as control, hold, init:
            with pytest.raises(errors.PocketError, match="no socket"):
                control.call(
                    "login", fds=[fd, init.fileno(), place], timeout=TIMEOUT, session=f"{number:032x}", mode="program",
                    name="plain", path=str(tmp_path), roles=["session", "hold", "dir"],
                )  # fmt: skip
        os.close(fd)
        os.close(place)
    assert serves()


def test_more_mounts_than_a_launch_can_carry(pocketd: Pocketd, tmp_path: Path, serves: Any) -> None:
    words = [word for n in range(26) for word in ("--mount", f"{tmp_path}:/srv/shown/{n}")]
    for mode in (("-c", "print(1)"), ("other.py",)):
        done = pocketd.pocket("run", "--service", "plain", "--dir", str(tmp_path), *words, *mode, check=False)
        assert done.returncode == 125 and "at most" in done.stderr, done
    assert serves()


def test_children_of_inits_that_stop_and_go_on_for_ever(pocketd: Pocketd, tmp_path: Path, serves: Any) -> None:
    """Made its own by CLONE_PARENT: it hears of each stop."""
    text = b"""
import ctypes, os, time
libc = ctypes.CDLL(None)
pids = []
for _ in range(300):
    pid = libc.syscall(56, 0x8000 | 17, 0, 0, 0, 0)
    if pid == 0:
        while True: os.kill(os.getpid(), 19)
    pids.append(pid)
print(1, flush=True)
begun = time.monotonic()
while time.monotonic() < begun + 60:
    for pid in pids: pid > 0 and os.kill(pid, 18)
"""
    with program(pocketd, tmp_path, text):
        assert serves()
    assert wait_for(serves)
