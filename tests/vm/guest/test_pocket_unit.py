"""Pockets as units of systemd: systemd/pocket@.service and pocket@.socket, with the worker in the unit's own cgroup."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT, wait_for
from tests.launch.both import read_line
from tests.vm.guest.installed import call, show, systemctl

UNITS = Path("/etc/systemd/system")
CONFIG = """
[pocket.detect]
service = "plain"
dir = "/srv/detect"
program = "app.py"

[pocket.limited]
service = "plain"
dir = "/srv/limited"
program = "app.py"
limits = { "memory.max" = "100M", "pids.max" = 100 }
"""
APP = """
import os, signal, socket, sys, time

def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.connect(os.environ["NOTIFY_SOCKET"])
        s.send(text.encode())

def ended(*_):
    print("ended in good order", flush=True)
    sys.exit(0)

def eat():
    held = []
    while True:
        held.append(b"x" * (1 << 20))

def burn():
    begun, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - begun < 5:
        pass
    print("share", (time.process_time() - cpu) / (time.monotonic() - begun), flush=True)

def ready():
    notify("READY=1\\nSTATUS=watching the door")

def watched():
    print("watchdog", os.environ["WATCHDOG_PID"] == str(os.getpid()), flush=True)
    for _ in range(3):
        notify("WATCHDOG=1")
        time.sleep(int(os.environ["WATCHDOG_USEC"]) / 2e6)

def credential():
    print("token", open(os.environ["CREDENTIALS_DIRECTORY"] + "/token").read(), flush=True)

def serve():
    listening = socket.socket(fileno=3)
    names = [name for _, name in socket.if_nameindex()]
    own = os.environ["LISTEN_PID"] == str(os.getpid())
    while True:
        peer, _ = listening.accept()
        peer.sendall(f"served {own} {names}\\n".encode())
        peer.close()

def exit3():
    sys.exit(3)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

signal.signal(signal.SIGTERM, ended)
signal.signal(signal.SIGUSR1, lambda *_: print("heard", flush=True))
print("begun in", open("/proc/self/cgroup").read().splitlines()[-1], flush=True)
for name in os.environ.get("DO", "").split():
    globals()[name]()
print("waiting", flush=True)
while True:
    time.sleep(0.1)  # not pause(2), before which a signal of Python's can come too early
"""


def cursor() -> str:
    shown = subprocess.run(["journalctl", "-n0", "--show-cursor"], capture_output=True, text=True, check=True).stdout
    return shown.partition("cursor: ")[2].strip()


BEGUN: dict[str, str] = {}  # unit -> where in the journal its test began


def journal(unit: str) -> str:
    """What a unit wrote since its test began, and what systemd said of it."""
    subprocess.run(["journalctl", "--sync"], check=True)
    words = ["journalctl", "--no-pager", "-o", "cat", "-u", unit, f"--after-cursor={BEGUN[unit]}"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def says(unit: str, text: str, since: str | None = None) -> None:
    """Wait until the unit has written a line with `text`."""
    words = ["journalctl", "-f", "-n", "all", "-o", "cat", "-u", unit, f"--after-cursor={since or BEGUN[unit]}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as follows:
        try:
            while text.encode() not in (line := read_line(follows.stdout.fileno())):
                assert line, journal(unit)
        finally:
            follows.terminate()


def ended(unit: str) -> tuple[str, str, str]:
    """How a unit that does not restart ended, for which is waited."""
    assert wait_for(lambda: show(unit, "ActiveState") in ("failed", "inactive"))
    return show(unit, "ActiveState"), show(unit, "Result"), show(unit, "ExecMainStatus")


def cgroup(unit: str) -> Path:
    return Path("/sys/fs/cgroup" + show(unit, "ControlGroup"))


def processes(place: Path) -> set[int]:
    return {int(pid) for pid in (place / "cgroup.procs").read_text().split()}


@pytest.fixture(scope="module", autouse=True)
def pockets(installed):
    for name in ("detect", "limited"):
        Path(f"/srv/{name}").mkdir(parents=True)
        Path(f"/srv/{name}/app.py").write_text(APP)
    installed.configure("units", CONFIG)
    yield
    systemctl("stop", "pocket@*.socket", "pocket@*.service")
    systemctl("start", "pocketd.socket", "pocketd.service")
    installed.configure("units", "")
    for name in ("detect", "limited"):
        shutil.rmtree(f"/srv/{name}")


@pytest.fixture
def pocket():
    """A function that starts pocket@NAME with a drop-in, and returns the unit's name. What it started is stopped."""
    begun: list[tuple[str, Path]] = []

    def start(name: str, *lines: str, do: str = "", wait: str = "waiting", check: bool = True) -> str:
        unit = f"pocket@{name}.service"
        place = UNITS / f"{unit}.d"
        place.mkdir()
        begun.append((unit, place))
        BEGUN[unit] = cursor()
        (place / "test.conf").write_text("\n".join(["[Service]", f'Environment="DO={do}"', *lines]) + "\n")
        systemctl("daemon-reload")
        # Without a line to wait for: until it has ended again.
        systemctl("start", *([] if wait else ["--wait"]), unit, check=check)
        if wait:
            says(unit, wait)
        return unit

    yield start
    for unit, place in begun:
        systemctl("stop", unit)
        systemctl("reset-failed", unit, check=False)
        shutil.rmtree(place)


def test_enabled_it_runs_in_the_units_own_cgroup():
    unit = "pocket@detect.service"
    BEGUN[unit] = cursor()
    systemctl("enable", "--now", unit)
    try:
        says(unit, "waiting")
        assert "begun in 0::/\n" in journal(unit)
        main, inside = int(show(unit, "MainPID")), processes(cgroup(unit))
        (worker,) = inside - {main}
        assert Path(f"/proc/{worker}/oom_score_adj").read_text() == "0\n"  # pocketd's own is lower
        status = Path(f"/proc/{worker}/status").read_text()
        assert re.search(r"^NSpid:\t\d+\t\d+\t2$", status, re.MULTILINE)  # the host's, the service's, its own
        shown = systemctl("status", unit).stdout
        assert "active (running)" in shown and f"{worker} " in shown and "waiting" in shown
        assert Path("/etc/systemd/system/multi-user.target.wants", unit).exists()
    finally:
        systemctl("disable", "--now", unit)
    assert "ended in good order" in journal(unit)
    assert (show(unit, "ActiveState"), show(unit, "Result")) == ("inactive", "success")
    assert not Path(f"/proc/{worker}").exists()


def test_stop_is_the_apps_own_end(pocket):
    unit = pocket("detect")
    systemctl("stop", unit)
    assert "ended in good order" in journal(unit)
    assert (show(unit, "Result"), show(unit, "ExecMainStatus")) == ("success", "0")


def test_a_signal_to_the_unit_reaches_the_app(pocket):
    unit = pocket("detect")
    systemctl("kill", "--kill-whom=main", "--signal=USR1", unit)
    says(unit, "heard")


def test_an_exit_code_is_the_units(pocket):
    unit = pocket("detect", "Restart=no", do="exit3", wait="", check=False)
    assert ended(unit) == ("failed", "exit-code", "3")


def test_memory_max_of_the_unit_ends_it_as_oom_kill(pocket):
    unit = pocket("detect", "MemoryMax=100M", "Restart=no", do="eat", wait="", check=False)
    assert ended(unit)[:2] == ("failed", "oom-kill")
    assert cgroup_is_gone(unit)


@pytest.mark.slow
def test_the_limit_of_the_unit_is_named(pocket):
    """OOMPolicy=continue: systemd leaves it to the command to end, which then has its say in any case."""
    unit = pocket("detect", "MemoryMax=100M", "Restart=no", "OOMPolicy=continue", do="eat", wait="", check=False)
    assert ended(unit) == ("failed", "signal", str(int(signal.SIGKILL)))
    place = f"/system.slice/system-pocket.slice/{unit}"
    assert f"pocket detect was ended by the memory.max of 100.0M of {place} (peak 100.0M)" in journal(unit)


@pytest.mark.slow
def test_cpu_quota_of_the_unit_holds(pocket):
    unit = pocket("detect", "CPUQuota=20%", do="burn")
    (share,) = re.findall(r"^share ([0-9.]+)$", journal(unit), re.MULTILINE)
    assert 0.1 < float(share) < 0.3
    assert "nr_throttled 0\n" not in (cgroup(unit) / "cpu.stat").read_text()


def cgroup_is_gone(unit: str) -> bool:
    place = Path("/sys/fs/cgroup/system.slice/system-pocket.slice") / unit
    return wait_for(lambda: not place.exists())


# -- the pocket's own limits within the unit's


def test_limits_of_both_stand_one_within_the_other(pocket):
    unit = pocket("limited", "MemoryMax=200M")
    place = cgroup(unit)
    (leaf,) = [p for p in place.iterdir() if p.is_dir() and p.name != "caller"]
    assert processes(place) == set() and processes(place / "caller") == {int(show(unit, "MainPID"))}
    assert len(processes(leaf)) == 1
    assert (place / "memory.max").read_text() == f"{200 << 20}\n"
    assert (leaf / "memory.max").read_text() == f"{100 << 20}\n"
    assert (leaf / "pids.max").read_text() == "100\n"
    (session,) = call("inspect", name="limited")["sessions"]
    said = {level["cgroup"]: level["limits"].get("memory.max") for level in session["levels"]}
    own, units = (str(p).removeprefix("/sys/fs/cgroup") for p in (leaf, place))
    assert (said[own], said[units]) == (str(100 << 20), str(200 << 20))
    assert session["holds"]["memory.max"] == {"value": str(100 << 20), "cgroup": own}


@pytest.mark.slow
def test_it_restarts_with_limits_of_both(pocket):
    """systemd starts a unit in its own cgroup, which fails (219/CGROUP) where one below it has controllers still."""
    unit = pocket("limited", "MemoryMax=200M")
    for _ in range(2):
        here = cursor()
        systemctl("restart", unit)
        says(unit, "waiting", here)
    (place,) = [p for p in cgroup(unit).iterdir() if p.is_dir() and p.name != "caller"]
    systemctl("daemon-reload")
    here = cursor()
    os.kill(min(processes(place)), signal.SIGKILL)
    says(unit, "waiting", here)
    assert (show(unit, "ActiveState"), show(unit, "NRestarts")) == ("active", "1")
    assert not place.exists()
    here = cursor()
    os.kill(int(show(unit, "MainPID")), signal.SIGKILL)  # and when it is the command that dies
    says(unit, "waiting", here)
    assert (show(unit, "ActiveState"), show(unit, "NRestarts")) == ("active", "2")
    assert "219" not in journal(unit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unit_limit", "said"),
    [("80M", "the memory.max of 80.0M of /system.slice/"), ("200M", "its memory.max of 100.0M (peak 100.0M)")],
)
def test_the_smaller_of_both_holds_and_is_named(pocket, unit_limit, said):
    unit = pocket(
        "limited", f"MemoryMax={unit_limit}", "Restart=no", "OOMPolicy=continue", do="eat", wait="", check=False
    )
    assert ended(unit)[:2] == ("failed", "signal")
    assert f"pocket limited was ended by {said}" in journal(unit)
    assert cgroup_is_gone(unit)


@pytest.mark.slow
def test_without_delegation_the_unit_says_what_to_write(pocket):
    unit = pocket("limited", "Delegate=no", "Restart=no", wait="", check=False)
    assert ended(unit) == ("failed", "exit-code", "125")
    assert "write Delegate=yes" in journal(unit)


# -- what systemd gives


def test_ready_and_status_are_the_apps(pocket):
    unit = pocket("detect", "Type=notify", do="ready")
    assert show(unit, "ActiveState") == "active"
    assert show(unit, "StatusText") == "watching the door"


def test_ready_and_status_with_limits_of_both(pocket):
    unit = pocket("limited", "Type=notify", do="ready")
    assert show(unit, "StatusText") == "watching the door"


@pytest.mark.slow
def test_an_app_that_never_says_ready_does_not_start(pocket):
    unit = pocket("detect", "Type=notify", "TimeoutStartSec=20", "Restart=no", wait="", check=False)
    assert ended(unit)[:2] == ("failed", "timeout")
    assert "waiting" in journal(unit)


@pytest.mark.slow
def test_a_watchdog_that_is_not_fed_ends_the_app(pocket):
    unit = pocket("detect", "Type=notify", "WatchdogSec=8", "Restart=no", do="ready watched")
    assert "watchdog True" in journal(unit)
    # It came to wait, so it was fed for one interval and a half, and then not any more.
    assert ended(unit)[:2] == ("failed", "watchdog")
    assert cgroup_is_gone(unit)


def test_a_credential_is_read_where_it_is_said_to_be(pocket, tmp_path):
    (tmp_path / "token").write_text("a secret")
    unit = pocket("detect", f"LoadCredential=token:{tmp_path}/token", do="credential")
    assert "token a secret\n" in journal(unit)


def test_a_socket_starts_the_pocket_and_is_served_without_a_network(pocket):
    drop_in = UNITS / "pocket@detect.service.d"
    drop_in.mkdir()
    (drop_in / "test.conf").write_text("[Service]\nEnvironment=DO=serve\n")
    systemctl("daemon-reload")
    systemctl("start", "pocket@detect.socket")
    try:
        assert show("pocket@detect.service", "ActiveState") == "inactive"
        for _ in range(2):  # the first one starts it
            with socket.socket(socket.AF_UNIX) as s:
                s.settimeout(TIMEOUT)
                s.connect("/run/pocket/detect.sock")
                assert s.makefile().read() == "served True ['lo']\n"
        assert show("pocket@detect.service", "ActiveState") == "active"
    finally:
        systemctl("stop", "pocket@detect.socket", "pocket@detect.service")
        shutil.rmtree(drop_in)


# -- pocketd beside it


def test_it_goes_on_without_pocketd_and_starts_when_pocketd_does(pocket):
    unit = pocket("detect")
    main = show(unit, "MainPID")
    systemctl("restart", "pocketd.service")
    systemctl("stop", "pocketd.socket", "pocketd.service")
    assert (show(unit, "ActiveState"), show(unit, "MainPID")) == ("active", main)
    systemctl("stop", unit)
    assert "ended in good order" in journal(unit)
    here = cursor()
    systemctl("start", unit)  # Wants=pocketd.service
    says(unit, "waiting", here)
    assert show("pocketd.service", "ActiveState") == "active"


@pytest.mark.slow
def test_it_starts_while_pocketd_restarts(pocket):
    unit = pocket("detect", "Restart=no")
    systemctl("stop", unit)
    here = cursor()
    systemctl("start", "--no-block", unit)
    systemctl("restart", "pocketd.service")
    says(unit, "waiting", here)
