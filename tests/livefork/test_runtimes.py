"""Live runtimes: models loaded and run, pools running; each child's result is its parent's."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest

Python = Callable[..., str]

TENSORFLOW = """
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
"""


def require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed in this Python")


def test_keras_model_gives_the_same_result_in_a_child(python: Python) -> None:
    require("tensorflow")
    python(
        TENSORFLOW
        + """
inputs = h = tf.keras.Input((64, 64, 3))
for _ in range(3):
    h = tf.keras.layers.Conv2D(16, 3, padding="same", activation="relu")(h)
model = tf.keras.Model(inputs, tf.keras.layers.Dense(10)(tf.keras.layers.GlobalAveragePooling2D()(h)))
x = np.random.default_rng(1).random((4, 64, 64, 3), "float32")
traced = tf.function(lambda a: model(a, training=False))
y, predicted = traced(x).numpy(), model.predict(x, verbose=0)
def act():
    clone.revive()
    return np.array_equal(traced(x).numpy(), y), np.array_equal(model.predict(x, verbose=0), predicted)
for _ in range(20):
    assert child_says(act) == [True, True]
assert np.array_equal(traced(x).numpy(), y)
os._exit(0)
"""
    )


def test_tf_data_goes_on_in_a_child_where_its_parent_was(python: Python) -> None:
    require("tensorflow")
    python(
        TENSORFLOW
        + """
numbers = iter(tf.data.Dataset.range(10**9).map(lambda v: v * 2, num_parallel_calls=4).batch(64).prefetch(4))
last = [next(numbers).numpy()[-1] for _ in range(5)][-1]
def act():
    clone.revive()
    return [int(n) for _ in range(20) for n in next(numbers).numpy()]
for _ in range(10):
    assert child_says(act, quiet=False) == [int(last) + 2 * (n + 1) for n in range(20 * 64)]
os._exit(0)
"""
    )


def test_torch_gives_the_same_result_in_a_child(python: Python) -> None:
    require("torch")
    python(
        """
import torch
torch.set_num_threads(4)
model = torch.nn.Sequential(*[torch.nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(4)]).eval()
x = torch.rand(1, 3, 128, 128)
with torch.inference_mode():
    y = model(x)
    def act():
        clone.revive()
        return bool(torch.equal(model(x), y))
    for _ in range(20):
        assert child_says(act)
os._exit(0)
"""
    )


def test_onnxruntime_gives_the_same_result_in_a_child(python: Python) -> None:
    require("onnxruntime")
    require("onnx")
    python(
        """
import numpy as np
import onnx, onnxruntime
from onnx import TensorProto, helper, numpy_helper
rng = np.random.default_rng(1)
weights = numpy_helper.from_array(rng.random((64, 3, 3, 3), "float32"), "w")
shape = [1, 3, 128, 128]
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4), helper.make_node("Relu", ["a"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weights])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 4
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
x = rng.random(shape, "float32")
y = session.run(None, {"x": x})[0]
clone.privatize_shared_mappings()
assert not [o for o in clone.inspect(()) if o.remedy == "privatize"]
def act():
    clone.revive()
    return bool(np.array_equal(session.run(None, {"x": x})[0], y))
for _ in range(20):
    assert child_says(act, quiet=False)
os._exit(0)
"""
    )


DRAW = (
    TENSORFLOW
    + """
import random, ssl, sys, tempfile, uuid
import keras
from runtime import randomness
def draw():
    return {
        "openssl": ssl.RAND_bytes(16).hex(), "uuid": str(uuid.uuid4()),
        "temporary": next(tempfile._get_candidate_names()),
        "random": random.random(), "numpy": float(np.random.rand()), "eager": float(tf.random.uniform(())),
        "generator": float(tf.random.get_global_generator().uniform(())), "keras": float(keras.random.uniform((1,))[0]),
        "dropout": np.asarray(tf.nn.dropout(tf.ones(64), 0.5)).tolist(),
    }
draw(), draw()  # the template has used them all
def worker():
    pause = stand()
    def act():
        clone.revive()
        if RENEW: randomness.renew()
        return os.getpid(), draw()
    try:
        return child_says(act, pid_namespace=pause.pidfd, set_tid=[clone.free_pid([os.getpid()])])
    finally:
        signal.pidfd_send_signal(pause.pidfd, signal.SIGKILL)
        outcome(pause)
workers = [worker() for _ in range(20)]
assert {pid for pid, _ in workers} == {2}
drawn = [numbers for _, numbers in workers]
print(json.dumps({name: len({json.dumps(each[name]) for each in drawn}) for name in drawn[0]}))
os._exit(0)
"""
)


def test_twenty_workers_draw_different_numbers(python: Python) -> None:
    require("tensorflow")
    different = json.loads(python("RENEW = True\n" + DRAW).splitlines()[-1])
    assert set(different.values()) == {20}, different


def test_without_renewal_they_would_draw_the_same(python: Python) -> None:
    """So that the test above can fail. What looks at getpid() or asks the kernel is different all the same."""
    require("tensorflow")
    different = json.loads(python("RENEW = False\n" + DRAW).splitlines()[-1])
    same = {name for name, count in different.items() if count == 1}
    assert same == {"random", "numpy", "eager", "generator", "keras", "dropout"}, different


def test_renewal_starts_no_eager_context(python: Python) -> None:
    require("tensorflow")
    python(
        TENSORFLOW
        + """
from runtime import randomness
from tensorflow.python.eager import context
def act():
    clone.revive()
    before = len(os.listdir("/proc/self/task"))
    randomness.renew()
    eager = context.context_safe()
    return eager is None or eager._context_handle is None, len(os.listdir("/proc/self/task")) - before
assert child_says(act) == [True, 0]
"""
    )
