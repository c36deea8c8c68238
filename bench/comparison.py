"""The comparison as a whole: which apps in which ways, and how often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from bench import compare, rpc, ways
from bench.apps import DETECT_FACES, DETECT_OBJECTS, FUNCTION, OBJECTS, PREDICT, App
from bench.figures import Measure
from bench.launch import ENVIRONMENT, undisturbed
from bench.service import say, service_with
from bench.started import Started, process
from bench.ways import Pockets, Way


def run(
    work: Path, place: Path, files: Mapping[str, Path], wanted: Sequence[str], quick: bool
) -> tuple[dict[str, Measure], dict[str, str]]:
    """The measures, and of the peers that are missing why. Raises Trouble and Failed."""
    found: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    models: dict[str, Path | str] = {**files, "faces": "mtcnn:MTCNN"}
    if "launch" in wanted or "scripts" in wanted:
        with undisturbed(), ExitStack() as stack:
            pockets = Pockets(stack.enter_context(service_with(work, models)), work / "pocketd.conf", place)
            peers, missing = ways.peers(stack, work / "alone", place)
            if "launch" in wanted:
                say("launches of every way")
                made = compare.launches(pockets, peers, *((1, 5) if quick else (5, 20)))
                found.update(zip(("launch-begun", "launch", "request"), made, strict=True))
            if "scripts" in wanted:
                found.update(scripts(pockets, peers, quick))
    if "at-once" in wanted:
        with ExitStack() as stack:
            pockets = Pockets(stack.enter_context(service_with(work, models)), work / "pocketd.conf", place)
            peers, missing = ways.peers(stack, work / "at-once", place)
            server = stack.enter_context(rpc.server(work / "at-once", dict(files)))
            found.update(at_once(pockets, peers, server, quick))
    return found, missing


def scripts(pockets: Pockets, peers: Sequence[Way], quick: bool) -> dict[str, Measure]:
    """Whole scripts, their first results, and inference without a pause."""
    found: dict[str, Measure] = {}
    every = [*peers, pockets.on_demand, pockets.slot, pockets.held]
    few = [peers[0], pockets.held]
    plan = [(PREDICT, every, 4), (FUNCTION, few, 3), (DETECT_OBJECTS, every, 2), (DETECT_FACES, every, 2)]
    plan.insert(2, (OBJECTS, few, 3))
    for app, ways_of_it, rounds in plan:
        if quick and app in (DETECT_OBJECTS, OBJECTS):
            continue
        say(f"{app.program} from start to exit")
        with compare.held(pockets, app, 2) as making:
            found[f"making-{app.name}"] = making
            found[f"script-{app.name}"] = compare.scripts(app, pockets, ways_of_it, 1 if quick else rounds)
            if app in (PREDICT, FUNCTION, OBJECTS):
                looks = compare.first_looks(app, pockets, 3 if quick else 8 if app is OBJECTS else 20)
                found[f"first-look-{app.name}"] = looks
    say("inference without a pause")
    found["busy"] = compare.busy(pockets, *((3, 20) if quick else (20, 40)))
    return found


def at_once(pockets: Pockets, peers: Sequence[Way], server: rpc.Rpc, quick: bool) -> dict[str, Measure]:
    """Many of an app at once."""
    found: dict[str, Measure] = {}
    every = [*peers, pockets.on_demand, pockets.held]

    def rpc_client(model: str) -> Way:
        def start(_: App) -> Started:
            return process(server.command(model), rpc.ROOT, ENVIRONMENT)

        return Way("gRPC client", start, server.used, standing=lambda: [server.pid])

    few = [peers[0], pockets.held]
    plan: list[tuple[App, list[Way], list[int], int]] = [
        (PREDICT, [*every, pockets.client("mobilenet"), rpc_client("mobilenet")], [1, 4, 10, 20], 20),
        (FUNCTION, few, [20], 20),
        (DETECT_OBJECTS, every, [1, 4, 10], 2),
        (OBJECTS, [*few, pockets.client("yolov3"), rpc_client("yolov3")], [1, 4, 10], 4),
        (DETECT_FACES, [*every, pockets.client("faces")], [1, 4, 10], 4),
    ]
    for app, ways_of_it, counts, warm in plan:
        if quick and app is not PREDICT:
            continue
        say(f"{app.program}, many at once")
        with compare.held(pockets, app, 4 if quick else warm) as making:
            found[f"making-{app.name}-{warm}"] = making
            made = compare.at_once(app, ways_of_it, [2] if quick else counts)
            found.update({f"at-once-{app.name}{kind}": measure for kind, measure in made.items()})
    return found
