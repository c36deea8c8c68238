"""Find the faces in a photograph: JSON on stdout, and a picture with boxes.

usage: python detect.py [--hold] PHOTO [OUT.png]

An ordinary program. It runs under plain `python`, and unmodified in a pocket: `pocket run detect.py PHOTO OUT.png`.
"""

import argparse
import json

import picture
import tensorflow as tf

picture.log(f"started with TensorFlow {tf.__version__}")

from mtcnn import MTCNN  # noqa: E402  (the line above is the app's first, and says when it was reached)


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the faces in a photograph.")
    parser.add_argument("photo")
    parser.add_argument("out", nargs="?", help="where to save the photograph with boxes drawn on it, as PNG")
    parser.add_argument("--hold", action="store_true", help="stay until stdin ends, after the result")
    arguments = parser.parse_args()

    detector = MTCNN()
    pixels = picture.read(arguments.photo)
    faces = picture.plain(detector.detect_faces(pixels))
    picture.log("result")

    print(json.dumps(faces), flush=True)
    if arguments.out:
        picture.draw(pixels, faces, arguments.out)
    if arguments.hold:
        picture.hold()


if __name__ == "__main__":
    main()
