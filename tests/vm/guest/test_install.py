"""The units as they are installed, the order of a start, and what a stale or forged state is worth."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

import pytest

from pocketd.client import errors, login
from tests.conftest import TIMEOUT, wait_for
from tests.vm.guest.installed import (
    DROP_INS,
    RUNTIME,
    SLICE,
    Program,
    call,
    configure,
    journal,
    ps,
    run,
    systemctl,
)

pytestmark = pytest.mark.usefixtures("installed")
UNITS = Path("/usr/local/lib/systemd/system")
UNIT = "pocketd.service"


@pytest.fixture
def place() -> Path:
    directory = Path("/srv/units")
    directory.mkdir(exist_ok=True)
    return directory


def services() -> dict[str, str]:
    return {service["name"]: service["state"] for service in ps()["services"]}


@pytest.mark.oldest
def test_units_verify_clean():
    units = [str(UNITS / name) for name in ("pocketd.service", "pocketd.socket", "pocketd.slice")]
    instances = ["pocket@detect.service", "pocket@detect.socket"]
    done = run("systemd-analyze", "verify", *units, *instances)
    assert [line for line in done.stderr.splitlines() if "pocket" in line] == []


def test_exposure_is_what_the_documentation_says():
    """systemd-analyze security: 0 is best. Most of the rest needs a mount namespace, which pocketd must not have."""
    last = run("systemd-analyze", "security", "--no-pager", UNIT).stdout.splitlines()[-1]
    (figure,) = re.findall(r"([0-9.]+) [A-Z]+", last)
    print(f"exposure {figure}")
    text = (Path(__file__).parents[3] / "docs/design.md").read_text()
    assert f"exposure of {figure}" in text


def test_no_unit_gives_pocketd_a_mount_namespace():
    (pid,) = (int(line.split("=")[1]) for line in systemctl("show", "-p", "MainPID", UNIT).stdout.split())
    assert os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/1/ns/mnt")


def test_members_of_the_group_may_reach_the_socket():
    status = os.stat(RUNTIME / "pocketd.sock")
    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == int(run("getent", "group", "pocket").stdout.split(":")[2])


def test_boot_services_start_one_after_the_other_once_logins_work(place):
    configure(
        "boot", '[service.first]\nruntime = "exec"\nstart = "boot"\n[service.second]\nruntime = "exec"\nstart = "boot"'
    )
    run("journalctl", "--rotate")
    run("journalctl", "--vacuum-time=1s")
    systemctl("restart", UNIT)
    assert wait_for(lambda: services()["first"] == services()["second"] == "on")
    said = journal(UNIT)
    order = [
        said.index(text) for text in ("started version", "service-on service=first", "service-starting service=second")
    ]
    assert order == sorted(order)
    call("off", name="first")
    call("off", name="second")
    (DROP_INS / "50-boot.conf").unlink()
    call("reload", name=None)


def test_a_manual_service_waits_for_the_operator(place):
    configure("manual", '[service.byhand]\nruntime = "exec"\nstart = "manual"')
    with pytest.raises(errors.PocketError, match="switch it on by: pocket byhand on"):
        login("byhand", directory=str(place), timeout=TIMEOUT)
    (DROP_INS / "50-manual.conf").unlink()
    call("reload", name=None)


def test_a_start_after_a_crash_of_the_host_is_clean(place):
    """What a runtime directory that outlived its processes names is gone; so it is after a reboot."""
    with Program("programs", "", directory=str(place)) as program:
        program.end()
    systemctl("stop", "pocketd.socket", UNIT)
    for scope in SLICE.glob("*.scope"):
        (scope / "cgroup.kill").write_text("1")
    assert wait_for(lambda: not list(SLICE.glob("*.scope")))
    assert (RUNTIME / "services/programs/init.sock").exists()
    systemctl("start", "pocketd.socket", UNIT)
    assert set(services().values()) == {"off"}
    assert ps()["workers"] == []
    assert list((RUNTIME / "services").iterdir()) == []


def test_a_forged_init_is_not_believed(place):
    """A process of root's that listens where an init would: its cgroup is not an init's, so it is not even greeted."""
    forged, scope = RUNTIME / "services/programs", SLICE / "pocketd-programs.scope"
    systemctl("stop", "pocketd.socket", UNIT)
    forged.mkdir(parents=True)
    (scope / "service/init").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(forged / "init.sock"))
        listener.listen()
        listener.settimeout(TIMEOUT)
        systemctl("start", "--no-block", "pocketd.socket", UNIT)
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(100) == b""
    assert services()["programs"] == "off"
    assert f"what listens as its init is in {own_cgroup()}" in journal(UNIT)
    assert ps()["workers"] == []
    assert not forged.exists() and not scope.exists()


def own_cgroup() -> str:
    return Path("/proc/self/cgroup").read_text().strip().removeprefix("0::")
