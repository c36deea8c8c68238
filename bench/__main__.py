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
from bench.launch import Failed, Service

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
    began, load = time.time(), os.getloadavg()
    found: dict[str, Measure] = {}
    with tempfile.TemporaryDirectory(prefix="pocketd-bench-") as name:
        work = Path(name)
        large = () if "memory" not in wanted else ("mobilenet",) if quick else ("yolov3", "resnet152")
        say("making the models")
        files = {model: models.save(model, work) for model in {"mobilenet", *large}}
        with own.OwnPocketd(work, configuration(work, files, large)) as pocketd:
            pocketd.turn_on("tensorflow")
            service = describe(pocketd, "tensorflow")
            if "first-line" in wanted:
                say("launch to first line")
                rounds, launches = (2, 10) if quick else (6, 20)
                command = own.BIN / "pocket"
                made = measures.first_line(service, command, rounds, launches)
                found.update(zip(("first-line", "command", "cpu"), made, strict=True))
            if "first-result" in wanted:
                say("launch to first result")
                rounds, launches = (1, 8) if quick else (5, 20)
                found["first-result"] = measures.first_result(service, files["mobilenet"], rounds, launches)
            if "round-trip" in wanted:
                say("round trip")
                rounds, block = (5, 20) if quick else (40, 50)
                found["round-trip"] = measures.round_trip(service, rounds, block)
            for model in large:
                say(f"memory, {model}")
                pocketd.turn_on(f"one-{model}")
                one = describe(pocketd, f"one-{model}")
                counts = [1, 2] if quick else [1, 4, 10]
                found[f"memory-{model}"] = measures.apps_memory(one, model, files[model], counts)
                pocketd.command(one.name, "off")
    return {
        "machine": machine(),
        "quick": quick,
        "load": {"before": load, "after": os.getloadavg()},
        "seconds": round(time.time() - began),
        "measures": {name: measure.wire() for name, measure in found.items()},
    }


def configuration(work: Path, files: dict[str, Path], large: tuple[str, ...]) -> Path:
    """A service for the launches, and one for each large model that holds nothing else."""
    text = ""
    for name, model in [("tensorflow", "mobilenet"), *((f"one-{model}", model) for model in large)]:
        held = f"{{ {model} = {json.dumps(str(files[model]))} }}"
        text += f'[service.{name}]\nruntime = "tensorflow"\nmodels = {held}\n\n'
    path = work / "pocketd.conf"
    path.write_text(text)
    return path


def describe(pocketd: own.OwnPocketd, name: str) -> Service:
    scope = own.cgroup2() / pocketd.cgroup / f"pocketd-{name}.scope"
    return Service(pocketd.runtime, name, scope, pocketd.pid)


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
