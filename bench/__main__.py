"""usage: python -m bench [--quick] [--only MEASURE ...] [--results DIRECTORY]

Every measure beside the monolith and beside its floor, in one run against a pocketd of its own. Writes results.json
and plots to bench/results, and prints the ratios and which bars they reach. --quick does little of everything, to see
that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import apps, bars, comparison, deployed, many, measures, models, own, plot, show
from bench.figures import Measure
from bench.launch import Failed, Service, undisturbed
from bench.service import say, service_with
from bench.ways import Pockets

NAMES = ("first-line", "first-result", "round-trip", "memory", "launch", "scripts", "at-once", "many", "deployed")
HELD = {"yolov3": apps.OBJECTS, "mobilenet": apps.FUNCTION}  # scripts that are held with a model in memory
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="few repetitions, and a small model")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these measures alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default bench/results)")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if os.geteuid():
        print("bench: pocketd needs root, and so do its benchmarks", file=sys.stderr)
        return 1
    try:
        results = run(arguments.only, arguments.quick)
    except (own.Trouble, Failed) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plots = plot.draw(results, arguments.results)
    print(show.text(results))
    print(f"\n{os.path.relpath(arguments.results)}: {', '.join(['results.json', *plots])}")
    return 0


def run(wanted: list[str], quick: bool) -> dict[str, Any]:
    """Measure what is wanted. Raises Trouble and Failed."""
    began, load, alone = time.time(), os.getloadavg(), True
    found: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="pocketd-bench-") as name:
        work = Path(name)
        work.chmod(0o755)
        place = apps.directory(work)
        large = () if "memory" not in wanted else ("mobilenet",) if quick else ("yolov3", "resnet152")
        both = {"yolov3"} if "at-once" in wanted else set()
        say("making the models")
        files = {model: models.save(model, work) for model in {"mobilenet", *large, *both}}
        if "deployed" in wanted:
            found["deployed"] = deployed.sizes(place)
        if "first-line" in wanted or "first-result" in wanted:
            with undisturbed() as alone, service_with(work, {"mobilenet": files["mobilenet"]}) as service:
                found.update(launches(service, work, wanted, files["mobilenet"], quick))
        if "round-trip" in wanted:
            say("round trip")
            with service_with(work) as service:
                found["round-trip"] = measures.round_trip(service, work, *((5, 20) if quick else (40, 50)))
        for model in large:
            say(f"memory, {model}")
            counts = [1, 2] if quick else [1, 4, 10]
            with service_with(work, {model: files[model]}) as service:
                found[f"memory-{model}"] = measures.apps_memory(service, model, files[model], counts)
            if model in HELD:
                with service_with(work) as service:
                    pockets = Pockets(service, work / "pocketd.conf", place)
                    measures.held_memory(found[f"memory-{model}"], pockets, HELD[model], counts)
        if "many" in wanted:
            say("many launches, idle clients")
            with service_with(work, runtime="python") as service:
                made = many.launches(service, 200 if quick else 10_000)
                found.update(zip(("many", "many-cpu", "many-memory"), made, strict=True))
                made = many.idle(service, 20 if quick else 200, 2.0 if quick else 10.0)
                found.update(zip(("idle", "idle-cpu"), made, strict=True))
        if {"launch", "scripts", "at-once"} & set(wanted):
            wants = {name: file for name, file in files.items() if name in ("mobilenet", *both)}
            compared, missing = comparison.run(work, place, wants, wanted, quick)
            found.update(compared)
    written = {name: measure.wire() for name, measure in found.items()}
    return {
        "machine": machine(),
        "quick": quick,
        "load": {"before": load, "after": os.getloadavg(), "real-time priority": alone},
        "seconds": round(time.time() - began),
        "missing": missing,
        "bars": bars.reached(written),
        "measures": written,
    }


def launches(service: Service, work: Path, wanted: list[str], file: Path, quick: bool) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    if "first-line" in wanted:
        say("launch to first line")
        rounds, count = (2, 10) if quick else (6, 20)
        made = measures.first_line(service, own.BIN / "pocket", rounds, count)
        found.update(zip(("first-line", "command", "cpu"), made, strict=True))
    if "first-result" in wanted:
        say("launch to first result")
        rounds, count = (1, 8) if quick else (5, 20)
        found["first-result"] = measures.first_result(service, work, file, rounds, count)
    return found


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    head = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return {
        "processor": cpus[0] if cpus else platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "glibc": platform.libc_ver()[1],
        "tensorflow": version("tensorflow-cpu") or version("tensorflow"),
        "numpy": version("numpy"),
        "pocketd": head.stdout.strip() or version("pocketd"),
    }


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
