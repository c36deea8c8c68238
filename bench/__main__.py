"""usage: python -m bench [--quick] [--only MEASURE ...] [--results DIRECTORY]

Every measure beside the monolith and beside its floor, in one run against a pocketd of its own. Writes results.json
and plots to bench/results, and prints the ratios and which bars they reach. --quick does little of everything, to see
that it works. With --only, what was measured before on this machine stays in results.json beside it, each part with the
version that it was measured of.
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
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import bars, own, plot, show
from bench.parts import PARTS, Run

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--quick", action="store_true", help="few repetitions, and a small model")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS), help="these measures alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write (default bench/results)")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if os.geteuid():
        print("bench: pocketd needs root, and so do its benchmarks", file=sys.stderr)
        return 1
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / "results.json"
    before = file.read_text() if file.exists() else ""
    results: dict[str, Any] = {}
    try:
        for results in run(arguments.only, arguments.quick):  # one that is interrupted keeps what it has by then
            results = merged(before, results)
            file.write_text(json.dumps(results, indent=1) + "\n")
    except own.Trouble as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    plots = plot.draw(results, arguments.results)
    print(show.text(results))
    print(f"\n{os.path.relpath(arguments.results)}: {', '.join(['results.json', *plots])}")
    return int(any(part in results["missing"] for part in arguments.only))


def run(wanted: Sequence[str], quick: bool) -> Iterator[dict[str, Any]]:
    """Measure what is wanted; gives all results so far after each part. Raises Trouble."""
    parts: dict[str, Any] = {}
    computer = machine()
    with tempfile.TemporaryDirectory(prefix="pocketd-bench-") as name:
        work = Path(name)
        work.chmod(0o755)
        made = Run(work, quick)
        for part in PARTS:
            if part in wanted:
                began, load = time.time(), os.getloadavg()
                made.part(part)
                parts[part] = {
                    "pocketd": computer["pocketd"],
                    "seconds": round(time.time() - began),
                    "load": [load[0], os.getloadavg()[0]],
                    "real-time priority": made.undisturbed,
                }
                written = {name: measure.wire() for name, measure in made.found.items()}
                yield {
                    "machine": computer,
                    "quick": quick,
                    "parts": dict(parts),
                    "missing": dict(made.missing),
                    "bars": bars.reached(written),
                    "measures": written,
                }


def merged(text: str, results: dict[str, Any]) -> dict[str, Any]:
    """With what earlier results, `text`, have of parts that were not measured now, where they are of this machine."""
    missing = results["missing"]
    try:
        before = json.loads(text)
        wanted = [p for p in PARTS if p not in results["parts"] or p in missing]
        parts = {p: before["parts"][p] for p in wanted if p in before["parts"]}
    except (OSError, ValueError, KeyError):
        return results
    same = {k: v for k, v in before["machine"].items() if k != "pocketd"}
    if not parts or before["quick"] != results["quick"] or same.items() - results["machine"].items():
        return results
    measures = {**before["measures"], **results["measures"]}
    return {
        **results,
        "parts": {**results["parts"], **parts},
        "missing": {**{k: v for k, v in before["missing"].items() if k in parts}, **missing},
        "bars": bars.reached(measures),
        "measures": measures,
    }


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
