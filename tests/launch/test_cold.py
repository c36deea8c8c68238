"""Cold runs: a fresh interpreter in the same sandbox, with one line that says why, and otherwise the same."""

from __future__ import annotations

import pytest

FRESH = "import os, sys; print(sys.argv, sys.flags.hash_randomization, __file__, os.getcwd()); sys.exit(3)"


def test_cold_by_an_option(both):
    both.write("app.py", FRESH)
    ended = both.pocket("app.py", "a", "", b"\xff", options=("--cold",))
    assert ended == both.plain("app.py", "a", "", b"\xff")


@pytest.mark.parametrize(
    "words", [["-c", "import sys; print(sys.argv)", "x"], ["-m", "json.tool", "-h"], ["missing.py"]]
)
def test_cold_in_every_way_to_name_a_program(both, words):
    assert both.pocket(*words, options=("--cold",)) == both.plain(*words)


def test_a_variable_that_differs_is_named_once(both):
    both.write("app.py", "import os; print(os.environ['OMP_NUM_THREADS'])")
    ended = both.pocket("app.py", env={"OMP_NUM_THREADS": "3"})
    assert (ended.status, ended.out) == (0, b"3\n")
    line = b"pocket: OMP_NUM_THREADS differs from the service's, which read it at import; running it cold\n"
    assert ended.err == line


@pytest.mark.parametrize(
    "name",
    [
        "TF_ENABLE_ONEDNN_OPTS",
        "KERAS_BACKEND",
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "PYTHONHASHSEED",
        "LD_PRELOAD",
    ],
)
def test_variables_read_at_import_make_a_run_cold(tensorflow, name):
    value = {"LD_PRELOAD": "", "KERAS_BACKEND": "jax", "PYTHONHASHSEED": "0"}.get(name, "1")
    ended = tensorflow.pocket(
        "-c", f"import os, sys; print(os.environ[{name!r}], 'tensorflow' in sys.modules)", env={name: value}
    )
    assert ended.out.decode() == f"{value} False\n"
    assert (
        ended.err.decode() == f"pocket: {name} differs from the service's, which read it at import; running it cold\n"
    )


@pytest.mark.parametrize(
    "name", ["TF_CPP_MIN_LOG_LEVEL", "TF_CPP_MIN_VLOG_LEVEL", "TF_CLI_CONFIG_FILE", "TF_VAR_region", "MODE"]
)
def test_other_variables_do_not(tensorflow, name):
    ended = tensorflow.pocket(
        "-c", f"import os, sys; print(os.environ[{name!r}], 'tensorflow' in sys.modules)", env={name: "2"}
    )
    assert (ended.out, ended.err) == (b"2 True\n", b"")


@pytest.mark.parametrize("name, value", [("KERAS_BACKEND", "tensorflow"), ("CUDA_VISIBLE_DEVICES", "-1")])
def test_what_changes_nothing_may_be_said(tensorflow, name, value):
    """By a caller or by a program: what the service goes by anyway, which GPUs not to use where none can be."""
    says = f"import os, sys\nos.environ[{name!r}] = {value!r}\n"
    tensorflow.write("app.py", f"{says}print('tensorflow' in sys.modules)\nimport tensorflow\n")
    for env in ({}, {name: value}):
        ended = tensorflow.pocket("app.py", env=env)
        assert (ended.out, ended.err) == (b"True\n", b"")


SETS = {
    "os.environ[...]": "import os\nos.environ['TF_NUM_INTRAOP_THREADS'] = '1'",
    "setdefault": "import os\nos.environ.setdefault('TF_NUM_INTRAOP_THREADS', '1')",
    "update": "import os\nos.environ.update({'TF_NUM_INTRAOP_THREADS': '1'})",
    "update by keyword": "from os import environ\nenviron.update(TF_NUM_INTRAOP_THREADS='1')",
    "in a condition": "import os\nif True:\n    os.environ['TF_NUM_INTRAOP_THREADS'] = '1'",
}


@pytest.mark.parametrize("name", SETS)
def test_a_program_that_sets_one_before_its_import_runs_cold(tensorflow, name):
    source = f"{SETS[name]}\nimport sys\nprint('tensorflow' in sys.modules)\nif 0: import tensorflow\n"
    tensorflow.write("app.py", source)
    ended = tensorflow.pocket("app.py")
    assert ended.out == b"False\n"
    assert ended.err == b"pocket: the program sets TF_NUM_INTRAOP_THREADS before its imports; running it cold\n"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'\n",
        "import tensorflow, os\nos.environ['TF_NUM_INTRAOP_THREADS'] = '1'\n",
        "import os\ndef f():\n    pass\nos.environ['MODE'] = 'x'\n",
        "import os\nprint(os.environ.get('TF_NUM_INTRAOP_THREADS'), end='')\n",
    ],
)
def test_a_program_that_sets_another_or_later_does_not(tensorflow, source):
    tensorflow.write("app.py", source + "import sys\nsys.exit(7 if 'tensorflow' in sys.modules else 8)")
    ended = tensorflow.pocket("app.py")
    assert (ended.status, ended.err) == (7, b"")


def test_a_cold_run_is_in_the_same_sandbox(both):
    program = "import os; print(os.getuid(), os.getpid(), os.listdir('/tmp'), sorted(os.listdir('/proc/self/fd')))"
    warm, cold = both.pocket("-c", program), both.pocket("-c", program, options=("--cold",))
    assert warm.status == cold.status == 0
    strip = lambda ended: ended.out.split()[1:]  # noqa: E731  # each run has a uid of its own
    assert strip(warm) == strip(cold)


def test_a_cold_run_ends_and_is_signalled_as_any(both, begun):
    both.write(
        "app.py",
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.1)",
    )
    process = begun(both.pocket_command("app.py", options=("--cold",)), env=both.environment(None), cwd=both.place)
    process.terminate()
    assert process.wait(60) == 5


def test_a_cold_run_has_the_callers_ignored_signals_and_limits(both):
    import resource
    import signal

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_NOFILE, (99, 199))

    program = (
        "import signal as s, resource as r; print(s.getsignal(1), s.getsignal(13), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    assert both.pocket("-c", program, options=("--cold",), preexec_fn=prepare) == both.plain(
        "-c", program, preexec_fn=prepare
    )


def test_a_service_has_the_variables_that_pocketd_was_started_with(own_pocketd, tmp_path, monkeypatch):
    """Unless its definition says otherwise."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    daemon = own_pocketd("""
        [service.plain]
        runtime = "python"
        [service.other]
        runtime = "python"
        env = { OMP_NUM_THREADS = "5" }
    """)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    done = daemon.pocket("run", "--service", "plain", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("3\n", "")
    done = daemon.pocket("run", "--service", "other", "-c", code, cwd=tmp_path)
    assert done.stdout == "3\n" and "OMP_NUM_THREADS differs" in done.stderr
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    done = daemon.pocket("run", "--service", "other", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("5\n", "")
