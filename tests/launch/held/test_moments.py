"""What belongs to one run, or one moment, and was done before the checkpoint: refused by name, compared, or told."""

# ruff: noqa: E501
from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

from tests.conftest import wait_for
from tests.launch.held.test_program import HERE

TEMPORARY = {
    "TemporaryDirectory": "import tempfile\nplace = tempfile.TemporaryDirectory()\n",
    "mkdtemp": "import tempfile\nplace = tempfile.mkdtemp()\n",
    "mkstemp": "import os, tempfile\nfd, place = tempfile.mkstemp()\nos.close(fd)\n",
    "in a function": "import tempfile\ndef work():\n    return tempfile.TemporaryDirectory()\nplace = work()\n",
}


@pytest.mark.parametrize("what", TEMPORARY)
def test_a_temporary_file_of_the_programs_own(hold, what):
    """It would be that of all runs, and the first would take it away."""
    pocket = hold(f"{TEMPORARY[what]}{HERE}print(place)\n", "here =")
    why = pocket.refused()
    assert "it makes /tmp/tmp" in why and "app.py, line" in why and "put the checkpoint before that" in why


def test_a_temporary_directory_that_is_gone_by_then(hold):
    pocket = hold(f"import tempfile\nwith tempfile.TemporaryDirectory(): pass\n{HERE}print(1)\n", "here =")
    pocket.warm()
    pocket.same()


def test_a_directory_in_tmp_that_a_run_takes_away(hold):
    """The next run has it again."""
    source = f"import os\nos.makedirs('/tmp/cache', exist_ok=True)\n{HERE}print(os.listdir('/tmp/cache'))\nos.rmdir('/tmp/cache')\n"
    pocket = hold(source, "here =")
    pocket.warm()
    for _ in range(3):
        assert pocket.pocket().out == b"[]\n"


LOOKS = {
    "a list": ("names = sorted(os.listdir())", "names"),
    "a list of .": ("names = sorted(os.listdir('.'))", "names"),
    "a scan": ("names = sorted(entry.name for entry in os.scandir())", "names"),
    "a glob": ("import glob; names = sorted(glob.glob('*.flag'))", "names"),
    "exists": ("there = os.path.exists('debug.flag')", "there"),
    "a path": ("import pathlib; there = pathlib.Path('debug.flag').exists()", "there"),
    "access": ("there = os.access('debug.flag', os.R_OK)", "there"),
}


@pytest.mark.parametrize("what", LOOKS)
def test_what_a_relative_name_says_is_its_directorys(hold, what):
    look, shown = LOOKS[what]
    pocket = hold(f"import os\n{look}\n{HERE}print({shown})\n", "here =")
    (pocket.place / "sub").mkdir()
    pocket.write("sub/debug.flag", "")
    pocket.warm()
    pocket.same()
    assert pocket.same(cwd=str(pocket.place / "sub"), way="root").out != pocket.same().out


PARSER = """
import argparse, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int, default=3, metavar="N")
commands = parser.add_subparsers(dest="command")
commands.add_parser("look", help="look at something for so long that the help is wider than a narrow terminal is")
def main():
    print(parser.parse_args().size)
    if sys.stdout.isatty():
        print(parser.format_help())
main()
"""


@pytest.mark.parametrize("columns", [40, 132])
def test_a_parser_made_before_is_held_for_a_terminal_too(hold, columns):
    pocket = hold(PARSER, "main")
    pocket.warm()
    assert pocket.same("--size", "5").out == b"5\n"
    shown = []
    for command in (pocket.plain_command("look"), pocket.pocket_command("look")):
        pocket.forget()
        ours, theirs = os.openpty()
        subprocess.run(["stty", "cols", str(columns)], stdin=theirs, check=True)
        run = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=pocket.place, env=pocket.environment(None)
        )
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:
                break
            if not part:
                break
            text += part
        assert run.wait(60) == 0
        os.close(ours)
        shown.append(text)
    assert shown[0] == shown[1] and b"usage:" in shown[0]
    assert pocket.went("held")


NOTED = {
    "time.time": ("import time", "start = time.time()"),
    "datetime.datetime.now": ("from datetime import datetime", "today = datetime.now()"),
    "datetime.date.today": ("import datetime as dt", "today = dt.date.today()"),
    "uuid.uuid4": ("import uuid", "run = uuid.uuid4().hex"),
    "time.perf_counter": ("from time import perf_counter", "start = perf_counter()"),
    "os.urandom": ("import os", "seed = os.urandom(8)"),
    "random.random": ("import random", "x = random.random()"),
    "numpy.random.rand": ("import numpy as np", "x = np.random.rand(2)"),
    "os.getpid": ("import os", "pid = os.getpid()"),
    "subprocess.check_output": ("import subprocess", "said = subprocess.check_output(['true'])"),
}


@pytest.mark.parametrize("what", NOTED)
def test_what_was_taken_of_a_moment_is_told(hold, what):
    imports, line = NOTED[what]
    pocket = hold(f"{imports}\ndef later():\n    {line}\n{line}\n{HERE}{line}\nprint(1)\n", "here =")
    (noted,) = pocket.warm()["noted"]
    assert noted.endswith(f"app.py, line 4, calls {what}() once for all runs")
    pocket.same()


@pytest.mark.parametrize("seed", ["random.seed(1)", "np.random.seed(1)"])
def test_numbers_of_a_seed_are_no_moment(hold, seed):
    pocket = hold(
        f"import random, numpy as np\n{seed}\nx = random.random(), np.random.rand()\n{HERE}print(1)\n", "here ="
    )
    assert pocket.warm()["noted"] == []


def test_a_library_that_reads_the_whole_environment_is_told(hold):
    """Whether it goes by that, or hands it on, nothing says."""
    pocket = hold("import wsgiref.handlers\nhere = None\nprint(1)\n", "here =")
    (noted,) = pocket.warm()["noted"]
    assert re.search(r"wsgiref/handlers\.py, line [0-9]+, reads the whole environment$", noted)
    pocket.same()


def test_a_checkpoint_that_a_child_process_reaches(hold):
    source = "import os\ndef main(): print('child', flush=True)\nif os.fork() == 0:\n    main()\n    os._exit(0)\nos.wait()\n"
    pocket = hold(source, "main")
    assert "its checkpoint was reached in a child process of the program" in pocket.refused()
    assert pocket.pocket().out == b"child\n"


@pytest.mark.parametrize("what", ["signal.SIG_IGN", "lambda *_: os.waitpid(-1, os.WNOHANG)"])
@pytest.mark.parametrize("rehearse", [None, []])
def test_a_program_that_waits_for_children_itself(hold, what, rehearse):
    pocket = hold(
        f"import os, signal\nsignal.signal(signal.SIGCHLD, {what})\n{HERE}print(1)\n", "here =", rehearse=rehearse
    )
    assert pocket.warm()["rehearsed"] is (rehearse is not None)
    pocket.same()


def test_a_checkpoint_of_the_programs_own_can_be_rehearsed(hold):
    source = "import pocketd\nx = [1]\npocketd.checkpoint()\nimport colorsys, sys\nprint(x, sys.argv[1:])\n"
    pocket = hold(source, "pocketd.checkpoint()", rehearse=["s"])
    assert pocket.warm()["rehearsed"] is True
    pocket.same("a")


THREAD = """
import threading, time, sys
def beat():
    while True:
        time.sleep(0.2)
        print("beat", flush=True)
def main():
    threading.Thread(target=beat, daemon=True, name="beater").start()
    time.sleep(float(sys.argv[1]))
    print("done", flush=True)
main()
"""


def test_a_thread_that_a_rehearsal_leaves_at_work(hold):
    """It would be in each run, beside the one that this starts."""
    pocket = hold(THREAD, "main", rehearse=["0"])
    assert pocket.warm()["rehearsed"] is False
    assert "the thread beater" in pocket.row()["why_not_rehearsed"]
    assert pocket.from_held("0.5").out.count(b"beat") in (1, 2, 3)


def test_a_warning_of_its_text_is_given_once(hold):
    pocket = hold("import sys\nhere = None\nif sys.argv[0] is 'x': pass\nprint(1)\n", "here =", rehearse=[])
    pocket.warm()
    assert pocket.from_held().err.count(b"SyntaxWarning") == pocket.plain().err.count(b"SyntaxWarning") == 1


@pytest.mark.parametrize("what", ["1/0", "raise SystemExit('so')", "raise SystemExit(7)"])
def test_a_function_of_on_start_that_fails_is_the_programs_failure(hold, what):
    source = f"import pocketd\n@pocketd.on_start\ndef begin():\n    {what}\nhere = None\nprint(1)\n"
    pocket = hold(source, "here =")
    pocket.warm()
    expected = pocket.plain()
    found = pocket.from_held()
    assert (found.status, found.out) == (expected.status, expected.out)
    assert found.err.splitlines()[-1:] == expected.err.splitlines()[-1:]


def test_a_database_that_the_pocket_may_write(hold):
    source = f"import sqlite3\nbase = sqlite3.connect('/pocket/out/runs.db')\nbase.execute('create table if not exists t (n)')\nbase.commit()\nbase.close()\n{HERE}print(1)\n"
    pocket = hold(source, "here =", allow={"write": ["out"]})
    (pocket.place / "out").mkdir(exist_ok=True)
    assert "it opens the database /pocket/out/runs.db" in pocket.refused()


def test_a_directory_has_no_place_to_be_held_at(hold):
    pocket = hold("", "main", program="tool")
    (pocket.place / "tool").mkdir()
    pocket.write("tool/__main__.py", "def main(): print(1)\nmain()\n")
    assert "a directory or an archive has no place to be held at" in pocket.refused()
    assert pocket.pocket().out == b"1\n"


# -- what is shown is not there any more


@pytest.mark.parametrize("checkpoint", [None, "here ="])
@pytest.mark.parametrize("warm", [0, 2])
def test_a_directory_that_was_replaced(hold, checkpoint, warm):
    """Of what the pocket may write, the one that has the name now is written to."""
    source = f"{HERE}open('/pocket/out/runs', 'a').write('run\\n')\n"
    pocket = hold(source, checkpoint, allow={"write": ["out"]}, warm=warm)
    out = pocket.place / "out"
    out.mkdir(exist_ok=True)
    if checkpoint or warm:
        pocket.warm()
    pocket.pocket()
    assert (out / "runs").read_text() == "run\n"
    out.rename(pocket.place / "out.1")
    out.mkdir()
    pocket.pocket()
    assert (out / "runs").read_text() == "run\n"
    assert (pocket.place / "out.1/runs").read_text() == "run\n"


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_a_pockets_directory_that_was_replaced(hold, checkpoint):
    pocket = hold(f"{HERE}print('old')\n", checkpoint, warm=2)
    pocket.warm()
    assert pocket.pocket().out == b"old\n"
    pocket.place.rename(f"{pocket.place}.old")
    pocket.place.mkdir()
    pocket.write("app.py", f"{HERE}print('new')\n")
    for _ in range(3):
        assert pocket.pocket().out == b"new\n"


def test_a_writable_mount_that_was_replaced(hold, tmp_path):
    source = f"{HERE}open('/log/runs', 'a').write('run\\n')\n"
    tmp_path.parent.chmod(0o755)
    place = hold("", None).place.parent / "log-of-mount"
    place.mkdir()
    pocket = hold(source, "here =", mounts=[f"{place}:/log:rw"])
    pocket.warm()
    pocket.pocket()
    place.rename(f"{place}.1")
    place.mkdir()
    pocket.pocket()
    assert (place / "runs").read_text() == "run\n"


# -- what cannot be held is not tried again and again


def test_what_cannot_be_held_is_not_tried_for_each_slot(hold):
    pocket = hold("raise SystemExit(3)\nhere = None\n", "here =", warm=2)
    assert "before it came to its checkpoint" in pocket.refused()
    for _ in range(3):
        assert pocket.pocket().status == 3
    assert wait_for(lambda: pocket.row()["slots"] == 2)
    assert len(pocket.events("pocket-not-held")) <= 2  # of the definition, and of `pocket warm`


def test_a_user_whose_runs_are_all_refused_is_not_made_to_wait_for_it(hold):
    """Each refusal costs a fork: it is asked less and less often, and again when one goes well."""
    pocket = hold(f"import os\nmode = os.environ.get('MODE')\n{HERE}print(os.environ.get('MODE'))\n", "here =")
    pocket.warm()
    for n in range(40):
        assert pocket.pocket(env={"MODE": "slow"}).out == b"slow\n", n
    assert 8 <= len(pocket.events("launch-not-held")) < 20
    pocket.forget()
    for _ in range(70):
        assert pocket.pocket().out == b"None\n"
    assert pocket.ways().count("held") > 1


def test_a_writable_mount_that_was_removed_and_made_again(hold):
    """What a template shows is not gone while it shows it, and the kernel says so only then."""
    place = hold("", None).place.parent / "made-again"
    place.mkdir()
    pocket = hold(f"{HERE}open('/log/runs', 'a').write('run\\n')\n", "here =", mounts=[f"{place}:/log:rw"])
    pocket.warm()
    pocket.pocket()
    shutil.rmtree(place)
    place.mkdir()
    pocket.pocket()
    assert (place / "runs").read_text() == "run\n"


@pytest.mark.parametrize("checkpoint", [None, "here ="])
def test_a_mounted_file_that_was_replaced(hold, checkpoint):
    file = hold("", None).place.parent / f"mounted-{checkpoint}"
    file.write_text("old")
    pocket = hold(f"{HERE}print(open('/conf').read())\n", checkpoint, mounts=[f"{file}:/conf"], warm=2)
    pocket.warm()
    assert pocket.pocket().out == b"old\n"
    new = file.with_suffix(".new")
    new.write_text("new")
    new.replace(file)
    for _ in range(3):
        assert pocket.pocket().out == b"new\n"
