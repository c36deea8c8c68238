"""Real TensorFlow programs in the warm service: the same as under plain Python, with every thread they start."""

from __future__ import annotations

import pytest

# TensorFlow's own log lines at import come once, in the template; what a program prints and how it ends is compared.
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}

PROGRAMS = {
    "eager": """
        import tensorflow as tf
        a = tf.reshape(tf.range(6.0), (2, 3))
        print((a @ tf.transpose(a)).numpy().tolist(), tf.executing_eagerly(), tf.reduce_sum(a).numpy())
    """,
    "fit": """
        import numpy as np, keras
        keras.utils.set_random_seed(3)
        x = np.linspace(-1, 1, 64, dtype="float32")[:, None]; y = 3 * x + 1
        model = keras.Sequential([keras.layers.Input((1,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        history = model.fit(x, y, epochs=5, batch_size=16, verbose=0)
        print([round(float(v), 4) for v in history.history["loss"]])
        print(np.round(model.predict(x[:3], verbose=0), 3).tolist())
        model.save("model.keras")
        print(np.round(keras.models.load_model("model.keras").predict(x[:3], verbose=0), 3).tolist())
    """,
    "threads": """
        import tensorflow as tf
        tf.config.threading.set_inter_op_parallelism_threads(1)
        tf.config.threading.set_intra_op_parallelism_threads(2)
        print(tf.config.threading.get_inter_op_parallelism_threads())
        print(tf.config.threading.get_intra_op_parallelism_threads())
        print(float(tf.reduce_sum(tf.ones((100, 100)) @ tf.ones((100, 100)))))
        try: tf.config.threading.set_inter_op_parallelism_threads(4)
        except RuntimeError as e: print(e)
    """,
    "function and data": """
        import tensorflow as tf
        @tf.function
        def f(x): return tf.where(x > 2, x * 2, x)
        data = tf.data.Dataset.range(10).map(f, num_parallel_calls=2).batch(4).prefetch(1)
        print([b.numpy().tolist() for b in data])
        print(tf.py_function(lambda x: x + 1, [1], tf.int32).numpy())
        print(f.get_concrete_function(tf.TensorSpec(None, tf.int64)))
    """,
    "errors": """
        import tensorflow as tf
        try: tf.ones((2, 3)) @ tf.ones((2, 3))
        except tf.errors.InvalidArgumentError as e: print(type(e).__name__)
        tf.constant("x") + 1
    """,
    "exit from a thread's program": """
        import sys, threading, tensorflow as tf
        t = threading.Thread(target=lambda: print(float(tf.reduce_sum(tf.ones(5))))); t.start(); t.join(); sys.exit(9)
    """,
    "records left open": """
        import os, tensorflow as tf
        w = tf.io.TFRecordWriter("out.records"); w.write(b"one"); w.write(b"two")
    """,
    "seeds": """
        import numpy as np, random, tensorflow as tf
        tf.random.set_seed(1); np.random.seed(2); random.seed(3)
        print(tf.random.uniform((3,)).numpy().tolist(), np.random.rand(2).tolist(), random.random())
    """,
    "a fork": """
        import os, sys, tensorflow as tf
        print(tf.__version__, flush=True)
        if os.fork() == 0: print("child", flush=True); os._exit(3)
        print(os.wait()[1])
    """,
    "spawned processes": """
        import multiprocessing as mp
        def f(n):
            import tensorflow as tf
            return float(tf.reduce_sum(tf.ones(n)))
        if __name__ == "__main__":
            with mp.get_context("spawn").Pool(1) as pool: print(pool.map(f, [3, 4]))
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_does_what_it_does_under_python(tensorflow, name):
    tensorflow.write("app.py", PROGRAMS[name])
    results = []
    for run in (tensorflow.plain, tensorflow.pocket):
        ended = run("app.py", env=QUIET)
        files = {p.name: p.read_bytes() for p in tensorflow.place.glob("*.records")}
        results.append((ended.status, ended.out, files, last_line(ended.err)))
        for path in tensorflow.place.glob("*.records"):
            path.unlink()
    assert results[1] == results[0], results


def last_line(text):
    """Of a traceback: the exception. What XLA and absl log is of the process, not of the program."""
    lines = [line for line in text.splitlines() if b"Error" in line and not line.startswith((b"E0", b"W0", b"I0"))]
    return lines[-1:] if b"Traceback" in text else []


def test_tensorflow_is_there_without_an_import_and_nothing_is_eager_yet(tensorflow):
    source = """
        import os, sys
        print("tensorflow" in sys.modules, "keras" in sys.modules)
        from tensorflow.python.eager import context
        print(context.context()._context_handle is None)
    """
    tensorflow.write("app.py", source)
    assert tensorflow.pocket("app.py").out == b"True True\nTrue\n"


def test_no_descriptor_of_the_template_is_left_open(tensorflow):
    source = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
    assert tensorflow.pocket("-c", source).out == b"[0, 1, 2, 3]\n"


def test_no_module_of_the_daemons_is_there(tensorflow):
    names = ("runtime", "nsutil", "pocketd", "msgpack")
    source = f"import sys; print([m for m in sys.modules if m.partition('.')[0] in {names}])"
    assert tensorflow.pocket("-c", source).out == b"[]\n"


def test_garbage_collection_is_on_and_warnings_are_fresh(tensorflow):
    tensorflow.write("app.py", "import gc, warnings; print(gc.isenabled()); warnings.warn('once')\n")
    ended = tensorflow.pocket("app.py")
    assert ended.out == b"True\n" and b"UserWarning: once" in ended.err


def test_numbers_of_concurrent_and_later_runs_differ(tensorflow):
    tensorflow.write(
        "app.py",
        "import numpy as np, random, tensorflow as tf, uuid\n"
        "print(tf.random.uniform(()).numpy()); print(np.random.rand()); print(random.random()); print(uuid.uuid4())",
    )
    runs = [tensorflow.pocket("app.py", env=QUIET).out.split() for _ in range(3)]
    for values in zip(*runs, strict=True):
        assert len(set(values)) == 3, values
