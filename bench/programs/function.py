"""usage: function.py PHOTO [--times]

As predict.py, by a tf.function."""

import keras
import tensorflow as tf
import timed  # type: ignore[import-not-found]

keras.utils.set_random_seed(1)
model = keras.applications.MobileNetV2(weights=None)
look = tf.function(lambda pixels: model(pixels, training=False))


def main():
    timed.main(lambda pixels: look(tf.constant(pixels)), 224)


if __name__ == "__main__":
    main()
