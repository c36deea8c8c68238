"""The same app as detect.py as a client of a service: no TensorFlow in this process, and none installed beside it.

usage: python client.py [--hold] PHOTO [OUT.png]

The detector is a model of the service (`models` in pocketd.conf), loaded before anyone asks.
"""

import argparse
import json

import picture

from pocketd.client import login


def main() -> None:
    parser = argparse.ArgumentParser(description="Find the faces in a photograph, by a service's detector.")
    parser.add_argument("photo")
    parser.add_argument("out", nargs="?", help="where to save the photograph with boxes drawn on it, as PNG")
    parser.add_argument("--hold", action="store_true", help="stay until stdin ends, after the result")
    arguments = parser.parse_args()

    with login("tensorflow") as session:
        detector = session.model("faces")
        picture.log("started with the service's detector")
        pixels = picture.read(arguments.photo)
        image = session.tensor(pixels.shape, "uint8")
        image.numpy()[...] = pixels
        faces = picture.plain(detector.detect_faces(image))
        picture.log("result")

        print(json.dumps(faces), flush=True)
        if arguments.out:
            picture.draw(pixels, faces, arguments.out)
        if arguments.hold:
            picture.hold()


if __name__ == "__main__":
    main()
