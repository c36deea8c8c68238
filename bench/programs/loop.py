"""usage: loop.py COUNT

An ordinary script: a convolution through a tf.function, COUNT times after a first one, which traces it; the seconds
that each took, as JSON. It waits for a line on its standard input in between, so that several begin together."""

import json
import sys
import time

import numpy as np
import tensorflow as tf

kernels = tf.constant(np.random.default_rng(1).random((3, 3, 32, 32), "float32"))


@tf.function
def layers(x):
    for _ in range(4):
        x = tf.nn.relu(tf.nn.conv2d(x, kernels, 1, "SAME")) / 100.0
    return tf.reduce_sum(x)


image = tf.constant(np.full((1, 64, 64, 32), 0.5, "float32"))
float(layers(image))
print("ready", flush=True)
sys.stdin.readline()
took = []
for _ in range(int(sys.argv[1])):
    begun = time.monotonic()
    float(layers(image))
    took.append(time.monotonic() - begun)
print(json.dumps(took), flush=True)
