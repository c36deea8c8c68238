"""The smallest program: says when it stands at its first line."""

import time

print(f'{{"line": {time.monotonic()!r}}}', flush=True)
