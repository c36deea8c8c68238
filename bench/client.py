"""usage: python -m bench.client RUNTIME_DIR SERVICE MODEL

An app that holds no TensorFlow: gets one result of a deployed model, and one more for each line of its standard input,
until that ends. It holds the last result, and says "held" at each.
"""

from __future__ import annotations

import sys

from bench.models import INPUTS
from pocketd.client import login


def main(runtime_dir: str, service: str, name: str) -> None:
    with login(service, directory="bench/programs", runtime_dir=runtime_dir) as session:
        model = session.model(name)
        image = session.tensor(INPUTS[name], "float32")
        image.numpy()[...] = 0.5
        result = model(image)
        print("held", flush=True)
        for _ in sys.stdin:
            result = model(image)
            print("held", flush=True)
        del result


if __name__ == "__main__":
    main(*sys.argv[1:])
