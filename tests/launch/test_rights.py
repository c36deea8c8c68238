"""What a pocket may do is what its definition says; `pocket allow` and `pocket deny` change it at run time."""

from __future__ import annotations

import grp
import json
import os
import pwd
import socket
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

from cgroup.hierarchy import Hierarchy
from pocketd import witness
from pocketd.client import errors, login
from tests.conftest import TIMEOUT, service_environment, toml_table

with Hierarchy.find() as _hierarchy:
    MOUNT = Path(_hierarchy.mount.path)
NULL = os.makedev(1, 3)
TRY = """
import os, socket, sys
for what in sys.argv[1:]:
    try:
        if what.isdigit():
            socket.create_connection(("127.0.0.1", int(what)), timeout=5).close()
        elif what.startswith("/dev/") and what[-1] != "!":
            s = os.stat(what)
            print(os.major(s.st_rdev), os.minor(s.st_rdev), oct(s.st_mode & 0o777), s.st_uid == os.getuid())
            os.write(os.open(what, os.O_WRONLY), b"x")
        elif what.endswith("!"):
            open(what[:-1], "w").close()
        else:
            print(open(what).read(), end="")
        print("yes")
    except OSError as e:
        print(e.strerror)
"""


class Pocket:
    def __init__(self, daemon, place):
        self.daemon, self.place = daemon, place

    def tries(self, *words):
        done = self.daemon.pocket("p", *words, cwd=self.place)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def says(self, *words, code=0):
        done = self.daemon.pocket(*words, check=False)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture
def p(own_pocketd, tmp_path):
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text(TRY)
    (tmp_path / "beside").write_text("beside\n")
    text = f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.p]
        service = "plain"
        dir = "{place}"
        program = "app.py"
    """
    return Pocket(own_pocketd(text), place)


def test_the_network_is_given_and_taken_at_run_time(p):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert p.tries(port) == ["Connection refused"]
        assert "allowed network=host" in p.says("allow", "p", "network=host")
        assert p.tries(port) == ["yes"]
        p.says("deny", "p", "network")
        assert p.tries(port) == ["Connection refused"]


def test_a_path_to_write_is_given_and_taken(p):
    assert p.tries("out/made!") == ["No such file or directory"]
    p.says("allow", "p", "write=out")
    assert p.tries("out/made!", "made!") == ["yes", "Read-only file system"]
    p.says("deny", "p", "write=out")
    assert p.tries("out/made!") == ["Read-only file system"]


def test_a_mount_is_given_read_only_unless_it_says_so(p, tmp_path):
    beside = str(tmp_path / "beside")
    assert p.tries(beside) == ["No such file or directory"]
    p.says("allow", "p", f"mount={beside}")
    assert p.tries(beside, f"{beside}!") == ["beside", "yes", "Read-only file system"]
    (tmp_path / "beside").rename(tmp_path / "away")
    p.says("deny", "p", f"mount={beside}")
    (tmp_path / "away").rename(tmp_path / "beside")
    p.says("allow", "p", f"mount={beside}:{beside}:rw")
    assert p.tries(f"{beside}!") == ["yes"]


@pytest.fixture
def device():
    """A device file of the host's: another name of the null device, for root alone."""
    path = f"/dev/pocketd-test-{os.getpid()}"
    os.mknod(path, stat.S_IFCHR | 0o600, NULL)
    yield path
    os.unlink(path)


def test_a_device_is_the_workers_own_file(p, device):
    assert p.tries(device) == ["No such file or directory"]
    p.says("allow", "p", f"device={device}")
    assert p.tries(device, "/dev/zero", "/dev/urandom!") == ["1 3 0o600 True", "yes", "1 5 0o666 False", "yes", "yes"]
    assert os.stat(device).st_uid == 0 and stat.S_IMODE(os.stat(device).st_mode) == 0o600
    p.says("deny", "p", f"device={device}")
    assert p.tries(device) == ["No such file or directory"]


def test_a_device_that_is_not_there_is_named(p, device):
    os.rename(device, device + ".away")
    try:
        p.says("allow", "p", f"device={device}")
        assert f"p may use {device}, which is not there" in p.says("p", device, code=125)
    finally:
        os.rename(device + ".away", device)


def test_what_is_kept_is_in_the_configuration_and_what_is_not_ends_when_it_is_read(p, tmp_path):
    p.says("allow", "p", "write=out")
    p.says("allow", "--persist", "p", "network=host")
    kept = tomllib.loads((p.daemon.place / "pocketd.conf.d/90-p.conf").read_text())
    allow = {"network": "host", "models": [], "write": ["out"], "devices": []}
    assert kept == {"pocket": {"p": {"allow": allow, "mounts": []}}}
    p.says("allow", "p", f"mount={tmp_path}/beside")
    p.says("reload")
    inspected = json.loads(p.says("inspect", "--json", "p"))["definition"]
    assert inspected["allow"]["network"] == "host" and inspected["allow"]["write"] == ["out"]
    assert inspected["mounts"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("p", "everything"), "is no right; rights are network=host"),
        (("p", "network"), "write network=host"),
        (("p", "network=hots"), "did you mean"),
        (("p", "write=../up"), "beneath the pocket's directory"),
        (("p", "mount=/etc:/etc:rw"), "part of the system"),
        (("p", "device=/dev/mem"), "all of the host"),
        (("p", "model=none"), "has no model 'none'"),
        (("q", "network=host"), "there is no pocket 'q'"),
        (("plain", "network=host"), "there is no pocket 'plain'"),
    ],
)
def test_a_wrong_right_is_refused_and_changes_nothing(p, words, said):
    before = p.says("inspect", "p")
    assert said in p.says("allow", *words, "write=out", code=127 if "no pocket" in said or "no model" in said else 125)
    assert p.says("inspect", "p") == before


def test_taking_what_was_not_given_is_an_error(p):
    assert "not allowed write=out" in p.says("deny", "p", "write=out", code=127)


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)", "network=host"),
        ("import urllib.request; urllib.request.urlopen('http://example.invalid')", "network=host"),
        ("open('out/x', 'w')", "write=out/x"),
        ("open('/pocket/x', 'w')", "write=x"),
        ("open('/dev/video9', 'rb')", "device=/dev/video9"),
    ],
)
def test_a_program_that_fails_for_want_of_a_right_says_which_in_its_last_line(p, program, right):
    (p.place / "out").mkdir()
    (p.place / "app.py").write_text(program)
    done = p.daemon.pocket("p", check=False, cwd=p.place)
    *traceback, last = done.stderr.splitlines()
    assert done.returncode == 1 and "Error" in traceback[-1]
    assert last.startswith("pocket: ") and last.endswith(f"as root: pocket allow p {right}")


@pytest.mark.parametrize("how", ["its path", "a name in the caller's directory"])
def test_a_file_that_the_caller_names_and_the_pocket_does_not_see_is_named(p, tmp_path, how):
    (p.place / "app.py").write_text("import sys; print(open(sys.argv[1]).read(), end='')")
    beside, away = str(tmp_path / "beside"), tmp_path / "away"
    away.mkdir()
    (away / "beside").write_text("beside\n")
    word, cwd, path = (beside, p.place, beside) if how == "its path" else ("beside", away, f"{away}/beside")
    done = p.daemon.pocket("p", word, check=False, cwd=cwd)
    *traceback, last = done.stderr.splitlines()
    assert done.returncode == 1 and traceback[-1] == f"FileNotFoundError: [Errno 2] No such file or directory: '{word}'"
    assert last == (
        f"pocket: this pocket does not see {path}, if there is one; to allow it, as root: pocket allow p mount={path}"
    )
    p.says("allow", "p", f"mount={path}")
    assert p.daemon.pocket("p", path, cwd=cwd).stdout == "beside\n"
    done = p.daemon.pocket("run", "--service", "plain", "app.py", beside, check=False, cwd=p.place)
    assert done.stderr.endswith(f"does not see {beside}, if there is one; to show it: pocket run --mount {beside}\n")
    shown = p.daemon.pocket("run", "--service", "plain", "--mount", beside, "app.py", beside, cwd=p.place)
    assert shown.stdout == "beside\n"


@pytest.mark.parametrize(
    ("function", "right"),
    [
        ("reach", "network=host"),
        ("write", "write=out/x"),
        ("device", "device=/dev/video9"),
        ("hidden", "write=out/x"),
        ("other", None),
    ],
)
def test_a_clients_call_that_fails_for_want_of_a_right_says_which(p, function, right):
    (p.place / "out").mkdir()
    (p.place / "functions.py").write_text(
        "import socket\n"
        "def reach(): socket.create_connection(('192.0.2.1', 80), timeout=5)\n"
        "def write(): open('/pocket/out/x', 'w')\n"
        "def device(): open('/dev/video9')\n"
        "def hidden():\n"
        "    try: write()\n"
        "    except OSError as e: raise ValueError('no result') from e\n"
        "def other(): open('nowhere')\n"
    )
    with login("p", runtime_dir=str(p.daemon.runtime_dir), timeout=TIMEOUT) as session:
        with pytest.raises(errors.RemoteError) as caught:
            session.call(f"functions:{function}", timeout=TIMEOUT)
    last = str(caught.value).splitlines()[-1]
    assert last.endswith(f"as root: pocket allow p {right}") if right else "pocket allow" not in str(caught.value)
    assert caught.value.type in ("OSError", "FileNotFoundError", "ValueError")


def test_a_model_that_a_pocket_may_not_use_is_named_with_its_right(own_pocketd, tmp_path):
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}
        models = {{ counter = "collections:Counter", other = "collections:OrderedDict" }}

        [pocket.p]
        service = "plain"
        dir = "{tmp_path}"
        program = "app.py"
        allow = {{ models = ["counter"] }}
    """)
    runtime_dir = str(daemon.runtime_dir)
    with login("p", runtime_dir=runtime_dir, timeout=TIMEOUT) as session:
        assert session.models == ("counter",)
        with pytest.raises(
            errors.UnknownModel, match="pocket p may not use model 'other'.*pocket allow p model=other$"
        ):
            session.model("other")
        with pytest.raises(errors.UnknownModel) as caught:
            session.model("none")
        assert "pocket allow" not in str(caught.value)
    daemon.pocket("allow", "p", "model=other")
    with login("p", runtime_dir=runtime_dir, timeout=TIMEOUT) as session:
        assert session.model("other")


@pytest.mark.parametrize("name", ["nowhere", "/pocket/nowhere", "{place}/nowhere", "/nowhere", "/dev/fd/9"])
def test_other_failures_have_no_such_line(p, name):
    path = name.format(place=p.place)
    named = [] if name == "/nowhere" else [path]
    (p.place / "app.py").write_text(f"open({path!r})")
    done = p.daemon.pocket("p", *named, check=False, cwd=p.place)
    assert done.stderr.splitlines()[-1].startswith("FileNotFoundError")


def test_the_kernels_word_on_a_worker(p, begun):
    (p.place / "app.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    begun(p.daemon.command("p"), env=p.daemon.environment, stdin=subprocess.PIPE)
    (worker,) = json.loads(p.says("inspect", "--privileges", "--json", "p"))["workers"]
    (status,) = worker["status"]
    assert {status[key] for key in status if key.startswith("Cap")} == {"0000000000000000"}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Groups"], status["threads"]) == ("1", "2", "", 1)
    uid = status["Uid"].split()[0]
    assert worker["uid_map"][0].split() == [uid, uid, "1"] and int(uid) > 0
    assert not set(worker["shared"]) & {"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"}
    assert sorted(worker["descriptors"]) == ["0", "1", "2"]
    assert any(" /sys/firmware " in line for line in worker["mountinfo"]) == os.path.isdir("/sys/firmware")
    text = p.says("inspect", "--privileges", "p")
    assert "CapBnd          0000000000000000" in text and "Max open files" in text
    assert "no worker of 'q'" in p.says("inspect", "--privileges", "q", code=127)


MANY = """
import ctypes, os, sys, threading
open("/tmp/a\\n  left out: nothing", "w").close()
fds = [os.open("/tmp/a\\n  left out: nothing", os.O_RDONLY) for _ in range(300)]
end = threading.Event()
for _ in range(1100):
    threading.Thread(target=end.wait).start()
ctypes.CDLL(None).prctl(15, b"\\x0bSeccomp:\\t0", 0, 0, 0)  # PR_SET_NAME
print("ready", flush=True)
sys.stdin.read()
end.set()
"""


def test_a_worker_with_many_threads_and_descriptors_is_shown_in_part(p, begun):
    (p.place / "app.py").write_text(MANY)
    begun(p.daemon.command("p"), env=p.daemon.environment, stdin=subprocess.PIPE)
    reply = json.loads(p.says("inspect", "--privileges", "--json", "p"))
    (worker,) = reply["workers"]
    (status,) = worker["status"]  # a thread's name adds no line to it
    assert (status["threads"], status["Seccomp"]) == (witness.THREADS, "2")
    assert [int(fd) for fd in worker["descriptors"]] == list(range(witness.DESCRIPTORS))
    left_out = ["threads after the first 1000", "descriptors after the first 200"]
    assert (worker["left_out"], reply["left_out"]) == (left_out, [])
    lines = p.says("inspect", "--privileges", "p").split("\n")
    assert [line for line in lines if line.startswith("  left out: ")] == [f"  left out: {what}" for what in left_out]


def test_more_workers_than_are_shown_are_counted(p, begun):
    (p.place / "app.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    for _ in range(witness.WORKERS + 1):
        begun(p.daemon.command("p"), env=p.daemon.environment, stdin=subprocess.PIPE)
    reply = json.loads(p.says("inspect", "--privileges", "--json", "p"))
    assert (len(reply["workers"]), reply["left_out"]) == (witness.WORKERS, ["1 workers"])
    assert p.says("inspect", "--privileges", "p").endswith("\nleft out: 1 workers\n")


# -- who may log in


def by(daemon, user, *words, cgroup=None, gid=None, groups=()):
    """`pocket` as another user, who may connect as one of the group `pocket` may, perhaps from a cgroup, and with these
    groups by their numbers."""

    def enter():
        if cgroup:
            (cgroup / "cgroup.procs").write_text("0")

    options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "cwd": "/", "env": daemon.environment}
    (daemon.runtime_dir / "pocketd.sock").chmod(0o666)
    for above in (daemon.place, *daemon.place.parents):
        if above.stat().st_mode & 0o5 != 0o5:
            above.chmod(0o755)
    having = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    as_user = ["setpriv", f"--reuid={user}", f"--regid={gid or pwd.getpwnam(user).pw_gid}", having, "--"]
    return subprocess.run([*as_user, *daemon.command(*words)], preexec_fn=enter, **options)


def test_who_may_run_ad_hoc_in_a_service(own_pocketd):
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        may_run = ["nobody"]
        env = {toml_table(service_environment())}
    """)
    words = ("run", "--service", "plain", "--dir", "/var/lib/dpkg", "-c", "print(1)")
    done = by(daemon, "nobody", *words)
    assert (done.stdout, done.stderr) == ("1\n", "")
    refused = by(daemon, "daemon", *words)
    assert refused.returncode == 125 and "its `may_run` does not name you" in refused.stderr


@pytest.fixture
def cgroup():
    base = MOUNT / f"may-run-{os.getpid()}"
    (base / "beneath").mkdir(parents=True)
    yield base
    (base / "beneath").rmdir()
    base.rmdir()


def test_a_pocket_for_whoever_stands_in_a_cgroup(own_pocketd, tmp_path, cgroup):
    """A container's or a unit's identity, by the kernel's word: what the caller says does not count."""
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text("print('run')")
    path = "/" + str(cgroup.relative_to(MOUNT))
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.p]
        service = "plain"
        dir = "{place}"
        program = "app.py"
        may_run = ["cgroup:{path}"]
    """)
    assert by(daemon, "daemon", "p", cgroup=cgroup).stdout == "run\n"
    assert by(daemon, "daemon", "p", cgroup=cgroup / "beneath").stdout == "run\n"
    refused = by(daemon, "daemon", "p")
    assert refused.returncode == 125 and "you may not run p" in refused.stderr


def test_a_pocket_for_whoever_has_a_group_by_the_kernels_word(own_pocketd, tmp_path):
    """What a process has counts, and not what a database has for its user: one can be without the other."""
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text("print('run')")
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.p]
        service = "plain"
        dir = "{place}"
        program = "app.py"
        may_run = ["@games", "@54399"]
    """)
    games, many = grp.getgrnam("games").gr_gid, range(60_000, 60_400)
    for groups in ([games], [54399], [*many, games]):
        assert by(daemon, "nobody", "p", groups=groups).stdout == "run\n"
    assert by(daemon, "games", "p").stdout == "run\n"  # as its own group
    for refused in (by(daemon, "nobody", "p", groups=many), by(daemon, "games", "p", gid=many[0])):
        assert refused.returncode == 125 and "you may not run p" in refused.stderr


def test_a_pocket_that_shares_nothing(p):
    """cold = true: neither the template's hash seed nor its address layout, which all its forks have."""
    (p.place / "app.py").write_text("print(hash('x'), id(type))")
    assert p.tries() == p.tries()
    with p.daemon.config.open("a") as file:
        file.write("cold = true\n")
    p.says("reload")
    assert p.tries() != p.tries()
    with pytest.raises(errors.PocketError, match="cold = true"):
        login("p", runtime_dir=str(p.daemon.runtime_dir), timeout=TIMEOUT)
