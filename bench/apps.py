"""The apps to compare: scripts that run in every way, unmodified, and their clients; all in one directory, with one
photograph, as a pocket's files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench import own
from bench.launch import PROGRAMS

PHOTO = "photo.png"


@dataclass(frozen=True)
class App:
    """A script; and where its pocket is held, after what sample, in how many slots."""

    name: str
    program: str
    words: tuple[str, ...] = (PHOTO,)
    checkpoint: str = "main"
    rehearsal: tuple[str, ...] = (PHOTO,)
    warm: int = 2


FIRST_LINE = App("first-line", "first_line.py", ("say",), "line = time", ("quiet",))
PREDICT = App("predict", "predict.py", warm=20)
FUNCTION = App("function", "function.py", warm=20)
OBJECTS = App("objects", "objects.py")
DETECT_OBJECTS = App("detect-objects", "detect_objects.py")
DETECT_FACES = App("detect-faces", "detect.py")


def directory(work: Path) -> Path:
    """Made beneath `work`, for everyone to read."""
    from skimage.data import data_dir  # the package's directory of pictures; nothing is fetched

    made = work / "app"
    made.mkdir(mode=0o755)
    for place in (PROGRAMS, own.EXAMPLES / "yolov3", own.EXAMPLES / "faces"):
        for file in [*place.glob("*.py"), *place.glob("*.names")]:
            shutil.copy(file, made)
    shutil.copy(Path(data_dir) / "astronaut.png", made / PHOTO)
    return made


def definitions(service: str, place: Path, app: App, warm: int) -> str:
    """For pocketd.conf: the app held as NAME, in `warm` slots; and where there are some, as NAME-imported in slots that
    have TensorFlow imported and nothing else."""
    common = [f"service = {json.dumps(service)}", f"dir = {json.dumps(str(place))}"]
    common.append(f"program = {json.dumps(app.program)}")
    held = [f"checkpoint = {json.dumps(app.checkpoint)}", f"rehearse = {json.dumps(app.rehearsal)}", f"warm = {warm}"]
    lines = [f"[pocket.{app.name}]", *common, *held]
    if warm:
        lines += [f"[pocket.{app.name}-imported]", *common, "warm = 2"]
    return "\n".join([*lines, ""])


def client(service: str, place: Path, name: str, model: str, warm: int) -> str:
    """For pocketd.conf: a pocket whose clients may use a model of the service, in `warm` slots."""
    lines = [f"[pocket.{name}]", f"service = {json.dumps(service)}", f"dir = {json.dumps(str(place))}"]
    return "\n".join([*lines, f"allow = {{ models = [{json.dumps(model)}] }}", f"warm = {warm}", ""])
