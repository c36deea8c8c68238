"""The smallest program with TensorFlow: says when it stands at its first line after the import."""

import json
import time

import tensorflow  # noqa: F401

print(json.dumps({"line": time.monotonic()}), flush=True)
