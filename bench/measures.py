"""The measures. Each goes round: every series gets its turn in each round, so that all meet the same machine."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench import launch, models, own, rpc
from bench.apps import App
from bench.echo import echo
from bench.figures import Measure
from bench.floor import floor
from bench.launch import ENVIRONMENT, PROGRAMS, Failed, Service
from bench.ways import Pockets
from pocketd.client import login

REST = 0.02  # seconds after each launch, in which what it left is cleared away
BIG = (25_000_000 // 4,)  # float32


def first_line(service: Service, pocket: Path, rounds: int, launches: int) -> list[Measure]:
    """Launch to the first line with TensorFlow imported, the whole command, and what a launch costs in cpu time."""
    line = Measure("Launch to first line, TensorFlow imported", "s")
    whole = Measure("A whole command, from its start to its exit", "s")
    cpu = Measure("Processor time of a launch", "s")
    with ExitStack() as stack:
        control = stack.enter_context(service.control())
        plain = stack.enter_context(floor(service.template()))
        alive = stack.enter_context(floor(service.template()))
        leaves = own.cgroup2() / f"{service.scope.parent.parent.name}-floor"
        leaves.mkdir()
        stack.callback(leaves.rmdir)
        environment = {**ENVIRONMENT, "POCKETD_RUNTIME_DIR": service.runtime_dir}
        words = ["run", "--service", service.name, "first_line.py"]
        commands = {"pocket run": [str(pocket), *words], "the same in Python": [f"{pocket}-py", *words]}
        for round in range(rounds + 1):
            run = launch.monolith("first_line.py")
            if round:
                line.add("monolith", run.line)
                whole.add("python", run.end)
                cpu.add("monolith", run.cpu or 0.0)
            for _ in range(3):
                for name, command in commands.items():
                    run = launch.as_process(command, environment=environment)
                    time.sleep(REST)
                    if round:
                        whole.add(name, run.end)
            service.settle()
            before = service.cpu()
            for _ in range(launches):
                forked, cloned = plain.fork(), alive.live_fork(leaves)
                run = launch.in_worker(control, service.name, "first_line.py")
                time.sleep(REST)
                if round:  # the first has warmed caches
                    line.add("worker", run.line)
                    line.add("bare fork", forked)
                    line.add("live fork into namespaces", cloned)
            service.settle()
            if round:
                used = {part: (seconds - before[part]) / launches for part, seconds in service.cpu().items()}
                for part, seconds in used.items():
                    cpu.add(part, seconds)
                cpu.add("launch", sum(used.values()))
    line.compare("monolith", ["worker"])
    line.compare("worker", ["bare fork", "live fork into namespaces"])
    whole.compare("python", ["pocket run"])
    whole.compare("the same in Python", ["pocket run"])
    cpu.compare("monolith", ["launch"])
    return [line, whole, cpu]


def client_result(service: Service, name: str = "mobilenet", pocket: str | None = None) -> tuple[float, float, float]:
    """Login to first result of a model, in seconds; seconds of the same call again; and the sum of the result."""
    began = time.monotonic()
    with login(pocket or service.name, directory=str(PROGRAMS), runtime_dir=service.runtime_dir) as session:
        model = session.model(name)
        image = session.tensor(models.INPUTS[name], "float32")
        image.numpy()[...] = 0.5
        scores = first(model(image))
        result = time.monotonic()
        said = float(np.abs(scores).sum())
        again = time.monotonic()
        first(model(image))
        return result - began, time.monotonic() - again, said


def first(results: Any) -> Any:
    return (results[0] if isinstance(results, (list, tuple)) else results).numpy()


def first_result(pockets: Pockets, work: Path, file: Path, rounds: int, launches: int) -> Measure:
    """Launch to the first result of MobileNetV2: an unmodified script, a client of a service that holds it, on demand
    and from a slot, and a client of gRPC."""
    measure = Measure("Launch to first result of MobileNetV2", "s")
    service = pockets.service
    with ExitStack() as stack:
        control, server = (
            stack.enter_context(service.control()),
            stack.enter_context(rpc.server(work, {"mobilenet": file})),
        )
        pocket = stack.enter_context(pockets.client_slots("mobilenet", 2))
        for round in range(rounds):
            measure.add("monolith, builds", launch.monolith("build.py").result or 0.0)
            loads = launch.monolith("load.py", str(file))
            measure.add("monolith, loads", loads.result or 0.0)
            for _ in range(max(1, launches // 4)):
                measure.add("program, builds", launch.in_worker(control, service.name, "build.py").result or 0.0)
                time.sleep(REST)
            for number in range(launches):
                for name, there in (("client", None), ("client, slot", pocket)):
                    seconds, again, said = client_result(service, pocket=there)
                    if abs(said - loads.said["sum"]) > 1e-3 * abs(said):
                        raise Failed(f"a client's result {said} is not the monolith's {loads.said['sum']}")
                    if round or number:
                        measure.add(name, seconds)
                        measure.add("inference alone" if there is None else "inference alone, slot", again)
                    pockets.settle()
                    time.sleep(REST)
                if round or number:
                    seconds, again, _ = rpc.result(server.address, "mobilenet")
                    measure.add("gRPC client, from its connection", seconds)
                    measure.add("gRPC client, inference alone", again)
    measure.compare("monolith, builds", ["program, builds"])
    measure.compare("monolith, loads", ["client", "client, slot", "gRPC client, from its connection"])
    measure.compare("client", ["inference alone"])
    return measure


def round_trip(service: Service, work: Path, rounds: int, block: int) -> Measure:
    """One call that does nothing, alone and with 25 MB, beside a bare echo; all three processes on one processor, since
    a message to another one costs twice as much, and the scheduler would choose. GRPC, which has threads on both sides,
    there and on all processors."""
    measure = Measure("Round trip", "s")
    with ExitStack() as stack:
        everywhere = _methods(stack, work / "everywhere")
        with launch.one_processor() as processor:
            trip = stack.enter_context(echo())
            session = stack.enter_context(login(service.name, directory=str(PROGRAMS), runtime_dir=service.runtime_dir))
            for thread in Path(f"/proc/{session.pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), {processor})
            there = _methods(stack, work / "there")
        small, big = session.tensor((16,), "float32"), session.tensor(BIG, "float32")
        source = np.zeros(BIG, "float32")
        few, lot = bytes(64), source.tobytes()

        def copied() -> None:
            big.numpy()[...] = source
            session.call("null:take", big)

        less = max(1, block // 10)  # where 25 MB are copied
        once: dict[str, tuple[int, Callable[[], Any]]] = {
            "bare echo": (block, trip),
            "call": (block, lambda: session.call("null:null")),
            "call, 64 bytes in the arena": (block, lambda: session.call("null:take", small)),
            "call, 25 MB in the arena": (block, lambda: session.call("null:take", big)),
            "call, 25 MB copied in": (less, copied),
            "25 MB copied alone": (less, lambda: np.copyto(big.numpy(), source)),
            "gRPC, no bytes, one processor": (block, lambda: there(b"")),
            "gRPC, 64 bytes, one processor": (block, lambda: there(few)),
            "gRPC, 25 MB, one processor": (less, lambda: there(lot)),
        }
        spread: dict[str, tuple[int, Callable[[], Any]]] = {
            "gRPC, no bytes": (block, lambda: everywhere(b"")),
            "gRPC, 64 bytes": (block, lambda: everywhere(few)),
            "gRPC, 25 MB": (less, lambda: everywhere(lot)),
        }
        for round in range(rounds + 1):
            with launch.one_processor():
                _timed(measure, once, bool(round))
            _timed(measure, spread, bool(round))
    measure.compare("call", ["bare echo"])
    measure.compare("call, 25 MB in the arena", ["bare echo", "call, 64 bytes in the arena"])
    measure.compare("call, 25 MB copied in", ["25 MB copied alone"])
    for name in ("gRPC, no bytes", "gRPC, no bytes, one processor"):
        measure.compare(name, ["call"])
    for name in ("gRPC, 64 bytes", "gRPC, 64 bytes, one processor"):
        measure.compare(name, ["call, 64 bytes in the arena"])
    for name in ("gRPC, 25 MB", "gRPC, 25 MB, one processor"):
        measure.compare(name, ["call, 25 MB in the arena", "call, 25 MB copied in"])
    return measure


def _methods(stack: ExitStack, place: Path) -> Any:
    """A method of a gRPC server that takes bytes and gives none, by a channel that has its threads."""
    place.mkdir()
    channel = rpc.Channel(stack.enter_context(rpc.server(place, {})).address)
    stack.callback(channel.close)
    method = channel.method("null")
    method(b"")
    return method


def _timed(measure: Measure, series: dict[str, tuple[int, Callable[[], Any]]], keep: bool) -> None:
    clock = time.perf_counter
    for name, (times, function) in series.items():
        for _ in range(times):
            began = clock()
            function()
            if keep:
                measure.add(name, clock() - began)


def apps_memory(service: Service, name: str, file: Path, counts: list[int]) -> Measure:
    """Sum of PSS of so many apps at once that each hold a result of one model, deployed with the service: clients with
    their workers and all of the service; and monoliths that load it. Private: what one app alone holds, the median."""
    measure = Measure(f"Memory of concurrent apps, {name}", "bytes")
    with ExitStack() as stack:
        started: list[int] = []
        for count in counts:
            while len(started) < count:
                command = [sys.executable, str(PROGRAMS / "load.py"), str(file), "--hold"]
                process = subprocess.Popen(
                    command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                stack.callback(_end, process)
                assert process.stdout
                json.loads(process.stdout.readline())
                started.append(process.pid)
            held = [own.memory([pid]) for pid in started]
            measure.add(_many(count, "monolith"), sum(each.pss for each in held))
            measure.add(_many(count, "monolith") + ", private of one", *(each.private for each in held))
    with ExitStack() as stack:
        clients: list[subprocess.Popen[bytes]] = []
        for count in counts:
            while len(clients) < count:
                clients.append(_client(service, name))
                stack.callback(_end, clients[-1])
            for client in clients:  # all at once
                assert client.stdin
                client.stdin.write(b"\n")
                client.stdin.flush()
            for client in clients:
                _await(client)
            for when, patience in (("", 0.0), (", idle", 3.0)):
                pockets = _many(count, "pocket") + when
                time.sleep(patience)  # a worker gives back its allocator's memory after 2 s without a call
                workers = [own.memory([pid]) for pid in _workers(service)]
                apps = [own.memory([client.pid]) for client in clients]
                everything = own.memory([*(client.pid for client in clients), *service.processes()])
                measure.add(pockets, everything.pss)
                measure.add(f"{pockets}, private of one worker", *(each.private for each in workers))
                measure.add(f"{pockets}, private of one client", *(each.private for each in apps))
    service.settle()
    for count in counts:
        pockets = _many(count, "pocket")
        measure.compare(_many(count, "monolith"), [pockets, f"{pockets}, idle"])
    return measure


def held_memory(measure: Measure, pockets: Pockets, app: App, counts: list[int]) -> None:
    """The same of so many runs of a held script at once, in a service without models: each has its weights from the
    pocket's template."""
    with pockets.holding(app, 0), ExitStack() as stack:
        runs: list[subprocess.Popen[bytes]] = []
        for count in counts:
            while len(runs) < count:
                runs.append(
                    subprocess.Popen(
                        [str(own.BIN / "pocket"), app.name, *app.words, "--hold"],
                        cwd=pockets.place,
                        env=pockets.environment,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                    )
                )
                stack.callback(_end, runs[-1])
                process = runs[-1]
                assert process.stdout
                if not process.stdout.readline():
                    raise Failed(f"{app.program} in a pocket has no result")
            held = _many(count, "held pocket")
            everything = own.memory([*(run.pid for run in runs), *pockets.service.processes()])
            measure.add(held, everything.pss)
            workers = [own.memory([pid]).private for pid in _workers(pockets.service)]
            measure.add(f"{held}, private of one worker", *workers)
            measure.compare(_many(count, "monolith"), [held])


def _client(service: Service, name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "bench.client", service.runtime_dir, service.name, name]
    process = subprocess.Popen(command, cwd=own.EXAMPLES.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        _await(process)
    except BaseException:
        _end(process)
        raise
    return process


def _await(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], 120)
    if not ready or process.stdout.readline() != b"held\n":
        raise Failed("a client has no result")


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _workers(service: Service) -> list[int]:
    with service.control() as control:
        return [int(worker["pid"]) for worker in control.call("ps")["workers"] if worker["service"] == service.name]


def _end(process: subprocess.Popen[bytes]) -> None:
    """By the end of its standard input."""
    process.communicate(timeout=60)
