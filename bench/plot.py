"""The plots of a run. Bars: one panel a measure, medians with p99 as a mark, times on a logarithmic axis. Lines: so
many of an app at once, as in the figure of the paper, a panel for what each way took and used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.figures import quantity
from bench.show import ratio

_BAR, _MARK = "#4878a8", "#c05020"
_BARS = {
    "launches": ("first-line", "command", "cpu", "launch", "request", "first-result"),
    "scripts": ("script-", "first-look-", "busy"),
    "memory": ("memory-", "idle", "deployed"),
    "round-trip": ("round-trip",),
    "many": ("many",),
}
_AT_ONCE = "at-once-"
_USED = {"": "s, each", "-cpu": "processor time", "-faults": "page faults", "-peak": "memory", "-energy": "energy"}


def draw(results: dict[str, Any], directory: Path) -> list[str]:
    """Files in there, of what was measured; their names."""
    import matplotlib

    matplotlib.use("Agg")
    measures = results["measures"]
    wanted: dict[str, tuple[dict[str, Any], Callable[[Any, Path], None]]] = {
        name: ({key: m for key, m in measures.items() if key.startswith(prefixes)}, bars)
        for name, prefixes in _BARS.items()
    }
    wanted["at-once"] = ({key: m for key, m in measures.items() if key.startswith(_AT_ONCE)}, lines)
    made = []
    for name, (shown, plot) in wanted.items():
        if shown:
            plot(shown, directory / f"{name}.png")
            made.append(f"{name}.png")
    return made


def bars(measures: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    shown = {name: _without_private(measure) for name, measure in measures.items()}
    heights = [len(series) + 1.6 for series in shown.values()]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.36 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (name, series) in zip(axes[:, 0], shown.items(), strict=True):
        measure = measures[name]
        unit = measure["unit"]
        names = list(series)
        medians = [series[n]["median"] for n in names]
        axis.barh(names, medians, color=_BAR, height=0.6)
        several = [n for n in names if series[n]["count"] > 1]
        axis.plot([series[n]["p99"] for n in several], several, "|", color=_MARK, markersize=9, markeredgewidth=2)
        if unit == "s" and min(medians) > 0:
            axis.set_xscale("log")
            axis.set_xlim(min(medians) / 3, max(series[n]["p99"] for n in names) * 5)
        else:
            axis.set_xlim(0, max(medians) * 1.15)
        for n, median in zip(names, medians, strict=True):
            axis.annotate(
                f" {quantity(median, unit)}", (max(median, series[n]["p99"]), n), va="center", fontsize=8,
                xytext=(4, 0), textcoords="offset points",
            )  # fmt: skip
        ratios = [f"{pair}: {ratio(value)}" for pair, value in measure["ratios"].items() if "idle" not in pair]
        said = "; ".join(ratios[:3])  # what a line holds; all are in the JSON
        axis.set_title(f"{measure['title']}\n", fontsize=10, loc="left", fontweight="bold")
        axis.text(0, 1.02, said, transform=axis.transAxes, fontsize=7.5, color="#444444")
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter(lambda value, _, unit=unit: quantity(value, unit) if value > 0 else "0")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _without_private(measure: dict[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in measure["series"].items() if "private" not in name}


def lines(measures: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    kinds = {kind: words for kind, words in _USED.items() if any(name.endswith(kind) for name in measures)}
    apps = [name for name in measures if f"{name}-cpu" in measures]
    figure, axes = pyplot.subplots(
        len(apps), len(kinds), figsize=(3.4 * len(kinds), 2.8 * len(apps)), squeeze=False, layout="constrained"
    )
    for row, app in zip(axes, apps, strict=True):
        for axis, (kind, words) in zip(row, kinds.items(), strict=True):
            measure = measures[f"{app}{kind}"]
            for way, points in _by_way(measure).items():
                axis.plot([n for n, _ in points], [value for _, value in points], "o-", label=way, markersize=3)
            axis.set_xticks(sorted({n for points in _by_way(measure).values() for n, _ in points}))
            axis.set_yscale("log")
            axis.set_title(f"{app.removeprefix(_AT_ONCE)}: {words}", fontsize=9, loc="left", fontweight="bold")
            unit = measure["unit"]
            axis.yaxis.set_major_formatter(lambda value, _, unit=unit: quantity(value, unit))
            axis.tick_params(labelsize=7)
            axis.tick_params(which="minor", labelleft=False)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        row[0].legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _by_way(measure: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for name, series in measure["series"].items():
        count, _, way = name.partition(" ")
        found.setdefault(way, []).append((int(count), max(series["median"], 1e-9)))
    return found
