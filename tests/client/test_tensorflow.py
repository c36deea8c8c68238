"""Real TensorFlow in the worker: Keras models, SavedModels, factories, beside the same model called directly here."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketd.client import RemoteError, Session, login
from tests.client.conftest import ROOT, standin

# Made in a process of its own: once TensorFlow has run here, the forks of other tests would hang.
MAKE = """
    import json, sys
    import numpy as np, tensorflow as tf
    out = sys.argv[1]
    tf.keras.utils.set_random_seed(1)
    K, L = tf.keras, tf.keras.layers
    x = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)

    a = K.Input((8, 8, 3)); h = L.Dropout(0.5)(L.BatchNormalization()(L.Conv2D(4, 3)(a)))
    small = K.Model(a, [L.Dense(5, activation="softmax")(L.Flatten()(h)), L.GlobalMaxPooling2D()(h)])
    small.save(f"{out}/two.keras")
    one = K.Model(a, small.outputs[0])
    one.save(f"{out}/one.keras"); one.save(f"{out}/one.h5"); one.export(f"{out}/one_saved", verbose=False)

    class Adder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "a"), tf.TensorSpec([None], tf.float32, "b")])
        def __call__(self, a, b): return {"sum": a + b, "difference": a - b}
        @tf.function(input_signature=[tf.TensorSpec([], tf.string, "s")])
        def upper(self, s): return {"out": tf.strings.upper(s)}
        @tf.function(input_signature=[tf.TensorSpec([None], tf.bfloat16, "h")])
        def half(self, h): return {"out": h * 2}
    adder = Adder()
    class Previous(tf.Module):
        def __init__(self): self.last, self.n = tf.Variable(tf.zeros([4])), tf.Variable(0)
        @tf.function(input_signature=[tf.TensorSpec([4], tf.float32, "x")])
        def __call__(self, x):
            difference = x - self.last
            self.last.assign(x)
            return {"difference": difference, "calls": self.n.assign_add(1)}
    previous = Previous()
    tf.saved_model.save(previous, f"{out}/previous", signatures=previous.__call__)
    signatures = {"serving_default": adder.__call__, "upper": adder.upper, "half": adder.half}
    tf.saved_model.save(adder, f"{out}/adder", signatures=signatures)
    np.savez(f"{out}/expected.npz", x=x, one=one(x, training=False), max=small(x, training=False)[1])

    net = K.applications.MobileNetV2(weights=None); net.save(f"{out}/mobilenet.keras")
    picture = np.random.default_rng(1).random((1, 224, 224, 3), np.float32)
    np.savez(f"{out}/mobilenet.npz", x=picture, y=net(picture, training=False))
"""

FACTORY = """
    import tensorflow as tf

    def network():
        tf.keras.utils.set_random_seed(2)
        return tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(2)])

    class Detector:
        def __init__(self): self._stages = [{"net": network()}]; self.calls = 0
        def detect(self, image, least=0):
            assert type(image).__module__ == "numpy", type(image)
            self.calls += 1
            y = self._stages[0]["net"](image)
            return [{"box": [1, 2], "score": y[0, 0].numpy(), "raw": y, "calls": self.calls}]

    class Untraceable(tf.keras.Model):
        def call(self, x, training=False): return x + float(x.numpy().sum())

    K, L = tf.keras, tf.keras.layers

    class Flat(K.Model):
        def call(self, x, training=False): return tf.reshape(x, (x.shape[0] * 4,))
    class Norm(K.Model):
        def call(self, x, training=False): return x / float(tf.reduce_max(x))
    class Optional(K.Model):
        def call(self, a, b=None, training=False): return a if b is None else a + b
    class Scaled(K.Model):
        scale = 1.0
        def set_scale(self, scale): self.scale = scale
        def call(self, x, training=False): return x * self.scale
    class Positive(K.Model):
        def build(self, input_shape=(1, 3)): super().build(input_shape)
        def call(self, x, training=False):
            tf.debugging.assert_positive(x)
            return x + 1

    def relu():
        x = K.Input((4,))
        return K.Model(x, L.ReLU()(x))

    def stateful():
        K.utils.set_random_seed(3)
        x = K.Input(batch_shape=(1, 3, 2))
        return K.Model(x, L.LSTM(4, stateful=True, bias_initializer="ones")(x))

    def by_name():
        "Its inputs stand in an order that is not that of their names."
        ids, mask = K.Input((4,), name="ids", dtype="int32"), K.Input((4,), name="attention", dtype="int32")
        whole = L.Multiply()([L.Embedding(9, 3, embeddings_initializer="ones")(ids), L.Reshape((4, 1))(mask)])
        return K.Model({"ids": ids, "attention": mask}, L.Flatten()(whole))

    def words():
        layer = L.TextVectorization(vocabulary=["a", "b"], output_mode="int")
        x = K.Input((), dtype="string")
        return K.Model(x, layer(x))

    class Difference:
        "Of an image and the one before it, kept as it came."
        def __init__(self): self.last = 0
        def of(self, x):
            found, self.last = float((x - self.last).sum()), x
            return found
        def weights(self): return [K.Variable([1.0, 2.0]), tf.constant("word"), tf.constant([["x", "y"]])]
        def half(self): return tf.constant(1.5, tf.bfloat16)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorflow")
    out = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, "-c", textwrap.dedent(MAKE), str(out)], check=True, capture_output=True)
    (out / "tools.py").write_text(
        "import numpy as np, tensorflow as tf\n"
        "def relu(a): return tf.nn.relu(a)\n"
        "def both(a): return {'t': tf.constant(a), 'n': (a, [tf.Variable([1.0, 2.0])])}\n"
    )
    return out


@pytest.fixture(scope="module")
def open_tensorflow(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Session]]:
    modules = tmp_path_factory.mktemp("factories")
    (modules / "nets.py").write_text(textwrap.dedent(FACTORY))
    models = {
        "one": str(files / "one.keras"),
        "saved": str(files / "one_saved"),
        "adder": str(files / "adder"),
        "network": "nets:network",
        "detector": "nets:Detector",
        "previous": str(files / "previous"),
    }
    models |= {
        made: f"nets:{made}"
        for made in "Flat Norm Optional Scaled Positive relu stateful by_name words Difference".split()
    }
    for directory in standin("tensorflow", tmp_path_factory.mktemp("run"), models, str(modules)):
        yield partial(login, "tensorflow", directory=str(files), runtime_dir=directory, timeout=120)


@pytest.fixture(scope="module")
def tf_session(open_tensorflow: Callable[[], Session]) -> Iterator[Session]:
    with open_tensorflow() as session:
        yield session


@pytest.fixture(scope="module")
def expected(files: Path) -> dict[str, Any]:
    return dict(np.load(files / "expected.npz"))


def tensor_of(session: Session, array: Any) -> Any:
    made = session.tensor(array.shape, str(array.dtype))
    made.numpy()[...] = array
    return made


@pytest.mark.parametrize("name", ["one", "saved"])
def test_a_deployed_model_gives_what_it_gives_directly(
    tf_session: Session, expected: dict[str, Any], name: str
) -> None:
    result = tf_session.model(name)(tensor_of(tf_session, expected["x"]))
    np.testing.assert_allclose(result.numpy(), expected["one"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["one.keras", "one.h5", "one_saved"])
def test_a_pockets_own_model_gives_what_it_gives_directly(
    tf_session: Session, expected: dict[str, Any], path: str
) -> None:
    model = tf_session.load(path)
    assert model.name == path
    np.testing.assert_allclose(model(expected["x"]).numpy(), expected["one"], rtol=1e-5, atol=1e-6)


def test_mobilenet_gives_what_it_gives_directly(tf_session: Session, files: Path) -> None:
    data = np.load(files / "mobilenet.npz")
    model = tf_session.load("mobilenet.keras")
    np.testing.assert_allclose(model(data["x"]).numpy(), data["y"], rtol=1e-4, atol=1e-6)


def test_several_outputs_come_as_the_model_nests_them(tf_session: Session, expected: dict[str, Any]) -> None:
    result = tf_session.load("two.keras")(expected["x"])
    assert [r.shape for r in result] == [(2, 5), (2, 4)]
    np.testing.assert_allclose(result[1].numpy(), expected["max"], rtol=1e-5)


def test_a_model_says_what_it_takes(tf_session: Session) -> None:
    assert tf_session.model("one").inputs[0]["shape"] == [None, 8, 8, 3]
    assert tf_session.model("adder").inputs == [{"name": n, "dtype": "float32", "shape": [None]} for n in "ab"]


def test_signatures_take_inputs_by_position_and_by_name(tf_session: Session) -> None:
    adder = tf_session.model("adder")
    a, b = np.array([5, 7], np.float32), np.array([1, 2], np.float32)
    for result in (adder(a, b), adder(b=b, a=a)):
        assert result["sum"].tolist() == [6, 9] and result["difference"].tolist() == [4, 5]
    with pytest.raises(RemoteError, match="takes 2 inputs"):
        adder(a, a, a)
    assert adder.upper("shout") == b"SHOUT"


def test_bfloat16_works(tf_session: Session) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    result = tf_session.model("adder").half(np.array([1, 2], ml_dtypes.bfloat16))
    assert result.dtype == "bfloat16" and result.numpy().astype(float).tolist() == [2, 4]


def test_wrong_shapes_and_dtypes_are_the_frameworks_errors(tf_session: Session, expected: dict[str, Any]) -> None:
    for name, bad in (("one", np.zeros((2, 9, 8), np.float32)), ("adder", np.zeros(3, np.int8)), ("network", "text")):
        with pytest.raises(RemoteError) as caught:
            tf_session.model(name)(bad)
        assert caught.value.type in ("ValueError", "TypeError", "InvalidArgumentError"), caught.value
    tf_session.model("one")(expected["x"])


def test_options_of_a_call_reach_keras(tf_session: Session, expected: dict[str, Any]) -> None:
    x = expected["x"]
    model = tf_session.load("one.keras")
    np.testing.assert_allclose(model.predict(x, verbose=0).numpy(), expected["one"], rtol=1e-5, atol=1e-6)
    assert not np.allclose(model(x, training=True).numpy(), expected["one"])


def test_factories_make_networks_and_detectors(tf_session: Session) -> None:
    assert tf_session.model("network")(np.ones((3, 4), np.float32)).shape == (3, 2)
    detector = tf_session.model("detector")
    image = tf_session.tensor((1, 4), "float32")
    image[...] = 1
    [face] = detector.detect(image, least=1)
    assert face["box"] == [1, 2] and type(face["score"]) is float and face["raw"].shape == (1, 2)
    assert detector.detect(image)[0]["calls"] == 2


def ones(*shape: int, of: float = 1) -> Any:
    return np.full(shape, of, np.float32)


def test_a_variable_that_is_given_an_argument_keeps_it(tf_session: Session) -> None:
    """It takes the memory over. That is the arena's, where the next call's argument lies."""
    for model in (tf_session.load("previous"), tf_session.model("Difference").of):
        found = [model(ones(4, of=v)) for v in (1, 2, 4, 8)]
        found = [f["difference"].tolist()[0] if isinstance(f, dict) else f / 4 for f in found]
        assert found == [1, 1, 2, 4]


def test_models_keep_none_of_their_arguments(open_tensorflow: Callable[[], Session], expected: dict[str, Any]) -> None:
    """Else each call would copy them, and map the arena once more."""
    with open_tensorflow() as session:
        x = session.tensor(expected["x"].shape)
        x[:] = expected["x"]
        row = session.tensor((1, 4))
        row[:] = 1

        def calls() -> int:
            for model in (session.model("one"), session.model("saved")):
                model(x)
            session.model("one").predict(x, verbose=0)
            for name in ("network", "relu", "Scaled"):
                session.model(name)(row)
            session.model("detector").detect(row)
            return Path(f"/proc/{session.pid}/maps").read_text().count("memfd:arena")

        first = calls()
        assert [calls() for _ in range(5)] == [first] * 5 and first <= 3


def test_a_rehearsal_changes_no_models_state(open_tensorflow: Callable[[], Session], files: Path) -> None:
    with open_tensorflow() as session:
        assert int(session.model("previous")(ones(4))["calls"]) == 1
        first = session.model("stateful")(ones(1, 3, 2)).numpy()
    with open_tensorflow() as session:
        model = session.model("stateful")
        np.testing.assert_allclose(model(ones(1, 3, 2)).numpy(), first)
        assert not np.allclose(model(ones(1, 3, 2)).numpy(), first)


def test_a_graph_follows_what_a_models_method_changes(tf_session: Session) -> None:
    model = tf_session.model("Scaled")
    assert model(ones(2)).tolist() == [1, 1]
    model.set_scale(3.0)
    assert model(ones(2)).tolist() == [3, 3]


def test_shapes_that_do_not_fit_are_refused_after_others_too(tf_session: Session) -> None:
    model = tf_session.model("relu")
    for n in (1, 2, 3):
        assert model(ones(n, 4)).shape == (n, 4)
    with pytest.raises(RemoteError, match="expected shape"):
        model(ones(1, 9))
    assert model(ones(5, 4)).shape == (5, 4)


@pytest.mark.parametrize(
    "name, calls, expected",
    [
        ("Flat", [[ones(1, 4)], [ones(2, 4)], [ones(3, 4)]], [4, 8, 12]),
        ("Norm", [[ones(2, of=2)], [ones(4, of=8)]], [2, 4]),
        ("Optional", [[ones(3)], [ones(3), ones(3)], [ones(3)]], [3, 6, 3]),
    ],
)
def test_models_whose_python_suits_no_graph_for_all_shapes(
    tf_session: Session, name: str, calls: list[list[Any]], expected: list[float]
) -> None:
    model = tf_session.model(name)
    assert [float(model(*args).numpy().sum()) for args in calls] == expected


def test_a_model_that_zeros_offend_can_be_deployed(tf_session: Session) -> None:
    assert tf_session.model("Positive")(ones(1, 3)).tolist() == [[2, 2, 2]]
    with pytest.raises(RemoteError, match="positive"):
        tf_session.model("Positive")(ones(1, 3, of=-1))


def test_a_model_that_takes_its_inputs_by_name(tf_session: Session) -> None:
    given = {"ids": np.ones((1, 4), np.int32), "attention": np.array([[1, 0, 1, 0]], np.int32)}
    assert tf_session.model("by_name")(given).numpy().sum() == 6


def test_words_go_in_and_come_out(tf_session: Session) -> None:
    for words in (["a", "b a"], np.array(["a", "b a"])):
        assert tf_session.model("words")(words).tolist() == [[2, 0], [3, 2]]
    variable, word, nested = tf_session.model("Difference").weights()
    assert variable.tolist() == [1, 2] and word == b"word" and nested == [[b"x", b"y"]]
    assert float(tf_session.model("Difference").half()) == 1.5


def test_functions_of_the_pocket_use_tensorflow(tf_session: Session) -> None:
    a = np.array([-1, 2], np.float32)
    assert tf_session.call("tools:relu", a).tolist() == [0, 2]
    result = tf_session.call("tools:both", a)
    assert result["t"].tolist() == [-1, 2] and type(result["n"]) is tuple and result["n"][1][0].tolist() == [1, 2]


def test_inputs_are_not_copied_and_layouts_that_tensorflow_refuses_are(files: Path) -> None:
    """The runtime by itself, in a process of its own: which memory a tensor has, for each kind of array."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import json
import numpy as np
from pocketd.arena import Heap
from pocketd.arrays import view
import runtime.tensorflow as rt
rt.preload([])
from tensorflow.python.eager import context
assert context._context is None or not context._context._initialized, "preload made an eager context"
heap = Heap(1)
arena, offset = heap.allocate(4096)
said = {{}}
for dtype in ("float32", "uint8", "int64", "bool", "float16", "complex64", "bfloat16"):
    array = view(np, arena, offset, dtype, (2, 4))
    array[...] = 1
    tensor = rt.adopt(array)
    said[dtype] = [tensor.dtype.name, bool(np.shares_memory(rt.arrays(tensor).view(np.uint8), array.view(np.uint8)))]
floats = view(np, arena, offset, "float32", (8, 8))
floats[...] = np.arange(64).reshape(8, 8)
for name, array in (("strided", floats[:, ::2]), ("misaligned", floats.reshape(-1)[1:]), ("empty", floats[:0])):
    tensor = rt.adopt(array)
    said[name] = [bool((rt.arrays(tensor) == array).all()), bool(np.shares_memory(rt.arrays(tensor), array))]
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for dtype in ("float32", "uint8", "int64", "bool", "float16", "complex64"):
        assert said[dtype] == [dtype, True]
    assert said["bfloat16"] == ["bfloat16", False]
    for layout in ("strided", "misaligned", "empty"):
        assert said[layout] == [True, False]


def test_a_model_that_cannot_be_traced_runs_eagerly(files: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORY))
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import numpy as np
import runtime.tensorflow as rt
from runtime import models
model = models.load(rt, "odd", "nets:Untraceable")
print([rt.arrays(model(np.float32([1, 2]))).tolist() for _ in range(2)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[4.0, 5.0], [4.0, 5.0]]"


def test_models_that_fail_say_which(files: Path, tmp_path: Path) -> None:
    """As they are loaded it is an error; in a rehearsal with zeros they are deployed without."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORY) + "def broken(): return [][1]\n")
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import runtime.tensorflow as rt
from runtime import models
from pocketd.wire import Error
assert models.load(rt, "positive", "nets:Positive").inputs
try:
    models.load(rt, "odd", "nets:broken", "factory")
except Error as e:
    print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "model odd (factory) cannot be loaded: IndexError: list index out of range\n"
    assert "model positive (nets:Positive) is not warm" in done.stderr and "nets.py" in done.stderr


def test_a_model_that_cannot_be_found_says_which(files: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text("")
    cases = {
        "/nowhere/m.keras": "no such file",
        "nets:absent": "has no absent",
        "nets": "neither an absolute path nor a factory",
        "/etc/hostname": "TensorFlow loads",
        "/etc": "saved_model.pb",
    }
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import runtime.tensorflow as rt
from pocketd.wire import Error
from runtime import models
for source in {list(cases)!r}:
    try:
        models.load(rt, "m", source)
    except Error as e:
        print(e.message)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, (source, said) in zip(done.stdout.splitlines(), cases.items(), strict=True):
        assert line.startswith(f"model m ({source})") and said in line
