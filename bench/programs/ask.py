"""usage: ask.py MODEL

An app that holds no TensorFlow: one result of a model that the service holds, for its input filled with 0.5."""

import sys

from pocketd.client import login

with login("tensorflow") as session:
    model = session.model(sys.argv[1])
    image = session.tensor((1, *([224] * 2 if sys.argv[1] == "mobilenet" else [416] * 2), 3), "float32")
    image.numpy()[...] = 0.5
    results = model(image)
    scores = (results[0] if isinstance(results, (list, tuple)) else results).numpy()
    print(float(abs(scores).sum()))
