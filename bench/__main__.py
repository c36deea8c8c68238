"""usage: python -m bench [--quick] [--only MEASURE ...] [--results DIRECTORY]

Every measure beside the monolith and beside its floor, in one run against a pocketd of its own. Writes results.json and
results.png to bench/results, and prints the ratios. --quick does little of everything, to see that it works.
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

from bench import measures, models, own, plot, show
from bench.figures import Measure
from bench.launch import Failed, Service, undisturbed

SERVICE = "tensorflow"
NAMES = ("first-line", "first-result", "round-trip", "memory")
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
    plot.draw(results, arguments.results / "results.png")
    print(show.text(results))
    print(f"\n{os.path.relpath(arguments.results)}/results.json, results.png")
    return 0


def run(wanted: list[str], quick: bool) -> dict[str, Any]:
    """Measure what is wanted. Raises Trouble and Failed."""
    began, load, alone = time.time(), os.getloadavg(), True
    found: dict[str, Measure] = {}
    with tempfile.TemporaryDirectory(prefix="pocketd-bench-") as name:
        work = Path(name)
        large = () if "memory" not in wanted else ("mobilenet",) if quick else ("yolov3", "resnet152")
        say("making the models")
        files = {model: models.save(model, work) for model in {"mobilenet", *large}}
        if "first-line" in wanted or "first-result" in wanted:
            with undisturbed() as alone, own.OwnPocketd(work, configuration(work, files["mobilenet"])) as pocketd:
                found.update(launches(pocketd, wanted, files["mobilenet"], quick))
        if "round-trip" in wanted:
            say("round trip")
            with own.OwnPocketd(work, configuration(work, files["mobilenet"])) as pocketd:
                rounds, block = (5, 20) if quick else (40, 50)
                found["round-trip"] = measures.round_trip(switched_on(pocketd), rounds, block)
        for model in large:
            say(f"memory, {model}")
            with own.OwnPocketd(work, configuration(work, files[model])) as pocketd:
                counts = [1, 2] if quick else [1, 4, 10]
                found[f"memory-{model}"] = measures.apps_memory(switched_on(pocketd), model, files[model], counts)
    return {
        "machine": machine(),
        "quick": quick,
        "load": {"before": load, "after": os.getloadavg(), "real-time priority": alone},
        "seconds": round(time.time() - began),
        "measures": {name: measure.wire() for name, measure in found.items()},
    }


def launches(pocketd: own.OwnPocketd, wanted: list[str], file: Path, quick: bool) -> dict[str, Measure]:
    service = switched_on(pocketd)
    found: dict[str, Measure] = {}
    if "first-line" in wanted:
        say("launch to first line")
        rounds, count = (2, 10) if quick else (6, 20)
        made = measures.first_line(service, own.BIN / "pocket", rounds, count)
        found.update(zip(("first-line", "command", "cpu"), made, strict=True))
    if "first-result" in wanted:
        say("launch to first result")
        rounds, count = (1, 8) if quick else (5, 20)
        found["first-result"] = measures.first_result(service, file, rounds, count)
    return found


def configuration(work: Path, file: Path) -> Path:
    """One service that holds one model, by the name of its file."""
    path = work / "pocketd.conf"
    path.write_text(
        f'[service.{SERVICE}]\nruntime = "tensorflow"\nmodels = {{ {file.stem} = {json.dumps(str(file))} }}\n'
    )
    return path


def switched_on(pocketd: own.OwnPocketd) -> Service:
    pocketd.turn_on(SERVICE)
    scope = own.cgroup2() / pocketd.cgroup / f"pocketd-{SERVICE}.scope"
    return Service(pocketd.runtime, SERVICE, scope, pocketd.pid)


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


def say(words: str) -> None:
    print(f"-- {words} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
