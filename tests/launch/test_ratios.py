"""How much sooner a pocket is than a process of its own, and how near to a bare fork, as ratios taken in one run.

The machine that runs this is small and busy, and a busy moment hits one side alone. So both sides run at real-time
priority where the host grants it and take turns, medians are compared, and of up to three rounds the best one counts:
noise makes a launch slower, never sooner than it can be.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench import launch, measures, models
from bench.floor import floor
from bench.launch import Service
from pocketd.client import login
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table

ROUNDS = 3


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    with launch.undisturbed():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save("mobilenet", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(undisturbed: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that holds MobileNetV2, of a daemon of these tests' own: what runs already keeps its priority."""
    config = f'[service.tensorflow]\nruntime = "tensorflow"\nmodels = {{ mobilenet = "{model}" }}\n'
    config += f"env = {toml_table(service_environment())}\n"
    place = tmp_path_factory.mktemp("caller")
    (place / "mine.py").touch()
    for name, more in (("caller", ""), ("keeper", 'preload = ["mine"]\n')):
        config += f'[pocket.{name}]\nservice = "tensorflow"\ndir = "{place}"\n{more}'
        config += 'allow = { models = ["mobilenet"] }\nwarm = 1\n'
    daemon = Pocketd(tmp_path_factory.mktemp("ratios"), config)
    daemon.start()
    try:
        daemon.pocket("tensorflow", "on")
        assert daemon.process
        scope = daemon.cgroup_path / "pocketd-tensorflow.scope"
        yield Service(daemon.runtime_dir, "tensorflow", "tensorflow", scope, daemon.process.pid)
    finally:
        daemon.close()


def best(measure: Callable[[], float], enough: Callable[[float], bool], better: Callable[..., float]) -> float:
    """The best of up to ROUNDS measurements; the first that is enough ends it."""
    found: list[float] = []
    while len(found) < ROUNDS and not (found and enough(found[-1])):
        found.append(measure())
    return better(found)


def report(what: str, one: list[float], other: list[float]) -> float:
    ratio = statistics.median(one) / statistics.median(other)
    medians = f"{statistics.median(one) * 1e3:.1f} ms / {statistics.median(other) * 1e3:.1f} ms"
    print(f"{what}: {ratio:.2f} ({medians}, of {len(one)} and {len(other)})")
    return ratio


def test_a_first_line_comes_100_times_sooner_than_the_monoliths(service: Service):
    def ratio() -> float:
        monolith, worker = [], []
        with service.control() as control:
            for _ in range(3):
                monolith.append(launch.monolith("first_line.py").line)
                for _ in range(10):
                    worker.append(launch.in_worker(control, service.name, "first_line.py").line)
                    time.sleep(measures.REST)
        return report("monolith / worker, first line", monolith, worker)

    assert best(ratio, lambda r: r >= 100, max) >= 100


def test_a_first_line_comes_within_6_bare_forks_of_the_template(service: Service):
    """A bare fork of a template of huge pages; beside other work the rest of a launch weighs more."""
    with floor(service.template()) as template, service.control() as control:

        def ratio() -> float:
            bare, worker = [], []
            for _ in range(40):
                bare.append(template.fork())
                time.sleep(measures.REST)
                worker.append(launch.in_worker(control, service.name, "first_line.py").line)
                time.sleep(measures.REST)
            return report("worker / bare fork, first line", worker, bare)

        assert best(ratio, lambda r: r <= 6, min) <= 6


def test_a_clients_first_result_comes_25_times_sooner_than_the_monoliths(service: Service, model: Path):
    def ratio() -> float:
        monolith, client = [], []
        for _ in range(2):
            run = launch.monolith("load.py", str(model))
            assert run.result
            monolith.append(run.result)
            for _ in range(8):
                seconds, _, said = measures.client_result(service)
                client.append(seconds)
                assert said == pytest.approx(run.said["sum"], rel=1e-3)
                time.sleep(measures.REST)
        return report("monolith / client, first result", monolith, client)

    assert best(ratio, lambda r: r >= 25, max) >= 25


def test_a_clients_slot_has_the_pages_of_its_models_first_call(service: Service):
    def faults(name: str) -> int:
        with login(name, directory=str(launch.PROGRAMS), runtime_dir=service.runtime_dir) as session:
            model, image = session.model("mobilenet"), session.tensor(models.INPUTS["mobilenet"], "float32")
            image.numpy()[...] = 0.5
            before = minor_faults(session.pid)
            measures.first(model(image))
            return minor_faults(session.pid) - before

    with service.control() as control:
        for name in ("caller", "keeper"):
            assert control.call("warm", name=name, timeout=TIMEOUT)["slots"] == 1
    on_demand, slot, preloaded = faults("tensorflow"), faults("caller"), faults("keeper")
    print(f"page faults of a first call, on demand, from a slot, a preloaded one: {on_demand}, {slot}, {preloaded}")
    assert max(slot, preloaded) < on_demand / 3


def test_a_first_call_finds_its_place_in_the_heap_and_its_pages_made(service: Service):
    """It takes hardly more address space, its caller's arena, and hardly more memory than its worker had."""
    with service.control() as control:
        assert control.call("warm", name="caller", timeout=TIMEOUT)["slots"] == 1
    with login("caller", directory=str(launch.PROGRAMS), runtime_dir=service.runtime_dir) as session:
        model, image = session.model("mobilenet"), session.tensor(models.INPUTS["mobilenet"], "float32")
        image.numpy()[...] = 0.5
        before = most(session.pid)
        measures.first(model(image))
        after = most(session.pid)
    print(f"KiB of a slot's worker at most, addresses and memory, before and after its first call: {before}, {after}")
    assert after[0] - before[0] < 4 << 10
    assert after[1] - before[1] < 4 << 10


def most(pid: int | None) -> tuple[int, int]:
    """Address space and memory that a process has had at most, in KiB (proc_pid_status(5))."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"(?m)^(VmPeak|VmHWM):\s+(\d+) kB$", text))
    return int(found["VmPeak"]), int(found["VmHWM"])


def minor_faults(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
