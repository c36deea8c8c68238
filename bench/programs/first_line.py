"""The smallest program with TensorFlow: says when it stood at its very first line, and when after the import. With
another argument than "say" it says nothing, for a rehearsal."""

import sys
import time

start = time.monotonic()
import tensorflow  # noqa: E402, F401

line = time.monotonic()
if sys.argv[1:] in ([], ["say"]):
    print(f'{{"start": {start!r}, "line": {line!r}}}', flush=True)
