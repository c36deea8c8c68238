"""A random generator that the program seeded goes on as under plain Python; one that nobody seeded is another each run."""

# ruff: noqa: E501
from __future__ import annotations

import pytest

# What TensorFlow logs at its import, more on some processors than on others: in a pocket its template has said it.
LOGS = (rb"\A(?:(?:WARNING: All log messages before absl|[IWE][0-9]{4} |[0-9-]{10} [0-9:.]+: [IWE] )[^\n]*\n)*",)
DRAWS = {
    "random": ("import random\n", "random.seed(7)\n", "random.random(), random.getrandbits(64)"),
    "random by text": ("import random\n", "random.seed('seven')\n", "random.random()"),
    "random by a name": ("from random import random, seed, shuffle\n", "seed(7)\n", "random()"),
    "random's state": ("import random\n", "random.setstate(random.Random(3).getstate())\n", "random.random()"),
    "an own Random": ("import random\nr = random.Random()\n", "r.seed(7)\n", "r.random()"),
    "an own Random, made with a seed": ("import random\n", "r = random.Random(7)\n", "(r if 'r' in globals() else random).random()"),
    "a subclass of Random": ("import random\nclass R(random.Random): pass\nr = R()\n", "r = R(7)\n", "r.random()"),
    "numpy": ("import numpy as np\n", "np.random.seed(7)\n", "np.random.rand(), np.random.randint(1 << 30)"),
    "numpy by a name": ("from numpy.random import rand, seed\n", "seed(7)\n", "rand()"),
    "numpy's state": ("import numpy as np\n", "np.random.set_state(np.random.RandomState(3).get_state())\n", "np.random.rand()"),
    "a RandomState": ("import numpy as np\nr = np.random.RandomState()\n", "r = np.random.RandomState(7)\n", "r.rand()"),
    "default_rng": ("import numpy as np\nr = np.random.default_rng()\n", "r = np.random.default_rng(7)\n", "r.random(), r.integers(1 << 60)"),
    "a generator in a list": ("import numpy as np\nr = [np.random.default_rng()]\n", "r = [np.random.default_rng(7)]\n", "r[0].random()"),
    "a generator of Philox": ("import numpy as np\nr = np.random.Generator(np.random.Philox())\n", "r = np.random.Generator(np.random.Philox(7))\n", "r.random()"),
    "generators spawned": ("import numpy as np\nr = np.random.default_rng().spawn(2)\n", "r = np.random.default_rng(7).spawn(2)\n", "r[1].random()"),
    "seeded and drawn from": ("import random\n", "random.seed(7)\nrandom.random()\n", "random.random()"),
}  # fmt: skip


@pytest.mark.parametrize("what", DRAWS)
@pytest.mark.parametrize("rehearse", [None, ["s"]])
def test_seeded_before_it_is_as_under_python(hold, what, rehearse):
    imports, seed, draw = DRAWS[what]
    pocket = hold(f"{imports}{seed}here = None\nprint({draw})\n", "here =", rehearse=rehearse)
    facts = pocket.warm()
    assert facts["rehearsed"] is (rehearse is not None), facts["not_rehearsed"]
    assert facts["unsure"] == []
    pocket.same()
    pocket.same()


@pytest.mark.parametrize("what", [name for name in DRAWS if "seed" not in name and "state" not in name])
def test_not_seeded_it_is_another_in_each_run(hold, what):
    imports, _, draw = DRAWS[what]
    pocket = hold(f"{imports}here = None\nprint({draw})\n", "here =")
    pocket.warm()
    assert len({pocket.from_held().out for _ in range(3)}) == 3


@pytest.mark.parametrize("what", ["random", "numpy"])
def test_seeded_and_then_not(hold, what):
    imports, seed, draw = DRAWS[what]
    undo = {"random": "random.seed()", "numpy": "np.random.seed()"}[what]
    pocket = hold(f"{imports}{seed}{undo}\nhere = None\nprint({draw})\n", "here =")
    pocket.warm()
    assert pocket.from_held().out != pocket.from_held().out


def test_seeded_after_it(hold):
    pocket = hold("import random\nhere = None\nrandom.seed(5)\nprint(random.random())\n", "here =")
    pocket.warm()
    pocket.same()


def test_other_sources_of_chance(hold):
    pocket = hold(
        """
        import os, secrets, ssl, tempfile, uuid
        ssl.RAND_bytes(1)
        tempfile.mktemp()
        here = None
        print(os.urandom(4).hex(), secrets.token_hex(4), ssl.RAND_bytes(4).hex(), uuid.uuid4(), os.path.basename(tempfile.mktemp()))
        """,
        "here =",
    )
    pocket.warm()
    drawn = [pocket.from_held().out.split() for _ in range(3)]
    assert all(len(set(column)) == 3 for column in zip(*drawn, strict=True)), drawn


def test_slots_too_draw_each_their_own(hold):
    pocket = hold(
        "import random\nr = random.Random()\nhere = None\nprint(random.random(), r.random())\n", "here =", warm=1
    )
    pocket.warm()
    found = set()
    for _ in range(3):
        pocket.warm()
        found.add(pocket.pocket().out)
    assert len(found) == 3


def test_a_seed_of_which_nobody_knows_whose_it_is_is_named(hold):
    pocket = hold("import numpy as np\nr = np.random.default_rng(2**100)\nhere = None\nprint(r.random())\n", "here =")
    assert "Generator of numpy" in pocket.warm()["unsure"][0]
    assert "its runs share the state of a Generator of numpy" in pocket.pocketd.pocket("warm", pocket.name).stdout
    pocket.same()


STREAMS = {
    "a Generator": "g = tf.random.Generator.from_seed(7)",
    "one that was reset": "g = tf.random.Generator.from_non_deterministic_state()\ng.reset_from_seed(8)",
    "the global one": "tf.random.set_global_generator(tf.random.Generator.from_seed(7))\ng = tf.random.get_global_generator()",
}
STREAM = """
import tensorflow as tf
{made}
g.uniform([])
def main():
    print(float(g.uniform([])), float(tf.random.Generator.from_non_deterministic_state().uniform([])))
main()
"""


@pytest.mark.parametrize("what", STREAMS)
def test_a_seeded_generator_of_tensorflow(hold, what):
    """It is as under Python; one that is made in each run is another in each."""
    pocket = hold(STREAM.format(made=STREAMS[what]), "main", service="tensorflow")
    assert pocket.warm()["unsure"] == []
    drawn = [run.out.split() for run in (pocket.plain(), pocket.from_held(), pocket.from_held())]
    assert len({own for own, _ in drawn}) == 1, drawn
    assert len({other for _, other in drawn}) == 3, drawn


def test_a_generator_of_tensorflow_that_nobody_seeded(hold):
    for made in ("tf.random.Generator.from_non_deterministic_state()", "tf.random.get_global_generator()"):
        pocket = hold(STREAM.format(made=f"g = {made}"), "main", service="tensorflow")
        assert pocket.warm()["unsure"] == []
        assert len({word for _ in range(3) for word in pocket.from_held().out.split()}) == 6


def test_a_dataset_that_draws(hold):
    """Its order is drawn anew where that can be; else the runs' is the same, and is told."""
    source = """
        import tensorflow as tf
        {seed}
        made = tf.data.Dataset.range(100).shuffle(100{its})
        here = None
        later = tf.data.Dataset.range(100).shuffle(100{its})
        print([int(n) for n in made][:8], [int(n) for n in later][:8], sep="\\n")
    """
    pocket = hold(source.format(seed="", its=""), "here =", service="tensorflow")
    assert pocket.warm()["unsure"] == ["dataset of TensorFlow that draws without a seed"]
    runs = [pocket.from_held().out.splitlines() for _ in range(3)]
    assert len({later for _, later in runs}) == 3, runs
    for keys in ({"seed": "tf.random.set_seed(7)", "its": ""}, {"seed": "", "its": ", seed=7"}):
        pocket = hold(source.format(**keys), "here =", service="tensorflow")
        assert pocket.warm()["unsure"] == []
        pocket.same(mask=LOGS, env={"TF_CPP_MIN_LOG_LEVEL": "3"})


def test_an_operation_of_tensorflow_with_a_seed_of_its_own(hold):
    """As under Python, where no seed is set for all of them; one without is another in each run."""
    source = "import tensorflow as tf\ntf.constant(1)\nhere = None\nprint(tf.random.uniform([2], seed=7).numpy())\n"
    pocket = hold(source, "here =", service="tensorflow")
    pocket.warm()
    pocket.same(mask=LOGS, env={"TF_CPP_MIN_LOG_LEVEL": "3"})
    pocket = hold(source.replace(", seed=7", ""), "here =", service="tensorflow")
    pocket.warm()
    assert len({pocket.from_held().out for _ in range(3)}) == 3


def test_torch(hold):
    pytest.importorskip("torch")
    pocket = hold("import torch\ntorch.manual_seed(7)\nhere = None\nprint(torch.rand(2))\n", "here =")
    pocket.warm()
    pocket.same()
    pocket = hold("import torch\nhere = None\nprint(torch.rand(2))\n", "here =")
    pocket.warm()
    assert pocket.from_held().out != pocket.from_held().out


# -- TensorFlow

KERAS = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import keras, numpy as np, tensorflow as tf
{seed}
model = keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=10)
drop = keras.layers.Dropout(0.5)

def main():
    image = np.random.RandomState(len(sys.argv)).rand(1, 96, 96, 3).astype("float32")
    print(model.predict(image, verbose=0).tobytes().hex(), sys.argv[1:])
    print({more}drop(np.ones((1, 8), "float32"), training=True).numpy(), np.random.rand())

main()
"""


def test_a_seeded_model_of_keras_rehearsed_is_as_under_python(hold):
    pocket = hold(
        KERAS.format(seed="keras.utils.set_random_seed(7)", more=""), "main()", service="tensorflow", rehearse=["s"]
    )
    facts = pocket.warm()
    assert facts["rehearsed"] is True, facts["not_rehearsed"]
    pocket.same("a", mask=LOGS, env={"TF_CPP_MIN_LOG_LEVEL": "3"})
    pocket.same("a", "b", mask=LOGS, env={"TF_CPP_MIN_LOG_LEVEL": "3"})


def test_a_model_of_keras_without_a_seed(hold):
    """Its weights are the template's; what it draws is each run's own."""
    pocket = hold(KERAS.format(seed="", more="tf.random.uniform([2]).numpy(), "), "main()", service="tensorflow")
    pocket.warm()
    first, second = (pocket.from_held("a").out.splitlines() for _ in range(2))
    assert first[0] == second[0] and len(first) == len(second)
    assert first[1:] != second[1:]
