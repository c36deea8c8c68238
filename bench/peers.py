"""Where a peer does better than pocketd in a run, and why: said of what was measured, never beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.figures import quantity

Measures = dict[str, Any]
Medians = dict[str, float]

_FORKS = (
    "it forks and does nothing else: no command is started, no namespace, cgroup, identity, mount or filter is made, "
    "and no model stands ready"
)
_ONE = "one process computes for all its clients: no worker is made, and none has limits, files or a failure of its own"
_ALONE = "what pocketd has standing, its templates and slots, is there for one app as for many"
_FILES = "an ssh client and no library; what is to be in memory each app loads itself"
_WHY = {
    "os.fork zygote": _FORKS,
    "gRPC client": _ONE,
    "gRPC client, from its connection": _ONE,
    "python": _ALONE,
    "python in crun": _ALONE,
    "ssh": _ALONE,
    "client of ssh": _FILES,
}
_OURS = ("pocket run", "pocket, slot", "pocket, held slot", "client", "client, slot", "client of a pocket")


def wins(measures: Measures) -> list[str]:
    """A sentence for each measure in which one does, and then why each of those does."""
    found, seen = [], set()
    for title, unit, theirs, ours in _where(measures):
        if theirs:
            best = min(ours, key=lambda name: ours[name])
            named = ", ".join(f"{peer} **{quantity(value, unit)}**" for peer, value in theirs.items())
            found.append(f"{title}: {named}; the best of ours, {best}, {quantity(ours[best], unit)}")
            seen |= set(theirs)
    return found + [f"{peer}: {_WHY[peer]}" for peer in _WHY if peer in seen]


def _where(measures: Measures) -> Iterator[tuple[str, str, Medians, Medians]]:
    """Title, unit, peers that do better than the best of ours, and ours."""
    for name, measure in measures.items():
        unit, medians = measure["unit"], {name: s["median"] for name, s in measure["series"].items()}
        if name.startswith("at-once-"):
            counts = sorted({int(series.split()[0]) for series in medians})
            for count in sorted({counts[0], counts[-1]}):
                these = {n.partition(" ")[2]: value for n, value in medians.items() if n.startswith(f"{count} ")}
                yield f"{measure['title']}, {count}", unit, *_split(these)
        elif name == "deployed":
            for workload in dict.fromkeys(series.partition(", ")[0] for series in medians):
                these = {n.partition(", ")[2]: v for n, v in medians.items() if n.startswith(f"{workload}, ")}
                these.pop("program in a pocket")
                yield f"{measure['title']}, {workload}", unit, *_split(these)
        elif name.startswith(("launch", "script-", "first-result")):
            yield measure["title"], unit, *_split(medians)
    if "launch" in measures and "request" in measures:
        forked = measures["launch"]["series"]["os.fork zygote"]["median"]
        asked = {name: s["median"] for name, s in measures["request"]["series"].items()}
        for name, value in asked.items():
            theirs = {"os.fork zygote": forked} if forked < value else {}
            yield f"{measures['request']['title']}, {name}", "s", theirs, {name: value}


def _split(medians: Medians) -> tuple[Medians, Medians]:
    ours = {name: value for name, value in medians.items() if name in _OURS}
    best = min(ours.values(), default=0.0)
    return {name: value for name, value in medians.items() if name in _WHY and value < best}, ours
