"""What runs in the guest before tests/vm/test_poweroff.py looks on while it powers off: pockets, as units and by hand.

pocketd is the checkout's own, from its environment: nothing of it is installed here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tests.vm.guest.installed import BIN, CONFIGURATION, run, systemctl

UNITS = [f"p{n}" for n in range(1, 21)]
STUBBORN = UNITS[-1]
BY_HAND = [f"q{n}" for n in range(1, 6)]
STOP_TIMEOUT = 5
APP = f"""
import signal, socket, sys, time
name = socket.gethostname()

def end(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the scope's and the unit's may both come
    print(name, "ended in good order", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, signal.SIG_IGN if name == {STUBBORN!r} else end)
print(name, "has begun", flush=True)
while True:
    time.sleep(0.1)
"""


def install() -> None:
    for name in ("pocket", "pocketd"):
        (BIN / name).symlink_to(ROOT / ".venv/bin" / name)
    for unit in ("pocketd.service", "pocketd.socket", "pocketd.slice", "pocket@.service"):
        text = (ROOT / "systemd" / unit).read_text()
        for name, value in {"bindir": str(BIN), "docdir": "/usr/share/doc", "rundir": "/run/pocketd"}.items():
            text = text.replace(f"@{name}@", value)
        Path("/etc/systemd/system", unit).write_text(text)
    run("systemd-sysusers", ROOT / "systemd/pocketd.sysusers.conf")
    text = f'[service.plain]\nruntime = "python"\nstop_timeout = {STOP_TIMEOUT}\n'
    for name in (*UNITS, *BY_HAND):
        place = Path("/srv", name)
        place.mkdir(parents=True)
        (place / "app.py").write_text(APP)
        text += f'[pocket.{name}]\nservice = "plain"\ndir = "{place}"\nprogram = "app.py"\n'
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(text)
    systemctl("daemon-reload")


def main() -> None:
    install()
    systemctl("start", "pocketd.socket", "pocketd.service")
    run(BIN / "pocket", "on", "plain")
    systemctl("start", *(f"pocket@{name}" for name in UNITS))
    for name in BY_HAND:
        run("systemd-run", f"--unit=by-hand-{name}", BIN / "pocket", "run", "-p", name)
    begun: set[str] = set()
    follow = ["journalctl", "-f", "-n", "all", "-o", "cat"]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as journal:
        while len(begun) < len(UNITS) + len(BY_HAND):
            words = journal.stdout.readline().split()
            if words[1:] == ["has", "begun"]:
                begun.add(words[0])
        journal.terminate()
    print(f"{len(begun)} pockets have begun", flush=True)


if __name__ == "__main__":
    main()
