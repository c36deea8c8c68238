"""What a caller could claim by choosing the name of its session, and what it hears of what is its operator's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nsutil import messages
from pocketd import wire
from pocketd.client import errors
from tests.conftest import TIMEOUT, Pocketd, wait_for
from tests.launch.test_wire_limits import START, control_of, program

POCKET = """
[service.plain]
runtime = "python"

[pocket.kept]
service = "plain"
dir = "{place}"
program = "app.py"
warm = 1
"""
MODULE = "module_of_the_operators"
BROKEN = """
[service.broken]
runtime = "python"
python = "{python}"
preload = ["{module}"]

[pocket.mine]
service = "broken"
dir = "{place}"
program = "app.py"
checkpoint = "main"
warm = 1
may_run = ["nobody"]
"""


@contextmanager
def log_in(daemon: Pocketd, place: Path, session: str, **fields: Any) -> Iterator[Any]:
    """A login of a session of that name, for a program that waits for its input. Gives the reply."""
    ours, theirs = messages.pair()
    hold, init = messages.pair()
    read, write = os.pipe()
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with ours, theirs, hold, init, open("/dev/null") as null, control_of(daemon) as control:
        wire.send(ours, {"op": "start", "mode": "program", **START}, [read, null.fileno(), null.fileno()])
        request = {"name": "plain", "path": str(place), "roles": ["session", "hold", "dir"], **fields}
        try:
            yield control.call(
                "login", fds=[theirs.fileno(), init.fileno(), directory], timeout=TIMEOUT, session=session,
                mode="program", **request,
            )  # fmt: skip
        finally:
            for fd in (read, write, directory):
                os.close(fd)


def test_a_session_by_whose_name_another_pocket_is_named(pocketd: Pocketd, tmp_path: Path) -> None:
    """It would be within another's limits, and end with its processes."""
    with program(pocketd, tmp_path) as first:
        for other in (first.id[:12] + "0" * 20, first.id[:-1] + "g"):
            with pytest.raises(errors.PocketError, match="another session|32 hexadecimal"):
                with log_in(pocketd, tmp_path, other):
                    pass
        assert [w["session"] for w in pocketd.workers()] == [first.id]


def test_a_session_by_the_name_of_a_slot(own_pocketd: Any, tmp_path: Path) -> None:
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text("print(1)")
    daemon: Pocketd = own_pocketd(POCKET.format(place=place))
    daemon.pocket("warm", "kept")
    cgroup = daemon.cgroup_path / "pocketd-plain.scope/service/pockets/kept"
    (slot,) = (path for path in cgroup.iterdir() if path.is_dir())
    processes = (slot / "cgroup.procs").read_text()
    assert processes
    for name in {slot.name, slot.name[-32:]}:
        try:
            with log_in(daemon, place, name) as reply:
                assert "attached" not in reply
                assert str(reply["pid"]) not in processes.split()
                subprocess.run(daemon.command("stop", name), env=daemon.environment, capture_output=True)
        except errors.PocketError as e:
            assert e.code == "bad-request"
    assert wait_for(lambda: not daemon.workers())
    assert (slot / "cgroup.procs").read_text() == processes
    assert subprocess.run(daemon.command("kept"), env=daemon.environment, capture_output=True).stdout == b"1\n"


@pytest.fixture
def broken() -> Iterator[Pocketd]:
    """Whose service does not start; a socket for all, as one of the group `pocket` would have it."""
    above = Path(tempfile.mkdtemp(prefix="claims-", dir="/var/tmp"))
    above.chmod(0o755)
    place = above / "app"
    place.mkdir()
    (place / "app.py").write_text("def main(): pass\nmain()\n")
    (above / "pocketd").mkdir()
    daemon = Pocketd(above / "pocketd", BROKEN.format(place=place, module=MODULE, python=sys.executable))
    daemon.start()
    daemon.place.chmod(0o755)
    (daemon.runtime_dir / "pocketd.sock").chmod(0o666)
    yield daemon
    daemon.close()
    shutil.rmtree(above)


@pytest.mark.parametrize("words", [["warm", "mine"], ["run", "-p", "mine"], ["mine"], ["ps", "--json"]])
def test_why_a_service_does_not_start_is_its_operators(broken: Pocketd, words: list[str]) -> None:
    nobody: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
    options: dict[str, Any] = {"env": broken.environment, "capture_output": True, "text": True, "timeout": TIMEOUT}
    subprocess.run(broken.command("warm", "mine"), **options, **nobody)
    told = subprocess.run(broken.command(*words), **options, **nobody)
    assert MODULE not in told.stdout + told.stderr, told
    if words != ["ps", "--json"]:
        assert "its log, which is its operator's, says why: pocket logs broken" in told.stderr, told
    assert MODULE in broken.pocket("logs", "broken", check=False).stdout
