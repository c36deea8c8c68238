"""The YOLOv3 of examples/yolov3: its size, its outputs, where a darknet file's values go, and how boxes are read."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "yolov3"


@pytest.fixture(scope="module")
def modules():
    """The example's own modules, as its programs import them."""
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLE))
    try:
        import boxes
        import yolov3

        yield yolov3, boxes
    finally:
        sys.path[:] = before
        for name in ("boxes", "yolov3"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def seeded(modules):
    yolov3, _ = modules
    return yolov3.model()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(7).random((1, 416, 416, 3), dtype=np.float32)


def layout(classes: int = 80) -> list[tuple[int, int, int, bool]]:
    """Inputs, outputs, kernel size and normalization of each convolution, written down from darknet's yolov3.cfg: the
    order in which its .weights file holds them."""
    convolutions = [(3, 32, 3, True)]
    width = 32
    for filters, blocks in [(64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)]:
        convolutions.append((width, filters, 3, True))
        convolutions += [(filters, filters // 2, 1, True), (filters // 2, filters, 3, True)] * blocks
        width = filters
    out = 3 * (5 + classes)
    for inputs, filters in [(1024, 512), (256 + 512, 256), (128 + 256, 128)]:
        if filters != 512:
            convolutions.append((2 * filters, filters, 1, True))  # before the upsampling
        convolutions += [(inputs, filters, 1, True), (filters, 2 * filters, 3, True)]
        convolutions += [(2 * filters, filters, 1, True), (filters, 2 * filters, 3, True)] * 2
        convolutions.append((2 * filters, out, 1, False))
    return convolutions


def write_darknet(path: Path, built, version=(0, 2, 0)) -> None:
    """What darknet writes (src/parser.c: save_weights), from a Keras model's layers by name."""
    with open(path, "wb") as file:
        file.write(struct.pack("<iii", *version))
        file.write(struct.pack("<q" if version >= (0, 2) else "<i", 32013312))
        for number, (_, _, _, normalized) in enumerate(layout()):
            convolution = built.get_layer(f"conv_{number}")
            if normalized:
                gamma, beta, mean, variance = built.get_layer(f"conv_{number}_norm").get_weights()
                values = [beta, gamma, mean, variance]
            else:
                values = [convolution.get_weights()[1]]
            kernel = np.transpose(convolution.get_weights()[0], (3, 2, 0, 1))
            for part in [*values, kernel]:
                np.ascontiguousarray(part, dtype="<f4").tofile(file)


def test_has_the_parameters_of_the_paper(seeded):
    assert seeded.count_params() == 62_001_757
    assert sum(np.prod(w.shape) for w in seeded.non_trainable_weights) == 52_608


def test_has_75_convolutions_of_the_shapes_in_yolov3_cfg(modules, seeded):
    yolov3, _ = modules
    shapes = [
        (*convolution.kernel.shape[2:], convolution.kernel.shape[0], norm is not None)
        for convolution, norm in yolov3.convolutions(seeded)
    ]
    assert len(shapes) == 75
    assert shapes == layout()


def test_gives_three_scales_at_416(seeded, image):
    shapes = [tuple(output.shape) for output in seeded(image)]
    assert shapes == [(1, 13, 13, 255), (1, 26, 26, 255), (1, 52, 52, 255)]


def test_seeded_weights_are_the_same_each_time_and_give_finite_outputs_that_depend_on_the_image(modules, seeded, image):
    yolov3, _ = modules
    once = [output.numpy() for output in seeded(image)]
    again = [output.numpy() for output in yolov3.network(seed=0)(image)]
    for a, b, other in zip(once, again, seeded(image[:, ::-1]), strict=True):
        assert np.isfinite(a).all() and 1e-3 < a.std() < 30
        assert np.array_equal(a, b)
        assert not np.allclose(a, other.numpy(), atol=1e-3)


@pytest.mark.parametrize("version", [(0, 2, 0), (0, 1, 0)], ids=["int64 seen", "int32 seen"])
def test_a_model_saved_as_a_darknet_file_and_loaded_gives_equal_outputs(modules, image, tmp_path, version):
    yolov3, _ = modules
    saved = yolov3.network(seed=2)
    random = np.random.default_rng(3)
    for number, (_, outputs, _, normalized) in enumerate(layout()):
        if normalized:  # apart from each other, so that no two of the four can be confused
            parts = [random.uniform(*span, outputs) for span in ((0.8, 1.2), (-0.2, 0.2), (-0.1, 0.1), (0.7, 1.5))]
            saved.get_layer(f"conv_{number}_norm").set_weights(parts)
    write_darknet(tmp_path / "known.weights", saved, version)
    if version == (0, 2, 0):
        assert (tmp_path / "known.weights").stat().st_size == 248_007_048  # as the authors' own file
    loaded = yolov3.network(weights=tmp_path / "known.weights", seed=1)
    for known, output in zip(saved(image), loaded(image), strict=True):
        assert np.array_equal(known.numpy(), output.numpy())


def test_each_value_of_a_darknet_file_goes_to_its_place(modules, tmp_path):
    """A file that counts 0, 1, 2, ... (as bits, since float32 cannot count that far) shows where each value went."""
    yolov3, _ = modules
    with open(tmp_path / "count.weights", "wb") as file:
        file.write(struct.pack("<iiiq", 0, 2, 0, 0))
        np.arange(62_001_757, dtype="<u4").tofile(file)
    loaded = yolov3.network(weights=tmp_path / "count.weights")

    def bits(array):
        return np.ascontiguousarray(array).view("<u4")

    at = 0
    for number, (inputs, outputs, size, normalized) in enumerate(layout()):
        weights = loaded.get_layer(f"conv_{number}").get_weights()
        if normalized:
            gamma, beta, mean, variance = map(bits, loaded.get_layer(f"conv_{number}_norm").get_weights())
            parts = [beta, gamma, mean, variance]
        else:
            parts = [bits(weights[1])]
        for part in parts:
            assert np.array_equal(part, np.arange(at, at + outputs, dtype="<u4")), number
            at += outputs
        # value (output, input, row, column) of darknet is (row, column, input, output) of Keras
        kernel = bits(weights[0])
        output, channel, row, column = outputs - 1, inputs // 2, size - 1, size // 2
        expected = at + ((output * inputs + channel) * size + row) * size + column
        assert kernel[row, column, channel, output] == expected, number
        at += inputs * outputs * size * size
        assert kernel[-1, -1, -1, -1] == at - 1, number
    assert at == 62_001_757


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0" * 7, "7 bytes are no darknet"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "no darknet .weights file"),
        (struct.pack("<iiiq", 0, 2, 0, 0) + b"\0" * 4000, "ends at value 1000, in conv_1"),
        (
            struct.pack("<iiiq", 0, 2, 0, 0) + b"\0" * 4 * 62_001_758,
            "holds 62001758 values where the network has 62001757",
        ),
    ],
    ids=["short", "a picture", "cut", "too long"],
)
def test_a_file_that_does_not_fit_is_refused_with_the_reason(modules, tmp_path, content, words):
    yolov3, _ = modules
    (tmp_path / "bad.weights").write_bytes(content)
    with pytest.raises(yolov3.WeightsError, match=words):
        yolov3.network(weights=tmp_path / "bad.weights")


def outputs_with(cell: tuple[int, int, int, int], values: list[float], label: int) -> list[np.ndarray]:
    """Outputs that are sure of nothing but one box: scale, row, column, anchor; tx, ty, tw, th."""
    outputs = [np.full((1, cells, cells, 3, 85), -20, dtype=np.float32) for cells in (13, 26, 52)]
    scale, row, column, anchor = cell
    outputs[scale][0, row, column, anchor, :5] = [*values, 20]
    outputs[scale][0, row, column, anchor, 5 + label] = 20
    return [output.reshape(*output.shape[:3], 255) for output in outputs]


def test_a_box_is_read_at_its_cell_with_its_anchor(modules):
    _, boxes = modules
    # the second anchor of the middle scale is 62 x 45 pixels; cell (row 3, column 5) of 26, each 16 pixels wide
    outputs = outputs_with((1, 3, 5, 1), [0.0, 0.0, np.log(2), 0.0], label=16)
    [box] = boxes.find(outputs, (416, 416, 3), 416)
    assert box.label == 16 and box.score > 0.999
    assert np.allclose([box.left, box.top, box.right, box.bottom], [88 - 62, 56 - 22.5, 88 + 62, 56 + 22.5], atol=1e-3)


def test_a_box_is_given_in_pixels_of_a_photograph_that_is_not_square(modules):
    _, boxes = modules
    # 832 x 416: scaled by half into 416 x 208, from y = 104
    outputs = outputs_with((0, 6, 6, 0), [0.0, 0.0, 0.0, 0.0], label=0)
    [box] = boxes.find(outputs, (416, 832, 3), 416)
    assert np.allclose([box.left, box.top, box.right, box.bottom], [300, 118, 532, 298], atol=1e-3)


def test_of_overlapping_boxes_of_one_class_the_best_stays(modules):
    _, boxes = modules
    corners = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [6, 6, 16, 16], [50, 50, 60, 60]], dtype=np.float32)
    assert boxes.suppress(corners, overlap=0.45, most=100) == [0, 2, 3]
    assert boxes.suppress(corners, overlap=0.45, most=2) == [0, 2]


def test_letterbox_keeps_the_shape_and_puts_grey_around(modules):
    _, boxes = modules
    image = boxes.letterbox(np.full((100, 200, 3), 255, dtype=np.uint8), 416)
    assert image.shape == (1, 416, 416, 3) and image.dtype == np.float32
    assert np.all(image[0, 104:312] == 1.0)
    assert np.allclose(image[0, :104], 127 / 255) and np.allclose(image[0, 312:], 127 / 255)


def test_the_program_prints_json_and_draws_a_picture(modules, tmp_path):
    from PIL import Image

    Image.new("RGB", (300, 200), (10, 200, 30)).save(tmp_path / "photo.png")
    done = subprocess.run(
        [sys.executable, EXAMPLE / "detect_objects.py", "photo.png", "boxes.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []  # random weights are sure of nothing
    with Image.open(tmp_path / "boxes.png") as picture:
        assert picture.size == (300, 200)
