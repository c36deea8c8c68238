"""The guest powers off as any host does, with pockets at work: its console shows how each of them ended."""

from __future__ import annotations

import re

import pytest

from tests.vm import initramfs, machine
from tests.vm.__main__ import ENVIRONMENT
from tests.vm.guest.poweroff import BY_HAND, STOP_TIMEOUT, STUBBORN, UNITS

LINE = re.compile(r"^\[ *([0-9]+\.[0-9]+)\] (.*?)\r*$", re.MULTILINE)
CONSOLE = "systemd.journald.forward_to_console=1 systemd.journald.max_level_console=info"


MOST = 15.0  # seconds that pockets may add


@pytest.mark.slow
def test_at_poweroff_pockets_end_in_good_order_and_one_that_does_not_is_killed():
    kernel = machine.find_kernel("newest")
    command = [str(machine.ROOT / ".venv/bin/python"), "-m", "tests.vm.guest.poweroff"]
    image = initramfs.build(kernel, command, machine.ROOT, ENVIRONMENT, orderly=True)
    said = bytearray()
    result = machine.run(kernel, image, words=CONSOLE, job_seconds=900, show=said.extend)
    assert result.status == 0, said.decode()
    lines = [(float(at), text) for at, text in LINE.findall(result.console)]
    begin = next(at for at, text in lines if "Deactivating" in text or "vm-job.service: Deactivated" in text)
    ended = {text.split()[-5]: at for at, text in lines if text.endswith("ended in good order")}
    assert sorted(ended) == sorted({*UNITS, *BY_HAND} - {STUBBORN})
    (killed,) = [at for at, text in lines if f"pocket@{STUBBORN}.service: Main process exited, code=killed" in text]
    assert STOP_TIMEOUT - 1 < killed - begin < MOST
    assert max(ended.values()) - begin < MOST
    (off,) = [at for at, text in lines if "Power down" in text]
    print(
        f"from the power-off's begin: {max(ended.values()) - begin:.1f} s to the end of {len(ended)} pockets, "
        f"{killed - begin:.1f} s to the end of one that ignores SIGTERM, {off - begin:.1f} s to power down"
    )
