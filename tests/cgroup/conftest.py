"""A cgroup of the tests' own beneath the host's cgroup2, and what skips where there is none."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cgroup.hierarchy import Hierarchy, NoCgroup2
from cgroup.node import Cgroup


@pytest.fixture
def hierarchy() -> Iterator[Hierarchy]:
    if os.geteuid() != 0:
        pytest.skip("making cgroups needs root")
    try:
        found = Hierarchy.find()
    except NoCgroup2 as e:
        pytest.skip(str(e))
    with found:
        yield found


@pytest.fixture
def base(hierarchy: Hierarchy) -> Iterator[Cgroup]:
    """A cgroup with a name that nobody has, gone afterwards with all beneath it."""
    with hierarchy.base(f"pocketd-test-{secrets.token_hex(6)}") as made:
        yield made
        if made.fd >= 0:
            made.kill()
            made.wait_empty(10)
            made.remove()


@pytest.fixture
def sleeper() -> Iterator[Callable[[Cgroup], int]]:
    """Starts a process in a cgroup, and returns its pid."""
    started = []

    def start(cgroup: Cgroup) -> int:
        # It writes its own pid: what it is born into matters to none of these tests.
        code = (
            f"import time; open('{cgroup.directory}/cgroup.procs', 'w').write('0'); print(flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        process.stdout.close()
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()
