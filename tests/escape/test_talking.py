"""No socket, no shared object and no terminal leads to another pocket or to the host; nor does another ABI."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import TIMEOUT
from tests.escape.attempt import THREADS, Attempt, Inside, each, outcome
from tests.escape.conftest import control_command
from tests.escape.inside.kernel import X86_64

IPC = ("shm", "msg", "sem", "/dev/shm")


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("kind", IPC)
def test_ipc_objects_of_a_neighbour_are_not_there(pockets, prisoner, controls, kind, thread):
    for process in (pockets("neighbour"), controls("user")):
        process.make("talking.make_ipc")
    assert controls("user").attempt("talking.find_ipc", kind=kind) == {"value": True}
    assert outcome(prisoner.attempt("talking.find_ipc", thread, kind=kind)) == "ENOENT"


@pytest.mark.parametrize("thread", THREADS)
def test_a_posix_queue_of_a_neighbour_is_not_there(pockets, prisoner, controls, thread):
    for process in (controls("user"), pockets("neighbour")):
        process.make("talking.make_queue")
    assert controls("user").attempt("talking.find_ipc", kind="mq") == {"value": True}
    assert outcome(prisoner.attempt("talking.find_ipc", thread, kind="mq")) == "ENOENT"


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("kind", ["shm", "msg", "sem"])
def test_nor_by_their_numbers(pockets, prisoner, controls, kind, thread):
    theirs = pockets("neighbour").make("talking.make_ipc")[kind]
    own = controls("user").make("talking.make_ipc")[kind]
    assert controls("user").attempt("talking.use_ipc", kind=kind, number=own) == {"value": True}
    assert outcome(prisoner.attempt("talking.use_ipc", thread, kind=kind, number=theirs)) == "EINVAL"


@pytest.mark.oldest
@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("way", ["connect_abstract", "send_abstract"])
def test_an_abstract_socket_of_a_neighbour_is_not_there(pockets, prisoner, controls, way, thread):
    name = f"escape-{way}-{thread}-{prisoner.directory.name}"
    for process in (pockets("neighbour"), controls("user")):
        process.make("talking.listen_abstract", name=name)
    assert controls("user").attempt(f"talking.{way}", name=name) == {"value": True}
    assert outcome(prisoner.attempt(f"talking.{way}", thread, name=name)) == "ECONNREFUSED"


@pytest.fixture(scope="module")
def hosted(enter, place):
    """Two workers on the host's network."""
    (place / "hosted/app.py").write_text("from tests.escape.inside import program; program.main()\n")
    made = [enter("hosted", defined=True) for _ in range(2)]
    yield made
    for inside in made:
        inside.end()


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("way", ["connect_abstract", "send_abstract"])
def test_abstract_sockets_on_the_hosts_network_are_out_of_reach(hosted, controls, landlock_scopes, way, thread):
    """Of the host's processes and of other pockets: Landlock's doing, since one network namespace has them all."""
    name = f"escape-{os.getpid()}-{way}-{thread}"
    with socket.socket(socket.AF_UNIX) as stream, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        stream.bind(f"\0{name}")
        stream.listen(100)
        datagram.bind(f"\0{name}-d")
        assert controls("neighbour").attempt(f"talking.{way}", name=name) == {"value": True}
        assert outcome(hosted[0].attempt(f"talking.{way}", thread, name=name)) == "EPERM"
    hosted[1].make("talking.listen_abstract", name=f"{name}-of-a-pocket")
    assert controls("neighbour").attempt(f"talking.{way}", name=f"{name}-of-a-pocket") == {"value": True}
    assert outcome(hosted[0].attempt(f"talking.{way}", thread, name=f"{name}-of-a-pocket")) == "EPERM"


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("what", ["link", "address", "route"])
def test_the_hosts_network_cannot_be_changed_by_who_may_use_it(hosted, controls, what, thread):
    assert controls("root").attempt("talking.ask_route", what=what) == {"value": True}
    assert outcome(hosted[0].attempt("talking.ask_route", thread, what=what)) == "EPERM"


RAW, STREAM, DGRAM, SEQPACKET = socket.SOCK_RAW, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
UNKNOWN, NO_FAMILY = ("ENOSYS",), ("EAFNOSUPPORT",)


def made(refused, control, family, kind, protocol=0):
    given = {"family": family, "kind": kind, "protocol": protocol}
    return Attempt("talking.make_socket", refused, control, given=given)


NETWORK = {
    "route": Attempt("talking.ask_route", ("EPERM",), "root", given={"what": "route"}),
    "address": Attempt("talking.ask_route", ("EPERM",), "root", given={"what": "address"}),
    "link": Attempt("talking.ask_route", ("EPERM",), "root", given={"what": "link"}),
    "SIOCSIFFLAGS": Attempt("talking.set_interface", ("EPERM",), "root"),
    "raw socket": made(("EPERM", "EACCES"), "root", socket.AF_INET, RAW, socket.IPPROTO_ICMP),
    "packet socket": made(NO_FAMILY, "root", socket.AF_PACKET, RAW),
    "NETLINK_AUDIT": made(UNKNOWN, "root", socket.AF_NETLINK, RAW, 9),
    "NETLINK_NETFILTER": made(UNKNOWN, "user", socket.AF_NETLINK, RAW, 12),
    "NETLINK_SOCK_DIAG": made(UNKNOWN, "user", socket.AF_NETLINK, RAW, 4),
    "NETLINK_KOBJECT_UEVENT": made(UNKNOWN, "user", socket.AF_NETLINK, RAW, 15),
    "NETLINK_GENERIC": made(UNKNOWN, "user", socket.AF_NETLINK, RAW, 16),
}


@each(NETWORK)
def test_the_network(refused, attempt, thread):
    refused(attempt, thread)


# What a kernel may be built without, each here or in the VM.
FAMILIES = {
    "AF_VSOCK": made(NO_FAMILY, "user", socket.AF_VSOCK, STREAM),
    "AF_ALG": made(NO_FAMILY, "user", socket.AF_ALG, SEQPACKET),
}


@pytest.mark.oldest
@each(FAMILIES)
def test_families_of_no_use(refused, through, attempt, thread):
    if through(attempt) == "EAFNOSUPPORT":
        pytest.skip("this host's kernel has no such family")
    refused(attempt, thread)


# socketpair(2) makes two sockets of any family before it asks whether that has pairs, and loads the family's module.
PAIRS = {
    "AF_VSOCK": Attempt("talking.make_pair", NO_FAMILY, "user", "ENOTSUP", {"family": socket.AF_VSOCK, "kind": STREAM}),
    "AF_NETLINK": Attempt(
        "talking.make_pair", NO_FAMILY, "user", "ENOTSUP", {"family": socket.AF_NETLINK, "kind": RAW}
    ),
}


@each(PAIRS)
def test_pairs_of_other_families(refused, attempt, thread):
    refused(attempt, thread)


@pytest.fixture
def landlock_scopes():
    from nsutil import landlock

    if landlock.abi() < 6:
        pytest.skip("this host's Landlock has no scopes (ABI 6, Linux 6.12)")


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("how", ["TIOCSTI", "TIOCSCTTY", "TIOCSETD"])
def test_a_callers_terminal_is_not_the_programs(enter, place, how, thread):
    """The control is root with the same terminal. It is somebody's controlling terminal meanwhile."""
    terminal, passed = os.openpty()
    hold = ["setsid", "--ctty", "sh", "-c", "printf !; read line"]
    holder = subprocess.Popen(hold, stdin=passed, stdout=passed, stderr=passed)
    running = []
    try:
        assert os.read(terminal, 1) == b"!"
        python = os.path.realpath(sys.executable)
        control = Inside(control_command("host", python), cwd=place / "control", stderr=passed)
        running.append(control)
        inside = enter("terminal", stderr=passed)
        running.append(inside)
        given = {"fd": 2, "how": how}
        assert outcome(inside.attempt("talking.write_by_terminal", thread, **given)) == "EPERM"
        act = "lead_and_write" if how == "TIOCSCTTY" else "write_by_terminal"
        assert control.attempt(f"talking.{act}", **given) == {"value": True}
    finally:
        for process in running:
            process.end()
        os.close(passed)
        os.close(terminal)
        holder.wait(TIMEOUT)  # the hangup ends it


ABIS = {
    "i386 getpid": Attempt("talking.by_int_80", ("ENOSYS",), given={"what": "getpid"}),
    "i386 ptrace": Attempt("talking.by_int_80", ("ENOSYS",), given={"what": "ptrace"}),
}


@pytest.mark.oldest
@pytest.mark.skipif(not X86_64, reason="other machines' system calls are x86's")
@each(ABIS)
def test_i386_system_calls(refused, attempt, thread):
    refused(attempt, thread)


@pytest.mark.skipif(not X86_64, reason="other machines' system calls are x86's")
@pytest.mark.parametrize("thread", THREADS)
def test_x32_system_calls(prisoner, controls, thread):
    """Few kernels know x32: where this one does not, there is no more than its own word that nothing got through."""
    from tests.escape.inside.kernel import NUMBERS

    assert outcome(controls("user").attempt("talking.by_x32", number=NUMBERS["getpid"])) in (True, "ENOSYS")
    for number in (NUMBERS["getpid"], 521, NUMBERS["unshare"]):  # 521: x32's own ptrace
        assert outcome(prisoner.attempt("talking.by_x32", thread, number=number)) == "ENOSYS"
