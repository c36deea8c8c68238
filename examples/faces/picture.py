"""Photographs in and out, shared by both forms of the app: pixels as a uint8 array, and boxes drawn on them."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


def read(path: str) -> NDArray[np.uint8]:
    """The photograph as an array of shape (height, width, 3), uint8."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def plain(value: Any) -> Any:
    """`value` with numpy's numbers turned into Python's, as JSON wants them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def draw(pixels: NDArray[np.uint8], faces: list[dict[str, Any]], path: str) -> None:
    """Save `pixels` as PNG with a box and five points for each face."""
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    thick = max(2, image.width // 170)
    for face in faces:
        x, y, width, height = face["box"]
        pen.rectangle((x, y, x + width, y + height), outline=(0, 255, 80), width=thick)
        label = f"face {face['confidence']:.3f}"
        left, top, right, bottom = pen.textbbox((x, y - thick), label, anchor="lb", font_size=5 * thick + 2)
        pen.rectangle((left - thick, top - thick, right + thick, bottom + thick), fill=(0, 255, 80))
        pen.text((x, y - thick), label, anchor="lb", font_size=5 * thick + 2, fill=(0, 0, 0))
        for px, py in face["keypoints"].values():
            pen.ellipse((px - thick, py - thick, px + thick, py + thick), fill=(255, 60, 60))
    image.save(path)


def log(event: str) -> None:
    """One line on stderr: what happened, and when on the clock that the whole host shares."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    print(json.dumps({"event": event, "monotonic": now}), file=sys.stderr, flush=True)


def hold() -> None:
    """Wait until stdin ends: keeps the process and all it holds there, to be looked at."""
    sys.stdin.buffer.read()
