"""Files of the host, of other pockets, of the service and of the kernel stay what and where they are."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import open_login
from tests.conftest import TIMEOUT
from tests.escape.attempt import THREADS, Attempt, each, outcome


@pytest.fixture(scope="module")
def marker(place):
    """A file of the host that everybody may read, and no pocket is shown."""
    path = place / "marker"
    path.write_text("of the host")
    path.chmod(0o644)
    return str(path)


WAYS = {
    "..": ("climb", {"directory": "."}),
    "the root's ..": ("climb", {"directory": "/"}),
    "/proc/self/root": ("climb_by_magic_link", {"link": "root"}),
    "/proc/self/cwd": ("climb_by_magic_link", {"link": "cwd"}),
    "/proc/self/task's cwd": ("climb_by_magic_link", {"link": "../thread-self/cwd"}),
    "/proc/thread-self/fd": ("climb_from_own_descriptor", {}),
}


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("way", WAYS)
def test_no_way_up_leads_to_the_hosts_files(prisoner, controls, marker, way, thread):
    name, given = WAYS[way]
    given = {**given, "marker": marker}
    assert controls("user").attempt(f"files.{name}", **given) == {"value": True}
    assert outcome(prisoner.attempt(f"files.{name}", thread, **given)) == "ENOENT"


# linux/openat2.h: none, NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS
@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("resolve", [0, 0x01, 0x02, 0x04])
def test_openat2_is_not_there(prisoner, controls, marker, resolve, thread):
    given = {"marker": marker, "resolve": resolve}
    assert controls("user").attempt("files.openat2", **given) == {"value": True}
    assert outcome(prisoner.attempt("files.openat2", thread, **given)) == "ENOSYS"


@pytest.mark.parametrize("thread", THREADS)
def test_a_neighbours_file_has_no_name(pockets, prisoner, controls, place, thread):
    pockets("neighbour")
    path = place / "neighbour/secret"
    path.write_text("secret")
    path.chmod(0o644)
    assert controls("user").attempt("files.read", path=str(path)) == {"value": "secr"}
    assert outcome(prisoner.attempt("files.read", thread, path=str(path))) == "ENOENT"


@pytest.mark.parametrize("flags", [os.O_RDONLY | os.O_DIRECTORY, os.O_PATH])
def test_a_directory_cannot_be_passed_as_a_standard_stream(daemon, place, flags):
    """It is of another mount namespace, so its .. knows no root of this one."""

    def says(fd):
        start = {
            "kind": "file", "program": b"sh", "arguments": [b"-c", b"echo begun"], "environment": [], "directory": b"/",
            "umask": 0o22, "ignored": [], "blocked": [], "limits": {}, "cold": False, "stdio": [1, 2],
        }  # fmt: skip
        read, write = os.pipe()
        with Control(str(daemon.runtime_dir)) as control, open(read) as out:
            fields: dict[str, Any] = {"name": "programs", "directory": str(place), "start": start, "fds": [write, fd]}
            login = open_login(control, mode="program", timeout=TIMEOUT, **fields)
            os.close(write)
            with login.session, login.hold:
                said = out.read()
                if said:
                    return said
                message, _ = wire.receive(login.session)
                return message["error"]["message"]

    other, null = os.open(place, flags), os.open(os.devnull, os.O_WRONLY)
    try:
        assert says(null) == "begun\n"
        assert "cannot be a standard stream" in says(other)
    finally:
        os.close(other)
        os.close(null)


def masked(path):
    return Attempt("files.something_in", (False,), "root", given={"path": path})


NODE = ("EPERM", "EACCES")  # Landlock's, and mknod's own
KERNELS = {
    "a file by its mapping": Attempt("files.open_a_mapping", ("EPERM",), "root"),
    "write /proc/sys": Attempt(
        "files.open_to_write", ("EACCES", "EROFS"), "root", given={"path": "/proc/sys/kernel/hostname"}
    ),
    "write /sys": Attempt("files.open_to_write", ("EACCES", "EROFS"), "root", given={"path": "/sys/class/net/lo/mtu"}),
    "mknod of /dev/null": Attempt("files.make_node", NODE, "root", given={"major": 1, "minor": 3, "block": False}),
    "mknod of a disk": Attempt("files.make_node", NODE, "root", given={"major": 7, "minor": 0, "block": True}),
    "security.capability": Attempt("files.have_capable_file", ("EPERM",), "root"),
    "chown to root": Attempt("files.give_to_root", ("EPERM", "EINVAL"), "root"),
}


@pytest.mark.oldest
@each(KERNELS)
def test_the_kernels_files(refused, attempt, thread):
    refused(attempt, thread)


@each({path: masked(path) for path in ("/proc/keys", "/proc/timer_list", "/proc/kcore")})
def test_what_tells_of_the_host_says_nothing(refused, attempt, thread):
    if not os.path.exists(attempt.given["path"]):
        pytest.skip(f"this host's kernel has no {attempt.given['path']}")
    refused(attempt, thread)


SETS = {
    path: Attempt("files.open_to_write", ("EACCES", "EROFS"), "host", given={"path": path})
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger")
}


@pytest.mark.harmful
@each(SETS)
def test_files_that_set_what_the_host_does(refused, attempt, thread):
    refused(attempt, thread)


DEVICES = ("/dev/kmsg", "/dev/mem", "/dev/loop0", "/dev/loop-control", "/dev/fuse", "/dev/kvm", "/dev/net/tun")


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("path", DEVICES)
def test_devices_are_not_there(refused, path, thread):
    if not os.path.exists(path):
        pytest.skip(f"this host has no {path}")
    refused(Attempt("files.open_and_close", ("ENOENT",), "root", given={"path": path}), thread)


def test_one_of_those_devices_is_there_on_this_host():
    assert any(map(os.path.exists, DEVICES))


@pytest.mark.parametrize("thread", THREADS)
def test_its_cgroups_files_are_not_shown(daemon, pockets, controls, thread):
    pockets("prisoner")
    worker = next(w for w in daemon.workers() if w["directory"].endswith("/prisoner"))
    leaf = next(daemon.cgroup_path.glob(f"*/service/pockets/*/{worker['session']}"))
    for path in (leaf / "cgroup.procs", leaf / "cgroup.kill", daemon.cgroup_path / "cgroup.procs"):
        assert controls("root").attempt("files.open_to_write", path=str(path)) == {"value": True}
        assert outcome(pockets("prisoner").attempt("files.open_to_write", thread, path=str(path))) == "ENOENT"


@pytest.fixture(scope="module")
def plain_file(place):
    """What a control may write: a file and a directory of nobody's in particular."""
    (place / "open").mkdir()
    (place / "open/file").write_bytes(b"x" * 8192)
    for path in (place / "open", place / "open/file"):
        path.chmod(0o777)
    return place / "open/file"


def of_the_service(place):
    version = Path(os.readlink(place / "env/bin/python")).resolve().name
    return {
        "our own code": "/run/pocketd/lib/runtime/worker.py",
        "its python": f"/usr/bin/{version}",
        "a preloaded module": str(next((place / "env/lib").glob("python*/site-packages/resident.py"))),
        "/etc": "/etc/passwd",
        "its own executable": "/proc/self/exe",
    }


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("what", ["our own code", "its python", "a preloaded module", "/etc", "its own executable"])
def test_the_services_files_cannot_be_written(prisoner, controls, place, plain_file, what, thread):
    path = of_the_service(place)[what]
    assert controls("user").attempt("files.open_to_write", path=str(plain_file)) == {"value": True}
    assert outcome(prisoner.attempt("files.open_to_write", thread, path=path)) in (
        "EACCES",
        "EROFS",
        "ETXTBSY",
    )


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("directory", ["/", "/usr", "/etc", "/run/pocketd/lib", "/dev", "/sys", "/home", "/var/tmp"])
def test_the_services_directories_take_no_file(prisoner, controls, plain_file, directory, thread):
    assert controls("user").attempt("files.create_in", path=str(plain_file.parent)) == {"value": True}
    found = outcome(prisoner.attempt("files.create_in", thread, path=directory))
    assert found in ("EACCES", "EROFS"), found


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("how", ["mmap", "mprotect", "mremap", "/proc/self/mem"])
def test_shared_mappings_of_the_services_files_stay_read_only(prisoner, controls, place, plain_file, how, thread):
    assert controls("user").attempt("files.write_mapping", path=str(plain_file), how=how) == {"value": True}
    for path in of_the_service(place).values():
        found = outcome(prisoner.attempt("files.write_mapping", thread, path=path, how=how))
        assert found in ("EACCES", "EIO", "EPERM"), (path, found)


@pytest.mark.parametrize("thread", THREADS)
def test_sockets_and_logs_of_pocketd_have_no_name(daemon, prisoner, controls, thread):
    """They are there for root outside, which shows that the paths are right."""
    service = next((daemon.runtime_dir / "services").iterdir())
    for path in (daemon.runtime_dir / "pocketd.sock", service / "init.sock"):
        assert path.is_socket()
        found = outcome(prisoner.attempt("files.connect", thread, path=str(path)))
        assert found == "ENOENT"
    assert controls("host").attempt("files.connect", path=str(daemon.runtime_dir / "pocketd.sock")) == {"value": True}
    logs = [p for p in daemon.place.rglob("*.log") if p.name != "pocketd.log"]
    assert logs
    for path in (*logs, daemon.config):
        found = outcome(prisoner.attempt("files.read", thread, path=str(path)))
        assert found == "ENOENT"
        assert path.exists() and "errno" not in controls("host").attempt("files.read", path=str(path))


def test_a_socket_that_is_shown_can_be_reached(pockets, place):
    """So that ENOENT above is a name's absence, and not a refusal to connect at all."""
    pockets("prisoner")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "prisoner/socket"))
        os.chmod(place / "prisoner/socket", 0o777)
        listener.listen()
        assert pockets("prisoner").attempt("files.connect", path=str(place / "prisoner/socket")) == {"value": True}
