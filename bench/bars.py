"""What is to be reached, as ratios, beside what was; read from results as they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Measures = dict[str, Any]
IMPORTED, PREDICT, HELD = "launch", "script-predict", "pocket, held slot"


def median(measures: Measures, measure: str, series: str) -> float:
    return float(measures[measure]["series"][series]["median"])


def ratio(one: tuple[str, str], other: tuple[str, str]) -> Callable[[Measures], float]:
    """Of the medians of two (measure, series)."""
    return lambda measures: median(measures, *one) / median(measures, *other)


def pairs(measure: str, name: str) -> Callable[[Measures], float]:
    return lambda measures: float(measures[measure]["pairs"][name]["median"])


def many(measure: str, one: str, other: str) -> Callable[[Measures], float]:
    """Ratio at the largest number of apps that there is."""

    def value(measures: Measures) -> float:
        count = most(measures[measure])
        return median(measures, measure, f"{count} {one}") / median(measures, measure, f"{count} {other}")

    return value


def most(measure: dict[str, Any]) -> int:
    return max(int(name.split()[0]) for name in measure["series"])


def same_script(measures: Measures) -> float:
    """None at all where its output is not that of plain Python."""
    unlike = measures[PREDICT]["facts"]["prints something else"]
    return 0.0 if HELD in unlike else ratio((PREDICT, "python"), (PREDICT, HELD))(measures)


def memory(measures: Measures) -> float:
    """Of the leanest way of pocketd's."""
    measure = "memory-yolov3"
    count = most(measures[measure])
    pockets = [f"{count} {name}" for name in ("pockets", "held pockets")]
    least = min(median(measures, measure, name) for name in pockets if name in measures[measure]["series"])
    return median(measures, measure, f"{count} monoliths") / least


def rpc(series: str, ours: str) -> Callable[[Measures], float]:
    """gRPC where it is soonest: on one processor with its client, or on all."""

    def value(measures: Measures) -> float:
        there = [f"gRPC, {series}", f"gRPC, {series}, one processor"]
        return min(median(measures, "round-trip", name) for name in there) / median(measures, "round-trip", ours)

    return value


def _within(series: str, bar: float, then: str) -> Callable[[Measures], str]:
    """What a bar comes to on this machine, beside what was measured."""

    def words(measures: Measures) -> str:
        whole, got = median(measures, IMPORTED, "python in crun"), median(measures, "request", series)
        fork = median(measures, IMPORTED, "os.fork zygote")
        return then.format(wanted=f"{1e3 * whole / bar:.2f}", got=f"{1e3 * got:.2f}", fork=f"{1e3 * fork:.1f}")

    return words


def _spread(measure: str, series: str, what: str) -> Callable[[Measures], str]:
    """How far what it is compared with is from itself."""

    def words(measures: Measures) -> str:
        found = measures[measure]["series"][series]
        least, most, middle = found["min"], found["p99"], found["median"]
        by_itself = f"from {1e3 * least:.3g} to {1e3 * most:.3g} ms by itself, a range of {(most - least) / middle:.0%}"
        return f"{what} takes {by_itself} of its median, in this run: the machine was not quiet enough for this bar"

    return words


def _call(measures: Measures) -> str:
    echo, call = (1e6 * median(measures, "round-trip", name) for name in ("bare echo", "call"))
    return (
        f"the bar is {2 * echo:.0f} us here, a call takes {call:.0f}: both sides check what came, a call has a number "
        "by which it can be cancelled and may give arenas back, and its client looks at three descriptors (poll): the "
        "session's, what tells of the worker's end, and what cancels"
    )


def _client(measures: Measures) -> str:
    loads, got, again = (
        1e3 * median(measures, "first-result", name)
        for name in ("monolith, loads", "client, slot", "inference alone, slot")
    )
    return (
        f"the bar is {loads / BARS[7][2]:.1f} ms here, a client takes {got:.1f}, of which the inference, done again in "
        f"the same session, takes {again:.1f} by itself"
    )


def _idle(measures: Measures) -> str:
    count = most(measures["memory-yolov3"])
    monoliths, idle = (median(measures, "memory-yolov3", f"{count} {name}") for name in ("monoliths", "pockets, idle"))
    return (
        "this is just after all have their results; three seconds later workers of clients have given back what "
        f"computing took, and it is {monoliths / idle:.3g}"
    )


LEAST, MOST = "at least", "at most"
# Of each: what it is, whether its value is to be at least or at most the bar, the bar, and the value.
BARS: list[tuple[str, str, float, Callable[[Measures], float]]] = [
    (
        "python with its import of TensorFlow / `pocket NAME` from a slot, each a whole command, to the first line",
        LEAST,
        500,
        ratio((IMPORTED, "python"), (IMPORTED, "pocket, slot")),
    ),
    (
        "python in crun with its import / request on the control socket to first line, slot",
        LEAST,
        2000,
        ratio((IMPORTED, "python in crun"), ("request", "slot")),
    ),
    (
        "python in crun with its import / request on the control socket to first line, on demand",
        LEAST,
        300,
        ratio((IMPORTED, "python in crun"), ("request", "on demand")),
    ),
    (
        "python / held slot: predict.py (Keras, MobileNetV2) from its start to its exit, the same output",
        LEAST,
        40,
        same_script,
    ),
    (
        "first result of MobileNetV2 in a held slot less its steady state, predict(), milliseconds",
        MOST,
        10,
        lambda measures: 1e3 * median(measures, "first-look-predict", "first less steady"),
    ),
    (
        "first result of MobileNetV2 in a held slot less its steady state, tf.function, milliseconds",
        MOST,
        10,
        lambda measures: 1e3 * median(measures, "first-look-function", "first less steady"),
    ),
    (
        "first result of YOLOv3 in a held slot / its steady state, paired",
        MOST,
        1.05,
        pairs("first-look-objects", "first / steady"),
    ),
    (
        "monolith's start to its result / client's login to its result, MobileNetV2, from a slot",
        LEAST,
        150,
        ratio(("first-result", "monolith, loads"), ("first-result", "client, slot")),
    ),
    ("memory (PSS) of YOLOv3 monoliths / of as many pockets with all templates", LEAST, 7, memory),
    (
        "processor time of predict.py as monoliths / from held slots, so many at once",
        LEAST,
        20,
        many("at-once-predict-cpu", "python", HELD),
    ),
    (
        "page faults of predict.py as monoliths / from held slots, making those included",
        LEAST,
        7,
        many("at-once-predict-faults", "python", HELD),
    ),
    (
        "page faults of function.py (tf.function) as monoliths / from held slots, making those included",
        LEAST,
        12,
        many("at-once-function-faults", "python", HELD),
    ),
    ("gRPC / call, a tensor of 25 MB that is in the arena", LEAST, 100, rpc("25 MB", "call, 25 MB in the arena")),
    ("gRPC / call, nothing in either", LEAST, 10, rpc("no bytes", "call")),
    ("call / a bare echo of msgpack", MOST, 2, ratio(("round-trip", "call"), ("round-trip", "bare echo"))),
    (
        "inference without a pause in a worker / in a process of its own, paired",
        MOST,
        1.02,
        pairs("busy", "pocket run / python"),
    ),
    (
        "latency of a launch, the last tenth of many in a row / the first",
        MOST,
        1.1,
        ratio(("many", "tenth 10"), ("many", "tenth 1")),
    ),
    (
        "pocketd's processor time of a launch, the last tenth / the first",
        MOST,
        1.1,
        ratio(("many-cpu", "tenth 10"), ("many-cpu", "tenth 1")),
    ),
    (
        "pocketd's memory, after the last tenth / after the first",
        MOST,
        1.1,
        ratio(("many-memory", "tenth 10"), ("many-memory", "tenth 1")),
    ),
]


# Of bars that may be missed, by what they are: what the measurements say of why.
WHY: dict[str, Callable[[Measures], str]] = {
    BARS[1][0]: _within(
        "slot",
        BARS[1][2],
        "the bar is {wanted} ms here, a slot takes {got}: pocketd finds out who asks and for what, and the slot "
        "takes over environment, directory and streams, each in Python, in processes that wake one after the other",
    ),
    BARS[2][0]: _within(
        "on demand",
        BARS[2][2],
        "the bar is {wanted} ms here, a launch takes {got}; os.fork of a process with the same imports, which makes no "
        "container and gives up no privilege, takes {fork} to the same line",
    ),
    BARS[6][0]: _spread("first-look-objects", "steady", "the steady state that it is compared with"),
    BARS[7][0]: _client,
    BARS[8][0]: _idle,
    BARS[14][0]: _call,
    BARS[15][0]: _spread("busy", "python", "an inference in a process of its own"),
}


def reached(measures: Measures) -> list[dict[str, Any]]:
    """All bars whose measures there are."""
    found = []
    for what, kind, bar, value in BARS:
        try:
            got = value(measures)
        except (KeyError, ValueError):
            continue  # not measured in this run
        found.append({"what": what, "kind": kind, "bar": bar, "value": got, "reached": _reaches(kind, bar, got)})
    return found


def _reaches(kind: str, bar: float, value: float) -> bool:
    return value >= bar if kind == LEAST else value <= bar
