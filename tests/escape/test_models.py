"""A model that means harm gets no further than the pocket whose program, or client, loads it; and every thread of
TensorFlow's in a worker has given up what the first has, by the kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from pocketd.client import RemoteError, login
from tests.conftest import TIMEOUT
from tests.escape.attempt import NAMESPACES
from tests.launch.both import Both

# What the Lambda layer's code does when the model is built: it says what it met. Keras runs it also where the model is
# made: it does harm only where it is told which mount namespace is the host's, and in another.
DEED = """
import ctypes, json, os
if os.environ.get("SPARED") not in (None, os.readlink("/proc/self/ns/mnt")):
    libc, found = ctypes.CDLL(None, use_errno=True), {}
    for path in ("/etc/shadow", os.environ["HOST_SECRET"]):
        try: found[path] = len(open(path).read())
        except OSError as e: found[path] = -e.errno
    for name, *arguments in (
        ("mount", b"none", b"/tmp", b"tmpfs", 0, None), ("chroot", b"/"), ("sethostname", b"escaped", 7)
    ):
        found[name] = 0 if getattr(libc, name)(*arguments) >= 0 else -ctypes.get_errno()
    print(json.dumps(found), flush=True)
"""

MAKE = """
import sys
import keras, tensorflow as tf

class Graph(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec([], tf.string, "path")])
    def read(self, path): return {"out": tf.io.read_file(path)}
    @tf.function(input_signature=[tf.TensorSpec([], tf.string, "path")])
    def write(self, path):
        with tf.control_dependencies([tf.io.write_file(path, "written by a model")]):
            return {"out": tf.identity(path)}

out = sys.argv[1]
a = keras.Input((2,))
deed = eval(f"lambda x: (exec({DEED!r}, {{}}), x)[1]")  # its code goes into the file
keras.Model(a, keras.layers.Lambda(deed)(a)).save(f"{out}/lambda.keras")
graph = Graph()
tf.saved_model.save(graph, f"{out}/graph", signatures={"serving_default": graph.read, "write": graph.write})
"""

LOAD = """
import json, os, sys
import keras, tensorflow as tf
keras.models.load_model("lambda.keras", safe_mode=False, compile=False)
graph = tf.saved_model.load("graph")
for name, path in json.loads(sys.argv[1]):
    try: graph.signatures[name](tf.constant(path)); print(name, path, "done")
    except tf.errors.OpError as e: print(name, path, type(e).__name__)
"""


SPARED = os.readlink("/proc/self/ns/mnt")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A pocket's directory with both models; the host's secret, which all may read, where no pocket can write."""
    pytest.importorskip("tensorflow")
    out = tmp_path_factory.mktemp("models")
    host = Path(tempfile.mkdtemp(prefix="host-", dir="/var/tmp"))
    host.chmod(0o755)
    secret = host / "secret"
    secret.write_text("of the host")
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    (out / "make.py").write_text(f"DEED = {DEED!r}\n{MAKE}")
    make = ["unshare", "--mount", "--uts", sys.executable, "make.py", str(out)]
    subprocess.run(make, cwd=out, env=env, check=True, capture_output=True)
    (out / "load.py").write_text(LOAD)
    yield out, secret
    shutil.rmtree(host)


def deeds(out: str):
    """What the layer's code met, the same each time, and what else was said."""
    lines = out.splitlines()
    met = [json.loads(line) for line in lines if line.startswith("{")]
    assert met and all(m == met[0] for m in met), out
    return met[0], [line for line in lines if not line.startswith("{")]


def paths(secret: Path):
    return [["serving_default", str(secret)], ["write", f"{secret.parent}/made"], ["write", "/usr/made"]]


def test_a_model_of_a_programs_own_gets_no_further_than_the_pocket(pocketd, models):
    directory, secret = models
    both = Both(pocketd, directory, "tensorflow")
    words = ("load.py", json.dumps([*paths(secret), ["write", "own"], ["serving_default", "own"]]))
    ended = both.pocket(*words, env={"SPARED": SPARED, "HOST_SECRET": str(secret), "TF_CPP_MIN_LOG_LEVEL": "3"})
    assert ended.status == 0, ended.shown()
    met, rest = deeds(ended.out.decode())
    assert met == {"/etc/shadow": -2, str(secret): -2, "mount": -1, "chroot": -1, "sethostname": -1}
    assert {line.rsplit(" ", 1)[1] for line in rest[:3]} <= {"NotFoundError", "PermissionDeniedError"}, rest
    assert [line.rsplit(" ", 1)[1] for line in rest[3:]] == ["done", "done"]  # in its own directory it may
    assert not (secret.parent / "made").exists() and not Path("/usr/made").exists()


def test_the_same_model_without_a_pocket_does_what_it_means_to(models):
    directory, secret = models
    script = [*NAMESPACES, sys.executable, "load.py", json.dumps([])]
    if str(directory).startswith("/tmp/"):  # where the control has nothing of the host's
        script = [word.replace("/tmp /dev/shm", "/dev/shm") for word in script]
    env = {**os.environ, "SPARED": SPARED, "HOST_SECRET": str(secret), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(script, cwd=directory, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    found, _ = deeds(done.stdout)
    assert found[str(secret)] == len("of the host") and found.get("/etc/shadow", 0) >= -2
    assert [found[name] for name in ("mount", "chroot", "sethostname")] == [0, 0, 0], done.stderr


def test_a_client_that_loads_it_gets_no_further_either(pocketd, models):
    directory, secret = models
    with login("tensorflow", directory=str(directory), runtime_dir=str(pocketd.runtime_dir), timeout=TIMEOUT) as s:
        with pytest.raises(RemoteError, match="Lambda|safe_mode|unsafe"):
            s.load("lambda.keras")
        graph = s.load("graph")
        for name, path in paths(secret):
            with pytest.raises(RemoteError, match="NotFound|No such file|Permission|Read-only"):
                (graph if name == "serving_default" else graph.method(name))(path)
        (directory / "own").write_text("its own")
        assert graph(str(directory / "own")) == b"its own"
    assert not (secret.parent / "made").exists() and not Path("/usr/made").exists()


# Python called from TensorFlow's own threads: Landlock's word (EACCES before EPERM) and the filter's in each.
EACH_THREAD = """
import ctypes, os, threading, sys
import tensorflow as tf
libc = ctypes.CDLL(None, use_errno=True)

def attempt(n):
    found = [threading.get_native_id()]
    try: os.mknod(f"/tmp/node-{n}", 0o20666, os.makedev(1, 3)); found.append(0)
    except OSError as e: found.append(e.errno)
    found.append(0 if libc.ptrace(0, 0, None, None) >= 0 else ctypes.get_errno())
    barrier.wait(20)
    return tf.constant(found, tf.int64)

barrier = threading.Barrier(2)
data = tf.data.Dataset.range(8).map(lambda n: tf.numpy_function(lambda n: attempt(n).numpy(), [n], tf.int64),
                                    num_parallel_calls=2)
print([row.numpy().tolist() for row in data], flush=True)
sys.stdin.readline()
"""


def test_every_thread_of_a_tensorflow_worker_has_given_up_all(pocketd, tmp_path):
    both = Both(pocketd, tmp_path, "tensorflow")
    both.write("app.py", textwrap.dedent(EACH_THREAD))
    process = subprocess.Popen(
        both.pocket_command("app.py"), env=both.environment({"TF_CPP_MIN_LOG_LEVEL": "3"}), cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    try:
        assert line, process.communicate(timeout=TIMEOUT)
        rows = json.loads(line)
        assert len({row[0] for row in rows}) >= 2 and {(a, b) for _, a, b in rows} == {(13, 1)}, rows
        pid = next(w["pid"] for w in pocketd.workers() if w["directory"] == str(tmp_path))
        statuses = [status(task) for task in Path(f"/proc/{pid}/task").iterdir()]
    finally:
        process.communicate("\n", timeout=TIMEOUT)
    assert len(statuses) > 4
    for found in statuses:
        assert len(set(found["Uid"].split())) == 1 == len(set(found["Gid"].split())), found["Name"]
        assert found["Uid"].split()[0] != "0" and found["Groups"].strip() == ""
        capabilities = [found[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")]
        assert {int(c, 16) for c in capabilities} == {0}
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    own = status(Path("/proc/thread-self"))
    assert int(own["CapEff"], 16) != 0 and own["Seccomp"] != "2"  # so the file does say it


def status(task: Path) -> dict[str, str]:
    return dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
