"""usage: predict.py PHOTO [--times]

An ordinary script: what MobileNetV2 (with seeded random weights) says of a photograph, by model.predict()."""

import keras
import timed  # type: ignore[import-not-found]

keras.utils.set_random_seed(1)
model = keras.applications.MobileNetV2(weights=None)


def main():
    timed.main(lambda pixels: model.predict(pixels, verbose=0), 224)


if __name__ == "__main__":
    main()
