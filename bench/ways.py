"""The ways to run an app: as a process of its own, in the peers' ways, and in a pocket."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import apps, crun, own, sshd, usage, zygote
from bench.apps import PHOTO, App
from bench.fetched import Missing
from bench.launch import ENVIRONMENT, Failed, Service
from bench.started import Started, process, together
from bench.usage import Used

TRIED = "now.py"  # the program by which a peer shows that it works
PATIENCE = 180.0  # seconds until a pocket is held, or its slots are there again


@dataclass(frozen=True)
class Way:
    """`used`: by what serves all its runs, so far; `settle`: wait until what its runs left is cleared away; `standing`:
    pids of what serves all its runs."""

    name: str
    start: Callable[[App], Started]
    used: Callable[[], Used] = Used
    settle: Callable[[], object] = lambda: None
    standing: Callable[[], list[int]] = list


def peers(stack: ExitStack, work: Path, place: Path) -> tuple[list[Way], dict[str, str]]:
    """The monolith and the peers that are there, until `stack` is closed; and why others are not. `work` is
    where they may write."""

    def python(app: App) -> Started:
        return process([sys.executable, app.program, *app.words], place, ENVIRONMENT)

    work = Path(tempfile.mkdtemp(prefix="peers-", dir=work))
    found, missing = [Way("python", python)], {}
    try:
        container = crun.Crun(work, [Path(sys.prefix), place])
        together([lambda: container.start(place, TRIED)])
        found.append(Way("python in crun", lambda app: container.start(place, app.program, *app.words)))
    except (Missing, Failed) as e:
        missing["python in crun"] = str(e)
    plain = stack.enter_context(zygote.zygote())
    found.append(
        Way(
            "os.fork zygote",
            lambda app: plain.start(place, app.program, *app.words),
            plain.used,
            standing=lambda: [plain.pid],
        )
    )
    try:
        server = stack.enter_context(sshd.sshd(work))
        together([lambda: server.start(place, TRIED)])

        def ssh(app: App) -> Started:
            return server.start(place, app.program, *app.words)

        found.append(Way("ssh", ssh, server.used, server.settle, lambda: [server.pid]))
    except (Missing, Failed) as e:
        missing["ssh"] = str(e)
    return found, missing


class Pockets:
    """The ways of one pocketd, with a service that is on; `work` has its configuration, which defines apps while they
    are held, and its log."""

    def __init__(self, service: Service, work: Path, place: Path):
        self.service = service
        self.place = place
        self.environment = {**ENVIRONMENT, "POCKETD_RUNTIME_DIR": service.runtime_dir}
        self.on_demand = self._way("pocket run", self._run)
        self.slot = self._way("pocket, slot", lambda app: self.command(f"{app.name}-imported", *app.words))
        self.held = self._way("pocket, held slot", lambda app: self.command(app.name, *app.words))
        self._config, self._log = work / "pocketd.conf", work / "pocketd.log"
        self._base, self._mark = self._config.read_text(), 0
        self._names: list[str] = []

    def _way(self, name: str, start: Callable[[App], Started]) -> Way:
        return Way(name, start, self.used, self.settle, self.standing)

    def command(self, *words: str) -> Started:
        return process([str(own.BIN / "pocket"), *words], self.place, self.environment)

    def _run(self, app: App) -> Started:
        return self.command("run", "--service", self.service.name, app.program, *app.words)

    def client(self, model: str) -> Way:
        """Apps that hold no TensorFlow and ask for one result of a model of the service."""
        return self.script("client", "client.py", PHOTO) if model == "faces" else self.script("client", "ask.py", model)

    def script(self, name: str, *words: str) -> Way:
        """Python by itself, in a process that may log in."""
        return self._way(name, lambda app: process([sys.executable, *words], self.place, self.environment))

    @contextmanager
    def holding(self, app: App, warm: int) -> Iterator[dict[str, Any]]:
        """Its template and its slots, made and given up; what pocketd says of it."""
        names = [app.name, f"{app.name}-imported"] if warm else [app.name]
        with self._there(apps.definitions(self.service.name, self.place, app, warm), names) as said:
            yield said

    @contextmanager
    def client_slots(self, model: str, warm: int) -> Iterator[str]:
        """Slots of a pocket for clients of a model of the service. Gives its name."""
        name = f"client-of-{model}"
        with self._there(apps.client(self.service.name, self.place, name, model, warm), [name]):
            yield name

    @contextmanager
    def _there(self, definitions: str, names: list[str]) -> Iterator[dict[str, Any]]:
        self._mark = self._log.stat().st_size
        try:
            self._define(definitions)
            self._names = names
            with self.service.control() as control:
                said: list[dict[str, Any]] = [control.call("warm", name=n, timeout=PATIENCE) for n in self._names]
            self.settle()
            yield said[0]
        finally:
            self._names = []
            self._define("")
            self.settle()

    def came(self, app: App) -> dict[str, int]:
        """Since it is held: how many of its runs came from a slot, and how many another way."""
        with open(self._log) as log:
            log.seek(self._mark)
            lines = [line for line in log if " session-started " in line and f" pocket={app.name} " in line]
        slots = sum("way=slot" in line for line in lines)
        return {"from slots": slots, "another way": len(lines) - slots}

    def _define(self, definitions: str) -> None:
        self._config.write_text(f"{self._base}\n{definitions}")
        done = subprocess.run(
            [str(own.BIN / "pocket"), "reload"], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"pocketd does not take its configuration: {done.stderr}")

    def settle(self) -> None:
        """Wait until no session is left and all slots are there again. Raises Failed. It asks seldom: pocketd forks to
        answer, and those faults would stand beside what is measured."""
        end, pause = time.monotonic() + PATIENCE, 0.02
        with self.service.control() as control:
            while True:
                shown = control.call("ps")
                rows = [row for row in shown["pockets"] if row["name"] in self._names]
                if not shown["workers"] and all((row["slots"] or 0) == row["warm"] for row in rows):
                    return
                if time.monotonic() > end:
                    raise Failed(f"not settled: {[(row['name'], row['slots'], row['warm']) for row in rows]}")
                time.sleep(pause)
                pause = min(2 * pause, 0.5)

    def standing(self) -> list[int]:
        return [self.service.daemon, *self.service.processes()]

    def used(self) -> Used:
        """By the daemon and by all in the service, workers that have ended among them: init has waited for those."""
        while True:
            try:
                processes = [usage.process(pid) for pid in self.standing()]
                break
            except OSError:  # one has just ended
                time.sleep(0.02)
        return Used(sum(self.service.cpu().values()), usage.total(processes).faults)
