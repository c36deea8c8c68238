"""Measured values and what is said of them: median, p99, count, and the ratio of one series to another."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any


def p99(values: Sequence[float]) -> float:
    """The value that at least 99 of 100 do not exceed; with fewer than 100 values, the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(values),
        "p99": p99(values),
        "min": min(values),
        "count": len(values),
        "values": [float(f"{value:.4g}") for value in values],
    }


_UNITS = {
    "s": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)),
    "bytes": (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)),
}


def quantity(value: float, unit: str) -> str:
    """Three digits, with the unit's prefix; what has no prefixes as a whole number."""
    if unit not in _UNITS:
        return f"{round(value):,} {unit}".replace(",", " ").rstrip()
    scales = _UNITS[unit]
    name, scale = next((pair for pair in scales if abs(value) >= pair[1]), scales[-1])
    return f"{value / scale:.3g} {name}"


class Measure:
    """One thing measured several ways in one run: series of values by name, in one unit."""

    def __init__(self, title: str, unit: str):
        self.title = title
        self.unit = unit
        self.series: dict[str, list[float]] = {}
        self.ratios: dict[str, float] = {}
        self.pairs: dict[str, list[float]] = {}
        self.facts: dict[str, Any] = {}

    def add(self, name: str, *values: float) -> None:
        self.series.setdefault(name, []).extend(values)

    def pair(self, name: str, value: float) -> None:
        """A ratio of two values that were taken together: its median is less noisy than a ratio of medians."""
        self.pairs.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return statistics.median(self.series[name])

    def compare(self, name: str, others: Iterable[str]) -> None:
        """Note the ratio of medians of `name` to each of `others`."""
        for other in others:
            if name in self.series and other in self.series:
                self.ratios[f"{name} / {other}"] = self.median(name) / self.median(other)

    def wire(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "unit": self.unit,
            "series": {name: summary(values) for name, values in self.series.items()},
            "ratios": self.ratios,
            "pairs": {name: summary(values) for name, values in self.pairs.items()},
            "facts": self.facts,
        }
