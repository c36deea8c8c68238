"""YOLOv3 in Keras: the network of Redmon and Farhadi's "YOLOv3: An Incremental Improvement" (2018), 62 million
parameters at 80 classes, with seeded random weights or those of a darknet file.

The order of layers follows darknet's yolov3.cfg, since a .weights file has no names: its values are those of each
convolution in that order. `model` is a factory for a service: `models = { yolo = "yolov3:model" }`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import initializers, layers
from numpy.typing import NDArray

SIZE = 416  # pixels of a side; any multiple of 32 works
CLASSES = 80


def model() -> keras.Model:
    """The network with seeded random weights: enough to time it, and the same numbers in every process."""
    return network()


def network(classes: int = CLASSES, size: int = SIZE, weights: str | Path | None = None, seed: int = 0) -> keras.Model:
    """A model from float32 (batch, size, size, 3) in 0..1 to three outputs, coarse to fine: (batch, cells, cells,
    3 * (5 + classes)) for cells of size/32, size/16 and size/8. `weights` is a darknet file. Raises WeightsError."""
    build = _Builder(seed)
    image = keras.Input((size, size, 3), name="image")

    fine, middle, x = _darknet53(build, image)
    outputs = []
    for filters, route in ((512, None), (256, middle), (128, fine)):
        if route is not None:
            x = layers.UpSampling2D(2)(build.convolution(x, filters, 1))
            x = layers.Concatenate()([x, route])
        for _ in range(2):
            x = build.convolution(x, filters, 1)
            x = build.convolution(x, 2 * filters, 3)
        x = build.convolution(x, filters, 1)  # what the next, finer scale goes on from
        outputs.append(build.detection(build.convolution(x, 2 * filters, 3), 3 * (5 + classes)))

    built = keras.Model(image, outputs, name="yolov3")
    if weights is not None:
        load_darknet(built, weights)
    return built


def _darknet53(build: _Builder, x: Any) -> tuple[Any, Any, Any]:
    """52 convolutions; the features at strides 8, 16 and 32."""
    features = []
    x = build.convolution(x, 32, 3)
    for filters, blocks in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        x = build.convolution(x, filters, 3, stride=2)
        for _ in range(blocks):
            y = build.convolution(x, filters // 2, 1)
            y = build.convolution(y, filters, 3, gain=0.1)
            x = layers.Add()([x, y])
        features.append(x)
    return features[2], features[3], features[4]


class _Builder:
    """Makes convolutions named conv_0, conv_1, ... in the order of darknet's file."""

    def __init__(self, seed: int):
        self.seed = seed
        self.count = 0

    def _next(self) -> tuple[str, int]:
        self.count += 1
        return f"conv_{self.count - 1}", self.seed * 1000 + self.count

    def convolution(self, x: Any, filters: int, size: int, stride: int = 1, gain: float = 1.0) -> Any:
        """Convolution, batch normalization, leaky ReLU. `gain` scales random weights: small where a sum of many blocks
        would otherwise grow from one to the next."""
        name, seed = self._next()
        if stride == 2:
            # darknet pads one pixel on every side; "same" would pad below and to the right.
            x = layers.ZeroPadding2D(((1, 0), (1, 0)))(x)
        x = layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding="valid" if stride == 2 else "same",
            use_bias=False,
            kernel_initializer=initializers.VarianceScaling(2 * gain, "fan_in", "untruncated_normal", seed=seed),
            name=name,
        )(x)
        x = layers.BatchNormalization(epsilon=1e-5, name=f"{name}_norm")(x)
        return layers.LeakyReLU(negative_slope=0.1)(x)

    def detection(self, x: Any, filters: int) -> Any:
        """The last convolution of a scale: a bias, and neither normalization nor activation."""
        name, seed = self._next()
        return layers.Conv2D(filters, 1, kernel_initializer=initializers.RandomNormal(0, 1e-3, seed=seed), name=name)(x)


# ---- darknet's files


class WeightsError(ValueError):
    """A .weights file that does not fit the network; the message says where."""


def load_darknet(built: keras.Model, path: str | Path) -> None:
    """Fill `built` from a darknet .weights file (src/parser.c of darknet: load_weights_upto). Raises WeightsError when
    the file holds fewer or more values than the network, OSError when it cannot be read."""
    values = _read_darknet(path)
    at = 0

    def take(*shape: int) -> NDArray[np.float32]:
        nonlocal at
        count = int(np.prod(shape))
        if at + count > len(values):
            raise WeightsError(f"{path}: ends at value {len(values)}, in {convolution.name}: made for another network?")
        at += count
        return values[at - count : at].reshape(shape)

    for convolution, norm in convolutions(built):
        height, width, inputs, outputs = convolution.kernel.shape
        if norm:
            beta, gamma, mean, variance = (take(outputs) for _ in range(4))
            norm.set_weights([gamma, beta, mean, variance])
        else:
            bias = take(outputs)
        # darknet keeps (outputs, inputs, height, width); Keras (height, width, inputs, outputs).
        kernel = take(outputs, inputs, height, width).transpose(2, 3, 1, 0)
        convolution.set_weights([kernel] if norm else [kernel, bias])
    if at != len(values):
        raise WeightsError(f"{path}: holds {len(values)} values where the network has {at}: made for another network?")


def convolutions(built: keras.Model) -> list[tuple[Any, Any]]:
    """The convolutions in darknet's order, each with its normalization, or None."""
    by_name = {layer.name: layer for layer in built.layers}
    found: list[tuple[Any, Any]] = []
    while (name := f"conv_{len(found)}") in by_name:
        found.append((by_name[name], by_name.get(f"{name}_norm")))
    return found


def _read_darknet(path: str | Path) -> NDArray[np.float32]:
    """The values after the header: three int32 of version, then the images seen in training (int64 since 0.2)."""
    with open(path, "rb") as file:
        version = file.read(12)
        if len(version) < 12:
            raise WeightsError(f"{path}: {len(version)} bytes are no darknet .weights file")
        major, minor, _ = struct.unpack("<iii", version)
        if not (0 <= major < 1000 and 0 <= minor < 1000):
            raise WeightsError(f"{path}: version {major}.{minor} in its header: no darknet .weights file")
        file.seek(8 if major * 10 + minor >= 2 else 4, 1)
        return np.fromfile(file, dtype="<f4")
