"""A pocketd for the tests of pockets' templates, and pockets that are held by it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import CONFIG, Pocketd
from tests.launch.held.pocket import Pocket, Pockets


@pytest.fixture(scope="session")
def daemon() -> Iterator[Pocketd]:
    place = Path(tempfile.mkdtemp(prefix="held-", dir="/var/tmp"))
    place.chmod(0o755)
    (place / "pocketd").mkdir(mode=0o700)
    daemon = Pocketd(place / "pocketd", CONFIG)
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(place)
        assert not daemon.cgroup_path.exists(), f"cgroups are left: {daemon.cgroup_path}"


@pytest.fixture(scope="session")
def pool(daemon: Pocketd) -> Pockets:
    return Pockets(daemon, daemon.place.parent)


@pytest.fixture
def hold(pool: Pockets) -> Iterator[Callable[..., Pocket]]:
    """`hold(source, checkpoint, **keys)`: a pocket of the test's own, gone without a trace after it."""
    yield pool.make
    pool.clear()
