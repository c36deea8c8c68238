"""usage: objects.py PHOTO [--times] [--hold]

As function.py, with the YOLOv3 of the examples and the first of its outputs."""

import tensorflow as tf
import timed  # type: ignore[import-not-found]
import yolov3

model = yolov3.model()
look = tf.function(lambda pixels: model(pixels, training=False)[0])


def main():
    timed.main(lambda pixels: look(tf.constant(pixels)), yolov3.SIZE)


if __name__ == "__main__":
    main()
