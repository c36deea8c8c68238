"""What ordinary programs do that a held run could get wrong: each is as under plain Python, or refused by name."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.conftest import TIMEOUT, wait_for
from tests.launch.held.test_program import HERE

VERBOSE = """
import logging, sys
def main():
    level = logging.DEBUG if "-v" in sys.argv else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    logging.getLogger("own").setLevel(logging.INFO)
    logging.debug("details")
    logging.getLogger("own").info("more")
    logging.warning("end")
main()
"""


@pytest.mark.parametrize("rehearse", [None, ["s"]])
def test_logging_is_set_up_by_each_run(hold, rehearse):
    pocket = hold(VERBOSE, "main", rehearse=rehearse)
    assert pocket.warm()["rehearsed"] is (rehearse is not None)
    for words in ((), ("-v",)):
        assert b"end" in pocket.same(*words).err


@pytest.mark.parametrize("method", ["readline", "read"])
def test_a_method_of_standard_input_that_was_kept(hold, method):
    pocket = hold(f"import sys\nask = sys.stdin.{method}\n{HERE}print(repr(ask()))\n", "here =")
    pocket.warm()
    assert pocket.same(input=b"said\n").out == b"'said\\n'\n"


def test_questions_about_the_terminal_that_were_kept(hold):
    pocket = hold(f"import os, sys\nask, of = os.isatty, sys.stdout.isatty\n{HERE}print(ask(0), of())\n", "here =")
    pocket.warm()
    ours, theirs = os.openpty()
    assert pocket.same(stdin=theirs).out == b"True False\n"
    os.close(ours)
    os.close(theirs)


CLOCKS = {
    "random": ("import random, time\n", "random.seed(time.time())\n", "random.random()"),
    "random, whole seconds": ("import random, time\n", "random.seed(int(time.time()))\n", "random.random()"),
    "random, nanoseconds": ("import random, time\n", "random.seed(time.time_ns())\n", "random.random()"),
    "an own Random": ("import random, time\n", "r = random.Random(time.time())\n", "r.random()"),
    "numpy": ("import numpy as np, time\n", "np.random.seed(int(time.time()))\n", "np.random.rand()"),
    "numpy, milliseconds": (
        "import numpy as np, time\n", "np.random.seed(int(time.time() * 1000) % 2**32)\n", "np.random.rand()",
    ),
    "default_rng": ("import numpy as np, time\n", "r = np.random.default_rng(int(time.time()))\n", "r.random()"),
}  # fmt: skip


@pytest.mark.parametrize("what", CLOCKS)
def test_seeded_by_the_clock_it_is_another_in_each_run(hold, what):
    imports, seed, draw = CLOCKS[what]
    pocket = hold(f"{imports}{seed}{HERE}print({draw})\n", "here =")
    pocket.warm()
    assert len({pocket.from_held().out for _ in range(3)}) == 3


CACHED = """
import functools, os
@functools.lru_cache
def settings(): return os.environ.get("MODE", "fast")
def main():
    os.environ["OWN"] = "1"
    print(settings(), os.environ["OWN"])
main()
"""


def test_a_variable_that_a_rehearsal_has_kept(hold):
    """The caller's is what counts; with the same one it is a held run."""
    pocket = hold(CACHED, "main", rehearse=[])
    assert pocket.warm()["rehearsed"] is True
    assert pocket.from_held().out == b"fast 1\n"
    assert pocket.same(env={"MODE": "slow"}, way="root").out == b"slow 1\n"
    assert pocket.same().out == b"fast 1\n"


SHARES = """
import mmap, multiprocessing, os
went, lock, count = multiprocessing.Event(), multiprocessing.Lock(), mmap.mmap(-1, 8)
count[0] = 7
def work():
    went.wait()
    with lock: count[0] += 1
def main():
    others = [multiprocessing.Process(target=work) for _ in range(3)]
    for other in others: other.start()
    went.set()
    for other in others: other.join()
    print(count[0], went.is_set(), [other.exitcode for other in others])
main()
"""


def test_memory_that_a_runs_processes_share(hold):
    """What was made of it before is each run's own."""
    pocket = hold(SHARES, "main", rehearse=[])
    pocket.warm()
    for _ in range(2):
        assert pocket.same().out == b"10 True [0, 0, 0]\n"


def test_a_file_of_a_mount_is_not_written_before(hold, tmp_path):
    source = f"with open('/log/runs', 'a') as f: f.write('run\\n')\n{HERE}print(1)\n"
    place = hold(source, None).place.parent / "log"
    place.mkdir()
    place.chmod(0o777)
    pocket = hold(source, "here =", mounts=[f"{place}:/log:rw"])
    assert "writes /log/runs" in pocket.refused()
    for _ in range(2):
        assert pocket.pocket().out == b"1\n"
    assert (place / "runs").read_text() == "run\nrun\n"


@pytest.mark.parametrize("number", ["SIGHUP", "SIGINT", "SIGUSR1"])
def test_a_handler_stands_above_a_signal_that_the_caller_ignores(hold, number):
    """As under nohup, or in the background of a script."""
    pocket = hold(
        f"import signal\ndef hear(*a): print('heard')\nsignal.signal(signal.{number}, hear)\n{HERE}"
        f"signal.raise_signal(signal.{number})\nprint(signal.getsignal(signal.SIGUSR2).name)\n",
        "here =",
    )
    pocket.warm()

    def ignore() -> None:
        signal.signal(getattr(signal, number), signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    assert pocket.same(preexec_fn=ignore).out == b"heard\nSIG_IGN\n"


def test_a_locale_by_the_environment_is_the_callers(hold):
    pocket = hold(
        f"import locale\nlocale.setlocale(locale.LC_ALL, '')\n{HERE}print(locale.setlocale(locale.LC_CTYPE))\n",
        "here =",
    )
    pocket.warm()
    for name in ("C", "C.UTF-8", "POSIX"):
        assert pocket.pocket(env={"LC_ALL": name}) == pocket.plain(env={"LC_ALL": name})


def test_a_variable_that_the_service_read_at_import_is_not_set_too_late(hold):
    """Without a checkpoint such a program is run cold, and says so; held it would go by the service's."""
    pocket = hold(
        f"import os\nos.environ['TF_USE_LEGACY_KERAS'] = '1'\nimport tensorflow\n{HERE}", "here =", "tensorflow"
    )
    assert "the program sets TF_USE_LEGACY_KERAS before its imports" in pocket.refused()


def test_a_program_that_is_changed_while_it_is_being_held(hold):
    """What is held in the end is the program that is there."""
    waits = "import os, time\nwhile not os.path.exists('out/go'): time.sleep(0.05)\n"
    pocket = hold(f"{waits}{HERE}print(1)\n", "here =", allow={"write": ["out"]})
    pocket.write("out/here", "")
    with pocket.pocketd.popen("warm", pocket.name, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as warm:
        assert wait_for(lambda: pocket.row()["held"] == "holding" and pocket.processes())
        pocket.write("app.py", f"{HERE}print(2)\n")
        assert wait_for(lambda: pocket.row()["held"] == "held")
        pocket.write("out/go", "")
        assert warm.communicate(timeout=TIMEOUT)[1] == b"" or warm.returncode == 0
    assert pocket.from_held().out == b"2\n"


def test_a_directory_as_standard_input_is_refused_as_ever(hold, tmp_path):
    pocket = hold(f"import sys\n{HERE}print(1)\n", "here =")
    pocket.warm()
    with open_directory(tmp_path) as fd:
        done = pocket.pocket(stdin=fd)
    assert done.status == 125 and b"a directory cannot be a standard stream" in done.err


class open_directory:
    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        return self.fd

    def __exit__(self, *why):
        os.close(self.fd)
