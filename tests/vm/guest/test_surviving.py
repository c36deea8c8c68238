"""Twenty sessions at work, in both modes, while pocketd is killed, restarted, stopped, hung, crashing, and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pocketd.client import login
from tests.conftest import TIMEOUT, wait_for
from tests.vm.guest.installed import (
    BIN,
    CONFIGURATION,
    NEXT,
    SLICE,
    Program,
    call,
    configure,
    install,
    journal,
    pocket,
    ps,
    run,
    settled,
    show,
    systemctl,
)

pytestmark = pytest.mark.usefixtures("pockets")
EACH = 10
PLACE = Path("/var/lib/vm-scratch/work")  # ext4, where files can be shown as the pocket's own
UNIT = "pocketd.service"
# Each start of a program leaves a line; a signal is answered; each line of input too, with a number that goes on.
# A thread waits for the signal: a handler of Python's runs late when its signal comes just before read(2) is called.
LOOP = """
import os, signal, sys, threading
with open("out/started", "a") as f: f.write(sys.argv[1] + "\\n")
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def hear():
    while signal.sigwait([signal.SIGUSR1]): os.write(1, b"heard\\n")
threading.Thread(target=hear, daemon=True).start()
print("ready", flush=True)
for number, line in enumerate(sys.stdin, 1):
    print(number, line, end="", flush=True)
sys.exit(int(sys.argv[1]) + 40)
"""
APP = "number = 0\n\ndef next():\n    global number\n    number += 1\n    return number\n"


@pytest.fixture(scope="module")
def pockets(installed):
    (PLACE / "out").mkdir(parents=True)
    (PLACE / "app.py").write_text(APP)
    configure("surviving", f'[pocket.work]\nservice = "plain"\ndir = "{PLACE}"\nallow = {{ write = ["out"] }}\n')
    drop_in = Path(f"/etc/systemd/system/{UNIT}.d")
    drop_in.mkdir()
    (drop_in / "test.conf").write_text("[Service]\nWatchdogSec=20\n")
    systemctl("daemon-reload")
    systemctl("restart", UNIT)
    call("on", name="plain")


class Work:
    """The sessions; those of clients make requests all the time, each of which must have its answer, in order."""

    def __init__(self) -> None:
        (PLACE / "out/started").unlink(missing_ok=True)
        self.stopping = threading.Event()
        self.failures: list[BaseException] = []
        self.counts = [0] * EACH
        self.programs = [Program("work", LOOP, str(n)) for n in range(EACH)]
        for program in self.programs:
            line = program.line()
            assert line == "ready", line
        self.clients = [login("work", timeout=TIMEOUT) for _ in range(EACH)]
        self.threads = [threading.Thread(target=self._client, args=(n,)) for n in range(EACH)]
        self.lines = 0
        for thread in self.threads:
            thread.start()

    def _client(self, n: int) -> None:
        try:
            while not self.stopping.is_set():
                self.counts[n] += 1
                assert self.clients[n].call("app:next") == self.counts[n]
                time.sleep(0.3)  # twenty sessions and what is tested share two emulated cpus
        except BaseException as e:
            self.failures.append(e)

    def go_on(self) -> None:
        """Everybody works: each client has an answer that it asked for from now on, each program input and signals."""
        before = list(self.counts)
        self.lines += 1
        for program in self.programs:
            assert program.say("line") == f"{self.lines} line"
            program.signal(signal.SIGUSR1)
            assert program.line() == "heard"
        assert wait_for(lambda: self.failures or all(c > b + 1 for c, b in zip(self.counts, before, strict=True)))
        assert not self.failures

    def end(self) -> None:
        """Each program's exit code arrives, and none was run twice."""
        self.stopping.set()
        for thread in self.threads:
            thread.join(TIMEOUT)
        for client in self.clients:
            client.close()
        for n, program in enumerate(self.programs):
            os.close(program.write)
            assert os.waitstatus_to_exitcode(program.end()["status"]) == n + 40
            program.write = os.open("/dev/null", os.O_WRONLY)
            program.close()
        assert not self.failures
        assert sorted((PLACE / "out/started").read_text().split()) == [str(n) for n in range(EACH)]
        assert settled("work")


@pytest.fixture
def work():
    work = Work()
    yield work
    work.end()


def seen() -> list[tuple[Any, ...]]:
    keys = ("session", "pid", "pocket", "mode", "service", "generation", "directory")
    return sorted(tuple(w[key] for key in keys) for w in ps()["workers"])


def log_in_anew() -> None:
    """A new login works; how long after READY=1 is printed."""
    begun = time.monotonic()
    with login("work", timeout=TIMEOUT) as session:
        assert session.call("app:next") == 1
    print(f"a new login: {time.monotonic() - begun:.2f} s")


def main_pid() -> int:
    return int(show(UNIT, "MainPID"))


def until_active(before: int) -> None:
    """systemd has another pocketd, which has said READY=1."""
    assert wait_for(lambda: main_pid() not in (0, before) and show(UNIT, "ActiveState") == "active")


def survives(work: Work, happens: Any) -> None:
    before = seen()
    assert len(before) == 2 * EACH
    work.go_on()
    happens()
    log_in_anew()
    work.go_on()
    assert wait_for(lambda: seen() == before), (seen(), before)


@pytest.mark.oldest
def test_killed(work):
    def happens() -> None:
        pid = main_pid()
        os.kill(pid, signal.SIGKILL)
        work.go_on()
        until_active(pid)

    survives(work, happens)


def test_restarted_twice_and_reloaded(work):
    def happens() -> None:
        for words in (("restart", UNIT), ("daemon-reload",), ("reload", UNIT), ("restart", UNIT)):
            systemctl(*words)

    survives(work, happens)


def test_stopped_and_started(work):
    def happens() -> None:
        systemctl("stop", "pocketd.socket", UNIT)
        work.go_on()
        assert show(UNIT, "ActiveState") == "inactive"
        systemctl("start", "pocketd.socket", UNIT)

    survives(work, happens)


def test_a_login_while_pocketd_is_down_waits_in_the_sockets_queue_and_starts_it(work):
    systemctl("stop", UNIT)
    log_in_anew()
    assert show(UNIT, "ActiveState") == "active"
    work.go_on()


def test_a_watchdog_that_runs_out(work):
    def happens() -> None:
        pid = main_pid()
        os.kill(pid, signal.SIGSTOP)
        until_active(pid)
        assert "watchdog" in journal(UNIT).lower()

    survives(work, happens)


@pytest.mark.slow
def test_a_crash_loop(work):
    """It fails at start again and again, until systemd gives up; then the operator mends it."""

    def happens() -> None:
        good = Path("/usr/local/bin/pocketd")
        kept = good.with_name("pocketd.kept")
        good.rename(kept)
        good.write_text("#!/bin/sh\nexit 1\n")
        good.chmod(0o755)
        systemctl("restart", UNIT, check=False)
        assert wait_for(lambda: "Start request repeated too quickly" in journal(UNIT))
        work.go_on()
        kept.replace(good)
        systemctl("reset-failed", UNIT, "pocketd.socket")
        systemctl("start", "pocketd.socket", UNIT)

    survives(work, happens)


@pytest.mark.oldest
def test_a_stopped_scope_ends_its_sessions_in_order():
    """As at power-off: SIGTERM for each worker, and no more than stop_timeout for one that ignores it."""
    code = "import signal, sys; signal.signal(signal.SIGTERM, {0}); print('ready', flush=True); sys.stdin.read()"
    polite = code.format("lambda *a: (print('bye', flush=True), sys.exit(7))")
    programs = [Program("work", polite) for _ in range(EACH)] + [Program("work", code.format("signal.SIG_IGN"))]
    assert [p.line() for p in programs] == ["ready"] * (EACH + 1)
    begun = time.monotonic()
    (scope,) = SLICE.glob("pocketd-plain*.scope")
    systemctl("stop", scope.name)
    print(f"stopped within {time.monotonic() - begun:.1f} s, of which a worker was left 5")
    ends = [program.end() for program in programs]
    assert [p.line() for p in programs[:EACH]] == ["bye"] * EACH
    assert [os.waitstatus_to_exitcode(e["status"]) for e in ends] == [7] * EACH + [-signal.SIGKILL]
    assert not scope.exists()
    for program in programs:
        program.close()
    log_in_anew()


@pytest.mark.oldest
def test_off_all_ends_everything_in_order_and_leaves_nothing(work):
    """Every caller hears why. (What `work` does at its end is done here.)"""
    work.stopping.set()
    for thread in work.threads:
        thread.join(TIMEOUT)
    pocket("off", "--all")
    ends = [program.end() for program in work.programs]
    assert {e["error"]["code"] for e in ends} == {"service-off"}
    assert [os.waitstatus_to_exitcode(e["status"]) for e in ends] == [-signal.SIGTERM] * EACH
    assert not list(SLICE.glob("*.scope"))
    assert list(Path("/run/pocketd/services").iterdir()) == []
    work.end = lambda: [s.close() for s in (*work.programs, *work.clients)]


@pytest.mark.slow
def test_an_upgrade_with_another_wire_version(work):
    """Sessions, templates and inits of the version before go on, and new logins go to what is on."""
    assert run(BIN / "pocket", "--version").stdout == "pocket 0.1.0\n"
    before = main_pid()

    def happens() -> None:
        install(NEXT)
        until_active(before)

    try:
        survives(work, happens)
        assert run(BIN / "pocket", "--version").stdout == "pocket 0.2.0\n"
        assert "version=0.2.0" in journal(UNIT)
        done = run(BIN / "pocket", "run", "-p", "work", check=False)  # the new command, and pocketd's refusal in words
        assert "a pocket without a program" in done.stderr
        pocket("reload", "plain")  # new logins go to a generation made by the new version; the old sessions go on
        log_in_anew()
        work.go_on()
        assert {w["generation"] for w in ps()["workers"]} == {1}
    finally:
        work.end()
        work.end = lambda: None
        pocket("off", "--all")


@pytest.mark.slow
def test_uninstall_leaves_configuration_and_state_alone_and_nothing_else():
    """The last of this file: what it and the test before it changed is put back."""
    from tests.vm.guest.installed import deploy

    call("on", name="programs")
    deploy("uninstall", NEXT)
    try:
        assert not list(Path("/usr/local/bin").glob("pocket*"))
        assert not list(Path("/usr/local/lib/systemd/system").glob("pocket*"))
        assert subprocess.run(["systemctl", "cat", UNIT], capture_output=True).returncode != 0
        assert not list(SLICE.glob("*.scope"))
        assert CONFIGURATION.exists()
        assert Path("/var/lib/pocketd/ids.json").exists()
    finally:
        install()
        systemctl("enable", "--now", "pocketd.socket", UNIT)
    call("on", name="programs")
