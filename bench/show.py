"""Results as text, and docs/performance.md made of them.

usage: python -m bench.show [RESULTS.JSON [PAGE.MD]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def quantity(value: float, unit: str) -> str:
    """With its prefix, three digits."""
    if unit == "bytes":
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    for name, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale or name == "us":
            return f"{value / scale:.3g} {name}"
    raise AssertionError(value)


def rows(measure: dict[str, Any]) -> list[list[str]]:
    unit = measure["unit"]
    return [
        [name, quantity(s["median"], unit), quantity(s["p99"], unit) if s["count"] > 1 else "", str(s["count"])]
        for name, s in measure["series"].items()
    ]


def ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def text(results: dict[str, Any]) -> str:
    lines = []
    for measure in results["measures"].values():
        table = [[measure["title"], "median", "p99", "count"], *rows(measure)]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines += ["", *("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table)]
        lines += [f"  {name}: {ratio(value)}" for name, value in measure["ratios"].items()]
    return "\n".join(lines)


def page(results: dict[str, Any]) -> str:
    """docs/performance.md."""
    m, load = results["machine"], results["load"]
    lines = [
        "# Performance",
        "",
        *_HEAD.splitlines(),
        "",
        "| | |",
        "|---|---|",
        f"| processors | {m['processors']}, {m['processor']} |",
        f"| memory | {m['memory'] / 1e9:.0f} GB |",
        f"| kernel, glibc | {m['kernel']}, {m['glibc']} |",
        f"| Python, TensorFlow, numpy | {m['python']}, {m['tensorflow']}, {m['numpy']} |",
        f"| pocketd | {m['pocketd']} |",
        f"| load average before, after | {load['before'][0]:.1f}, {load['after'][0]:.1f}, in {results['seconds']} s |",
        f"| launches at real-time priority | {'yes' if load['real-time priority'] else 'no'} |",
    ]
    for measure in results["measures"].values():
        lines += ["", f"## {measure['title']}", ""]
        lines += ["| | median | p99 | count |", "|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(measure)]
        lines += ["", *(f"- {name}: **{ratio(value)}**" for name, value in measure["ratios"].items())]
    lines += ["", *_MEANINGS.splitlines()]
    return "\n".join(lines) + "\n"


_HEAD = """\
Made by `python -m bench.show` of what `make bench` measured: do not edit. Every number stands beside the same program
as a process of its own (the monolith) and beside a floor, taken in turns in one run: what is to be read are the ratios
of medians, in bold. P99 of fewer than 100 values is their largest.
"""

_MEANINGS = """\
## What is measured
- **Worker**: from just before the request on the control socket to the program's first line after `import tensorflow`.
  **Monolith**: from before fork and exec to the same line. **Bare fork**: `os.fork()` in a process that is what a root
  template is, to the child's first instruction; **live fork into namespaces**: `nsutil.clone.live_fork` likewise, with
  the template's threads, a worker's namespaces and a cgroup that others have made.
- **Processor time**: of daemon, init, templates and workers, by cgroup v2's cpu.stat and /proc/PID/schedstat.
- **Client**: from before `login()` to the result in the client's memory, of a model that the service holds. The
  monolith loads the same file and calls the model once, directly. **Inference alone** is the same call again.
- **Round trip**: `session.call` of a function that does nothing; the echo packs and unpacks the same maps.
  All on one processor.
- **Memory**: sum of PSS; pockets with their clients, the service's init and its templates. Idle: a second after the
  last call. Private: what no other process maps, of one.
"""

RESULTS, PAGE = ROOT / "bench/results/results.json", ROOT / "docs/performance.md"


def main(source: str = str(RESULTS), target: str = str(PAGE)) -> None:
    made = page(json.loads(Path(source).read_text()))
    Path(target).parent.mkdir(exist_ok=True)
    Path(target).write_text(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
