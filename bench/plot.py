"""The plot of a run: one panel a measure, medians as bars with p99 as a mark, times on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.show import quantity, ratio

_BAR, _MARK = "#4878a8", "#c05020"


def draw(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {name: _bars(measure) for name, measure in results["measures"].items()}
    heights = [len(bars) + 1.6 for bars in shown.values()]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.36 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (name, bars) in zip(axes[:, 0], shown.items(), strict=True):
        measure = results["measures"][name]
        unit = measure["unit"]
        names = list(bars)
        medians = [bars[n]["median"] for n in names]
        axis.barh(names, medians, color=_BAR, height=0.6)
        several = [n for n in names if bars[n]["count"] > 1]
        axis.plot([bars[n]["p99"] for n in several], several, "|", color=_MARK, markersize=9, markeredgewidth=2)
        if unit == "s":
            axis.set_xscale("log")
            axis.set_xlim(min(medians) / 3, max(bars[n]["p99"] for n in names) * 5)
        else:
            axis.set_xlim(0, max(medians) * 1.15)
        for n, median in zip(names, medians, strict=True):
            axis.annotate(
                f" {quantity(median, unit)}", (max(median, bars[n]["p99"]), n), va="center", fontsize=8,
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


def _bars(measure: dict[str, Any]) -> dict[str, Any]:
    return {name: s for name, s in measure["series"].items() if "private" not in name}
