"""A worker in its caller's own cgroup, which somebody else made, as `pocket run --adopt` in a systemd unit has it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from cgroup.hierarchy import Hierarchy
from cgroup.node import Cgroup
from nsutil.processes import Peer
from pocketd import adopt
from pocketd.client.control import Control
from pocketd.client.handshake import open_login
from pocketd.wire import Error
from tests.conftest import TIMEOUT, service_environment, toml_table, wait_for
from tests.launch.both import read_line

PROGRAM = """
import os, sys
print(open("/proc/self/cgroup").read().splitlines()[-1], flush=True)
child = os.fork()
if not child:
    os.execvp("sleep", ["sleep", "1000"])
print("ready", flush=True)
sys.stdin.read()
sys.exit(42)
"""


def configuration(place: Path, more: str = "") -> str:
    return f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.app]
        service = "plain"
        dir = "{place}"
        program = "app.py"
        {more}
    """


@pytest.fixture
def app(tmp_path):
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text(PROGRAM)
    return place


@pytest.fixture
def cgroups():
    """The hierarchy, and a cgroup at its top as a unit's."""
    with Hierarchy.find() as hierarchy:
        hierarchy.root.enable({"hugetlb"})
        unit = hierarchy.root.create(f"pocketd-test-unit-{os.getpid()}")
        yield hierarchy, unit
        unit.wait_empty(TIMEOUT)
        unit.remove()


def delegate(unit):
    """As systemd marks a unit with Delegate=yes."""
    os.setxattr(unit.directory, "trusted.delegate", b"1")


@pytest.fixture
def adopted(begun):
    """A function that runs `pocket run --adopt -p app` in a cgroup."""

    def start(daemon, unit, *words, first=b"0::/\n"):
        script = f'echo $$ > {unit.directory}/cgroup.procs && exec "$@"'
        command = ["sh", "-c", script, "sh", *daemon.command("run", "--adopt", *(words or ("-p", "app")))]
        return begun(command, first, env=daemon.environment, stdin=subprocess.PIPE)

    return start


def worker(daemon):
    assert wait_for(lambda: [w for w in daemon.workers() if w["pid"]])
    (found,) = daemon.workers()
    return found


def cgroup_of(pid):
    return Path(f"/proc/{pid}/cgroup").read_text().splitlines()[-1].partition("::")[2]


def end(process):
    process.communicate(timeout=TIMEOUT)
    return process.returncode


def test_the_worker_is_in_its_callers_cgroup(own_pocketd, app, cgroups, adopted):
    _, unit = cgroups
    daemon = own_pocketd(configuration(app))
    process = adopted(daemon, unit)
    assert read_line(process.stdout.fileno()) == b"ready\n"
    found = worker(daemon)
    assert cgroup_of(found["pid"]) == unit.kernel_path
    assert {process.pid, found["pid"]} < set(unit.procs)
    assert len(unit.procs) == 3  # and the program's child
    assert daemon.leaves() == []  # none was made
    assert end(process) == 42
    unit.wait_empty(TIMEOUT)
    assert Path(unit.directory).exists()
    assert wait_for(lambda: daemon.workers() == [])


def test_an_adopted_session_ends_by_its_pause_and_nobody_else_in_the_cgroup_does(own_pocketd, app, cgroups, adopted):
    _, unit = cgroups
    daemon = own_pocketd(configuration(app))
    process, beside = adopted(daemon, unit), adopted(daemon, unit)
    for p in (process, beside):
        assert read_line(p.stdout.fileno()) == b"ready\n"
    process.kill()
    assert wait_for(lambda: len(daemon.workers()) == 1)
    assert wait_for(lambda: len(unit.procs) == 3)
    assert end(beside) == 42
    process.communicate()


def test_a_new_pocketd_knows_an_adopted_session_and_can_stop_it(own_pocketd, app, cgroups, adopted):
    _, unit = cgroups
    daemon = own_pocketd(configuration(app))
    process = adopted(daemon, unit)
    before = worker(daemon)
    daemon.end(signal.SIGKILL)
    daemon.start()
    after = worker(daemon)
    assert (after["session"], after["pid"]) == (before["session"], before["pid"])
    assert cgroup_of(after["pid"]) == unit.kernel_path
    daemon.pocket("stop", "app")
    assert end(process) == -signal.SIGTERM
    unit.wait_empty(TIMEOUT)
    assert Path(unit.directory).exists()


def test_a_switched_off_service_leaves_the_adopted_cgroup_alone(own_pocketd, app, cgroups, adopted):
    _, unit = cgroups
    daemon = own_pocketd(configuration(app))
    process = adopted(daemon, unit)
    assert read_line(process.stdout.fileno()) == b"ready\n"
    script = f"echo $$ > {unit.directory}/cgroup.procs && exec cat"
    stranger = subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE)
    try:
        assert wait_for(lambda: stranger.pid in unit.procs)
        daemon.pocket("off", "plain")
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGTERM
        assert stranger.poll() is None and unit.procs == (stranger.pid,)
    finally:
        stranger.communicate(timeout=TIMEOUT)


# -- limits of the pocket's own within the unit's


LIMIT = 'limits = { "hugetlb.2MB.max" = "4M" }'


@pytest.fixture
def limited(cgroups):
    hierarchy, unit = cgroups
    if "hugetlb" not in hierarchy.controllers:
        pytest.skip("this host's cgroup2 has no hugetlb controller")
    return unit


def test_limits_of_the_definition_stand_within_the_units_own(own_pocketd, app, limited, adopted):
    unit = limited
    delegate(unit)
    daemon = own_pocketd(configuration(app, LIMIT))
    process = adopted(daemon, unit)
    found = worker(daemon)
    leaf = f"{unit.kernel_path}/{found['session']}"
    assert cgroup_of(found["pid"]) == leaf
    assert cgroup_of(process.pid) == f"{unit.kernel_path}/caller"
    limit = Path(unit.directory) / found["session"] / "hugetlb.2MB.max"
    assert limit.read_text() == f"{4 << 20}\n"
    with Cgroup("caller", unit) as moved:  # where the unit's processes, and so their children, are by now
        again = adopted(daemon, moved)
    assert end(process) == 42
    assert wait_for(lambda: not limit.parent.exists())
    assert end(again) == 42
    assert wait_for(lambda: unit.names() == ["caller"])  # what was made for sessions is gone, and nothing else
    assert unit.procs == ()


def test_a_unit_that_is_not_delegated_is_said_to_need_it(own_pocketd, app, limited, adopted):
    daemon = own_pocketd(configuration(app, LIMIT))
    process = adopted(daemon, limited, first=b"")
    out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 125
    assert b"Delegate=yes" in err and limited.kernel_path.encode() in err
    assert limited.names() == []


def test_a_users_own_unit_cannot_hold_the_pockets_limits(own_pocketd, app, limited, adopted):
    """Who owns a cgroup may move processes out of those beneath it."""
    delegate(limited)
    os.chown(limited.directory, 54321, 54321)
    daemon = own_pocketd(configuration(app, LIMIT))
    process = adopted(daemon, limited, first=b"")
    assert b"belongs to a user who could lift them" in process.communicate(timeout=TIMEOUT)[1]
    assert limited.names() == []


def test_a_session_of_a_unit_goes_on_when_pocketd_is_killed_and_its_cgroup_goes_with_it(
    own_pocketd, app, limited, adopted
):
    delegate(limited)
    daemon = own_pocketd(configuration(app, LIMIT))
    process = adopted(daemon, limited)
    session = worker(daemon)["session"]
    daemon.end(signal.SIGKILL)
    daemon.start()
    assert worker(daemon)["session"] == session
    assert end(process) == 42
    assert wait_for(lambda: limited.names() == ["caller"])


# -- who asks


def test_nothing_can_be_adopted_at_the_top_of_the_hierarchy(pocketd, tmp_path):
    if cgroup_of(os.getpid()) != "/":
        pytest.skip("these tests do not run in the root cgroup")
    done = pocketd.pocket("run", "--adopt", "--service", "plain", "-c", "", cwd=tmp_path, check=False)
    assert done.returncode == 125 and "no cgroup to adopt" in done.stderr


def test_a_cgroup_is_the_kernels_word_and_not_the_callers(pocketd, tmp_path, cgroups):
    """Whatever a request says beside `adopt` changes nothing."""
    _, unit = cgroups
    with Control(str(pocketd.runtime_dir)) as control, pytest.raises(Exception, match="no cgroup to adopt"):
        fields = {"adopt": True, "cgroup": unit.kernel_path, "note": {"leaf": unit.kernel_path}}
        open_login(control, mode="program", name="plain", directory=str(tmp_path), start={}, **fields)
    assert unit.procs == ()


def test_a_pid_that_is_anothers_by_now_names_no_cgroup(cgroups):
    hierarchy, unit = cgroups
    script = f"echo $$ > {unit.directory}/cgroup.procs && exec cat"
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait(TIMEOUT)
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.PIPE) as another:
        try:
            assert wait_for(lambda: unit.procs == (another.pid,))
            with pytest.raises(Error, match="has ended"):
                adopt.of_peer(hierarchy, Peer(another.pid, 0, 0, pidfd))
        finally:
            os.close(pidfd)
            another.communicate(timeout=TIMEOUT)


def test_a_command_that_adopts_waits_for_pocketd(own_pocketd, app, cgroups, adopted):
    """pocketd starts, or starts again, while the unit does."""
    _, unit = cgroups
    daemon = own_pocketd(configuration(app))
    daemon.end(signal.SIGKILL)
    script = f'echo $$ > {unit.directory}/cgroup.procs && exec "$@"'
    command = ["sh", "-c", script, "sh", *daemon.command("run", "--adopt", "-p", "app")]
    with subprocess.Popen(
        command, env=daemon.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert wait_for(lambda: unit.procs == (process.pid,))
        daemon.start()
        assert read_line(process.stdout.fileno()) == b"0::/\n"
        assert end(process) == 42
