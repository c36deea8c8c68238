"""The form of events: with a priority for the journal where that is what they are written to, else with the time."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys

import pytest

from pocketd.daemon import lasting
from tests.conftest import ROOT, TIMEOUT


@pytest.mark.parametrize("named", ["this one", "another", None])
def test_a_line_is_for_whom_it_is_written_to(tmp_path, named):
    """A process of a service's may have been given another standard error (systemd.exec(5), $JOURNAL_STREAM)."""
    with open(tmp_path / "log", "w+") as log:
        status = os.fstat(log.fileno())
        stream = {"this one": f"{status.st_dev}:{status.st_ino}", "another": f"{status.st_dev}:{status.st_ino + 1}"}
        env = {"PYTHONPATH": str(ROOT), **({"JOURNAL_STREAM": stream[named]} if named else {})}
        code = "from pocketd import events; events.emit('happened', 'warning', what='a b')"
        subprocess.run([sys.executable, "-c", code], env=env, stderr=log, check=True, timeout=TIMEOUT)
        log.seek(0)
        said = log.read()
    wanted = '<4>happened what="a b"\n' if named == "this one" else r'\d{4}-\S+Z warning happened what="a b"' + "\n"
    assert re.fullmatch(wanted, said), said


def test_what_lasts_is_begun_anew_after_a_fault_which_is_said(capsys):
    begun: list[None] = []

    async def fails_twice() -> None:
        begun.append(None)
        if len(begun) < 3:
            raise KeyError("pocket")
        await asyncio.get_running_loop().create_future()

    async def watch() -> None:
        task = asyncio.ensure_future(lasting("idle", fails_twice, rest=0.01))
        while len(begun) < 3:
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()

    asyncio.run(asyncio.wait_for(watch(), TIMEOUT))
    said = re.findall(r"error task-failed task=idle why=(.*)", capsys.readouterr().err)
    assert said == ["\"KeyError('pocket')\""] * 2
