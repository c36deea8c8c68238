"""Who a worker is: the caller itself, or an id of the range in root's place."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT

UID, GID = 54321, 54322
WHO = """
    import os
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
    print(status["Uid"].split(), status["Gid"].split(), status["Groups"].split(), int(status["CapEff"], 16))
    s = os.stat("app.py"); print(s.st_uid, s.st_gid)
    open("made", "w").close(); m = os.stat("made"); print(m.st_uid, m.st_gid)
    try: open("/etc/shadow"); print("read")
    except OSError as e: print(type(e).__name__)
"""


@pytest.fixture
def place():
    """A directory of an unprivileged user, whom the daemon's socket lets in."""
    path = Path(tempfile.mkdtemp(prefix="user-", dir="/var/tmp"))
    (path / "app.py").write_text("\n".join(line[4:] for line in WHO.splitlines()))
    os.chown(path, UID, GID)
    os.chown(path / "app.py", UID, GID)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def open_pocketd(pocketd):
    """The tests' daemon with a socket for all, as one of the group `pocket` would have it."""
    socket, above = pocketd.runtime_dir / "pocketd.sock", pocketd.place
    before = [(p, p.stat().st_mode) for p in (socket, above)]
    socket.chmod(0o666)
    above.chmod(0o755)
    yield pocketd
    for path, mode in before:
        path.chmod(mode)


def run(pocketd, *words, cwd, uid=UID, gid=GID, **options):
    command = pocketd.command("run", "--service", "plain", *words)
    env = {**pocketd.environment, "HOME": str(cwd)}
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT, **options}
    return subprocess.run(command, env=env, cwd=cwd, user=uid, group=gid, extra_groups=[], **options)


def test_an_unprivileged_callers_worker_has_its_ids(open_pocketd, place):
    done = run(open_pocketd, "app.py", cwd=place)
    assert (done.returncode, done.stderr) == (0, "")
    ids = f"{[str(UID)] * 4} {[str(GID)] * 4} [] 0"
    lines = done.stdout.splitlines()
    assert lines[:3] == [ids, f"{UID} {GID}", f"{UID} {GID}"] and "read" not in done.stdout
    made = (place / "made").stat()
    assert (made.st_uid, made.st_gid) == (UID, GID)


def test_it_may_not_use_what_it_could_not_use_itself(open_pocketd, place):
    private = Path(tempfile.mkdtemp(prefix="of-root-", dir="/var/tmp"))
    try:
        (private / "secret").write_text("secret")
        done = run(open_pocketd, "-c", "print(open('secret').read())", "--", cwd=place)
        assert done.returncode == 1
        done = run(open_pocketd, "--dir", str(private), "-c", "print(open('secret').read())", cwd=place)
        assert done.returncode != 0 and "secret\n" not in done.stdout
        program = f"print(open('{private}/secret').read())"
        done = run(open_pocketd, "--mount", str(private), "-c", program, cwd=place)
        assert done.returncode != 0 and "secret\n" not in done.stdout
    finally:
        shutil.rmtree(private)


def test_it_may_not_see_or_stop_or_switch_what_is_others(open_pocketd, place, both, begun):
    both.write("app.py", "print('ready', flush=True); input()")
    process = begun(both.pocket_command("app.py"), env=both.environment(None), cwd=both.place, stdin=subprocess.PIPE)
    worker = next(w for w in open_pocketd.workers() if w["directory"] == str(both.place))

    def as_user(*words):
        command = open_pocketd.command(*words)
        options = {"capture_output": True, "text": True, "timeout": TIMEOUT, "env": open_pocketd.environment}
        return subprocess.run(command, user=UID, group=GID, extra_groups=[], **options)

    assert worker["session"] not in as_user("ps", "--json").stdout
    for words in (["stop", worker["session"]], ["stop", worker["pocket"]], ["plain", "off"], ["logs", "plain"]):
        done = as_user(*words)
        assert done.returncode in (125, 127) and done.stdout == "" and "Traceback" not in done.stderr, words
    process.communicate(b"\n", timeout=TIMEOUT)
    assert process.returncode == 0


def test_without_the_right_to_the_socket_it_says_so(pocketd, place):
    pocketd.place.chmod(0o755)
    try:
        done = run(pocketd, "app.py", cwd=place)
    finally:
        pocketd.place.chmod(0o700)
    assert done.returncode == 125 and "may not be used" in done.stderr and len(done.stderr.splitlines()) == 1


def test_roots_worker_has_an_id_of_the_range_and_roots_files_as_its_own(both):
    both.write("app.py", WHO)
    ended = both.pocket("app.py")
    lines = ended.out.decode().splitlines()
    uid = int(lines[0].split("'")[1])
    assert uid > 1_900_000_000 and ended.status == 0, ended.shown()
    made = (both.place / "made").stat()
    if lines[1] != "0 0":  # the file system maps ids
        assert lines[1] == lines[2] == f"{uid} {uid}"
        assert (made.st_uid, made.st_gid) == (0, 0)
    assert b"read" not in ended.out


def test_files_of_others_in_roots_directory_are_not_the_workers(both):
    """Only the directory's owner is mapped: whoever else owns a file in it stays a stranger."""
    private = both.write("private", "secret")
    os.chown(private, 999, 999)
    private.chmod(0o600)
    both.write("app.py", "open('private')")
    ended = both.pocket("app.py")
    assert ended.status == 1 and b"PermissionError" in ended.err


def test_two_runs_of_root_at_once_have_different_ids(both, begun):
    both.write("app.py", "import os; print('ready', flush=True); input(); print(os.getuid())")
    command, env = both.pocket_command("app.py"), both.environment(None)
    processes = [begun(command, env=env, cwd=both.place, stdin=subprocess.PIPE) for _ in range(3)]
    assert len({p.communicate(b"\n", timeout=TIMEOUT)[0] for p in processes}) == 3
