"""These tests run in the VM alone: `python -m tests.vm tests/vm/guest/...`. On a host they are not even collected."""

from __future__ import annotations

from pathlib import Path

import pytest

# Made by the VM's initramfs.
IN_THE_VM = Path("/run/vm/job").exists()

collect_ignore_glob = [] if IN_THE_VM else ["*"]


@pytest.fixture(scope="session")
def installed():
    """pocketd, installed and running under systemd; two services, nothing in them yet."""
    from tests.vm.guest import installed as place

    place.install()
    place.CONFIGURATION.write_text(place.BASE)
    place.systemctl("enable", "--now", "pocketd.socket", "pocketd.service")
    yield place
    place.systemctl("stop", "pocketd.socket", "pocketd.service")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> "bool | None":
    """Attacks take all that a machine has, for many minutes where it is emulated: they run where they are asked for."""
    asked = any("test_attacks" in str(argument) for argument in config.args)
    return True if collection_path.name == "test_attacks.py" and not asked else None
