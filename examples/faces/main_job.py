"""The main job: one real app four ways, and the difference in numbers.

usage: .venv/bin/python examples/faces/main_job.py [--runs N] [--apps N] [--json FILE]

A face detector with trained weights looks at a real photograph
  1. as a monolith: `python detect.py`, which imports TensorFlow and builds its detector each time;
  2. in program mode: the same file, unmodified, by `pocket run`;
  3. in client mode: client.py, with the detector in the service's models template;
  4. in client mode, ten at once, beside ten monoliths at once.
All must find the same faces: any difference is a failure. Everything it starts, it stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
from apps import App, Batch, Run, together
from own_pocketd import BIN, OwnPocketd, Trouble

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
SERVICE = "tensorflow"
PHOTO = "astronaut.png"
# Environment variables that change how numbers are computed.
NUMERICAL = ("KERAS_", "MKL_", "NPY_", "OMP_", "ONEDNN_", "OPENBLAS_", "TF_ENABLE_", "TF_NUM_", "TF_XLA_", "XLA_")
# What each way has to deploy: the app's files, and the distributions that they import with all that those require.
Deploys = tuple[list[str], list[str]]
MONOLITH: Deploys = (["detect.py", "picture.py"], ["tensorflow-cpu", "tensorflow", "mtcnn", "numpy", "pillow"])
PROGRAM: Deploys = (["detect.py", "picture.py"], [])
CLIENT: Deploys = (["client.py", "picture.py"], ["numpy", "pillow", "msgpack"])
# Functions that name pids: of each app, and of what stands for all of them.
Processes = tuple[Callable[[Sequence[App]], list[list[int]]], Callable[[], list[int]]]


@dataclass(frozen=True)
class Way:
    """A row of the table."""

    name: str
    batches: list[Batch]
    deployed: int

    @property
    def runs(self) -> list[Run]:
        return [run for batch in self.batches for run in batch.runs]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="runs of each way, one after the other (default 3)")
    parser.add_argument("--apps", type=int, default=10, help="apps at once (default 10)")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        ways = compare(arguments.runs, arguments.apps)
        same_faces(ways)
    except Trouble as trouble:
        say(f"\nThe main job failed: {trouble}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    faces = ways[0].runs[0].faces
    print(f"\n{table(ways)}\n{notes(arguments.runs, arguments.apps)}")
    print(f"All {sum(len(way.runs) for way in ways)} runs found the same: {describe(faces)}.")
    print("Pictures: " + ", ".join(os.path.relpath(path) for path in sorted(OUT.glob("*.png"))))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(way) for way in ways], indent=1) + "\n")
    return 0


def compare(runs: int, apps: int) -> list[Way]:
    """Run the app every way. Raises Trouble."""
    with tempfile.TemporaryDirectory(prefix="pocketd-example-") as name:
        work = Path(name)
        directory = app_directory(work)
        shutil.rmtree(OUT, ignore_errors=True)
        OUT.mkdir()

        def monolith(*words: str) -> App:
            return App([sys.executable, "detect.py", "--hold", PHOTO, *words], directory, dict(os.environ))

        def program(*words: str) -> App:
            command = [str(BIN / "pocket"), "run", "--service", SERVICE, "detect.py", "--hold", PHOTO, *words]
            return App(command, directory, pocketd.environment)

        def client(*words: str) -> App:
            return App([sys.executable, "client.py", "--hold", PHOTO, *words], directory, pocketd.environment)

        def alone(title: str, start: Callable[..., App], picture: str, of: Processes) -> list[Batch]:
            with progress(f"{title}, {runs} runs"):
                batches = [together([lambda: start(picture)], *of) for _ in range(runs)]
            shutil.copy(directory / picture, OUT)
            return batches

        def at_once(title: str, start: Callable[..., App], of: Processes) -> list[Batch]:
            with progress(f"{title}, {apps} at once"):
                return [together([start] * apps, *of)]

        first = alone("monolith", monolith, "monolith.png", (own_process, list))
        ten_monoliths = at_once("monoliths", monolith, (own_process, list))
        with OwnPocketd(work, configuration(work)) as pocketd:
            with progress(f"service {SERVICE} on"):
                pocketd.turn_on(SERVICE)
            served = (with_workers(pocketd), lambda: standing(pocketd))
            with progress("one login to warm up"):
                together([client], *served)
            second = alone("program mode", program, "program.png", served)
            third = alone("client mode", client, "client.png", served)
            ten_clients = at_once("clients", client, served)
            with progress(f"service {SERVICE} off, pocketd stopped"):
                pocketd.close()

    return [
        Way("monolith", first, deployed(*MONOLITH)),
        Way("program mode", second, deployed(*PROGRAM)),
        Way("client mode", third, deployed(*CLIENT)),
        Way(f"{apps} monoliths at once, each", ten_monoliths, deployed(*MONOLITH)),
        Way(f"{apps} clients at once, each", ten_clients, deployed(*CLIENT)),
    ]


def app_directory(work: Path) -> Path:
    """The app's own files and its photograph, as a pocket has them."""
    from skimage.data import data_dir  # the package's directory of pictures; nothing is fetched

    directory = work / "app"
    directory.mkdir()
    for name in {*MONOLITH[0], *PROGRAM[0], *CLIENT[0]}:
        shutil.copy(HERE / name, directory)
    shutil.copy(Path(data_dir) / PHOTO, directory)
    return directory


def configuration(work: Path) -> Path:
    """This example's pocketd.conf, and a drop-in with those of our variables that TensorFlow reads at import:
    a service has an environment of its own, a monolith has ours, and both are to compute alike."""
    shutil.copy(HERE / "pocketd.conf", work)
    kept = {name: value for name, value in os.environ.items() if name.startswith(NUMERICAL)}
    if kept:
        drop_in = work / "pocketd.conf.d" / "50-environment.conf"
        drop_in.parent.mkdir()
        lines = [f"{name} = {json.dumps(value)}" for name, value in kept.items()]  # a TOML string too
        drop_in.write_text("\n".join([f"[service.{SERVICE}.env]", *lines, ""]))
    return work / "pocketd.conf"


def deployed(files: Sequence[str], distributions: Sequence[str]) -> int:
    return sum((HERE / name).stat().st_size for name in files) + measure.distributions_size(distributions)


# ---- whose memory is whose


def own_process(apps: Sequence[App]) -> list[list[int]]:
    return [[app.process.pid] for app in apps]


def with_workers(pocketd: OwnPocketd) -> Callable[[Sequence[App]], list[list[int]]]:
    """Each app's processes: the one that was started here (`pocket run`, or the client) and a worker of the service.
    Which worker is whose does not matter: only means and sums are shown."""

    def processes(apps: Sequence[App]) -> list[list[int]]:
        workers = [worker["pid"] for worker in pocketd.ps()["workers"]]
        if len(workers) != len(apps):
            raise Trouble(f"`pocket ps` shows {len(workers)} workers while {len(apps)} apps hold their results")
        return [[app.process.pid, worker] for app, worker in zip(apps, workers, strict=True)]

    return processes


def standing(pocketd: OwnPocketd) -> list[int]:
    """What the service holds for everybody: its init and its templates."""
    shown = pocketd.ps()
    return sorted({entry["pid"] for kind in ("services", "templates") for entry in shown[kind] if entry.get("pid")})


# ---- what must be equal, and what is shown


def same_faces(ways: Sequence[Way]) -> None:
    """Raise Trouble unless every run found what the first monolith found: equal boxes and points, and confidence within
    1e-4 (additions in another order, by another number of threads, move the last digits)."""
    known = ways[0].runs[0].faces
    if not known:
        raise Trouble("the monolith found no face in a photograph that shows one")
    for way in ways:
        for run in way.runs:
            same = [(face["box"], face["keypoints"]) for face in run.faces] == [
                (face["box"], face["keypoints"]) for face in known
            ] and all(abs(a["confidence"] - b["confidence"]) <= 1e-4 for a, b in zip(run.faces, known, strict=True))
            if not same:
                raise Trouble(f"{way.name} found other faces.\n  {run.faces}\nthe monolith:\n  {known}")


def describe(faces: Sequence[dict[str, Any]]) -> str:
    found = [f"a face at {face['box']}, confidence {face['confidence']:.4f}" for face in faces]
    return f"{len(found)} " + ("face: " if len(found) == 1 else "faces: ") + "; ".join(found)


def table(ways: Sequence[Way]) -> str:
    head = ["", "first line", "first result", "private", "shared", "all (PSS)", "deployed"]
    rows = []
    for way in ways:
        memory = [run.memory for run in way.runs if run.memory]
        rows.append(
            [
                way.name,
                seconds(statistics.median(run.first_line for run in way.runs)),
                seconds(statistics.median(run.first_result for run in way.runs)),
                size(statistics.median(each.private for each in memory)),
                size(statistics.median(each.shared for each in memory)),
                size(statistics.median(batch.pss for batch in way.batches)),
                size(way.deployed),
            ]
        )
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [head, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def notes(runs: int, apps: int) -> str:
    return f"""
Medians of {runs} runs, or of {apps} apps at once.
First line    from the start of the command to the app's first line with TensorFlow imported (client mode: with the
              detector at hand); first result: to the faces found.
Private       held by one app alone, `pocket run` or client and its worker together; shared: mapped by others too.
All           every app and the service's init and templates, shared pages counted once (sum of PSS).
Deployed      the app's files and the packages that they import with all they require; Python itself left out.
"""


def seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def size(value: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.{0 if value >= 100 * scale else 1}f} {unit}"
    return f"{value:.0f} B"


def say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


@contextmanager
def progress(words: str) -> Iterator[None]:
    say(f"-- {words} ...")
    yield


if __name__ == "__main__":
    sys.exit(main())
