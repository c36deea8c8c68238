"""Directories that are swapped for links while launches run: nothing is shown or written outside of a pocket's own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT, TIMEOUT, wait_for
from tests.escape.attempt import THREADS, UID, outcome

LAUNCHES = 20
_EXCHANGE, _AT_FDCWD = 2, -100  # linux/fs.h, RENAME_EXCHANGE
WRITE = """
import sys
for path in ("out/probe", "deep/out/probe"):
    try:
        with open(path, "w") as f: f.write("reached")
    except OSError as e: print(path, e.errno)
"""


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[list[int]]:
    """Exchange two names all the time, atomically, so that one of the two is always there."""
    stop, count = threading.Event(), [0]
    libc = ctypes.CDLL(None, use_errno=True)

    def work() -> None:
        while not stop.is_set():
            result = libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE)
            assert result == 0, os.strerror(ctypes.get_errno())
            count[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join(TIMEOUT)


def goes_on(count: list[int]) -> bool:
    before = count[0]
    return wait_for(lambda: count[0] > before)


@pytest.fixture
def outside(place):
    """What a link would lead to: writable by everybody, and no pocket's."""
    made = Path(tempfile.mkdtemp(prefix="outside-", dir=place))
    (made / "out").mkdir()
    for path in (made, made / "out"):
        path.chmod(0o777)
    return made


@pytest.mark.parametrize("name", ["out", "deep"])
def test_a_writable_directory_that_becomes_a_link_leads_nowhere(daemon, place, outside, name):
    """`allow.write` of a pocket whose author swaps it, or a directory on the way to it."""
    pocket = place / "writer"
    (pocket / "app.py").write_text(WRITE)
    for path in (pocket / "out", pocket / "deep/out"):
        path.mkdir(parents=True, exist_ok=True)
    link = pocket / f"link-{name}"
    link.symlink_to(outside)
    statuses = []
    with swapping(pocket / name, link) as count:
        for _ in range(LAUNCHES):
            statuses.append(daemon.pocket("writer", check=False).returncode)
            assert goes_on(count)
    assert [p for p in outside.rglob("*") if p.is_file()] == []
    assert set(statuses) <= {0, 125}, statuses
    if (pocket / name).is_symlink():  # as they were
        os.rename(link, pocket / "spare")
        os.rename(pocket / name, link)
        os.rename(pocket / "spare", pocket / name)
    # As a link for good it is refused in words; without the link it is written.
    aside = pocket / "aside"
    (pocket / name).rename(aside)
    link.rename(pocket / name)
    done = daemon.pocket("writer", check=False)
    assert done.returncode == 125 and "Traceback" not in done.stderr
    assert [p for p in outside.rglob("*") if p.is_file()] == []
    # The same program where nobody resolves beneath the directory.
    subprocess.run([sys.executable, "app.py"], cwd=pocket, check=True, capture_output=True, timeout=TIMEOUT)
    assert [p.read_text() for p in outside.rglob("probe")] == ["reached"]
    (pocket / name).unlink()
    aside.rename(pocket / name)
    assert daemon.pocket("writer").stdout == ""
    assert (pocket / name / ("probe" if name == "out" else "out/probe")).read_text() == "reached"


@pytest.fixture
def users_place(daemon):
    """A directory of an unprivileged user's, whom the daemon's socket lets in for once."""
    socket = daemon.runtime_dir / "pocketd.sock"
    modes = [(p, p.stat().st_mode) for p in (socket, daemon.place)]
    socket.chmod(0o666)
    daemon.place.chmod(0o711)
    made = Path(tempfile.mkdtemp(prefix="user-", dir=daemon.place.parent))
    made.chmod(0o755)
    os.chown(made, UID, UID)
    yield made
    for path, mode in modes:
        path.chmod(mode)


def test_a_directory_closed_to_the_caller_is_not_opened_for_it_by_a_swapped_link(daemon, users_place):
    """By --dir; root's own run of the same reads it."""
    closed = Path(tempfile.mkdtemp(prefix="closed-", dir=daemon.place.parent))
    assert closed.stat().st_mode & 0o777 == 0o700
    (closed / "secret").write_text("of root")
    own, link = users_place / "own", users_place / "link"
    own.mkdir()
    (own / "secret").write_text("of the user")
    for path in (own, own / "secret"):
        os.chown(path, UID, UID)
    link.symlink_to(closed)
    words = daemon.command("run", "--service", "plain", "--dir", str(link), "-c", "print(open('secret').read())")
    env = {**daemon.environment, "HOME": "/"}
    options = {"env": env, "cwd": ROOT, "capture_output": True, "text": True, "timeout": TIMEOUT}
    as_user = {"user": UID, "group": UID, "extra_groups": []}
    assert subprocess.run(words, **options).stdout == "of root\n"  # type: ignore[call-overload]
    assert subprocess.run(words, **options, **as_user).stdout == ""  # type: ignore[call-overload]
    with swapping(own, link) as count:
        for _ in range(LAUNCHES):
            done = subprocess.run(words, **options, **as_user)  # type: ignore[call-overload]
            assert "of root" not in done.stdout + done.stderr
            assert goes_on(count)


def test_a_pockets_directory_that_becomes_a_link_leads_nowhere(daemon, place, outside):
    """Where the link leads, the same program is there, and would write."""
    pocket, link = place / "writer", place / "writer-link"
    for directory in (pocket, outside):
        (directory / "app.py").write_text(WRITE)
        for path in (directory / "out", directory / "deep/out"):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
    link.symlink_to(outside)
    statuses = []
    try:
        with swapping(pocket, link) as count:
            for _ in range(LAUNCHES):
                statuses.append(daemon.pocket("writer", check=False).returncode)
                assert goes_on(count)
    finally:
        if pocket.is_symlink():
            os.rename(pocket, place / "spare")
            os.rename(link, pocket)
            os.rename(place / "spare", link)
    assert set(statuses) <= {0, 125}, statuses
    assert list(outside.rglob("probe")) == []
    subprocess.run([sys.executable, "app.py"], cwd=link, check=True, capture_output=True, timeout=TIMEOUT)
    assert len(list(outside.rglob("probe"))) == 2
    link.unlink()


def test_a_directory_that_is_renamed_while_it_is_mounted_stays_what_it_is(enter, controls, place, outside):
    """By its old name others reach what a link there leads to; the pocket has its own directory, and no way up."""
    (outside / "marker").write_text("of the host")
    (outside / "marker").chmod(0o644)
    inside = enter("moved")
    try:
        (place / "moved").rename(place / "away")
        (place / "moved").symlink_to(outside)
        assert controls("user").attempt("files.read", path=f"{place}/moved/marker") == {"value": "of t"}
        for thread in THREADS:
            for path in (f"{place}/moved/marker", "marker", "../away/marker"):
                assert outcome(inside.attempt("files.read", thread, path=path)) == "ENOENT"
            for directory in (".", f"{place}/moved"):
                found = outcome(inside.attempt("files.climb", thread, directory=directory, marker=f"{outside}/marker"))
                assert found == "ENOENT"
        (place / "away/new").write_text("its own")
        assert inside.attempt("files.read", path=f"{place}/moved/new") == {"value": "its "}
    finally:
        inside.end()
        (place / "moved").unlink()


@pytest.fixture
def as_user(daemon, users_place):
    """A function that runs a line of Python in a pocket for an unprivileged user, by `pocket run` with options."""

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        words = daemon.command("run", "--service", "plain", *options, "-c", "print('begun')")
        environment = {**daemon.environment, "HOME": "/"}
        return subprocess.run(
            words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, user=UID, group=UID,
            extra_groups=[],
        )  # fmt: skip

    return run


@pytest.fixture
def of_root(daemon):
    """A directory of root's that others may look at."""
    made = Path(tempfile.mkdtemp(prefix="of-root-", dir=daemon.place.parent))
    made.chmod(0o755)
    return made


def test_a_mount_point_is_made_by_who_may_make_it(as_user, of_root, users_place):
    """In root's directory a mount point is only seen; in the user's own, and for root in its own, it is made."""
    own = users_place / "own"
    own.mkdir()
    os.chown(own, UID, UID)
    for options in (
        ("--dir", str(of_root), "--mount", f"{own}:{of_root}/directory"),
        ("--dir", str(of_root), "--mount", f"/etc/hostname:{of_root}/file"),
        ("--dir", str(own), "--mount", f"{of_root}:/shown:rw", "--mount", f"{own}:/shown/in/it"),
    ):
        done = as_user(*options)
        assert done.stdout == "begun\n", done
        assert list(of_root.iterdir()) == []
    assert as_user("--dir", str(own), "--mount", f"{of_root}:{own}/made").stdout == "begun\n"
    assert (own / "made").stat().st_uid == UID


def test_a_mount_point_that_becomes_a_link_is_made_nowhere_else(as_user, of_root, users_place):
    """A link in the user's own directory, to where the pocket sees root's."""
    own, link = users_place / "real", users_place / "link"
    own.mkdir()
    os.chown(own, UID, UID)
    link.symlink_to("/shown")
    options = ("--dir", str(users_place), "--mount", f"{of_root}:/shown:rw", "--mount")
    said = set()
    with swapping(own, link) as count:
        for number in range(LAUNCHES):
            said.add(as_user(*options, f"{of_root}:{users_place}/real/made-{number}").stdout)
            assert goes_on(count)
    assert list(of_root.iterdir()) == [] and "begun\n" in said


@pytest.mark.parametrize("own_names", [False, True], ids=["", "a mount namespace of its own"])
def test_a_tree_is_attached_where_its_target_says_and_nowhere_else(daemon, users_place, own_names):
    """A link in the user's own directory leads to the worker's /proc, and a tree over that to a file of root's: what
    root writes on the way to a worker's first line would go there."""
    victim = Path(tempfile.mkdtemp(prefix="victim-", dir=daemon.place.parent))
    victim.chmod(0o755)
    (victim / "file").write_text("of root\n")
    (victim / "file").chmod(0o644)
    fake = users_place / "fake"
    (fake / "self").mkdir(parents=True)
    for name in ("oom_score_adj", "setgroups", "uid_map", "gid_map"):
        (fake / "self" / name).symlink_to("/srv/victim/file")
    (users_place / "root").symlink_to("/")
    words = daemon.command(
        *("run", "--service", "plain", "--dir", str(users_place), "--mount", f"{fake}:{users_place}/root/proc"),
        *("--mount", f"{victim}:/srv/victim:rw", "-c", "print(open('/proc/self/comm').read())"),
    )
    enter = ["unshare", "-Urm"] if own_names else []
    done = subprocess.run(
        [*enter, *words], env={**daemon.environment, "HOME": "/"}, cwd=ROOT, capture_output=True, text=True,
        timeout=TIMEOUT, user=UID, group=UID, extra_groups=[],
    )  # fmt: skip
    assert (victim / "file").read_text() == "of root\n"
    assert done.returncode == 125 and "symbolic link" in done.stderr, done
