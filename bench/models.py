"""usage: python -m bench.models NAME FILE

Makes the model called NAME and saves it to FILE (.keras); by itself, since the benchmarks hold no TensorFlow.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench import own

INPUTS = {"mobilenet": (1, 224, 224, 3), "yolov3": (1, 416, 416, 3), "resnet152": (1, 224, 224, 3)}


def save(name: str, directory: Path) -> Path:
    """The file with that model, made beneath `directory`."""
    path = directory / f"{name}.keras"
    command = [sys.executable, "-m", "bench.models", name, str(path)]
    done = subprocess.run(command, cwd=own.EXAMPLES.parent, capture_output=True, text=True)
    if done.returncode:
        raise own.Trouble(f"the model {name} cannot be made:\n{done.stderr}")
    return path


def main(name: str, file: str) -> None:
    import keras

    if name == "yolov3":
        import yolov3

        made = yolov3.model()
    else:
        factories = {"mobilenet": keras.applications.MobileNetV2, "resnet152": keras.applications.ResNet152}
        made = factories[name](weights=None)
    made.save(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
