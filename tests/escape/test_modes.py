"""No call sets a setuid or setgid bit, in a directory where a worker may write and whose files are root's on disk."""

from __future__ import annotations

import os
import stat

import pytest

from tests.escape.attempt import THREADS, outcome
from tests.escape.inside.kernel import NUMBERS

CALLS = (
    "chmod", "fchmod", "fchmodat", "fchmodat2", "open", "openat", "O_TMPFILE", "open O_TMPFILE", "creat", "mkdir",
    "mkdirat", "mknod", "mknodat", "openat2",
)  # fmt: skip
MODES = {"setuid": 0o4755, "setgid": 0o2755}
STRIPPED = ("mkdir", "mkdirat")  # whose bits the kernel takes off itself: the call goes through, without them


def has(how):
    return NUMBERS.get(how.split()[0], 0) is not None


@pytest.mark.parametrize("thread", THREADS)
@pytest.mark.parametrize("garbage", [False, True], ids=["plain", "garbage above"])
@pytest.mark.parametrize("bit", MODES)
@pytest.mark.parametrize("how", CALLS)
def test_no_call_sets_the_bit(pockets, controls, place, how, bit, garbage, thread):
    if not has(how):
        pytest.skip(f"this machine has no {how}")
    given = {"how": how, "mode": MODES[bit], "garbage": garbage}
    prisoner = pockets("prisoner")
    mine, its = place / "control", place / "prisoner"
    wanted = 0 if how in STRIPPED else MODES[bit] & 0o7000
    assert controls("user").attempt("files.set_bits", directory=str(mine), **given) == {"value": wanted}
    assert prisoner.attempt("files.set_bits", directory=str(its), how="openat", mode=0o755) == {"value": 0}
    found = outcome(prisoner.attempt("files.set_bits", thread, directory=str(its), **given))
    assert found == ("ENOSYS" if how in ("openat2", "fchmodat2") and found != "EPERM" else "EPERM")
    for path in its.iterdir():
        status = path.lstat()
        assert not (stat.S_ISREG(status.st_mode) and status.st_mode & 0o6000 and path.name == "bits"), path


@pytest.mark.parametrize("thread", THREADS)
def test_files_made_there_are_roots_on_disk(pockets, place, thread):
    """So a bit on one of them would be root's."""
    pockets("prisoner").attempt("files.set_bits", thread, directory=str(place / "prisoner"), how="openat", mode=0o755)
    status = os.stat(place / "prisoner/bits")
    if status.st_uid != 0:
        pytest.skip("this file system maps no ids")
    assert status.st_uid == (place / "prisoner").stat().st_uid
