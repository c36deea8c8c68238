"""Table 1 of the paper: what an app's own container has to carry, in bytes: its files, and what they import."""

from __future__ import annotations

from pathlib import Path

from bench import fetched, own
from bench.apps import PHOTO
from bench.fetched import Missing
from bench.figures import Measure

_FRAMEWORK = ["tensorflow-cpu", "tensorflow", "numpy", "pillow"]
_CLIENT = ["numpy", "pillow", "msgpack"]
# Of each workload: the files of the script and of the client, and what the script imports beside the framework.
_WORKLOADS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "MobileNetV2": (["predict.py", "timed.py"], ["ask.py"], []),
    "YOLOv3": (["detect_objects.py", "boxes.py", "yolov3.py", "coco.names"], ["ask.py"], []),
    "face detector": (["detect.py", "picture.py"], ["client.py", "picture.py"], ["mtcnn"]),
}


def sizes(place: Path) -> Measure:
    """`place` has the apps' files. The model of a client is the service's; Python itself is left out everywhere."""
    measure = Measure("Deployed with an app: its files and what they import", "bytes")
    library = sum(f.stat().st_size for f in (own.EXAMPLES.parent / "pocketd/client").glob("*.py"))
    for name, (script, client, more) in _WORKLOADS.items():
        files = sum((place / file).stat().st_size for file in [*script, PHOTO])
        client_files = sum((place / file).stat().st_size for file in [*client, PHOTO])
        measure.add(f"{name}, monolith", files + own.distributions_size([*_FRAMEWORK, *more]))
        measure.add(f"{name}, program in a pocket", files)
        measure.add(f"{name}, client of a pocket", client_files + library + own.distributions_size(_CLIENT))
        measure.add(f"{name}, client of gRPC", client_files + own.distributions_size([*_CLIENT, "grpcio"]))
        try:
            measure.add(f"{name}, client of ssh", files + Path(fetched.program("ssh")).stat().st_size)
        except Missing:
            pass
        measure.compare(f"{name}, monolith", [n for n in measure.series if n.startswith(f"{name},")][1:])
    return measure
