"""What a worker's confinement costs: the steps of runtime.confinement and the mounts before it, each timed in children
of this process that have the namespaces of a worker, many times, in turn.

usage, as root: python -m bench.steps [TIMES [--json]]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable

import msgpack

from nsutil import clone, mounts, namespaces
from pocketd import filters
from runtime import confinement

UID = 1_900_000_000
FLAGS = namespaces.CLONE_NEWNS | namespaces.CLONE_NEWIPC | namespaces.CLONE_NEWUTS | namespaces.CLONE_NEWNET
ORDERS = {"uid": UID, "gid": UID, "home": "", "mounts": []}


def child(programs: list[bytes], masks: confinement.Masks) -> dict[str, float]:
    """Microseconds of each step, in this process, which is of no further use."""
    took = {}

    def time_it(name: str, step: Callable[[], object]) -> None:
        begun = time.perf_counter_ns()
        step()
        took[name] = (time.perf_counter_ns() - begun) / 1e3

    mounts.private()
    mounts.tmpfs("/run", size=1 << 20)
    mounts.cover("/dev", size=1 << 16)
    for made in (confinement.EMPTY, "/dev/shm", "/dev/mqueue"):  # as runtime.container makes them
        os.makedirs(made, exist_ok=True)
    os.setsid()
    m = mounts
    time_it("cgroup namespace", lambda: namespaces.unshare(namespaces.CLONE_NEWCGROUP))
    time_it("host name", lambda: namespaces.set_hostname("bench"))
    time_it("loopback", namespaces.loopback_up)
    time_it("/proc", lambda: m.mount("proc", "/proc", "proc", m.MS_NOSUID | m.MS_NODEV | m.MS_NOEXEC))
    time_it("masks of /proc", masks.apply)
    time_it("/tmp", lambda: m.tmpfs("/tmp", size=1 << 20, mode=0o1777))
    time_it("/dev/shm", lambda: m.tmpfs("/dev/shm", size=1 << 20, mode=0o1777))
    flags = m.MS_NOSUID | m.MS_NODEV | m.MS_NOEXEC
    time_it("/dev/mqueue", lambda: m.mount("mqueue", "/dev/mqueue", "mqueue", flags))
    terminals = "newinstance,ptmxmode=0666,mode=0620"
    os.makedirs("/dev/pts", exist_ok=True)
    time_it("/dev/pts", lambda: m.mount("devpts", "/dev/pts", "devpts", m.MS_NOSUID | m.MS_NOEXEC, terminals))
    time_it("a directory that is shown", lambda: m.attach_as_named(m.open_tree("/usr/share"), "/mnt"))
    orders = {**ORDERS, "self": os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)}
    for name, step in confinement.steps(orders, programs):
        time_it(name, step)
    return took


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    programs, masks = filters.compiled(), confinement.Masks()
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(times):
        read, write = os.pipe()
        begun = time.perf_counter_ns()
        pause = clone.pause(flags=namespaces.CLONE_NEWPID)
        made = clone.fork(flags=FLAGS, pid_namespace=pause.pidfd, set_tid=[clone.free_pid((os.getpid(),))])
        if made is None:
            try:
                os.write(write, msgpack.packb(child(programs, masks)))
            finally:
                os._exit(0)
        found["(the clone itself, with its namespaces)"].append((time.perf_counter_ns() - begun) / 1e3)
        os.close(write)
        with open(read, "rb") as file:
            for name, took in msgpack.unpackb(file.read()).items():
                found[name].append(took)
        os.waitpid(made.pid, 0)
        os.kill(pause.pid, 9)
        os.waitpid(pause.pid, 0)
        os.close(made.pidfd)
        os.close(pause.pidfd)
    if sys.argv[2:] == ["--json"]:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, series in found.items():
        print(f"{name:<{width}}  {statistics.median(series):8.0f} us")
    steps = [statistics.median(series) for name, series in found.items() if not name.startswith("(")]
    confined = sum(statistics.median(found[name]) for name, _ in confinement.steps(ORDERS, programs))
    print(f"{'all steps':<{width}}  {sum(steps):8.0f} us, of which giving up privileges {confined:.0f}")


if __name__ == "__main__":
    main()
