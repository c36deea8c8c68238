"""`make fuzz`: a million inputs and more, from a new seed each time. usage: python -m tests.fuzz [COUNT [SEED]]"""

from __future__ import annotations

import random
import sys
import time

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

COUNT = 1_000_000


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}: python -m tests.fuzz {count} {seed} does the same again", flush=True)
    began, total = time.monotonic(), 0
    for name, target in TARGETS.items():
        share, at = -(-count * target.share // 100), time.monotonic()
        for data in mutated(seed, target.corpus, share):
            try:
                target.check(data)
            except BaseException:
                print(f"{name}: fails on {data!r}", flush=True)
                raise
        took = time.monotonic() - at
        total += share
        print(f"{name:10} {share:9} inputs {took:7.1f} s {share / took:9.0f} a second", flush=True)
    took = time.monotonic() - began
    print(f"{'all':10} {total:9} inputs {took:7.1f} s {total / took:9.0f} a second", flush=True)


if __name__ == "__main__":
    main()
