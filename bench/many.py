"""Whether pocketd stays as it is: after thousands of launches, and with hundreds of clients that do nothing."""

from __future__ import annotations

import os
import resource
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import launch, own
from bench.figures import Measure
from bench.launch import PROGRAMS, Service
from pocketd.client import login


def _daemon(service: Service) -> tuple[float, int]:
    """Seconds that pocketd has computed, and bytes that it has."""
    seconds = int(Path(f"/proc/{service.daemon}/schedstat").read_text().split()[0]) / 1e9
    return seconds, own.memory([service.daemon]).pss


def launches(service: Service, count: int) -> list[Measure]:
    """One after the other; by tenths of them."""
    latency = Measure(f"{count} launches in a row: request to first line, a service of plain Python", "s")
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


def idle(service: Service, count: int, seconds: float) -> list[Measure]:
    """Clients that are logged in and do nothing: what one more holds, and what pocketd computes for all of them."""
    memory = Measure(f"Memory of one of {count} idle clients of a service of plain Python", "bytes")
    cpu = Measure(f"pocketd's processor time in {seconds:g} s", "s")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, files)
        cpu.add("no client", _idle_cpu(service, seconds))
        before, held = own.memory([os.getpid()]).pss, _daemon(service)[1]
        sessions: list[Any] = []
        for _ in range(count):
            sessions.append(stack.enter_context(_client(service)))
        memory.add("the client's own side", (own.memory([os.getpid()]).pss - before) / count)
        memory.add("pocketd", (_daemon(service)[1] - held) / count)
        memory.add("worker, private", *(own.memory([session.pid]).private for session in sessions))
        cpu.add(f"{count} idle clients", _idle_cpu(service, seconds))
        began = time.monotonic()
        for session in sessions:
            session.call("null:null")
        memory.facts["all answer, seconds"] = time.monotonic() - began
    service.settle()
    return [memory, cpu]


def _client(service: Service) -> Any:
    return login(service.name, directory=str(PROGRAMS), runtime_dir=service.runtime_dir)


def _idle_cpu(service: Service, seconds: float) -> float:
    time.sleep(1.0)
    before = _daemon(service)[0]
    time.sleep(seconds)
    return _daemon(service)[0] - before
