"""Find objects in a photograph with YOLOv3: JSON on stdout, and a picture with boxes.

usage: python detect_objects.py [--weights yolov3.weights] [--threshold T] [--hold] PHOTO [OUT.png]

An ordinary program, under plain `python` and unmodified in a pocket alike. Without --weights the network has seeded
random weights: it takes the same time, and finds nothing.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageDraw


def log(event: str) -> None:
    """One line on stderr: what happened, and when on the clock that the whole host shares."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    print(json.dumps({"event": event, "monotonic": now}), file=sys.stderr, flush=True)


log(f"started with TensorFlow {tf.__version__}")

import boxes  # noqa: E402  (the line above is the app's first, and says when it was reached)
import yolov3  # noqa: E402

NAMES = Path(__file__).with_name("coco.names").read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description="Find objects in a photograph with YOLOv3.")
    parser.add_argument("photo")
    parser.add_argument("out", nargs="?", help="where to save the photograph with boxes drawn on it, as PNG")
    parser.add_argument("--weights", help="a darknet file (default: seeded random weights)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of what is shown (default 0.5)")
    parser.add_argument("--hold", action="store_true", help="stay until stdin ends, after the result")
    arguments = parser.parse_args()

    try:
        network = yolov3.network(weights=arguments.weights)
    except (yolov3.WeightsError, OSError) as e:
        sys.exit(str(e))
    with Image.open(arguments.photo) as image:
        pixels = np.asarray(image.convert("RGB"))
    outputs = [output.numpy() for output in network(boxes.letterbox(pixels, yolov3.SIZE), training=False)]
    found = boxes.find(outputs, pixels.shape, yolov3.SIZE, arguments.threshold)
    log("result")

    print(json.dumps([{**asdict(box), "name": NAMES[box.label]} for box in found]), flush=True)
    if arguments.out:
        picture = Image.fromarray(pixels)
        pen = ImageDraw.Draw(picture)
        for box in found:
            pen.rectangle((box.left, box.top, box.right, box.bottom), outline=(0, 255, 80), width=3)
            pen.text(
                (box.left + 5, box.top + 3), f"{NAMES[box.label]} {box.score:.2f}", fill=(0, 255, 80), font_size=16
            )
        picture.save(arguments.out)
    if arguments.hold:
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
