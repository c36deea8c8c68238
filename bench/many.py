"""Whether pocketd stays as it is: after thousands of launches, with a thousand clients that do nothing, and with
hundreds that compute all the time.

usage, as root: python -m bench.many IDLE BUSY [RUNTIME]   without launches in a row; with each client's memory.current
where there is that controller, as in the test VM
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import launch, own, show
from bench.figures import Measure
from bench.launch import PROGRAMS, Service
from bench.service import service_with
from pocketd.client import login


def _daemon(service: Service) -> tuple[float, int]:
    """Seconds that pocketd has computed, and bytes that it has."""
    seconds = int(Path(f"/proc/{service.daemon}/schedstat").read_text().split()[0]) / 1e9
    return seconds, own.memory([service.daemon]).pss


def launches(service: Service, count: int) -> list[Measure]:
    """One after the other; by tenths of them."""
    latency = Measure(f"{count} launches in a row: request to first line, a service of {service.runtime}", "s")
    cpu = Measure(f"{count} launches in a row: pocketd's processor time of one", "s")
    memory = Measure(f"{count} launches in a row: pocketd's memory", "bytes")
    tenths = [f"tenth {n}" for n in range(1, 11)]
    with service.control() as control:
        launch.in_worker(control, service.name, "now.py")
        memory.add("before", _daemon(service)[1])
        for tenth in tenths:
            before, _ = _daemon(service)
            for _ in range(count // 10):
                latency.add(tenth, launch.in_worker(control, service.name, "now.py").line)
            after, held = _daemon(service)
            cpu.add(tenth, (after - before) / (count // 10))
            memory.add(tenth, held)
    service.settle()
    for measure in (latency, cpu, memory):
        measure.compare(tenths[-1], tenths[:1])
    return [latency, cpu, memory]


@contextmanager
def _clients(service: Service, count: int) -> Iterator[list[Any]]:
    """So many sessions, each of a pocket of its own."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, files)
        yield [
            stack.enter_context(login(service.name, directory=str(PROGRAMS), runtime_dir=service.runtime_dir))
            for _ in range(count)
        ]
    service.settle(120.0)


def idle(service: Service, count: int, seconds: float) -> list[Measure]:
    """Clients that are logged in and do nothing: what one more holds, and what pocketd computes for all of them."""
    memory = Measure(f"Memory of one of {count} idle clients of a service of {service.runtime}", "bytes")
    cpu = Measure(f"pocketd's processor time in {seconds:g} s", "s")
    cpu.add("no client", _idle_cpu(service, seconds))
    before, held = own.memory([os.getpid()]).pss, _daemon(service)[1]
    with _clients(service, count) as sessions:
        memory.add("the client's own side", (own.memory([os.getpid()]).pss - before) / count)
        memory.add("pocketd", (_daemon(service)[1] - held) / count)
        memory.add("worker, private", *(own.memory([session.pid]).private for session in sessions))
        charged = [path for session in sessions if (path := _leaf(session.pid) / "memory.current").exists()]
        if charged:
            memory.add("its cgroup's memory.current", *(int(path.read_text()) for path in charged))
        cpu.add(f"{count} idle clients", _idle_cpu(service, seconds))
        began = time.monotonic()
        for session in sessions:
            session.call("null:null")
        memory.facts["all answer, seconds"] = time.monotonic() - began
    return [memory, cpu]


def _leaf(pid: int) -> Path:
    """A process's cgroup."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return own.cgroup2() / next(line for line in lines if line.startswith("0::"))[len("0::/") :]


def busy(service: Service, count: int, seconds: float) -> list[Measure]:
    """Clients that compute all the time, on however many processors there are: what each gets of them."""
    share = Measure(f"Share of a processor of each of {count} busy clients, of what would be its fair one", "")
    launches = Measure(f"Request to first line beside {count} busy clients, a service of {service.runtime}", "s")
    processors = len(os.sched_getaffinity(0))
    with service.control() as control:
        for _ in range(10):
            launches.add("beside none", launch.in_worker(control, service.name, "now.py").line)
        with _clients(service, count) as sessions, ThreadPoolExecutor(count) as pool:
            end = time.monotonic() + seconds + count / 50  # all have begun by then
            running = [pool.submit(session.call, "spin:spin", end - seconds, end) for session in sessions]
            while time.monotonic() < end - seconds:
                time.sleep(0.1)
            while time.monotonic() < end - seconds / 2:
                launches.add(f"beside {count}", launch.in_worker(control, service.name, "now.py").line)
            got = [future.result() for future in running]
    fair = seconds * processors / count
    share.add("percent of it", *(100 * part / fair for part in got))
    share.facts["percent, least and most"] = [round(100 * part / fair) for part in (min(got), max(got))]
    launches.compare(f"beside {count}", ["beside none"])
    return [share, launches]


def _idle_cpu(service: Service, seconds: float) -> float:
    time.sleep(1.0)
    before = _daemon(service)[0]
    time.sleep(seconds)
    return _daemon(service)[0] - before


def main(idle_ones: str, busy_ones: str, runtime: str = "python") -> None:
    with tempfile.TemporaryDirectory(prefix="pocketd-bench-") as name:
        Path(name).chmod(0o755)
        with service_with(Path(name), runtime=runtime) as service:
            for measure in (*idle(service, int(idle_ones), 10.0), *busy(service, int(busy_ones), 20.0)):
                print(show.measured(measure.wire()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
