"""Every limit, by what the kernel does. A limit is a pocket's total: two workers share it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from pocketd.client import errors, login
from tests.conftest import TIMEOUT, wait_for
from tests.vm.guest.installed import SLICE, Program, call, cgroup_of, configure, journal, pocket, ps, settled, systemctl

pytestmark = pytest.mark.usefixtures("pockets")
SCRATCH = Path("/var/lib/vm-scratch")
APP = """
import os, resource, time
held = []

def burn(seconds):
    begun, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - begun < seconds:
        pass
    return time.process_time() - cpu, time.monotonic() - begun

def eat(size):
    for _ in range(size >> 20):
        held.append(bytearray(os.urandom(4096) * 256))
    return size

def fill(size):
    with open("/tmp/filled", "ab") as file:
        for _ in range(size >> 20):
            file.write(b"x" * (1 << 20))
    return os.stat("/tmp/filled").st_size

def cpus():
    return sorted(os.sched_getaffinity(0))

def bomb():
    made = 0
    try:
        while made < 1000:
            if os.fork() == 0:
                time.sleep(1000)
                os._exit(0)
            made += 1
    except OSError as e:
        return made, e.errno
    return made, 0

def write(size):
    begun = time.monotonic()
    fd = os.open("out/data", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    import mmap
    block = mmap.mmap(-1, 1 << 20)
    for _ in range(size >> 20):
        os.write(fd, block)
    os.close(fd)
    return time.monotonic() - begun

def cache(size):
    # Fill the page cache, with clean pages of a new file.
    with open(f"out/cached-{time.monotonic_ns()}", "wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(4096) * 256)
        os.fsync(file.fileno())

def compute(processes):
    # They end with the session.
    for _ in range(processes):
        if os.fork() == 0:
            while True:
                pass
    return processes

def nothing():
    return None
"""
LIMITS = {
    "share": '"cpu.max" = "20%"',
    "heavy": '"cpu.weight" = 300, "cpuset.cpus" = "0"',
    "light": '"cpu.weight" = 100, "cpuset.cpus" = "0"',
    "second": '"cpuset.cpus" = "1"',
    "small": '"memory.max" = "100M", "memory.swap.max" = 0',
    "high": '"memory.high" = "60M", "memory.swap.max" = 0',
    "guarded": '"memory.low" = "50M"',
    "swapping": '"memory.max" = "80M", "memory.swap.max" = "40M"',
    "few": '"pids.max" = 20',
    "slow": '"io.max" = "DEVICE wbps=2M"',
    "greedy": '"cpu.max" = "100%", "memory.max" = "150M", "memory.swap.max" = 0, "pids.max" = 40',
    "free": "",
    "other": "",
}


@pytest.fixture(scope="module")
def pockets(installed):
    device = SCRATCH.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    text = []
    for name, limits in LIMITS.items():
        place = SCRATCH / name
        place.mkdir(exist_ok=True)
        (place / "app.py").write_text(APP)
        text.append(f"""
            [pocket.{name}]
            service = "plain"
            dir = "{place}"
            allow = {{ write = ["out"] }}
            limits = {{ {limits.replace("DEVICE", number)} }}
        """)
    configure("limits", "\n".join(text))
    call("on", name="plain")


def alive() -> None:
    """Somebody else's session works."""
    with login("free", timeout=TIMEOUT) as session:
        assert session.call("app:nothing") is None


@pytest.mark.oldest
def test_cpu_max_is_the_share_of_one_cpu():
    with login("share", timeout=TIMEOUT) as session:
        session.call("app:burn", 0.5)
        used, elapsed = session.call("app:burn", 5)
        assert 0.1 < used / elapsed < 0.3
        assert counts(cgroup_of("share") / "cpu.stat")["nr_throttled"] > 0


def test_a_limit_is_the_total_of_all_workers_of_a_pocket():
    """Each of the two has the time of its call on the clock, which begins when the other may not have begun: so what
    both used is set against the time from the first call to the last answer."""
    used = []
    with login("share", timeout=TIMEOUT) as one, login("share", timeout=TIMEOUT) as other:
        begun = time.monotonic()
        threads = [
            threading.Thread(target=lambda session=session: used.append(session.call("app:burn", 5)[0]))
            for session in (one, other)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.monotonic() - begun
    assert len(used) == 2 and 0.1 < sum(used) / elapsed < 0.3


def test_cpu_weight_divides_a_busy_cpu():
    """Two that compute on one cpu, 3 to 1; compared over the time in which both ran."""
    with login("heavy", timeout=TIMEOUT) as heavy, login("light", timeout=TIMEOUT) as light:
        thread = threading.Thread(target=heavy.call, args=("app:burn", 20))
        thread.start()
        light_thread = threading.Thread(target=light.call, args=("app:burn", 20))
        light_thread.start()
        time.sleep(3)  # both at full speed
        before = [cpu_of("heavy"), cpu_of("light")]
        time.sleep(10)
        after = [cpu_of("heavy"), cpu_of("light")]
        thread.join()
        light_thread.join()
    ratio = (after[0] - before[0]) / (after[1] - before[1])
    assert 2 < ratio < 4.5


def cpu_of(name: str) -> int:
    return counts(cgroup_of(name) / "cpu.stat")["usage_usec"]


def test_cpuset_is_where_workers_run_and_threads_start():
    with login("second", timeout=TIMEOUT) as session:
        assert session.call("app:cpus") == [1]


@pytest.mark.oldest
def test_memory_max_ends_the_pocket_alone_and_is_told_by_name():
    with login("free", timeout=TIMEOUT) as other:
        with login("small", timeout=TIMEOUT) as session:
            assert session.call("app:eat", 20 << 20) == 20 << 20
            with pytest.raises(errors.OutOfMemory) as caught:
                session.call("app:eat", 200 << 20)
        error = caught.value
        assert (error.pocket, error.limit, error.signal) == ("small", 100 << 20, 9)
        assert error.peak is not None and 90 << 20 < error.peak <= 100 << 20
        assert other.call("app:nothing") is None
    (row,) = [p for p in ps()["pockets"] if p["name"] == "small"]
    assert "its memory.max of 100.0M" in row["last"]["why"]
    assert "its memory.max of 100.0M" in pocket("ps").stdout
    assert "memory-limit" in journal() and "small" in journal()
    assert settled("small")


def test_files_in_tmp_count_and_nobody_elses_suffer():
    with login("small", timeout=TIMEOUT) as session, pytest.raises(errors.OutOfMemory):
        session.call("app:fill", 200 << 20)
    alive()


def test_memory_max_of_a_program_is_told_in_one_line_and_its_signal():
    code = "import app; print('begun', flush=True); app.eat(200 << 20)"
    with Program("small", code) as program:
        assert program.line() == "begun"
        end = program.end()
    assert end["status"] == 9
    assert end["error"]["code"] == "memory"


def test_memory_high_slows_and_does_not_kill():
    with login("high", timeout=TIMEOUT) as session:
        session.call("app:nothing")
        throttled = events("high", "high")
        finished = threading.Event()

        def eat() -> None:
            try:
                session.call("app:eat", 70 << 20)
            finally:
                finished.set()

        threading.Thread(target=eat, daemon=True).start()
        assert wait_for(lambda: events("high", "high") > throttled)
        assert events("high", "oom_kill") == 0
        call("set", name="high", limits={"memory.high": "max"})
        assert finished.wait(TIMEOUT)
        assert session.call("app:nothing") is None


def events(name: str, key: str) -> int:
    return counts(cgroup_of(name) / "memory.events")[key]


def counts(path: Path) -> dict[str, int]:
    """A file of the kernel's with a key and a number on each line."""
    return {key: int(number) for key, number in (line.split() for line in path.read_text().splitlines())}


def test_memory_low_protects_a_pocket_when_others_are_reclaimed():
    """What the kernel takes back from all services it takes from those without a promise, as long as they have some."""

    def low(cgroup: Path) -> int:
        return int((cgroup / "memory.low").read_text())

    def pages(name: str) -> int:
        return counts(cgroup_of(name) / "memory.stat")["file"] >> 20

    with login("guarded", timeout=TIMEOUT) as guarded, login("free", timeout=TIMEOUT) as free:
        for session in (guarded, free):
            session.call("app:cache", 40 << 20)
        pocket_, above = cgroup_of("guarded"), list(cgroup_of("guarded").parents)[:4]
        assert above[-1] == SLICE
        assert wait_for(lambda: [low(cgroup) for cgroup in (pocket_, *above)] == [50 << 20] * 5)
        systemctl("daemon-reload")
        assert [low(cgroup) for cgroup in (pocket_, *above)] == [50 << 20] * 5
        assert pages("guarded") >= 40 and pages("free") >= 40
        (SLICE / "memory.reclaim").write_text("30M")
        assert pages("guarded") >= 40 and pages("free") < 20
        # The same without the promise: both have to give.
        free.call("app:cache", 40 << 20)
        call("set", name="guarded", limits={"memory.low": "0"})
        assert wait_for(lambda: [low(cgroup) for cgroup in (pocket_, *above)] == [0] * 5)
        (SLICE / "memory.reclaim").write_text("50M")
        assert pages("guarded") < 35
    call("set", name="guarded", limits={"memory.low": "50M"})


def test_promises_add_up_and_end_with_their_pockets():
    def low() -> int:
        return int((SLICE / "memory.low").read_text())

    call("set", name="free", limits={"memory.low": "20M"})
    try:
        with login("free", timeout=TIMEOUT):
            with login("guarded", timeout=TIMEOUT):
                assert wait_for(lambda: low() == 70 << 20)
                systemctl("restart", "pocketd.service")
                assert wait_for(lambda: low() == 70 << 20)
            assert wait_for(lambda: low() == 20 << 20)
        assert wait_for(lambda: low() == 0)
    finally:
        call("set", name="free", limits={"memory.low": "0"})


def test_swap_max_bounds_what_is_swapped():
    swap = SCRATCH / "swap"
    os.close(os.open(swap, os.O_CREAT | os.O_WRONLY, 0o600))
    os.system(f"dd if=/dev/zero of={swap} bs=1M count=256 2>/dev/null && mkswap -q {swap} && swapon {swap}")
    try:
        with login("swapping", timeout=TIMEOUT) as session:
            assert session.call("app:eat", 90 << 20) == 90 << 20
            used = int((cgroup_of("swapping") / "memory.swap.current").read_text())
            assert 0 < used <= 40 << 20
            with pytest.raises(errors.OutOfMemory):
                session.call("app:eat", 100 << 20)
    finally:
        os.system(f"swapoff {swap}")
        swap.unlink()


@pytest.mark.oldest
def test_pids_max_contains_a_fork_bomb():
    with login("few", timeout=TIMEOUT) as session:
        made, number = session.call("app:bomb")
        assert (0 < made < 20, number) == (True, 11)
        assert int((cgroup_of("few") / "pids.current").read_text()) <= 20
        alive()
    assert settled("few")


def test_io_max_slows_writes_to_the_disk():
    with login("free", timeout=TIMEOUT) as session:
        fast = session.call("app:write", 8 << 20)
    with login("slow", timeout=TIMEOUT) as session:
        slow = session.call("app:write", 8 << 20)
    assert slow > 3 > fast


@pytest.mark.oldest
def test_set_changes_a_running_pocket_and_daemon_reload_changes_nothing():
    with login("free", timeout=TIMEOUT) as session:
        session.call("app:nothing")
        pocket("set", "free", "memory.max=200M", "cpu.max=30%")
        place = cgroup_of("free")
        wanted = {"memory.max": str(200 << 20), "cpu.max": "30000 100000"}
        assert {name: (place / name).read_text().strip() for name in wanted} == wanted
        scope = place.parents[2]
        files = {f: f.read_text() for f in (*scope.glob("*.max"), *scope.glob("*.weight"), *place.glob("*.max"))}
        systemctl("daemon-reload")
        assert {f: f.read_text() for f in files} == files
        used, elapsed = session.call("app:burn", 4)
        assert used / elapsed < 0.45
        with pytest.raises(errors.OutOfMemory) as caught:
            session.call("app:eat", 300 << 20)
        assert caught.value.limit == 200 << 20
    call("reload", name=None)


def test_a_service_has_limits_too():
    call("set", name="plain", limits={"pids.max": "200"})
    (tree,) = {p.parents[1] for p in [cgroup_of_service()]}
    assert (tree / "pids.max").read_text().strip() == "200"
    assert (tree.parent / "pids.max").read_text().strip() == "max"
    call("reload", name=None)
    assert (tree / "pids.max").read_text().strip() == "max"


def cgroup_of_service() -> Path:
    (found,) = Path("/sys/fs/cgroup/pocketd.slice").glob("pocketd-plain*.scope/service/templates/*/")
    return found


def test_a_templates_memory_is_charged_where_it_was_loaded():
    """A worker's cgroup has what it wrote itself, far less than what it can read of its template."""
    with login("free", timeout=TIMEOUT) as session:
        session.call("app:nothing")
        loaded = counts(cgroup_of_service() / "memory.stat")[
            "anon"
        ]  # files may have been reclaimed, by a test above too
        assert loaded > 1 << 20
        (template,) = [t for t in ps()["templates"] if t["service"] == "plain"]
        assert template["charged"] > loaded * 0.9  # the kernel's counters lag behind one another a little
        assert counts(cgroup_of("free") / "memory.stat")["anon"] < loaded


def launch(count: int = 5) -> float:
    """Seconds that a launch of another pocket takes, from a login to its first line: the median."""
    took = []
    for _ in range(count):
        begun = time.monotonic()
        with Program("other", "print('begun', flush=True)") as program:
            assert program.line() == "begun"
            took.append(time.monotonic() - begun)
            assert program.end() == {"op": "exit", "v": 1, "status": 0}
    return sorted(took)[count // 2]


def of_the_service() -> list[Path]:
    """The cgroups of init and of templates."""
    return [*SLICE.glob("pocketd-plain*.scope/service/init"), *SLICE.glob("pocketd-plain*.scope/service/templates/*/")]


@pytest.mark.oldest
def test_a_pocket_at_all_its_limits_slows_neither_templates_nor_launches():
    """Thirty processes that compute, and memory up to the limit: it is throttled and reclaimed, and nothing else is."""
    alone = launch()
    before = [counts(place / "memory.events") for place in of_the_service()]
    with login("greedy", timeout=TIMEOUT) as session:
        session.call("app:eat", 80 << 20)
        for _ in range(2):
            session.call("app:cache", 60 << 20)
        session.call("app:compute", 30)
        beside = launch()
        assert counts(cgroup_of("greedy") / "cpu.stat")["nr_throttled"] > 0
        assert events("greedy", "max") > 0
        assert len(of_the_service()) >= 2
        for place in of_the_service():
            assert counts(place / "cpu.stat").get("nr_throttled", 0) == 0
        assert [counts(place / "memory.events") for place in of_the_service()] == before
    print(f"a launch took {alone:.2f} s alone, {beside:.2f} s beside it")
    assert beside < 6 * alone


def test_templates_have_their_share_beside_a_pocket_without_limits():
    """Forty processes on two cpus. In the template's own cgroup the same processes do starve it."""
    with login("free", timeout=TIMEOUT) as session:
        session.call("app:nothing")
        alone = launch()
        session.call("app:compute", 40)
        beside = launch()
        leaf = cgroup_of_service()
        (session_leaf,) = (place for place in cgroup_of("free").iterdir() if place.is_dir())
        for pid in (session_leaf / "cgroup.procs").read_text().split():
            (leaf / "cgroup.procs").write_text(pid)
        amid = launch(3)
    print(f"a launch took {alone:.2f} s alone, {beside:.2f} s beside them, {amid:.2f} s with them beside its template")
    assert beside < 6 * alone and amid > 1.5 * beside
