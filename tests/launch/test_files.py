"""What of the host's files a program sees: its directory, what is mounted, and nothing else."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nsutil.processes import Peer
from pocketd import shown
from pocketd.wire import Error
from tests.conftest import TIMEOUT, service_environment, toml_table
from tests.launch.both import Both


@pytest.fixture
def elsewhere():
    """A directory that no pocket of the test has."""
    place = Path(tempfile.mkdtemp(prefix="elsewhere-", dir="/var/tmp"))
    yield place
    shutil.rmtree(place)


def test_a_file_that_the_program_writes_is_there_for_the_caller(both):
    both.write("app.py", "open('out', 'w').write('words'); import os; os.chmod('out', 0o640)")
    assert both.pocket("app.py").status == 0
    status = (both.place / "out").stat()
    assert (both.place / "out").read_text() == "words"
    owner = both.place.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (owner.st_uid, owner.st_gid, 0o640)


def test_a_file_in_tmp_is_not_seen_either(both, tmp_path):
    """The program has a /tmp of its own."""
    app = tmp_path / "app"
    app.mkdir()
    (tmp_path / "photo.jpg").write_text("pixels")
    assert str(tmp_path).startswith("/tmp/")
    code = "import sys; print(open(sys.argv[1]).read())"
    ended = both.pocket("-c", code, f"--photo={tmp_path}/photo.jpg", "../photo.jpg", "..", cwd=app)
    line = f"pocket: the program does not see {tmp_path}/photo.jpg; add --mount {tmp_path}/photo.jpg\n".encode()
    assert ended.err.startswith(line + b"Traceback")
    ended = both.pocket("-c", code, f"{tmp_path}/photo.jpg", cwd=app, options=("--mount", f"{tmp_path}/photo.jpg"))
    assert (ended.status, ended.out, ended.err) == (0, b"pixels\n", b"")
    # Named from a directory that is not the pocket's.
    ended = both.pocket("-c", code, "photo.jpg", cwd=tmp_path, options=("--dir", str(app)))
    assert ended.err.startswith(line)


def test_an_argument_that_the_program_does_not_see_gets_one_line(both, elsewhere):
    (elsewhere / "photo.jpg").write_text("pixels")
    both.write("app.py", "import sys; print(open(sys.argv[1]).read())")
    ended = both.pocket("app.py", str(elsewhere / "photo.jpg"))
    line = f"pocket: the program does not see {elsewhere}/photo.jpg; add --mount {elsewhere}/photo.jpg\n"
    assert ended.err.decode().startswith(line) and b"FileNotFoundError" in ended.err and ended.status == 1
    both.write("ignores.py", "")
    assert both.pocket("ignores.py", str(elsewhere / "photo.jpg")).err.decode() == line
    assert both.pocket("ignores.py", f"--input={elsewhere}/photo.jpg").err.decode() == line
    relative = os.path.relpath(elsewhere / "photo.jpg", both.place)
    assert both.pocket("ignores.py", relative).err.decode() == line
    for harmless in (
        "/usr/bin",
        "app.py",
        "/no/such/file",
        "photo.jpg",
        "/",
        "a/b",
        "--x=/y",
        str(both.place / "app.py"),
    ):
        assert both.pocket("ignores.py", harmless).err == b""


def test_the_line_for_a_program_outside(both, elsewhere):
    (elsewhere / "app.py").write_text("print(1)")
    ended = both.pocket(str(elsewhere / "app.py"))
    assert ended.status == 2 and f"add --mount {elsewhere}/app.py\n".encode() in ended.err


@pytest.mark.parametrize("what", ["photo.jpg", ""], ids=["file", "directory"])
def test_with_that_mount_it_is_seen_where_it_is(both, elsewhere, what):
    (elsewhere / "photo.jpg").write_text("pixels")
    both.write("app.py", "import sys; print(open(sys.argv[1]).read())")
    path = str(elsewhere / "photo.jpg")
    ended = both.pocket("app.py", path, options=("--mount", str(elsewhere / what).rstrip("/")))
    assert (ended.status, ended.out, ended.err) == (0, b"pixels\n", b"")


def test_a_mount_elsewhere_and_by_a_relative_path(both, elsewhere):
    (elsewhere / "photo.jpg").write_text("pixels")
    both.write("app.py", "import os, sys; print([open(a).read() for a in sys.argv[1:]], os.listdir('/data'))")
    relative = os.path.relpath(elsewhere, both.place)
    ended = both.pocket(
        "app.py",
        "/data/photo.jpg",
        "/a/b/c.jpg",
        options=("--mount", f"{relative}:/data", f"--mount={relative}/photo.jpg:/a/b/c.jpg"),
    )
    assert (ended.status, ended.out, ended.err) == (0, b"['pixels', 'pixels'] ['photo.jpg']\n", b"")


def test_a_mount_is_read_only_by_the_kernel(both, elsewhere):
    (elsewhere / "file").write_text("old")
    program = f"""
        import os, subprocess
        for act in (lambda: open("{elsewhere}/file", "w"), lambda: open("{elsewhere}/new", "w"),
                    lambda: os.unlink("{elsewhere}/file"), lambda: os.chmod("{elsewhere}/file", 0o777),
                    lambda: os.utime("{elsewhere}"), lambda: os.mkdir("{elsewhere}/d")):
            try: act(); print("done")
            except OSError as e: print(e.errno)
    """
    both.write("app.py", program)
    assert both.pocket("app.py", options=("--mount", str(elsewhere))).out == b"30\n" * 6  # EROFS
    assert sorted(p.name for p in elsewhere.iterdir()) == ["file"]


def test_a_writable_mount_is_written(both, elsewhere):
    both.write("app.py", f"open('{elsewhere}/new', 'w').write('x'); open('/data/more', 'w').write('y')")
    ended = both.pocket("app.py", options=("--mount", f"{elsewhere}:rw", "--mount", f"{elsewhere}:/data:rw"))
    assert (ended.status, ended.err) == (0, b"")
    assert sorted(p.name for p in elsewhere.iterdir()) == ["more", "new"]
    assert (elsewhere / "new").stat().st_uid == elsewhere.stat().st_uid


def test_a_writable_file(both, elsewhere):
    (elsewhere / "file").write_text("old")
    (elsewhere / "other").write_text("other")
    both.write("app.py", f"import os; open('{elsewhere}/file', 'a').write('new'); print(os.listdir('{elsewhere}'))")
    assert both.pocket("app.py", options=("--mount", f"{elsewhere}/file:rw")).out == b"['file']\n"
    assert (elsewhere / "file").read_text() == "oldnew"


@pytest.mark.parametrize(
    "mount", ["", ":/x", "/no/such", "/:rw", "/usr:rw", "a:b:c:d", "/etc:/proc", "/var/tmp:/", "/proc"]
)
def test_a_mount_that_cannot_be(both, mount):
    ended = both.pocket("-c", "print('ran')", options=("--mount", mount))
    assert ended.status == 125 and ended.out == b"" and ended.err.startswith(b"pocket")
    assert b"Traceback" not in ended.err


@pytest.mark.parametrize(
    "directory", ["/", "/tmp", "/usr", "/etc", "/var", "/proc", "/dev", "/home", "/run", "/usr/lib/python3"]
)
def test_a_directory_of_the_system_is_refused_in_words(both, directory):
    if not os.path.isdir(directory):
        pytest.skip(f"no {directory}")
    ended = both.pocket("-c", "print('ran')", options=("--dir", directory))
    assert ended.status == 125 and ended.out == b""
    assert b"cannot be a pocket's directory" in ended.err and b"--dir" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_a_link_to_the_root_is_refused_too(both):
    (both.place / "link").symlink_to("/")
    ended = both.pocket("-c", "print('ran')", options=("--dir", "link"))
    assert ended.status == 125 and b"cannot be a pocket's directory" in ended.err


@pytest.mark.parametrize("directory", ["missing", "app.py"])
def test_a_directory_that_is_none(both, directory):
    both.write("app.py", "")
    ended = both.pocket("-c", "print('ran')", options=("--dir", directory))
    assert ended.status == 125 and directory.encode() in ended.err and b"Traceback" not in ended.err


def test_a_directory_beneath_tmp_and_an_own_tmp(both):
    """The test's own place is beneath /tmp: it is seen there, and nothing else of the host's /tmp is."""
    other = Path(tempfile.mkdtemp(prefix="of-the-host-"))
    try:
        both.write(
            "app.py", "import os, tempfile; print(os.listdir('/tmp')); tempfile.mkstemp(); print(os.listdir('.'))"
        )
        ended = both.pocket("app.py")
        # Besides its own, what the service's python is made of may lie there too.
        shown = {p.split("/")[2] for p in (str(both.place), sys.prefix, sys.base_prefix) if p.startswith("/tmp/")}
        assert ended.status == 0
        assert set(ast.literal_eval(ended.out.decode().splitlines()[0])) == shown
    finally:
        other.rmdir()


@pytest.fixture
def home(both: Both):
    """The caller's home, which is root's: nothing of it is changed but a directory that goes again."""
    place = Path(tempfile.mkdtemp(prefix=".pocketd-test-", dir=os.path.expanduser("~root")))
    yield place
    shutil.rmtree(place)


def test_a_directory_beneath_home(both, home):
    (home / "app.py").write_text(
        "import os, sys; print(os.getcwd()); open('out', 'w').write('x'); h = os.path.expanduser('~');"
        "print(os.path.dirname(os.getcwd()) == h, os.access(h, os.W_OK)); open(h + '/mine', 'w').close(); import json\n"
        "print(os.path.exists(sys.executable), len(os.listdir(h)) <= 3)"
    )
    ended = both.pocket("app.py", cwd=home)
    assert ended.out.decode().splitlines() == [str(home), "True True", "True True"], ended.shown()
    assert (home / "out").read_text() == "x" and not (home.parent / "mine").exists()


def test_home_itself_as_directory(both):
    ended = both.pocket(
        "-c", "import os, sys; print(os.getcwd(), os.path.exists(sys.executable))", cwd=os.path.expanduser("~root")
    )
    assert (ended.status, ended.out.decode()) == (0, f"{os.path.expanduser('~root')} True\n"), ended.shown()


def test_the_service_shows_no_more_of_the_host_than_it_lists(both):
    ended = both.pocket(
        "-c",
        "import os; print(sorted(os.listdir('/'))); print([p for p in ('/etc/shadow', '/etc/ssh', '/root/.ssh',"
        "'/var/log', '/var/lib', '/boot', '/sys/fs/cgroup', '/run/pocketd/pocketd.sock', '/proc/1/root/etc')"
        " if os.path.exists(p) and os.access(p, os.R_OK) and (not os.path.isdir(p) or os.listdir(p))])",
    )
    assert ended.out.splitlines()[-1] == b"[]", ended.shown()


def test_the_root_file_system_cannot_be_written(both):
    both.write(
        "app.py",
        """
        import os
        for p in ("/x", "/usr/x", "/etc/x", "/run/x", "/bin/x", "/lib/x", "/run/pocketd/lib/x", "/sys/x", "/proc/x"):
            try: open(p, "w"); print("wrote", p)
            except OSError: pass
        for p in ("/etc/passwd", "/usr/bin/env", "/run/pocketd/lib/runtime/worker.py"):
            for act in (lambda: open(p, "a"), lambda: os.chmod(p, 0o777), lambda: os.unlink(p)):
                try: act(); print("changed", p)
                except OSError: pass
        """,
    )
    assert both.pocket("app.py").out == b""


def test_setuid_files_do_nothing(both):
    """Nothing that the program executes gains anything, and what it makes is shown with no such bit to gain by."""
    both.write("app.py", "import subprocess; print(open('/proc/self/status').read())")
    text = both.pocket("app.py").out.decode()
    status = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert "0" not in status["Uid"].split() and status["Groups"].strip() == ""


def test_no_mount_appears_on_the_host(both, elsewhere, begun):
    before = Path("/proc/self/mountinfo").read_text()
    both.write("app.py", "print('ready', flush=True); input()")
    command = both.pocket_command("app.py", options=("--mount", f"{elsewhere}:rw"))
    process = begun(command, env=both.environment(None), cwd=both.place, stdin=-1)
    assert Path("/proc/self/mountinfo").read_text() == before
    process.communicate(b"\n")
    assert process.returncode == 0


@pytest.mark.parametrize("what", ["a/data", "a", "b/app", "b"])
def test_a_defined_place_that_has_become_a_link_is_not_followed(own_pocketd, tmp_path, what):
    """Whoever owns it, or a directory on the way: the operator meant what was there when the definition was read. A
    link that was there then is what it led to."""
    other = tmp_path / "of-others"
    for path in ("a/data", "b/app", "of-others/data", "of-others/app"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "app.py").write_text(f"print({path!r}, open('/data/word').read())")
        (tmp_path / path / "word").write_text(path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.app]
        service = "plain"
        dir = "{tmp_path}/b/app"
        program = "app.py"
        mounts = ["{tmp_path}/link/data:/data"]
    """)
    assert daemon.pocket("app").stdout == "b/app a/data\n"
    place = tmp_path / what
    place.rename(tmp_path / "aside")
    place.symlink_to(other if what in ("a", "b") else other / place.name)
    done = daemon.pocket("app", check=False)
    assert done.returncode == 125 and "behind a symbolic link by now" in done.stderr, done
    place.unlink()
    (tmp_path / "aside").rename(place)
    assert daemon.pocket("app").stdout == "b/app a/data\n"


def test_what_is_not_the_directorys_owners_is_not_shown_to_be_written(own_pocketd, elsewhere):
    """Its owner may rename what others have in it to a name that the definition lets the pocket write."""
    app = elsewhere / "app"
    (app / "out").mkdir(parents=True)
    (app / "kept").write_text("of another")
    (app / "app.py").write_text("open('/pocket/out/new', 'w').write('x'); print('written')")
    elsewhere.chmod(0o755)
    for path, uid in ((app, 61001), (app / "out", 61001), (app / "app.py", 61001), (app / "kept", 61002)):
        os.chown(path, uid, uid)
    (app / "kept").chmod(0o600)
    daemon = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.app]
        service = "plain"
        dir = "{app}"
        program = "app.py"
        allow = {{ write = ["out"] }}
    """)
    assert daemon.pocket("app").stdout == "written\n"
    (app / "out").rename(app / "aside")
    (app / "kept").rename(app / "out")
    (app / "app.py").write_text("print(open('/pocket/out').read())")
    done = daemon.pocket("app", check=False)
    assert done.returncode == 125 and "does not belong to that directory's owner" in done.stderr, done


def test_mounts_of_a_process_that_has_the_callers_pid_by_now_are_not_the_callers():
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait(TIMEOUT)
    try:
        with pytest.raises(Error, match="has ended"):
            shown._same_mounts(Peer(os.getpid(), 0, 0, pidfd))
    finally:
        os.close(pidfd)
