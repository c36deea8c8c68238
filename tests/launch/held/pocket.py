"""One pocket of a test's own, which is held at a checkpoint, and the same program under plain Python."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.conftest import Pocketd, wait_for
from tests.launch.both import Both, Ended


class Pocket(Both):
    """A pocket `name` whose program is app.py in `place`; `keys` are those of its definition, as TOML."""

    def __init__(self, pocketd: Pocketd, name: str, place: Path, service: str):
        super().__init__(pocketd, place, service)
        self.name = name
        self.mark = self.begin = pocketd.log.stat().st_size

    @property
    def app(self) -> str:
        return str(self.place / "app.py")

    def plain_command(self, *words: str | bytes) -> list[str | bytes]:
        return [sys.executable, self.app, *words]

    def pocket_command(self, *words: str | bytes, options: tuple[str, ...] = ()) -> list[str | bytes]:
        return self.pocketd.command("run", *options, "-p", self.name, *words)

    def warm(self) -> dict[str, Any]:
        """Hold it; what `pocket warm` says. Raises AssertionError with the reason where it cannot be held."""
        reply: dict[str, Any] = json.loads(self.pocketd.pocket("warm", self.name, "--json").stdout)
        return reply

    def refused(self) -> str:
        """Why it cannot be held."""
        done = self.pocketd.pocket("warm", self.name, check=False)
        assert done.returncode == 125, (done.returncode, done.stdout)
        return done.stderr

    def row(self, shown: dict[str, Any] | None = None) -> dict[str, Any]:
        """Of what `ps` shows, or has shown."""
        (row,) = [row for row in (shown or self.pocketd.ps())["pockets"] if row["name"] == self.name]
        return row

    # -- events of pocketd's log, since the pocket was made or `forget`

    def events(self, event: str) -> list[str]:
        with open(self.pocketd.log) as log:
            log.seek(self.mark)
            found = re.findall(rf"^\S+ \S+ {event} (.*)$", log.read(), re.MULTILINE)
        return [line for line in found if f"pocket={self.name} " in f"{line} "]

    def forget(self) -> None:
        self.mark = self.pocketd.log.stat().st_size

    def ways(self) -> list[str]:
        """Of each session: "held", "slot", or "root"."""
        return [m[1] if (m := re.search(r"way=(\w+)", line)) else "root" for line in self.events("session-started")]

    def went(self, *ways: str) -> bool:
        """Whether its sessions came so; one that has ended may not be in the log yet."""
        return wait_for(lambda: self.ways() == list(ways))

    def wait_held(self, times: int = 1) -> None:
        assert wait_for(lambda: len(self.events("pocket-held")) >= times), self.events("pocket-not-held")

    # -- runs

    def from_held(self, *words: str | bytes, way: str = "held", **options: Any) -> Ended:
        """Run it, and make sure that it came from its template. Slots give way where the host's memory is short, as
        beside a VM that starts: then once more."""
        for again in (way == "slot", False):
            self.forget()
            ended = self.pocket(*words, **options)
            if self.went(way) or not (again and self.slots_gave_way()):
                break
            self.warm()
        assert self.ways() == [way], (self.ways(), self.events("launch-not-held"), self.slots_gave_way(), ended.shown())
        return ended

    def slots_gave_way(self) -> bool:
        """Whether any slot of its pocketd did, since it was made."""
        with open(self.pocketd.log) as log:
            log.seek(self.begin)
            return " slots-gave-way " in log.read()

    def same(self, *words: str | bytes, mask: tuple[bytes, ...] = (), way: str = "held", **options: Any) -> Ended:
        """Run it both ways; what it wrote and how it ended must be the same, byte for byte but for `mask`."""
        expected = self.plain(*words, **options).masked(mask)
        found = self.from_held(*words, way=way, **options).masked(mask)
        assert found == expected, f"in a pocket:\n{found.shown()}\nunder python:\n{expected.shown()}"
        return expected

    # -- what there is, by the kernel

    @property
    def cgroup(self) -> Path:
        return self.pocketd.cgroup_path / f"pocketd-{self.service}.scope/service/pockets" / self.name

    def processes(self) -> list[int]:
        while True:
            try:
                return [int(pid) for path in self.cgroup.rglob("cgroup.procs") for pid in path.read_text().split()]
            except OSError:  # a leaf went in the midst of it
                continue

    def answered(self) -> None:
        """Wait until pocketd has answered a login: a program's first line may be there before."""
        assert wait_for(self.ways)
        self.pocketd.ps()  # answered after it

    @property
    def template(self) -> int:
        return int(self.row()["template_pid"])

    def cool(self) -> None:
        self.pocketd.pocket("cool", self.name)

    def gone(self) -> bool:
        if wait_for(lambda: not self.cgroup.exists()):
            return True
        print("left:", *self.cgroup.rglob("cgroup.procs"), self.processes())
        print(self.pocketd.log.read_text()[-4000:])
        return False


class Pockets:
    """Makes pockets of one pocketd, each with a definition of its own."""

    def __init__(self, pocketd: Pocketd, place: Path):
        self.pocketd, self.place = pocketd, place
        self.base = pocketd.config.read_text()
        self.made: list[Pocket] = []
        self.definitions: dict[str, str] = {}
        self.count = 0

    def make(self, source: str, checkpoint: str | None = None, service: str = "plain", **keys: Any) -> Pocket:
        """`keys`: of the operator's definition, as Python values; `allow` a dict. `source`: of app.py."""
        self.count += 1
        name = f"p{self.count}"
        place = self.place / name
        place.mkdir()
        pocket = Pocket(self.pocketd, name, place, service)
        pocket.write("app.py", source)
        checkpoint = checkpoint and checkpoint.replace("{place}", str(place))
        keys = {"service": service, "dir": str(place), "program": "app.py", "checkpoint": checkpoint, **keys}
        self.define(pocket, keys)
        self.made.append(pocket)
        return pocket

    def define(self, pocket: Pocket, keys: dict[str, Any]) -> None:
        lines = [f"{key} = {toml(value)}" for key, value in keys.items() if value is not None]
        self.definitions[pocket.name] = "\n".join([f"[pocket.{pocket.name}]", *lines, ""])
        self.read_again()

    def read_again(self) -> None:
        self.pocketd.config.write_text("\n".join([self.base, *self.definitions.values()]))
        self.pocketd.pocket("reload")

    def clear(self) -> None:
        """Take them away, and look that nothing of them is left."""
        made, self.made = self.made, []
        for pocket in made:
            self.pocketd.pocket("cool", pocket.name, check=False)
        for pocket in made:
            left = not pocket.gone() and [open(f"/proc/{pid}/cmdline").read() for pid in pocket.processes()]
            assert left is False, f"{pocket.name}: {left}"
        self.definitions.clear()


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
    return json.dumps(value)


def lines(*parts: str) -> str:
    return "\n".join(textwrap.dedent(part).strip("\n") for part in parts) + "\n"


def popen(pocket: Pocket, *words: str, **options: Any) -> subprocess.Popen[bytes]:
    """A run of which the test has both ends in its hands."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = pocket.environment(options.pop("env", None))
    return subprocess.Popen(pocket.pocket_command(*words), env=environment, cwd=pocket.place, **options)
