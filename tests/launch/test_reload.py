"""Updating what runs: generations, private copies of models, stale templates, the configuration read again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from nsutil.syscalls import libc
from pocketd.client import errors, login
from tests.client.test_python_runtime import TWO
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for

APP = """
import kit, os

def version():
    return kit.VERSION

def late():
    import kit.late
    return [kit.VERSION, kit.late.VERSION]"""


class Environment:
    """A Python environment of the test's own, with a package `kit` that has a version and a part imported late."""

    def __init__(self, place: Path):
        self.python = place / "env/bin/python"
        made = [sys.executable, "-m", "venv", "--without-pip", str(place / "env")]
        subprocess.run(made, check=True, timeout=TIMEOUT)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.kit = place / "env/lib" / version / "site-packages/kit"
        self.kit.mkdir()
        self.install(1)

    def install(self, version: int) -> None:
        """As an installer does it: each file written beside and renamed over the old."""
        body = f"""
            VERSION = {version}
        """
        for name in ("__init__.py", "late.py"):
            new = self.kit / f"{name}.new"
            new.write_text("\n".join(line[12:] for line in body.splitlines()))
            new.rename(self.kit / name)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/app.py").write_text(APP)
    return tmp_path / "app"


def configuration(environment: Environment, app: Path, more: str = "", preload: str = "kit") -> str:
    return f"""
        [service.kit]
        runtime = "python"
        python = "{environment.python}"
        preload = ["{preload}"]
        {more}

        [pocket.app]
        service = "kit"
        dir = "{app}"
    """


@pytest.fixture
def daemon(own_pocketd, environment: Environment, app: Path) -> Pocketd:
    return own_pocketd(configuration(environment, app))


def enter(daemon: Pocketd):
    return login("app", runtime_dir=str(daemon.runtime_dir))


def generations(daemon: Pocketd) -> list[int]:
    (service,) = daemon.ps()["services"]
    return [g["number"] for g in service["generations"]]


def test_reload_under_load_loses_no_request(daemon):
    """Sessions of the old generation go on; logins never fail; the old one ends with its last session."""
    stop, counts, failures = threading.Event(), [0, 0, 0], []

    def work(n: int) -> None:
        try:
            while not stop.is_set():
                with enter(daemon) as session:
                    for _ in range(20):
                        assert session.call("app:version") == 1
                counts[n] += 1
        except BaseException as e:
            failures.append(e)

    with enter(daemon) as old:
        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for number in (2, 3, 4):
            reply = json.loads(daemon.pocket("reload", "kit", "--json").stdout)
            assert reply["generation"] == number
            seen = counts[:]
            assert wait_for(lambda seen=seen: failures or all(c > s for c, s in zip(counts, seen, strict=True)))
        stop.set()
        for thread in threads:
            thread.join(TIMEOUT)
        assert not failures
        assert old.call("app:version") == 1
        assert wait_for(lambda: generations(daemon) == [4, 1])
        (worker,) = daemon.workers()
        assert worker["generation"] == 1
    assert wait_for(lambda: generations(daemon) == [4])
    assert wait_for(lambda: [p.name for p in daemon.cgroup_path.glob("*.scope")] == ["pocketd-kit:4.scope"])
    assert [p.name for p in (daemon.runtime_dir / "services").iterdir()] == ["kit:4"]


def test_a_reload_that_fails_leaves_the_old_in_place_and_says_why(daemon, environment, app):
    with enter(daemon) as session:
        daemon.config.write_text(configuration(environment, app, preload="missing_kit"))
        done = daemon.pocket("reload", "kit", check=False)
        assert done.returncode == 125
        assert "missing_kit" in done.stderr
        assert "the generation before (1) stays in its place" in done.stderr
        assert session.call("app:version") == 1
        with enter(daemon) as other:
            assert other.call("app:version") == 1
    assert generations(daemon) == [1]
    assert [p.name for p in daemon.cgroup_path.glob("*.scope")] == ["pocketd-kit.scope"]


def test_replace_ends_the_old_first(own_pocketd, environment, app):
    daemon = own_pocketd(configuration(environment, app, 'reload = "replace"'))
    with enter(daemon) as session:
        assert session.call("app:version") == 1
        daemon.pocket("reload", "kit")
        with pytest.raises(errors.PocketError):
            session.call("app:version")
    with enter(daemon) as session:
        assert session.call("app:version") == 1
    assert generations(daemon) == [2]


def test_pocketd_killed_while_two_generations_are_there(daemon):
    with enter(daemon) as session:
        daemon.pocket("reload", "kit")
        daemon.end(signal.SIGKILL)
        assert session.call("app:version") == 1
        daemon.start()
        assert generations(daemon) == [2, 1]
        with enter(daemon) as other:
            assert other.call("app:version") == 1
            assert sorted(w["generation"] for w in daemon.workers()) == [1, 2]
        assert session.call("app:version") == 1
    assert wait_for(lambda: generations(daemon) == [2])


def test_pocketd_killed_in_mid_reload_keeps_the_old(own_pocketd, environment, app, tmp_path):
    """The new generation's template was not ready: the next pocketd ends it."""
    fifo = environment.kit / "gate"
    (environment.kit / "__init__.py").write_text(
        f"import os\nVERSION = 1\nif os.path.exists({str(fifo)!r}): open({str(fifo)!r}).read()\n"
    )
    daemon = own_pocketd(configuration(environment, app))
    with enter(daemon) as session:
        os.mkfifo(fifo)
        reload = daemon.popen("reload", "kit", stderr=subprocess.DEVNULL)
        scope = daemon.cgroup_path / "pocketd-kit:2.scope/service/templates/1/cgroup.procs"
        assert wait_for(lambda: scope.exists() and scope.read_text())
        daemon.end(signal.SIGKILL)
        reload.wait(TIMEOUT)
        daemon.start()
        assert generations(daemon)[0] == 1
        assert wait_for(lambda: generations(daemon) == [1])
        assert session.call("app:version") == 1
        with enter(daemon) as other:
            assert other.call("app:version") == 1
    assert not scope.parents[3].exists()


# -- files


def test_a_deployed_model_is_a_private_copy(own_pocketd, app, tmp_path):
    """Whoever writes over the file tears nothing; a reload takes the new one, or says what is wrong with it."""
    pytest.importorskip("onnxruntime")
    model = tmp_path / "two.onnx"
    model.write_bytes(TWO)
    daemon = own_pocketd(f"""
        [service.onnx]
        runtime = "python"
        preload = ["onnxruntime"]
        env = {toml_table(service_environment())}
        models = {{ two = "{model}" }}

        [pocket.app]
        service = "onnx"
        dir = "{app}"
        allow = {{ models = ["two"] }}
    """)

    def second(session) -> list[list[float]]:
        """The second of the model's results, a product, or in the other model a difference."""
        a, b = np.array([[1, 2, 3]], np.float32), np.array([[4, 5, 7]], np.float32)
        return session.model("two")(a, b)[1].tolist()

    copies = daemon.state_dir / "models"
    with enter(daemon) as old:
        assert second(old) == [[4, 10, 21]]
        with open(model, "r+b") as file:  # the same file, as cp writes it
            file.write(b"\0" * len(TWO))
        done = daemon.pocket("reload", "onnx", check=False)
        assert done.returncode == 125
        assert f"two ({model})" in done.stderr or str(model) in done.stderr
        with enter(daemon) as new:
            assert second(new) == [[4, 10, 21]]
        model.write_bytes(TWO.replace(b"Mul", b"Sub"))
        daemon.pocket("reload", "onnx")
        with enter(daemon) as new:
            assert second(new) == [[-3, -3, -4]]
        assert second(old) == [[4, 10, 21]]
        assert len(list(copies.iterdir())) == 2
    daemon.pocket("off", "onnx")
    assert list(copies.iterdir()) == []


def test_a_service_is_shown_the_copies_of_its_own_models_alone(own_pocketd, tmp_path):
    """Two files of one content are two copies: none is taken away for the other's sake."""
    pytest.importorskip("onnxruntime")
    for name, content in {"one": TWO, "same": TWO, "two": TWO.replace(b"Mul", b"Sub")}.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    models = {"first": ["one"], "second": ["same", "two"]}
    daemon = own_pocketd(
        "".join(
            f"""
            [service.{service}]
            runtime = "python"
            preload = ["onnxruntime"]
            env = {toml_table(service_environment())}
            models = {toml_table({name: f"{tmp_path}/{name}.onnx" for name in names})}
            """
            for service, names in models.items()
        )
    )
    for service in models:
        daemon.pocket(service, "on")
    for service in daemon.ps()["services"]:
        shown = list(Path(f"/proc/{service['pid']}/root{daemon.state_dir}/models").glob("*/*"))
        assert sorted(path.stem for path in shown) == models[service["name"]]
        with pytest.raises(OSError, match="Read-only"):
            os.open(shown[0], os.O_WRONLY)


def test_a_template_is_stale_when_a_file_it_imported_changes(daemon, environment):
    """New logins get the new version and nothing of the old; a session that runs keeps what it has imported."""
    with enter(daemon) as old:
        assert old.call("app:version") == 1
        (before,) = daemon.ps()["templates"]
        environment.install(2)
        assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"] == [2])
        with enter(daemon) as new:
            assert new.call("app:late") == [2, 2]
        assert old.call("app:version") == 1
        assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"]] == [2])
        assert not Path(f"/proc/{before['pid']}").exists()


def test_a_directory_that_was_replaced_is_watched_as_the_one_before(daemon, environment, tmp_path):
    with enter(daemon) as session:
        assert session.call("app:version") == 1
    new = tmp_path / "new"
    shutil.copytree(environment.kit, new)
    shutil.rmtree(environment.kit)
    new.rename(environment.kit)
    assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"] == [2])
    environment.install(2)
    assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"] == [3])
    with enter(daemon) as session:
        assert session.call("app:version") == 2


def test_files_that_changed_while_no_pocketd_ran(daemon, environment):
    with enter(daemon) as session:
        assert session.call("app:version") == 1
    daemon.end(signal.SIGKILL)
    environment.install(2)
    daemon.start()
    assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"] == [2])
    with enter(daemon) as session:
        assert session.call("app:late") == [2, 2]


def test_a_broken_installation_is_told_and_mended(daemon, environment):
    with enter(daemon) as session:
        assert session.call("app:version") == 1
    good = (environment.kit / "__init__.py").read_text()
    (environment.kit / "__init__.py").write_text("this is no Python\n")
    assert wait_for(lambda: "template-failed" in daemon.log.read_text())
    with pytest.raises(errors.PocketError, match="SyntaxError"):
        enter(daemon)
    (environment.kit / "__init__.py").write_text(good)
    with enter(daemon) as session:
        assert session.call("app:version") == 1


def test_a_pockets_change_is_run_at_once(daemon, app):
    with enter(daemon) as session:
        assert session.call("app:version") == 1
    (app / "app.py").write_text("def version(): return 'new'")
    with enter(daemon) as session:
        assert session.call("app:version") == "new"


# -- the configuration


def test_hangup_reads_the_configuration_again(daemon, environment, app):
    """New pockets appear, broken ones are told as invalid, and what runs keeps its old definition."""
    with enter(daemon) as session:
        other = f'[pocket.other]\nservice = "kit"\ndir = "{app}"\n[pocket.bad]\nservice = "kit"\ndir = "/"\n'
        daemon.config.write_text(configuration(environment, app, 'exit = "full"') + other)
        daemon.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: {"app", "other", "bad"} <= {p["name"] for p in daemon.ps()["pockets"]})
        states = {p["name"]: p["state"] for p in daemon.ps()["pockets"]}
        assert states == {"app": "running", "other": "idle", "bad": "invalid"}
        assert session.call("app:version") == 1
        assert generations(daemon) == [1]
        daemon.config.write_text("this is no TOML")
        daemon.process.send_signal(signal.SIGHUP)
        assert wait_for(lambda: "config-problem" in daemon.log.read_text().split("reloaded", 1)[1])
        assert session.call("app:version") == 1


def test_a_service_that_lost_its_definition_can_be_switched_off(daemon):
    with enter(daemon) as session:
        daemon.config.write_text('[service.another]\nruntime = "exec"\n')
        daemon.pocket("reload")
        assert session.call("app:version") == 1
        daemon.pocket("off", "kit")
        with pytest.raises(errors.PocketError):
            session.call("app:version")
    daemon.pocket("reload")
    assert [s["name"] for s in daemon.ps()["services"]] == ["another"]


def test_a_file_that_changes_while_a_template_loads(own_pocketd, environment, app):
    """What it imported is not what lies there when it is ready: it is made again."""
    gate = environment.kit / "gate"
    os.mkfifo(gate)
    (environment.kit / "late.py").write_text("VERSION = 1\n")
    (environment.kit / "__init__.py").write_text(
        f"import os\nfrom kit.late import VERSION\nif os.path.exists({str(gate)!r}): open({str(gate)!r}).read()\n"
    )
    daemon = own_pocketd(configuration(environment, app))
    on = daemon.popen("on", "kit", stderr=subprocess.PIPE)
    with open(gate, "w"):  # somebody reads it: late.py has been imported
        (environment.kit / "late.py").write_text("VERSION = 2\n")
        gate.unlink()
    assert on.wait(TIMEOUT) == 0
    on.communicate()
    assert wait_for(lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"] == [2])
    with enter(daemon) as session:
        assert session.call("app:version") == 2


def test_an_authors_change_is_acted_on_and_a_wrong_one_told(daemon, environment, app):
    """pocket.toml is read again, and nothing of the operator's is in force before the operator says so."""
    other = f'[pocket.other]\nservice = "kit"\ndir = "{app}"\n'
    daemon.config.write_text(configuration(environment, app) + other)
    (app / "pocket.toml").write_text('program = "shown.py"\n')
    (app / "shown.py").write_text("print('shown')")
    assert wait_for(lambda: daemon.pocket("app", check=False).stdout == "shown\n")
    (app / "pocket.toml").write_text("programm = 7\n")
    assert wait_for(lambda: {p["name"]: p["state"] for p in daemon.ps()["pockets"]} == {"app": "invalid"})
    assert "did you mean 'program'" in daemon.pocket("app", check=False).stderr
    (app / "pocket.toml").write_text('program = "shown.py"\n')
    assert wait_for(lambda: daemon.pocket("app", check=False).stdout == "shown\n")


def test_a_pockets_directory_that_was_replaced_is_its_authors_still(daemon, environment, app):
    daemon.config.write_text(configuration(environment, app) + f'[pocket.other]\nservice = "kit"\ndir = "{app}"\n')
    app.rename(f"{app}.old")
    app.mkdir()
    for name in ("one", "two"):
        (app / f"{name}.py").write_text(f"print('{name}')")
    (app / "pocket.toml").write_text('program = "one.py"\n')
    assert wait_for(lambda: daemon.pocket("app", check=False).stdout == "one\n")
    (app / "pocket.toml").write_text('program = "two.py"\n')
    assert wait_for(lambda: daemon.pocket("app", check=False).stdout == "two\n")


def test_changes_of_many_authors_at_once_are_one_reading(own_pocketd, tmp_path):
    """Each reading is of the whole configuration, and pocketd answers nobody meanwhile."""
    places = [tmp_path / f"p{n}" for n in range(20)]
    for place in places:
        place.mkdir()
    pockets = "\n".join(f'[pocket.{place.name}]\nservice = "programs"\ndir = "{place}"\n' for place in places)
    daemon = own_pocketd(f'[service.programs]\nruntime = "exec"\n{pockets}')
    with opens(daemon.config) as counted:
        for place in places:
            (place / "pocket.toml").write_text("programm = 7\n")
        assert wait_for(lambda: {p["state"] for p in daemon.ps()["pockets"]} == {"invalid"})
        assert counted() == 1


@contextlib.contextmanager
def opens(path: Path):
    """A function that says how often a file was opened, by inotify(7)."""
    opened, closed = 0x20, 0x10  # IN_OPEN; and IN_CLOSE_NOWRITE, as equal events that follow each other become one
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(fd, os.fsencode(path), opened | closed) >= 0
    try:
        yield lambda: sum(bool(mask & opened) for _, mask, _, _ in struct.iter_unpack("iIII", os.read(fd, 65536)))
    finally:
        os.close(fd)
