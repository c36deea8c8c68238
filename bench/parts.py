"""The parts of a run, which `--only` names: each has a pocketd of its own, and leaves what it has measured."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench import apps, compare, deployed, many, measures, models, own, rpc, ways
from bench.apps import DETECT_FACES, DETECT_OBJECTS, FUNCTION, OBJECTS, PREDICT, App
from bench.figures import Measure
from bench.launch import ENVIRONMENT, Failed, undisturbed
from bench.service import say, service_with
from bench.started import Started, process
from bench.ways import Pockets, Way

# Scripts that are held with a model in memory, by the model.
HELD = {"yolov3": OBJECTS, "mobilenet": FUNCTION}


@dataclass
class Run:
    """One run: a directory for what it needs, what it has found, and what it could not measure, with the reason."""

    work: Path
    quick: bool
    found: dict[str, Measure] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    undisturbed: bool = True
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = apps.directory(self.work)

    def model(self, name: str) -> Path:
        """Its file, made when it is first asked for."""
        if name not in self.files:
            say(f"making the model {name}")
            self.files[name] = models.save(name, self.work)
        return self.files[name]

    def few(self, quick: int, else_: int) -> int:
        return quick if self.quick else else_

    def part(self, name: str) -> None:
        """Where it fails the others go on, and what it has measured by then is left out: it may stand beside what an
        earlier version measured of the rest."""
        say(name)
        found = dict(self.found)
        try:
            PARTS[name](self)
        except (own.Trouble, Failed, OSError, subprocess.SubprocessError) as e:
            self.found = found
            self.missing[name] = f"{type(e).__name__}: {e}"
            say(f"{name} failed: {e}")


@contextmanager
def pockets_of(run: Run, *names: str, alone: bool) -> Iterator[tuple[Pockets, list[Way], ExitStack]]:
    """Those of a service with these models and the detector of faces, and the peers; `alone`: before all else that this
    machine does. The stack is for what is to end with them."""
    held: dict[str, Path | str] = {name: run.model(name) for name in names}
    with ExitStack() as stack:
        if alone:
            run.undisturbed &= stack.enter_context(undisturbed())
        service = stack.enter_context(service_with(run.work, {**held, "faces": "mtcnn:MTCNN"}))
        peers, missing = ways.peers(stack, run.work, run.place)
        run.missing.update(missing)
        yield Pockets(service, run.work, run.place), peers, stack


# -- what pocketd takes, beside its floors


def first_line(run: Run) -> None:
    with undisturbed() as alone, service_with(run.work) as service:
        run.undisturbed &= alone
        made = measures.first_line(service, own.BIN / "pocket", run.few(2, 6), run.few(10, 20))
        run.found.update(zip(("first-line", "command", "cpu"), made, strict=True))


def steps(run: Run) -> None:
    """What a worker's confinement costs a launch."""
    command = [sys.executable, "-m", "bench.steps", str(run.few(5, 200)), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"bench.steps failed: {done.stderr}")
    measure = run.found["steps"] = Measure("A worker's own place, and giving up all privileges, step by step", "s")
    found = {name: [1e-6 * us for us in series] for name, series in json.loads(done.stdout).items()}
    for name, series in found.items():
        measure.add(name, *series)
    confining = [series for name, series in found.items() if not name.startswith("(")]
    measure.add("all steps", *map(sum, zip(*confining, strict=True)))


def first_result(run: Run) -> None:
    file = run.model("mobilenet")
    with undisturbed() as alone, service_with(run.work, {"mobilenet": file}) as service:
        run.undisturbed &= alone
        pockets = Pockets(service, run.work, run.place)
        run.found["first-result"] = measures.first_result(pockets, run.work, file, run.few(1, 5), run.few(8, 20))


def round_trip(run: Run) -> None:
    with service_with(run.work) as service:
        run.found["round-trip"] = measures.round_trip(service, run.work, run.few(5, 40), run.few(20, 50))


def memory(run: Run) -> None:
    counts = [1, 2] if run.quick else [1, 4, 10]
    for name in ("mobilenet",) if run.quick else ("yolov3", "resnet152"):
        file = run.model(name)
        with service_with(run.work, {name: file}) as service:
            measure = run.found[f"memory-{name}"] = measures.apps_memory(service, name, file, counts)
        if name in HELD:
            with service_with(run.work) as service:
                measures.held_memory(measure, Pockets(service, run.work, run.place), HELD[name], counts)


def many_launches(run: Run) -> None:
    with undisturbed(), service_with(run.work, runtime="python") as service:
        made = many.launches(service, run.few(200, 10_000))
        run.found.update(zip(("many", "many-cpu", "many-memory"), made, strict=True))
        made = many.idle(service, run.few(20, 1000), run.few(2, 10))
        run.found.update(zip(("idle", "idle-cpu"), made, strict=True))
    with service_with(run.work, runtime="python") as service:  # not before others: their processes take turns
        made = many.busy(service, run.few(20, 200), run.few(2, 20))
        run.found.update(zip(("busy-share", "busy-launch"), made, strict=True))


# -- beside its peers


def sizes(run: Run) -> None:
    run.found["deployed"] = deployed.sizes(run.place)


def launches(run: Run) -> None:
    with pockets_of(run, alone=True) as (pockets, peers, _):
        made = compare.launches(pockets, peers, run.few(1, 5), run.few(5, 20))
        run.found.update(zip(("launch-begun", "launch", "request"), made, strict=True))


def scripts(run: Run) -> None:
    """Whole scripts, their first results, and inference without a pause."""
    with pockets_of(run, alone=True) as (pockets, peers, _):
        every = [*peers, pockets.on_demand, pockets.slot, pockets.held]
        two = [peers[0], pockets.held]
        plan = [(PREDICT, every, 4), (FUNCTION, two, 3)]
        if not run.quick:
            plan += [(OBJECTS, two, 3), (DETECT_OBJECTS, every, 2), (DETECT_FACES, every, 2)]
        for app, ways_of_it, rounds in plan:
            say(f"{app.program} from start to exit")
            with compare.held(pockets, app, 2) as making:
                run.found[f"making-{app.name}"] = making
                run.found[f"script-{app.name}"] = compare.scripts(app, pockets, ways_of_it, run.few(1, rounds))
                if app in (PREDICT, FUNCTION, OBJECTS):
                    looks = compare.first_looks(app, pockets, run.few(3, 8 if app is OBJECTS else 20))
                    run.found[f"first-look-{app.name}"] = looks
        say("inference without a pause")
        run.found["busy"] = compare.busy(pockets, run.few(3, 20), run.few(20, 40))


def at_once(
    app: App, everyone: bool, counts: list[int], warm: int, model: str | None = None
) -> tuple[str, Callable[[Run], None]]:
    """The part of one app, and its name: `everyone` has it run by all peers; `model`: what its clients ask for."""

    def part(run: Run) -> None:
        if run.quick and app is not PREDICT:
            return
        deployed_ones = [model] if model in models.INPUTS else []
        with pockets_of(run, *deployed_ones, alone=False) as (pockets, peers, stack):
            of_it = [*peers, pockets.on_demand, pockets.held] if everyone else [peers[0], pockets.held]
            of_it += [pockets.client(model)] if model else []
            for name in deployed_ones:
                server = stack.enter_context(rpc.server(run.work, {name: run.model(name)}))
                of_it.append(rpc_client(server, name))
            slots = run.few(4, warm)
            with compare.held(pockets, app, slots) as making:
                run.found[f"making-{app.name}-{slots}"] = making
                made = compare.at_once(app, pockets, of_it, [2] if run.quick else counts)
                run.found.update({f"at-once-{app.name}{kind}": measure for kind, measure in made.items()})

    return f"at-once-{app.name}", part


def rpc_client(server: rpc.Rpc, model: str) -> Way:
    def start(_: App) -> Started:
        return process(server.command(model), rpc.ROOT, ENVIRONMENT)

    return Way("gRPC client", start, server.used, standing=lambda: [server.pid])


PARTS: dict[str, Callable[[Run], None]] = {
    "deployed": sizes,
    "first-line": first_line,
    "launch": launches,
    "steps": steps,
    "first-result": first_result,
    "scripts": scripts,
    **dict(
        [
            at_once(PREDICT, True, [1, 4, 10, 20], 20, "mobilenet"),
            at_once(FUNCTION, False, [20], 20),
            at_once(DETECT_OBJECTS, True, [1, 4, 10], 2),
            at_once(OBJECTS, False, [1, 4, 10, 20], 4, "yolov3"),
            at_once(DETECT_FACES, True, [1, 4, 10, 20], 4, "faces"),
        ]
    ),
    "memory": memory,
    "round-trip": round_trip,
    "many": many_launches,
}
