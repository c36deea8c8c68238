"""Faults on purpose: full disks, no descriptors, clones that fail, cgroups that others use, and random kills."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pocketd.client import errors, login
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for
from tests.launch.both import read_line
from tests.launch.test_survival import difference, state

LAUNCHES = 500
APP = "import os\n\ndef pid(): return os.getpid()\n"


def configuration(place: Path) -> str:
    return f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}
        [service.other]
        runtime = "python"
        env = {toml_table(service_environment())}
        [pocket.app]
        service = "plain"
        dir = "{place}"
        [pocket.second]
        service = "plain"
        dir = "{place}"
    """


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/app.py").write_text(APP)
    return tmp_path / "app"


@pytest.fixture
def daemon(own_pocketd, place):
    return own_pocketd(configuration(place))


@pytest.fixture
def small(tmp_path: Path, place: Path) -> Iterator[Pocketd]:
    """A pocketd whose runtime and state directories are on a file system of 12 MB."""
    disk = tmp_path / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "small", disk], check=True)
    try:
        daemon = Pocketd(disk, configuration(place))
        daemon.start()
        yield daemon
        (disk / "filler").unlink(missing_ok=True)
        daemon.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass


def enter(daemon: Pocketd, name: str = "app"):
    return login(name, runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT)


def test_a_full_disk_refuses_what_is_new_and_leaves_what_runs(small):
    with enter(small) as session:
        pid = session.call("app:pid")
        fill(small.place)
        with enter(small) as other:  # this pocket has its id already
            assert other.call("app:pid") > 1
        with pytest.raises(errors.PocketError, match="ids.json cannot be written: No space left on device"):
            enter(small, "second")
        done = small.pocket("on", "other", check=False)
        assert done.returncode == 125
        assert re.search("code cannot be copied to .*: .*No space left on device.*; make room there", done.stderr)
        assert session.call("app:pid") == pid
        (small.place / "filler").unlink()
        with enter(small, "second") as again:
            assert again.call("app:pid") > 1
        small.pocket("on", "other")


def test_no_descriptors_left(daemon):
    """Callers wait or are told; with descriptors again all is as before."""
    with enter(daemon) as session:
        pid = session.call("app:pid")
        before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (before + 3, limits[1]))
        try:
            with pytest.raises(errors.PocketError, match="RLIMIT_NOFILE|Too many open files"):
                enter(daemon)
            assert session.call("app:pid") == pid
            cpu = cpu_seconds(daemon.process.pid)
            with pytest.raises(errors.PocketError):
                enter(daemon)
            assert cpu_seconds(daemon.process.pid) - cpu < 1  # it does not spin
        finally:
            resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
        with enter(daemon) as other:
            assert other.call("app:pid") > 1


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def test_accept_without_descriptors_does_not_spin_and_goes_on(daemon):
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(daemon.pocket("ps", check=False).returncode))
    thread.start()
    assert wait_for(lambda: "accept-failed" in daemon.log.read_text())
    resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)
    thread.join(TIMEOUT)
    assert results == [0]
    assert daemon.log.read_text().count("accept-failed") < 100


def test_a_clone_that_fails_is_an_error_and_the_next_works(daemon):
    """A clone into a pid namespace whose first process has died is ENOMEM (pid_namespaces(7))."""
    with enter(daemon) as session:
        pid = session.call("app:pid")
        (template,) = [t for t in daemon.ps()["templates"] if t["service"] == "plain"]
        init = next(s["pid"] for s in daemon.ps()["services"] if s["name"] == "plain")
        os.kill(template["pid"], signal.SIGSTOP)
        known = children(init)
        failures: list[BaseException] = []

        def log_in() -> None:
            try:
                enter(daemon)
            except BaseException as e:
                failures.append(e)

        thread = threading.Thread(target=log_in)
        thread.start()
        assert wait_for(lambda: any("starting" == w["state"] for w in daemon.workers()))
        # The session's pause is the spare that init had, or a new one: all that hold no worker are ended.
        for pause in [p for p in known | children(init) if is_pause(p) and not has_worker(p, daemon)]:
            os.kill(pause, signal.SIGKILL)
        os.kill(template["pid"], signal.SIGCONT)
        thread.join(TIMEOUT)
        assert isinstance(failures[0], errors.PocketError), failures
        assert session.call("app:pid") == pid
        with enter(daemon) as other:
            assert other.call("app:pid") > 1
    assert daemon.settled()


def children(pid: int) -> set[int]:
    return {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def is_pause(pid: int) -> bool:
    """The first process of a pid namespace beneath the service's own."""
    return Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].splitlines()[0].split()[-1] == "1"


def has_worker(pause: int, daemon: Pocketd) -> bool:
    namespace = os.stat(f"/proc/{pause}/ns/pid").st_ino
    return any(w["pid"] and os.stat(f"/proc/{w['pid']}/ns/pid").st_ino == namespace for w in daemon.workers())


def test_a_leaf_that_somebody_else_uses_is_emptied_and_removed(daemon):
    """rmdir says EBUSY while a stranger stands in it: pocketd waits, then ends what is in its own cgroup."""
    stranger = subprocess.Popen(["sleep", "1000"])
    with enter(daemon) as session:
        session.call("app:pid")
        (leaf,) = daemon.cgroup_path.glob("*.scope/service/pockets/app/*/")
        (leaf / "sub").mkdir()
        (leaf / "sub/cgroup.procs").write_text(str(stranger.pid))
    assert stranger.wait(TIMEOUT) == -signal.SIGKILL
    assert daemon.settled()


def test_random_kills_at_random_steps_leave_nothing(daemon, place, own_pocketd):
    """500 launches, while clients, workers, pauses, templates and pocketd itself are killed at moments of chance."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with enter(daemon) as session:
        session.call("app:pid")
    assert daemon.settled()
    before = numberless(daemon)
    stop = threading.Event()
    done = [0, 0]  # launches that came to their end as they should, and others
    unexpected: list[str] = []

    def launch(n: int, dice: random.Random) -> None:
        process = daemon.popen(
            "run", "--dir", str(place), "--service", "plain", "-c", "print('ready', flush=True); input()",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if dice.random() < 0.3:
            threading.Event().wait(dice.random() * 0.3)
            process.kill()
            process.communicate()
            return
        read_line(process.stdout.fileno())
        out, err = process.communicate(b"\n", timeout=TIMEOUT)
        done[process.returncode != 0] += 1
        if process.returncode not in (0, 125, -signal.SIGKILL):
            unexpected.append(f"{process.returncode}: {err!r}")

    def launcher(n: int) -> None:
        dice = random.Random(seed + n)
        for _ in range(LAUNCHES // 4):
            launch(n, dice)

    def kill() -> None:
        """One process of chance, from what pocketd says there is."""
        try:
            reply = json.loads(daemon.pocket("ps", "--json", check=False).stdout)
        except ValueError:
            return
        what = chance.choice(["worker", "worker", "pause", "template", "pocketd"])
        if what == "pocketd":
            daemon.end(signal.SIGKILL)
            daemon.start()
            return
        victims = [w["pid"] for w in reply["workers"]] if what != "template" else [t["pid"] for t in reply["templates"]]
        if what == "pause":
            victims = [p for s in reply["services"] if s["pid"] for p in children(s["pid"]) if is_pause(p)]
        if victims and (victim := chance.choice(victims)):
            os.kill(victim, signal.SIGKILL)

    def killer() -> None:
        while not stop.is_set():
            threading.Event().wait(chance.random() * 0.4)
            try:
                kill()
            except (ProcessLookupError, FileNotFoundError):
                pass  # it ended just now

    threads = [threading.Thread(target=launcher, args=(n,)) for n in range(4)]
    killing = threading.Thread(target=killer)
    for thread in (*threads, killing):
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    killing.join()
    assert not unexpected
    assert done[0] > 0
    print(f"{done[0]} ended well, {done[1]} were hit")
    daemon.end(signal.SIGKILL)
    daemon.start()
    with enter(daemon) as session:  # whatever was hit, it works
        session.call("app:pid")
    assert daemon.settled()
    assert wait_for(lambda: difference(numberless(daemon), before) == {}, 60), difference(numberless(daemon), before)


def numberless(daemon: Pocketd) -> dict:
    """The state, for a template is made again under another number."""
    found = state(daemon)
    return {**found, "cgroups": sorted(re.sub(r"templates/\d+$", "templates/N", path) for path in found["cgroups"])}
