"""For `python -m bench.many`."""

import time


def spin(begin, end):
    """Compute from one moment of the monotonic clock to another: seconds of processor time that it got."""
    time.sleep(max(0.0, begin - time.monotonic()))
    before = time.process_time()
    while time.monotonic() < end:
        pass
    return time.process_time() - before
