"""What it is worth that a worker computes with as many threads as its limits allow processors: ten pockets of half a
processor each infer at the same time, once so, once with as many threads as TensorFlow takes for this host, and once
with eight, as on a larger one.

usage, as root, where cpu.max can be set (the test VM has every controller):

    python -m tests.vm --run 'python -m bench.threads 20 /run/vm/results/threads.json'   inferences of each pocket
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.figures import p99
from bench.own import BIN, OwnPocketd, Trouble
from cgroup.hierarchy import Hierarchy

PROGRAM = Path(__file__).resolve().parent / "programs/loop.py"
POCKETS = 10
LIMIT = "50%"
EIGHT = 8  # threads: of a larger host
SERVICE = '[service.tensorflow]\nruntime = "tensorflow"\n'
POCKET = """
[pocket.{name}]
service = "tensorflow"
dir = "{place}"
program = "loop.py"
limits = {{ "cpu.max" = "{limit}" }}
{threads}
"""


def run(pocketd: OwnPocketd, kind: str, count: int) -> list[float]:
    """Seconds of every inference of all pockets of that kind, which begin together."""
    running = [
        subprocess.Popen(
            [str(BIN / "pocket"), f"{kind}-{n}", str(count)],
            env=pocketd.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(POCKETS)
    ]
    try:
        for process in running:
            assert process.stdin and process.stdout and process.stderr
            if process.stdout.readline() != "ready\n":
                raise Trouble(f"a pocket of the kind {kind} ended: {process.stderr.read()}")
        for process in running:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        found: list[float] = []
        for process in running:
            assert process.stdout
            found += json.loads(process.stdout.readline())
            process.wait()
        return found
    finally:
        for process in running:
            process.kill()
            process.communicate()


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    kinds = {"fitted": "", "host": f"threads = {os.cpu_count()}", "eight": f"threads = {EIGHT}"}
    with Hierarchy.find() as hierarchy, tempfile.TemporaryDirectory(prefix="threads-", dir="/var/tmp") as directory:
        if hierarchy.refusals({"cpu.max": LIMIT}):
            print("bench.threads: this host cannot enforce cpu.max; run it in the test VM", file=sys.stderr)
            return 1
        place = Path(directory)
        place.chmod(0o755)
        (place / "app").mkdir()
        (place / "app/loop.py").write_text(PROGRAM.read_text())
        config = place / "pocketd.conf"
        pockets = [
            POCKET.format(name=f"{kind}-{n}", place=place / "app", limit=LIMIT, threads=threads)
            for kind, threads in kinds.items()
            for n in range(POCKETS)
        ]
        config.write_text(SERVICE + "".join(pockets))
        with OwnPocketd(place, config) as pocketd:
            pocketd.turn_on("tensorflow")
            found = {kind: run(pocketd, kind, count) for kind in kinds}
    for kind, took in found.items():
        ms = [1e3 * seconds for seconds in took]
        print(f"{kind:<8} median {statistics.median(ms):.0f} ms, p99 {p99(ms):.0f} ms, of {len(ms)}")
    print(f"p99 of host / fitted: {p99(found['host']) / p99(found['fitted']):.2f}")
    print(f"p99 of eight / fitted: {p99(found['eight']) / p99(found['fitted']):.2f}")
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
