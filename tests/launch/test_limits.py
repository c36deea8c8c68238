"""`pocket set` and `pocket inspect`: limits changed live, kept or taken back, and what the kernel holds."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from cgroup.hierarchy import Hierarchy
from tests.conftest import service_environment, toml_table

LIMIT = "hugetlb.2MB.max"


@pytest.fixture(autouse=True)
def _controller():
    with Hierarchy.find() as hierarchy:
        if "hugetlb" not in hierarchy.controllers:
            pytest.skip("this host's cgroup2 has no hugetlb controller")


@pytest.fixture
def daemon(own_pocketd, tmp_path: Path):
    (tmp_path / "app").mkdir()
    (tmp_path / "app/app.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    return own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.app]
        service = "plain"
        dir = "{tmp_path / "app"}"
        program = "app.py"
        limits = {{ "{LIMIT}" = "4M" }}
    """)


@pytest.fixture
def running(daemon, begun):
    return begun(daemon.command("app"), env=daemon.environment, stdin=subprocess.PIPE)


def limit(daemon) -> str:
    (pocket,) = daemon.cgroup_path.glob("*.scope/service/pockets/app")
    return (pocket / LIMIT).read_text().strip()


def test_set_changes_a_running_pocket_and_reload_takes_it_back(daemon, running):
    assert limit(daemon) == str(4 << 20)
    daemon.pocket("set", "app", f"{LIMIT}=8M")
    assert limit(daemon) == str(8 << 20)
    daemon.pocket("set", "app", "hugetlb.1GB.max=1G")
    daemon.pocket("reload")
    assert limit(daemon) == str(4 << 20)
    (pocket,) = daemon.cgroup_path.glob("*.scope/service/pockets/app")
    assert (pocket / "hugetlb.1GB.max").read_text().strip() == "max"


def test_what_is_set_holds_for_later_launches_until_reload(daemon, begun):
    daemon.pocket("set", "app", f"{LIMIT}=8M")
    first = begun(daemon.command("app"), env=daemon.environment, stdin=subprocess.PIPE)
    assert limit(daemon) == str(8 << 20)
    first.kill()
    assert daemon.settled()
    daemon.pocket("reload")
    begun(daemon.command("app"), env=daemon.environment, stdin=subprocess.PIPE)
    assert limit(daemon) == str(4 << 20)


def test_persist_writes_the_drop_in_and_nothing_else_of_it(daemon, begun):
    drop_in = daemon.config.with_name("pocketd.conf.d") / "90-app.conf"
    daemon.pocket("set", "--persist", "app", f"{LIMIT}=6M")
    daemon.pocket("set", "--persist", "plain", f"{LIMIT}=64M")
    assert tomllib.loads(drop_in.read_text()) == {"pocket": {"app": {"limits": {LIMIT: "6M"}}}}
    daemon.end()
    daemon.start()
    begun(daemon.command("app"), env=daemon.environment, stdin=subprocess.PIPE)
    assert limit(daemon) == str(6 << 20)
    shown = json.loads(daemon.pocket("inspect", "plain", "--json").stdout)
    (held,) = shown["cgroups"]
    assert held["cgroup"].endswith("pocketd-plain.scope/service")
    (scope,) = daemon.cgroup_path.glob("*.scope/service")
    assert (scope / LIMIT).read_text().strip() == str(64 << 20)


@pytest.mark.parametrize(
    "words, said",
    [
        (("app", "memory.maxx=1M"), "did you mean 'memory.max'?"),
        (("app", f"{LIMIT}=lots"), "is not a size"),
        (("nobody", f"{LIMIT}=4M"), "there is no pocket or service 'nobody'"),
        (("app",), "set needs a name and limits"),
        (("app", "memory.max"), "set needs a name and limits"),
    ],
)
def test_what_cannot_be_set_is_refused_in_words(daemon, words, said):
    done = daemon.pocket("set", *words, check=False)
    assert done.returncode != 0
    assert said in done.stderr


def test_inspect_shows_the_definition_and_where_each_limit_stands(daemon, running):
    shown = json.loads(daemon.pocket("inspect", "app", "--json").stdout)
    assert shown["definition"]["program"] == "app.py"
    assert shown["definition"]["limits"] == {LIMIT: str(4 << 20)}
    (session,) = shown["sessions"]
    assert session["cgroup"].split("/")[-2] == "app"
    assert not session["adopted"]
    text = daemon.pocket("inspect", "app").stdout
    assert "program = app.py" in text
