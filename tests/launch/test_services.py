"""Kinds of services: two TensorFlow versions side by side, other runtimes, other root file systems; and what fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nsutil import mounts
from tests.conftest import ROOT, service_environment, toml_table, wait_for
from tests.launch.test_rights import by

OTHER = ROOT / ".cache/other-tensorflow/bin/python"  # made by deploy/prepare test
ENV = toml_table(service_environment())
PLAIN = "service bad could not be started; its log, which is its operator's, says why: pocket logs bad"


VERSION = """
import importlib.metadata as metadata
for name in "tensorflow", "tensorflow-cpu":
    try:
        print(metadata.version(name))
        break
    except metadata.PackageNotFoundError:
        pass
"""


def version(python: str | Path) -> str:
    return subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()


def test_two_services_with_different_tensorflow_versions(own_pocketd, tmp_path):
    if not OTHER.exists():
        pytest.skip(f"no second TensorFlow at {OTHER}; `make test` makes it")
    daemon = own_pocketd(f"""
        [service.new]
        runtime = "tensorflow"
        env = {ENV}
        [service.other]
        runtime = "tensorflow"
        python = "{OTHER}"
        env = {ENV}
    """)
    code = "import tensorflow as tf, sys; print(tf.__version__, float(tf.reduce_sum(tf.ones((2, 3)))), sys.prefix)"
    found = {}
    for service in ("new", "other", "new"):
        done = daemon.pocket("run", "--service", service, "-c", code, cwd=tmp_path)
        found[service] = done.stdout.split()
    assert found["new"][0] == version(sys.executable)
    assert found["other"][0] == version(OTHER)
    assert found["new"][0] != found["other"][0]
    assert found["new"][1] == found["other"][1] == "6.0"
    assert {s["state"] for s in daemon.ps()["services"]} == {"on"}


def test_a_python_service_holds_onnxruntime_warm(own_pocketd, tmp_path):
    pytest.importorskip("onnxruntime")
    daemon = own_pocketd(f"""
        [service.onnx]
        runtime = "python"
        preload = ["numpy", "onnxruntime"]
        env = {ENV}
    """)
    code = (
        "import sys; warm = 'onnxruntime' in sys.modules; import onnxruntime\n"
        "print(warm, onnxruntime.get_available_providers()[-1])"
    )
    done = daemon.pocket("run", "-c", code, cwd=tmp_path)
    assert done.stdout == "True CPUExecutionProvider\n"


def test_a_caller_that_has_imported_tensorflow_itself_is_served_warm(pocketd, tmp_path):
    """TensorFlow sets variables when it is imported, which its process's children inherit."""
    script = (
        "import os, subprocess, sys, tensorflow\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "print(done.stdout, done.stderr, sep='|')\n"
    )
    words = pocketd.command("run", "--service", "tensorflow", "-c", "import sys; print('tensorflow' in sys.modules)")
    env = {**pocketd.environment, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, env=env, cwd=tmp_path, check=True
    )
    assert done.stdout == "True\n|\n"


def test_an_exec_service_runs_node(own_pocketd, tmp_path):
    node = shutil.which("node")
    if node is None or not os.path.realpath(node).startswith("/usr/"):
        pytest.skip("no node beneath /usr on this host")
    daemon = own_pocketd('[service.node]\nruntime = "exec"\n')
    (tmp_path / "app.js").write_text("console.log(process.argv.slice(2), process.cwd()); process.exit(5)")
    done = daemon.pocket("run", os.path.realpath(node), "app.js", "x", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (5, f"[ 'x' ] {tmp_path}\n")


@pytest.fixture
def rootfs(tmp_path: Path):
    """A root file system of its own: the host's /usr, and nothing else of the host."""
    root = tmp_path / "rootfs"
    (root / "usr").mkdir(parents=True)
    (root / "etc").mkdir()
    (root / "etc/hostname").write_text("of the rootfs\n")
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (root / name).symlink_to(os.readlink(f"/{name}"))
    mounts.bind("/usr", str(root / "usr"))
    yield root
    mounts.unmount(str(root / "usr"))


def test_a_service_from_a_directory(own_pocketd, tmp_path, rootfs):
    daemon = own_pocketd(f"""
        [service.shell]
        runtime = "exec"
        rootfs = "{rootfs}"
        [service.python]
        runtime = "python"
        rootfs = "{rootfs}"
        python = "/usr/bin/python3"
    """)
    app = tmp_path / "app"
    app.mkdir()
    done = daemon.pocket(
        "run", "--service", "shell", "sh", "-c", "cat /etc/hostname; touch /etc/x", cwd=app, check=False
    )
    assert done.stdout == "of the rootfs\n"
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr
    code = "import os, sys; print(sys.executable, sorted(os.listdir('/etc')))"
    done = daemon.pocket("run", "--service", "python", "-c", code, cwd=app)
    assert done.stdout == "/usr/bin/python3 ['hostname']\n"


def test_a_module_by_a_link_of_its_root_is_watched_there(own_pocketd, tmp_path, rootfs):
    """The link leads to another file, or none, where the root is the host's."""
    for name in ("lib", "real"):
        (rootfs / "opt" / name).mkdir(parents=True)
    module = rootfs / "opt/real/linked.py"
    module.write_text("VERSION = 1\n")
    (rootfs / "opt/lib/linked.py").symlink_to("/opt/real/linked.py")
    daemon = own_pocketd(f"""
        [service.python]
        runtime = "python"
        rootfs = "{rootfs}"
        python = "/usr/bin/python3"
        preload = ["linked"]
        env = {{ PYTHONPATH = "/opt/lib" }}
    """)
    code = "import linked; print(linked.VERSION)"
    assert daemon.pocket("run", "--service", "python", "-c", code, cwd=tmp_path).stdout == "1\n"
    module.write_text("VERSION = 22\n")
    ready = lambda: [t["number"] for t in daemon.ps()["templates"] if t["state"] == "ready"]  # noqa: E731
    assert wait_for(lambda: ready() == [2])
    assert daemon.pocket("run", "--service", "python", "-c", code, cwd=tmp_path).stdout == "22\n"
    assert not wait_for(lambda: daemon.log.read_text().count("files-changed") > 1, 6)


@pytest.fixture
def with_module(own_pocketd, rootfs):
    """A pocketd with a service `python` that has imported a module of this source."""

    def started(source: str, more: str = ""):
        (rootfs / "opt/lib").mkdir(parents=True)
        (rootfs / "opt/lib/mine.py").write_text(textwrap.dedent(source))
        return own_pocketd(f"""
            [service.python]
            runtime = "python"
            rootfs = "{rootfs}"
            python = "/usr/bin/python3"
            preload = ["mine"]
            env = {{ PYTHONPATH = "/opt/lib" }}
            {more}
        """)

    return started


def test_a_file_that_an_import_leaves_open_for_writing_is_each_workers_own(with_module, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    code = (
        "import mine, os, sys; found = os.pread(mine.file.fileno(), 100, 0); mine.file.write(b' and mine')\n"
        "print(found, os.pread(mine.file.fileno(), 100, 0), mine.file.tell())\n"
    )
    main = "def main(): print(mine.file.write(sys.argv[1].encode()), mine.file.tell())\nmain()"
    (app / "app.py").write_text(code.replace("mine.file.write(b' and mine')", "0") + main)
    daemon = with_module(
        """
        import tempfile
        file = tempfile.TemporaryFile("w+b", buffering=0)
        file.write(b"of the service")
        """,
        f'[pocket.held]\nservice = "python"\ndir = "{app}"\nprogram = "app.py"\ncheckpoint = "main"',
    )
    for _ in range(2):
        done = daemon.pocket("run", "--service", "python", "-c", code, cwd=app)
        assert done.stdout == "b'of the service' b'of the service and mine' 23\n"
    daemon.pocket("warm", "held")
    for _ in range(2):
        assert daemon.pocket("held", "more").stdout == "b'of the service' b'of the service' 14\n4 18\n"
    [row] = daemon.ps()["pockets"]
    assert row["held"] == "held" and daemon.log.read_text().count("way=held") == 2


def test_a_large_file_open_for_writing_is_refused_by_name(with_module, tmp_path):
    daemon = with_module("""
        import tempfile
        file = tempfile.TemporaryFile("w+b")
        file.truncate(17 << 20)
    """)
    done = daemon.pocket("python", "on", check=False)
    assert done.returncode == 125 and "open for writing and larger than 16 MiB" in done.stderr


def test_a_service_that_cannot_be_forked_does_not_start(with_module):
    """Not: it is on, and each of its launches fails."""
    daemon = with_module("""
        import signal, threading, time
        def work():
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
            time.sleep(1000)
        threading.Thread(target=work, daemon=True).start()
        time.sleep(0.1)
    """)
    done = daemon.pocket("python", "on", check=False)
    assert done.returncode == 125 and "did not stop within" in done.stderr and "blocks signals" in done.stderr


def test_random_in_sql_is_another_in_each_run(with_module, tmp_path):
    daemon = with_module("import sqlite3\nsqlite3.connect(':memory:').execute('select random()').fetchone()\n")
    code = "import sqlite3; print(sqlite3.connect(':memory:').execute('select random()').fetchone())"
    found = {daemon.pocket("run", "--service", "python", "-c", code, cwd=tmp_path).stdout for _ in range(3)}
    assert len(found) == 3


def test_the_host_root_shows_an_allowlist(pocketd, tmp_path):
    hidden = [
        "/etc/shadow",
        "/var",
        "/boot",
        "/etc/ssh",
        str(ROOT / "pocketd"),
        str(pocketd.state_dir),
        "/etc/ssl/private",
    ]
    code = f"import os; print([p for p in {hidden!r} if os.path.exists(p) and (not os.path.isdir(p) or os.listdir(p))])"
    done = pocketd.pocket("run", "--service", "plain", "-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n"
    done = pocketd.pocket("run", "--service", "plain", "-c", "open('/usr/x', 'w')", cwd=tmp_path, check=False)
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ('runtime = "python"\npreload = ["no_such_module"]', "No module named 'no_such_module'"),
        ('runtime = "python"\npreload = ["antigravity_"]', "ModuleNotFoundError"),
        ('runtime = "python"\nmodels = { m = "nothing_here:Model" }', "No module named 'nothing_here'"),
        ('runtime = "python"\nmodels = { m = "json:NoSuchThing" }', "has no NoSuchThing"),
        ('runtime = "python"\npython = "/usr/bin/env"', "does not run"),
    ],
)
def test_a_service_that_does_not_start_says_why(own_pocketd, definition, said):
    daemon = own_pocketd(f"[service.bad]\n{definition}\n[service.good]\nruntime = 'exec'\n")
    done = daemon.pocket("bad", "on", check=False)
    assert done.returncode == 125
    assert said in done.stderr, done.stderr
    assert "Traceback" in done.stderr or "bad does not start" in done.stderr
    assert [s["state"] for s in daemon.ps()["services"] if s["name"] == "bad"] == ["failed"]
    assert not list(daemon.cgroup_path.glob("pocketd-bad.scope"))
    daemon.pocket("good", "on")


@pytest.mark.parametrize(
    "definition", ['preload = ["no_such_module"]', 'models = { m = "nothing_here:Model" }', 'python = "/usr/bin/env"']
)
def test_why_it_does_not_start_is_for_its_operator_alone(own_pocketd, definition):
    """A template's last words may show what is in files that are not the caller's."""
    daemon = own_pocketd(f'[service.bad]\nruntime = "python"\n{definition}\n')
    words = ("run", "--service", "bad", "--dir", "/var/lib/dpkg", "-c", "1")
    for user, told in (("nobody", False), ("root", True)):
        done = by(daemon, user, *words)
        assert done.returncode == 125 and ("does not start" in done.stderr) == told, done.stderr
        assert told or PLAIN in done.stderr.splitlines()[-1]
        assert told or not any(word in done.stderr for word in ("no_such", "nothing_here", "/usr/bin/env", "Traceback"))


def test_a_service_that_is_started_by_hand_alone_says_how(own_pocketd, tmp_path):
    daemon = own_pocketd('[service.tools]\nruntime = "exec"\nstart = "manual"\n')
    done = daemon.pocket("run", "true", cwd=tmp_path, check=False)
    assert done.returncode == 125
    assert done.stderr == "pocket: service tools is off; switch it on by: pocket tools on\n"
    assert daemon.pocket("tools", "on").stdout == "tools is on\n"
    assert daemon.pocket("on", "tools").stdout == "tools is already on\n"
    daemon.pocket("run", "true", cwd=tmp_path)
    assert json.loads(daemon.pocket("off", "tools", "--json").stdout)["already"] is False
    assert json.loads(daemon.pocket("tools", "off", "--json").stdout)["already"] is True


def test_a_service_is_on_from_the_start_where_its_definition_says_so(own_pocketd):
    daemon = own_pocketd('[service.tools]\nruntime = "exec"\nstart = "boot"\n')
    assert wait_for(lambda: daemon.ps()["services"][0]["state"] == "on")
