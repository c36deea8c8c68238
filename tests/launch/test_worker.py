"""What a worker is by the kernel's word, and that it holds nothing of another caller's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from nsutil.privileges import PR_CAPBSET_READ
from nsutil.syscalls import libc
from tests.conftest import TIMEOUT

# Searches its own memory for text that it makes of two halves, so that it does not find itself.
SEARCH = """
import os, sys
first, second = sys.argv[1], sys.argv[2]
needle = (first + "-" + second).encode()
own = id(needle)
hits = 0
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps.read().splitlines():
        span, mode = line.split()[:2]
        if mode[0] != "r" or "[v" in line:
            continue
        start, end = (int(v, 16) for v in span.split("-"))
        memory.seek(start)
        try:
            text = memory.read(end - start)
        except OSError:
            continue
        at = text.find(needle)
        while at >= 0:
            if not own <= start + at < own + 200:
                hits += 1
            at = text.find(needle, at + 1)
        del text
print("hits", hits)
"""


def test_nobodys_arguments_environment_or_paths_are_in_anothers_memory(pocketd, tmp_path, begun):
    """Before, and at the same time: in argv, environment, standard input, directory and a client's call."""
    first, second = "marker", os.urandom(8).hex()
    marker = f"{first}-{second}"
    place = tmp_path / marker
    place.mkdir()
    env = {**pocketd.environment, "SECRET": marker}
    code = "import sys; sys.stdin.read(); print('ready', flush=True); import time; time.sleep(1000)"
    for _ in range(3):
        pocketd.pocket("run", "--service", "plain", "-c", "0", marker, cwd=place, env=env, input=marker)
    command = pocketd.command("run", "--service", "plain", "-c", code, marker)
    process = begun(command, env=env, cwd=place)
    search = tmp_path / "search"
    search.mkdir()
    (search / "search.py").write_text(SEARCH)
    done = pocketd.pocket("run", "--service", "plain", "search.py", first, second, cwd=search)
    assert done.stdout == "hits 0\n"
    # The search finds what there is: the same marker as its own argument.
    done = pocketd.pocket("run", "--service", "plain", "search.py", first, second, marker, cwd=search)
    assert done.stdout != "hits 0\n"
    process.kill()


STATUS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Uid", "Gid", "Groups")


@pytest.mark.parametrize("service", ["plain", "tensorflow"])
def test_every_thread_of_a_worker_has_given_up_everything(pocketd, tmp_path, begun, service):
    code = "import sys; print('ready', flush=True); sys.stdin.read()"
    if service == "tensorflow":
        code = f"import tensorflow as tf; tf.reduce_sum(tf.ones(8)); {code}"
    command = pocketd.command("run", "--service", service, "-c", code)
    process = begun(command, env=pocketd.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    (worker,) = pocketd.workers()
    threads = os.listdir(f"/proc/{worker['pid']}/task")
    assert len(threads) >= (2 if service == "tensorflow" else 1)
    for thread in threads:
        text = Path(f"/proc/{worker['pid']}/task/{thread}/status").read_text()
        said = dict(re.findall(rf"^({'|'.join(STATUS)}):[ \t]*(.*?)[ \t]*$", text, re.MULTILINE))
        assert {said[name] for name in STATUS if name.startswith("Cap")} == {"0" * 16}
        assert said["NoNewPrivs"] == "1" and said["Groups"] == ""
        uids = set(said["Uid"].split()) | set(said["Gid"].split())
        assert len(uids) == 1 and int(uids.pop()) >= 1_900_000_000
    own = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup")}
    for kind, host in own.items():
        assert os.stat(f"/proc/{worker['pid']}/ns/{kind}").st_ino != host, kind
    assert libc.prctl(PR_CAPBSET_READ, 0, 0, 0, 0) == 1  # the test itself still has what the worker lacks
    process.communicate(timeout=TIMEOUT)


def test_no_mount_of_a_worker_appears_on_the_host_or_in_its_service(pocketd, tmp_path, begun):
    code = "import sys; print('ready', flush=True); sys.stdin.read()"
    pocketd.pocket("run", "--service", "plain", "-c", "0", cwd=tmp_path)
    init = next(s["pid"] for s in pocketd.ps()["services"] if s["name"] == "plain")
    tables = [Path("/proc/self/mountinfo"), Path(f"/proc/{init}/mountinfo")]
    before = [table.read_text() for table in tables]
    process = begun(
        pocketd.command("run", "--service", "plain", "-c", code),
        env=pocketd.environment,
        cwd=tmp_path,
        stdin=subprocess.PIPE,
    )
    assert [table.read_text() for table in tables] == before
    (worker,) = pocketd.workers()
    assert f" {tmp_path} " in Path(f"/proc/{worker['pid']}/mountinfo").read_text()
    process.communicate(timeout=TIMEOUT)


def test_the_pause_reaps_orphans(pocketd, tmp_path):
    """A program's grandchild that loses its parent does not stay as a zombie."""
    source = (
        "import os, sys\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        "        os.read(read, 1); os._exit(0)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "orphan = max(int(p) for p in os.listdir('/proc') if p.isdigit())\n"
        "fd = os.pidfd_open(orphan)\n"
        "os.write(write, b'x')\n"
        "import select; select.select([fd], [], [])\n"
        "while os.path.exists(f'/proc/{orphan}'): pass\n"
        "print('reaped')\n"
    )
    done = pocketd.pocket("run", "--service", "plain", "-c", source, cwd=tmp_path)
    assert done.stdout == "reaped\n"
