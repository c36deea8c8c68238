"""The comparison: apps in every way that there is. Each measure goes round, so that all ways meet the same machine."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from bench import launch, own, usage
from bench.apps import FIRST_LINE, App
from bench.figures import Measure
from bench.launch import Failed
from bench.started import Ended, together
from bench.ways import Pockets, Way

TIMES = ("--times",)
PYTHON = "python"


def launches(pockets: Pockets, peers: Sequence[Way], rounds: int, times: int) -> list[Measure]:
    """To the first line of a script, by the whole command and from a request."""
    begun = Measure("Start of a command to its program's very first line", "s")
    line = Measure("Start of a command to the first line after the import of TensorFlow", "s")
    request = Measure("Request on the control socket to the first line after the import of TensorFlow", "s")

    def take(way: Way, name: str) -> None:
        (ended,) = together([lambda: way.start(FIRST_LINE)])
        way.settle()
        said = json.loads(ended.out)
        line.add(name, said["line"] - ended.began)
        if way is not pockets.held:  # where that line ran before
            begun.add(name, said["start"] - ended.began)

    with pockets.holding(FIRST_LINE, FIRST_LINE.warm), pockets.service.control() as control:

        def ask(name: str, pocket: str | None) -> None:
            program, service = FIRST_LINE.program, pockets.service.name
            run = launch.in_worker(control, service, program, *FIRST_LINE.words, directory=pockets.place, pocket=pocket)
            pockets.settle()
            request.add(name, run.line)

        for _ in range(rounds):
            for way in peers:
                take(way, way.name)
            for _ in range(times):
                for way in (pockets.on_demand, pockets.slot, pockets.held):
                    take(way, way.name)
                ask("on demand", None)
                ask("slot", f"{FIRST_LINE.name}-imported")
                ask("held slot", FIRST_LINE.name)
    for measure in (begun, line):
        for way in peers:
            measure.compare(way.name, [pockets.on_demand.name, pockets.slot.name, pockets.held.name])
    return [begun, line, request]


def scripts(app: App, pockets: Pockets, ways: Sequence[Way], rounds: int) -> Measure:
    """A whole script, exec to exit, in ways of which some need the app held; and which of them print something else
    than the first."""
    measure = Measure(f"{app.program}, from its start to its exit", "s")
    unlike = set()
    for _ in range(rounds):
        expected = b""
        for way in ways:
            (ended,) = together([lambda way=way: way.start(app)])  # type: ignore[misc]
            way.settle()
            expected = expected or ended.out
            if ended.out != expected:
                unlike.add(way.name)
            measure.add(way.name, ended.seconds)
    measure.facts = {"prints something else": sorted(unlike), **pockets.came(app)}
    for way in ways[1:]:
        measure.compare(ways[0].name, [way.name])
    return measure


def at_once(app: App, pockets: Pockets, ways: Sequence[Way], counts: Sequence[int]) -> dict[str, Measure]:
    """So many of an app at once, one inference each: when each has ended, and what all of them used, with all that
    serves them; slots that they took are made anew before it is counted."""
    title = app.program
    each = Measure(f"{title}, so many at once: from the start of each to its exit", "s")
    cpu = Measure(f"{title}, so many at once: processor time of all", "s")
    faults = Measure(f"{title}, so many at once: page faults of all", "")
    peak = Measure(f"{title}, so many at once: memory at its peak, with all that serves them", "bytes")
    energy = Measure(f"{title}, so many at once: energy of the processors", "J")
    for count in counts:
        for way in ways:
            way.settle()
            standing = usage.anonymous(way.standing())
            before, joules = way.used(), usage.joules()
            with usage.Peak() as most:
                ended = together([lambda way=way: way.start(app)] * count)  # type: ignore[misc]
            way.settle()
            time.sleep(0.1)  # what has just ended is waited for
            used = usage.total([run.used for run in ended]).plus(way.used()).less(before)
            name = f"{count} {way.name}"
            each.add(name, *(run.seconds for run in ended))
            cpu.add(name, used.cpu)
            faults.add(name, used.faults)
            peak.add(name, most.bytes + standing)
            if joules is not None:
                energy.add(name, (usage.joules() or 0.0) - joules)
    each.facts = {**pockets.came(app)}
    found = {"": each, "-cpu": cpu, "-faults": faults, "-peak": peak, **({"-energy": energy} if energy.series else {})}
    for measure in found.values():
        for count in counts:
            measure.compare(f"{count} {PYTHON}", [f"{count} {way.name}" for way in ways[1:]])
    return found


def first_looks(app: App, pockets: Pockets, rounds: int) -> Measure:
    """The first result of a held script from a slot, beside its own later ones, as it sees them."""
    measure = Measure(f"{app.program}, held: its first result and its later ones, measured inside", "s")
    faults = []
    for _ in range(rounds):
        (ended,) = together([lambda: pockets.command(app.name, *app.words, *TIMES)])
        pockets.settle()
        said = last_line(ended)
        steady = statistics.median(said["steady"])
        measure.add("first", said["first"])
        measure.add("steady", steady)
        measure.add("first less steady", said["first"] - steady)
        measure.pair("first / steady", said["first"] / steady)
        faults.append(said["faults"])
    measure.facts = {**pockets.came(app), "page faults of the first": statistics.median(each[0] for each in faults)}
    measure.facts["page faults of a later one"] = statistics.median(n for each in faults for n in each[1:])
    measure.compare("first", ["steady"])
    return measure


def last_line(ended: Ended) -> Any:
    try:
        return json.loads(ended.err.splitlines()[-1])
    except (ValueError, IndexError):
        raise Failed(f"not its times: {ended.err.decode(errors='replace')}") from None


def busy(pockets: Pockets, blocks: int, times: int) -> Measure:
    """Inferences one after the other, in a process of its own and in a worker: blocks by turns."""
    measure = Measure("MobileNetV2 without a pause, median of a block", "s")
    commands = {
        PYTHON: [sys.executable, "busy.py", str(times)],
        "pocket run": [str(own.BIN / "pocket"), "run", "--service", pockets.service.name, "busy.py", str(times)],
    }
    with ExitStack() as stack:
        running = {}
        for name, command in commands.items():
            made = subprocess.Popen(
                command,
                cwd=pockets.place,
                env=pockets.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(made.communicate, timeout=60)
            assert made.stdout
            if made.stdout.readline() != b"ready\n":
                raise Failed(f"{' '.join(command)} is not ready")
            running[name] = made
        for number in range(blocks + 1):
            order = list(running) if number % 2 else list(reversed(running))
            took = {}
            for name in order:
                made = running[name]
                assert made.stdin and made.stdout
                made.stdin.write(b"\n")
                made.stdin.flush()
                took[name] = float(made.stdout.readline())
            if number:
                for name, seconds in took.items():
                    measure.add(name, seconds)
                measure.pair("pocket run / python", took["pocket run"] / took[PYTHON])
    pockets.settle()
    return measure


@contextmanager
def held(pockets: Pockets, app: App, warm: int) -> Iterator[Measure]:
    """The app held; and what making that took."""
    measure = Measure(f"{app.program}: making its template and {warm} slots", "s")
    before, began = pockets.used(), time.monotonic()
    with pockets.holding(app, warm) as said:
        used = pockets.used().less(before)
        measure.add("until all are there", time.monotonic() - began)
        measure.add("processor time", used.cpu)
        with pockets.service.control() as control:
            (row,) = [row for row in control.call("ps")["pockets"] if row["name"] == app.name]
        measure.facts = {"faults": used.faults, "held": row["held"], "why not": row.get("why_not_rehearsed")}
        measure.facts["working set, bytes"] = said.get("working_set")
        yield measure
