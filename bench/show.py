"""Results as text, and docs/performance.md made of them.

usage: python -m bench.show [RESULTS.JSON [PAGE.MD]]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench import bars, peers
from bench.figures import quantity

ROOT = Path(__file__).resolve().parents[1]


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
        lines += ["", measured(measure)]
    lines += ["", *(bar_line(bar) for bar in results["bars"])]
    lines += [
        "",
        "Where a peer does better:",
        *(f"  {line.replace('**', '')}" for line in peers.wins(results["measures"])),
    ]
    lines += [f"Not there: {name}: {why}" for name, why in results["missing"].items()]
    return "\n".join(lines)


def measured(measure: dict[str, Any]) -> str:
    table = [[measure["title"], "median", "p99", "count"], *rows(measure)]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    return "\n".join([*lines, *(f"  {words}" for words in said(measure, ""))])


def said(measure: dict[str, Any], mark: str) -> list[str]:
    """Ratios of medians, medians of ratios, and what else is to be said of a measure."""
    found = [f"{name}: {mark}{ratio(value)}{mark}" for name, value in measure["ratios"].items()]
    found += [f"{name}, median of pairs: {mark}{ratio(s['median'])}{mark}" for name, s in measure["pairs"].items()]
    return found + [f"{name}: {shown(value)}" for name, value in measure["facts"].items() if value is not None]


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def bar_line(bar: dict[str, Any]) -> str:
    verdict = "reached" if bar["reached"] else "NOT REACHED"
    return f"{verdict:<12} {ratio(bar['value']):>6}  {bar['kind']} {bar['bar']:g}: {bar['what']}"


def page(results: dict[str, Any]) -> str:
    """docs/performance.md."""
    m = results["machine"]
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
        "",
        "| part | pocketd | seconds | load average before, after |",
        "|---|---|---:|---:|",
        *(
            f"| {part} | {told['pocketd']} | {told['seconds']} | {', '.join(f'{load:.1f}' for load in told['load'])} |"
            for part, told in results["parts"].items()
        ),
    ]
    if not all(told["real-time priority"] for told in results["parts"].values()):
        lines.append("\nLaunches had no real-time priority, and were disturbed by what else ran.")
    lines += ["", "## Bars", "", "| | measured | bar | |", "|---|---:|---:|---|"]
    for bar in results["bars"]:
        verdict = "reached" if bar["reached"] else "**not reached**"
        lines.append(f"| {bar['what']} | {ratio(bar['value'])} | {bar['kind']} {bar['bar']:g} | {verdict} |")
    missed = [bar["what"] for bar in results["bars"] if not bar["reached"] and bar["what"] in bars.WHY]
    lines += ["", *(f"- {what}: {bars.WHY[what](results['measures'])}" for what in missed)]
    lines += ["", "## Where a peer does better", "", *(f"- {line}" for line in peers.wins(results["measures"]))]
    lines += [f"- Not there: {name}: {why}" for name, why in results["missing"].items()]
    for measure in results["measures"].values():
        lines += ["", f"## {measure['title']}", ""]
        lines += ["| | median | p99 | count |", "|---|---:|---:|---:|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows(measure)]
        lines += ["", *(f"- {words}" for words in said(measure, "**"))]
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
  All on one processor. **gRPC**: a method that does nothing with bytes, on a unix socket, there and on all processors.
- **Memory**: sum of PSS; pockets with their clients, the service's init and its templates. Idle: a second after the
  last call. Private: what no other process maps, of one.
- **Ways**: `python PROGRAM`; the same in **crun**, all namespaces, without cgroups; an **os.fork zygote** that has
  imported TensorFlow, as SOCK's, from the request to it; a command by **ssh** in a service's container, as Pocket-ssh;
  a client of **gRPC** before a process that holds the model, as Pocket-rpc; **`pocket run`**, on demand; `pocket NAME`
  from a **slot** that has TensorFlow imported; from a **held slot**: at a checkpoint, rehearsed, its pages its own; a
  **client** of a service that holds the model. Pockets have their full isolation everywhere.
- **So many at once**: from the start of each process to its exit. Processor time and page faults (minor) are of all
  processes, of what serves them too, and of making as many slots as were taken. Memory at its peak: by how much the
  host's MemAvailable fell, and what stood before (anonymous PSS of templates, slots, servers).
- **Deployed**: what an app's own container has to carry, without Python itself.
"""

RESULTS, PAGE = ROOT / "bench/results/results.json", ROOT / "docs/performance.md"


def main(source: str = str(RESULTS), target: str = str(PAGE)) -> None:
    made = page(json.loads(Path(source).read_text()))
    Path(target).parent.mkdir(exist_ok=True)
    Path(target).write_text(made)


if __name__ == "__main__":
    main(*sys.argv[1:])
