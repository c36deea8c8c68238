"""usage: load.py MODEL [--hold]

An ordinary script: loads a Keras model from a file and runs it once on its input filled with 0.5, directly, which is
sooner than model.predict(). With --hold it stays until its standard input ends, so that its memory can be read."""

import json
import sys
import time

import numpy as np
import tensorflow as tf

line = time.monotonic()
model = tf.keras.models.load_model(sys.argv[1], compile=False)
image = np.full((1, *model.input_shape[1:]), 0.5, "float32")
results = model(image, training=False)
first = np.asarray(results[0] if isinstance(results, list) else results)
print(json.dumps({"line": line, "result": time.monotonic(), "sum": float(np.abs(first).sum())}), flush=True)
if "--hold" in sys.argv:
    sys.stdin.read()
