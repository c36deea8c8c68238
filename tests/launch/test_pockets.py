"""Pockets that have a definition: their program, rights, limits, packages; and what ps, logs and stop say of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from cgroup.hierarchy import Hierarchy
from pocketd.client import login
from pocketd.command import show
from tests.conftest import TIMEOUT, service_environment, toml_table, wait_for

SHOW = """
import json, os, sys
def can_write(path):
    try:
        with open(path, "w"): return True
    except OSError as e: return e.strerror
print(json.dumps({
    "arguments": sys.argv[1:], "mode": os.environ.get("MODE"), "uid": os.getuid(), "path": sys.path[:2],
    "program": can_write("/pocket/new"), "out": can_write("/pocket/out/new"), "extra": can_write("/extra/new"),
    "read": open("/extra/given").read(), "host": os.uname().nodename,
}))
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A pocket's directory `app`, and `extra` beside it."""
    (tmp_path / "app").mkdir()
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra/given").write_text("given")
    (tmp_path / "app/show.py").write_text(SHOW)
    return tmp_path


def configuration(place: Path, more: str = "") -> str:
    return f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.show]
        service = "plain"
        dir = "{place / "app"}"
        program = "show.py"
        env = {{ MODE = "fast" }}
        mounts = ["{place / "extra"}:/extra"]
        allow = {{ write = ["out"] }}
        {more}
    """


def test_a_pocket_runs_its_program_with_its_rights(own_pocketd, place):
    daemon = own_pocketd(configuration(place))
    found = json.loads(daemon.pocket("show", "a", "b c", cwd="/").stdout)
    assert found["arguments"] == ["a", "b c"]
    assert (found["mode"], found["host"], found["read"]) == ("fast", "show", "given")
    assert (found["program"], found["out"]) == ("Read-only file system", True)
    assert found["extra"] == "Read-only file system"
    assert found["uid"] >= 1_900_000_000
    made = (place / "app/out/new").stat()
    assert (made.st_uid, made.st_gid) == (0, 0)  # on disk the owner's
    again = json.loads(daemon.pocket("run", "-p", "show").stdout)
    assert again["uid"] == found["uid"]
    daemon.end()
    daemon.start()
    assert json.loads(daemon.pocket("show").stdout)["uid"] == found["uid"]  # the same for ever


def test_a_pockets_packages_come_first(own_pocketd, place):
    packages = place / "app/packages"
    packages.mkdir()
    (packages / "ownlib.py").write_text("value = 7")
    (place / "app/show.py").write_text("import ownlib; print(ownlib.value, ownlib.__file__)")
    daemon = own_pocketd(configuration(place, 'packages = "packages"'))
    assert daemon.pocket("show").stdout == f"7 {packages}/ownlib.py\n"


def test_packages_that_the_service_has_imported_in_another_version_are_refused(own_pocketd, place):
    packages = place / "app/packages"
    (packages / "numpy").mkdir(parents=True)
    (packages / "numpy/__init__.py").write_text("")
    (packages / "numpy-1.0.0.dist-info").mkdir()
    text = configuration(place, 'packages = "packages"').replace('"python"\n', '"python"\n preload = ["numpy"]\n')
    daemon = own_pocketd(text)
    done = daemon.pocket("show", check=False)
    assert done.returncode == 125
    assert "holds numpy 1.0.0, and the service has imported numpy" in done.stderr


def test_a_limit_without_its_controller_is_refused_by_name(own_pocketd, place):
    with Hierarchy.find() as hierarchy:
        controllers = hierarchy.controllers
    if "memory" in controllers:
        pytest.skip("this host's cgroup2 has the memory controller")
    daemon = own_pocketd(configuration(place, 'limits = { "memory.max" = "1G" }'))
    done = daemon.pocket("show", check=False)
    assert done.returncode == 125
    assert "memory.max" in done.stderr and "controller" in done.stderr
    daemon.pocket("run", "--service", "plain", "-c", "", cwd=place / "app")  # what has no limit runs


def test_a_limit_is_a_kernel_file_of_the_pocket(own_pocketd, place, begun):
    with Hierarchy.find() as hierarchy:
        if "hugetlb" not in hierarchy.controllers:
            pytest.skip("this host's cgroup2 has no hugetlb controller")
    (place / "app/show.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    daemon = own_pocketd(configuration(place, 'limits = { "hugetlb.2MB.max" = "4M" }'))
    process = begun(daemon.command("show"), env=daemon.environment, stdin=subprocess.PIPE)
    (pocket,) = daemon.cgroup_path.glob("*.scope/service/pockets/show")
    assert (pocket / "hugetlb.2MB.max").read_text() == f"{4 << 20}\n"
    process.communicate(timeout=TIMEOUT)
    assert wait_for(lambda: not pocket.exists())


def test_ps_logs_and_stop(own_pocketd, place, begun):
    (place / "app/show.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    (place / "app/talk.py").write_text("def say(text):\n    print(text, flush=True)\n")
    daemon = own_pocketd(configuration(place))
    process = begun(daemon.command("show"), env=daemon.environment, stdin=subprocess.PIPE)
    shown = daemon.ps()
    (worker,) = shown["workers"]
    assert (worker["pocket"], worker["service"], worker["mode"], worker["state"]) == (
        "show",
        "plain",
        "program",
        "running",
    )
    assert worker["session"] in Path(f"/proc/{worker['pid']}/cgroup").read_text()
    assert 0 < worker["private"] < worker["private"] + worker["shared"]
    assert worker["age"] >= 0 and worker["cpu"] > 0
    assert [(p["name"], p["state"], p["workers"]) for p in shown["pockets"]] == [("show", "running", 1)]
    assert [(t["kind"], t["state"]) for t in shown["templates"]] == [("root", "ready")]
    assert "show" in daemon.pocket("ps").stdout
    with login("show", runtime_dir=str(daemon.runtime_dir)) as session:
        session.call("talk:say", "hello log")
    assert wait_for(lambda: any("hello log" in line for line in daemon.pocket("logs", "show").stdout.splitlines()))
    assert json.loads(daemon.pocket("logs", "show", "--json").stdout)["lines"]
    stopped = json.loads(daemon.pocket("stop", "show", "--json").stdout)
    assert stopped == {"name": "show", "stopped": 1}
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM
    assert daemon.workers() == []


def test_what_a_pocket_writes_is_one_line_of_its_log_and_no_terminal_obeys_it(own_pocketd, place):
    """Of the characters that end a line in Unicode a line feed alone does here."""
    (place / "app/talk.py").write_text("import os\ndef say(text):\n    os.write(1, text.encode() + b'\\n')\n")
    daemon = own_pocketd(configuration(place))
    with login("show", runtime_dir=str(daemon.runtime_dir)) as session:
        session.call("talk:say", "begin\x0b\x85\u2028\x1b[2J\u202e\tend")
    for name in ("show", "plain"):
        assert wait_for(lambda name=name: "begin" in daemon.pocket("logs", name).stdout)
        (line,) = (line for line in logged(daemon, name) if "begin" in line)
        assert line.endswith(" pocket show begin\x0b\x85\u2028\x1b[2J\u202e\tend")
        (shown,) = (line for line in daemon.pocket("logs", name).stdout.split("\n") if "begin" in line)
        assert shown.endswith(" pocket show begin\\x0b\\x85\\u2028\\x1b[2J\\u202e\tend")


def logged(daemon, name) -> list[str]:
    return json.loads(daemon.pocket("logs", name, "--json").stdout)["lines"]


def test_no_cell_of_a_table_is_obeyed_or_makes_a_row():
    assert show.columns(("POCKET",), [("one\n\x1b[2Jtwo",)]) == "POCKET\none\\n\\x1b[2Jtwo\n"


def test_who_may_run_a_pocket(own_pocketd, place):
    daemon = own_pocketd(configuration(place, 'may_run = ["nobody"]').replace("pocket.show", "pocket.theirs"))
    daemon.end()
    daemon.config.write_text(
        daemon.config.read_text() + configuration(place).partition("[pocket")[2].join(["[pocket", ""])
    )
    usual = daemon.runtime_dir
    daemon.runtime_dir = Path(tempfile.mkdtemp(prefix="pocketd-test-"))
    try:
        daemon.start()
        os.chmod(daemon.runtime_dir / "pocketd.sock", 0o666)
        nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/", "check": False}
        done = daemon.pocket("show", **nobody)
        assert done.returncode == 125
        assert "may not run show" in done.stderr
        done = daemon.pocket("theirs", **nobody)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["uid"] >= 1_900_000_000
        assert "only root" in daemon.pocket("plain", "off", **nobody).stderr
    finally:
        daemon.close()
        shutil.rmtree(daemon.runtime_dir)
        daemon.runtime_dir = usual


def test_a_bad_pocket_disables_only_itself(own_pocketd, place):
    text = configuration(place) + f'\n[pocket.bad]\nservice = "plain"\ndir = "{place / "missing"}"\nprogram = "x.py"\n'
    daemon = own_pocketd(text)
    assert json.loads(daemon.pocket("show").stdout)["mode"] == "fast"
    done = daemon.pocket("bad", check=False)
    assert done.returncode == 125 and "missing" in done.stderr
    assert {p["name"]: p["state"] for p in daemon.ps()["pockets"]} == {"bad": "invalid", "show": "idle"}


def test_a_name_that_is_none_ends_with_127(pocketd):
    done = pocketd.pocket("nobody", "x", check=False)
    assert (done.returncode, done.stdout) == (127, "")
    assert "there is no service 'nobody'" in done.stderr
