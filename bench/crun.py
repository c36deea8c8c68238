"""The monolith in a container: crun, with a bundle whose root has the host's files read-only, as an image would have
them unpacked, and all namespaces. Its cgroups are left out, to its advantage: not every host has all of cgroup v2.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import fetched
from bench.fetched import Missing
from bench.launch import ENVIRONMENT
from bench.started import Started, process
from nsutil import mounts, namespaces

_SYSTEM = ("usr", "etc", "bin", "lib", "lib64", "sbin")
_HYBRID = Path("/sys/fs/cgroup/unified")
_NUMBERS = itertools.count()


class Crun:
    """Makes bundles beneath `directory`; all containers see `shown`, at the same paths."""

    def __init__(self, directory: Path, shown: Sequence[Path]):
        self.directory = directory / "crun"
        self.program = fetched.program("crun")
        self.shown = shown
        self.directory.mkdir()
        self.environment = {**ENVIRONMENT, **fetched.environment(), "XDG_RUNTIME_DIR": str(self.directory)}
        self._command = [self.program, "--root", str(self.directory / "state"), "--cgroup-manager=disabled"]
        done = subprocess.run(
            [self.program, "spec"], cwd=self.directory, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise Missing(f"crun does not work here: {done.stderr.strip()}")
        self._spec: dict[str, Any] = json.loads((self.directory / "config.json").read_text())

    def start(self, directory: Path, program: str, *words: str) -> Started:
        """In `directory`, by this Python."""
        number = next(_NUMBERS)
        bundle = self.directory / str(number)
        command = [sys.executable, str(directory / program), *words]
        self._bundle(bundle, command, directory)
        run = [*self._command, "run", "--bundle", str(bundle), f"bench-{number}"]
        return process(run, directory, self.environment, _without_hybrid)

    def _bundle(self, bundle: Path, command: list[str], directory: Path) -> None:
        root = bundle / "rootfs"
        root.mkdir(parents=True)
        binds = []
        for name in _SYSTEM:
            place = Path("/") / name
            if place.is_symlink():
                (root / name).symlink_to(place.readlink())
            elif place.is_dir():
                binds.append(place)
        mounts = [m for m in self._spec["mounts"] if m["type"] != "cgroup"]
        mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1777"]})
        for place in [*binds, *self.shown]:
            options = ["rbind", "ro", "rprivate"]
            mounts.append({"destination": str(place), "type": "bind", "source": str(place), "options": options})
        spec = {
            **self._spec,
            "root": {"path": "rootfs", "readonly": False},
            "process": {
                **self._spec["process"],
                "terminal": False,
                "args": command,
                "cwd": str(directory),
                "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            },
            "mounts": mounts,
        }
        (bundle / "config.json").write_text(json.dumps(spec))


def _without_hybrid() -> None:
    """Crun refuses a host of cgroup v1 on which cgroup v2 has a controller, whether it is to make cgroups or not: it is
    not shown the latter."""
    if _HYBRID.is_dir():
        namespaces.unshare(namespaces.CLONE_NEWNS)
        mounts.private()
        mounts.unmount(str(_HYBRID))
