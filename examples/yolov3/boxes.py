"""From a photograph to the network's input, and from its outputs to boxes: numpy and Pillow only, so that a client of a
service can do both without TensorFlow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Widths and heights in pixels of a 416-pixel input, three for each scale, coarse to fine (yolov3.cfg).
ANCHORS = np.array(
    [
        [(116, 90), (156, 198), (373, 326)],
        [(30, 61), (62, 45), (59, 119)],
        [(10, 13), (16, 30), (33, 23)],
    ],
    dtype=np.float32,
)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Box:
    """Pixels of the photograph, from its top left corner; `score` is objectness times the class's probability."""

    left: float
    top: float
    right: float
    bottom: float
    score: float
    label: int


def letterbox(pixels: NDArray[np.uint8], size: int) -> Floats:
    """The photograph (height, width, 3) scaled into (1, size, size, 3) in 0..1, its shape kept, grey around it."""
    scale, x, y = _placement(pixels.shape, size)
    height, width = pixels.shape[:2]
    canvas = Image.new("RGB", (size, size), (127, 127, 127))
    scaled = Image.fromarray(pixels).resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
    canvas.paste(scaled, (x, y))
    return np.asarray(canvas, dtype=np.float32)[None] / np.float32(255)


def _placement(shape: Sequence[int], size: int) -> tuple[float, int, int]:
    """The scale, and where the scaled photograph begins."""
    height, width = shape[:2]
    scale = size / max(height, width)
    return scale, (size - round(width * scale)) // 2, (size - round(height * scale)) // 2


def find(
    outputs: Sequence[Floats],
    shape: Sequence[int],
    size: int,
    threshold: float = 0.5,
    overlap: float = 0.45,
    most: int = 100,
) -> list[Box]:
    """The boxes in a photograph of `shape`, best first: those that score above `threshold`, without those of the same
    class that overlap a better one by more than `overlap` (intersection over union), `most` at the most."""
    corners, scores = decode(outputs, size)
    scale, x, y = _placement(shape, size)
    corners = (corners - np.array([x, y, x, y], dtype=np.float32)) / np.float32(scale)
    height, width = shape[:2]
    corners = corners.clip(0, np.array([width, height, width, height], dtype=np.float32))

    found: list[Box] = []
    for label in np.flatnonzero((scores > threshold).any(axis=0)):
        over = np.flatnonzero(scores[:, label] > threshold)
        over = over[np.argsort(-scores[over, label], kind="stable")]
        kept = suppress(corners[over], overlap, most)
        for i in over[kept]:
            left, top, right, bottom = map(float, corners[i])
            found.append(Box(left, top, right, bottom, float(scores[i, label]), int(label)))
    return sorted(found, key=lambda box: -box.score)[:most]


def decode(outputs: Sequence[Floats], size: int) -> tuple[Floats, Floats]:
    """All candidates of one image: corners (n, 4) in pixels of the input, and scores (n, classes)."""
    all_corners, all_scores = [], []
    for output, anchors in zip(outputs, ANCHORS, strict=True):
        _, rows, columns, channels = output.shape
        values = output[0].reshape(rows, columns, 3, channels // 3)
        column, row = np.meshgrid(np.arange(columns), np.arange(rows))
        cell = np.stack([column, row], axis=-1)[:, :, None, :].astype(np.float32)
        centre = (_sigmoid(values[..., 0:2]) + cell) * np.float32(size / rows)
        half = np.exp(values[..., 2:4].clip(max=20)) * anchors / 2
        scores = _sigmoid(values[..., 4:5]) * _sigmoid(values[..., 5:])
        all_corners.append(np.concatenate([centre - half, centre + half], axis=-1).reshape(-1, 4))
        all_scores.append(scores.reshape(-1, scores.shape[-1]))
    return np.concatenate(all_corners), np.concatenate(all_scores)


def suppress(corners: Floats, overlap: float, most: int) -> list[int]:
    """Indices of the boxes to keep, of boxes sorted best first."""
    area = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    kept: list[int] = []
    left = np.arange(len(corners))
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(corners[best, :2], corners[left, :2])
        high = np.minimum(corners[best, 2:], corners[left, 2:])
        both = np.prod((high - low).clip(min=0), axis=1)
        left = left[both <= overlap * (area[best] + area[left] - both)]
    return kept


def _sigmoid(values: Floats) -> Floats:
    result: Floats = 1 / (1 + np.exp(-values.clip(-60, 60)))
    return result
