"""deploy/prepare: what it says when it cannot go on, and that it costs nothing when there is nothing to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as `make run` does")


def prepare(*before: str, top: Path = TOP, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `deploy/prepare run` by way of the command `before`."""
    return subprocess.run(
        [*before, str(top / "deploy" / "prepare"), "run"],
        env={**os.environ, "PYTHON": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert done.stderr.startswith("prepare: cannot go on: "), done.stderr
    assert not done.stdout
    return done.stderr


def test_a_user_without_root_is_told_to_use_it():
    # a copy, since this tree may lie where others cannot look
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        top.chmod(0o755)
        shutil.copytree(TOP / "deploy", top / "deploy")
        said = refused(prepare("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--", top=top))
    assert "not root" in said and "sudo make run" in said


def test_a_kernel_that_is_too_old_is_named_with_the_version_needed():
    said = refused(prepare("setarch", "--uname-2.6"))
    assert "kernel 2.6." in said and "6.1 or newer" in said


def test_a_host_without_cgroup_v2_is_told_how_to_mount_it():
    said = refused(prepare("unshare", "--mount", "sh", "-c", 'umount -a -l -t cgroup2; exec "$0" "$@"'))
    assert "no cgroup v2 hierarchy is mounted" in said and "mount -t cgroup2" in said


def test_a_chosen_python_that_is_too_old_is_refused(tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert f"PYTHON={old} is not a Python 3.11 or newer" in refused(prepare(PYTHON=str(old)))


def test_without_a_network_the_first_setup_says_so_and_the_next_tries_again(tmp_path):
    top = tmp_path / "a path with spaces"
    shutil.copytree(TOP / "deploy", top / "deploy")
    alone = {"PIP_RETRIES": "1", "PIP_CONFIG_FILE": "/dev/null", "PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    for _ in range(2):
        done = prepare("unshare", "--net", top=top, **alone)
        assert done.returncode == 1
        assert "does not reach the package servers" in done.stderr, done.stderr
    assert not (top / ".venv" / ".stamps" / "run").exists()


def test_with_all_in_place_it_is_silent():
    if not (TOP / ".venv" / ".stamps" / "library").exists():
        pytest.skip("this tree was not set up by make")
    done = prepare(PYTHON=os.environ.get("PYTHON", ""))
    assert (done.returncode, done.stderr) == (0, "")
