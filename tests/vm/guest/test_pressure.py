"""What is idle goes to swap, launches wait for memory, systemd is busy, and clocks jump, while sessions are at work."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocketd.client import errors, login
from tests.conftest import TIMEOUT, wait_for
from tests.vm.guest.installed import (
    CGROUPS,
    SLICE,
    Program,
    call,
    cgroup_of,
    configure,
    journal,
    pocket,
    ps,
    run,
    settled,
    show,
    systemctl,
)

pytestmark = pytest.mark.usefixtures("pockets")
SCRATCH = Path("/var/lib/vm-scratch")
IDLE_AFTER = 3
SIZE = 60 << 20
APP = """
import os, zlib
held = []

def hold(size):
    held.extend(os.urandom(4096) * 256 for _ in range(size >> 20))
    return check()

def touch():
    for block in held:
        block[::4096]

def check():
    return [zlib.crc32(block) for block in held]

def nothing():
    return None
"""
SLEEPER = "import signal; print('ready', flush=True); signal.pause()"
THRASHES = """
print('ready', flush=True)
b = bytearray(150 << 20)
while True:
    for n in range(0, len(b), 4096):
        b[n] = 1
"""
CONFIG = f"""
[service.resting]
runtime = "python"
idle = "reclaim"
idle_after = {IDLE_AFTER}

[pocket.rested]
service = "resting"

[pocket.sleeper]
service = "resting"

[pocket.first]
service = "plain"

[pocket.second]
service = "plain"

[pocket.thrashes]
service = "plain"

[pocket.kept]
service = "plain"
warm = 1

[pocket.older]
service = "plain"
preload = ["app"]
warm = 1

[pocket.newer]
service = "plain"
preload = ["app"]
warm = 1
"""


@pytest.fixture(scope="module")
def pockets(installed):
    text = []
    for line in CONFIG.splitlines():
        text.append(line)
        if line.startswith("[pocket."):
            place = SCRATCH / line[len("[pocket.") : -1]
            place.mkdir(exist_ok=True)
            (place / "app.py").write_text(APP)
            text.append(f'dir = "{place}"')
    configure("pressure", "\n".join(text))
    call("on", name="plain")
    yield
    call("off", name="resting")
    configure("pressure", "")


# -- idle


@pytest.fixture
def swap():
    path = SCRATCH / "swap"
    run("dd", "if=/dev/zero", f"of={path}", "bs=1M", "count=512")
    path.chmod(0o600)
    run("mkswap", "-q", path)
    run("swapon", path)
    yield
    run("swapoff", path)
    path.unlink()


def reclaimed(place: Path) -> list[tuple[int, int]]:
    """What the journal says of each time that a cgroup was reclaimed: bytes before and after."""
    name = re.escape(str(place)[len(str(CGROUPS)) :])
    found = re.findall(rf"reclaimed .*cgroup={name} before=([0-9]+) after=([0-9]+)", journal())
    return [(int(before), int(after)) for before, after in found]


def current(place: Path) -> int:
    return int((place / "memory.current").read_text())


def leaf_of(name: str, service: str = "resting") -> Path:
    (found,) = (p for p in cgroup_of(name, service).iterdir() if p.is_dir())
    return found


def template_of(service: str) -> Path:
    (found,) = SLICE.glob(f"pocketd-{service}*.scope/service/templates/*/")
    return found


def timed(session, target: str) -> float:
    begun = time.monotonic()
    session.call(target)
    return time.monotonic() - begun


@pytest.mark.oldest
def test_an_idle_session_and_its_template_go_to_swap_once_and_come_back(swap):
    with login("rested", timeout=TIMEOUT) as session:
        data = session.call("app:hold", SIZE)
        leaf, template = leaf_of("rested"), template_of("resting")
        held, loaded, stalled = current(leaf), current(template), full("total")
        assert held > SIZE
        assert wait_for(lambda: reclaimed(leaf) and reclaimed(template))
        assert current(leaf) < held / 4 and current(template) < loaded / 2
        assert int((leaf / "memory.swap.current").read_text()) > SIZE / 2
        ((before, after),) = reclaimed(leaf)
        assert before > SIZE > after
        assert full("total") - stalled < 100_000  # microseconds: it holds up no launch
        time.sleep(3 * IDLE_AFTER)  # still idle
        assert (len(reclaimed(leaf)), len(reclaimed(template))) == (1, 1)
        cold, warm = timed(session, "app:touch"), timed(session, "app:touch")
        print(
            f"a call that touches {SIZE >> 20} MB: {cold:.3f} s from swap, then {warm:.4f} s; {cold / warm:.0f} times"
        )
        assert session.call("app:check") == data
        assert wait_for(lambda: len(reclaimed(leaf)) == 2)  # it worked since, and is idle again
        begun = time.monotonic()
        with login("rested", timeout=TIMEOUT) as other:  # of a template that is in the swap, with no wait for memory
            assert other.call("app:nothing") is None
        print(f"a login after its template was reclaimed: {time.monotonic() - begun:.2f} s")


def swapped(pid: int) -> int:
    """Bytes of a process's pages that are in the swap, shared ones too."""
    (found,) = re.findall(r"^Swap: +([0-9]+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return int(found) << 10


@pytest.mark.oldest
def test_a_running_program_is_never_touched_nor_what_it_shares_with_its_template(swap):
    """All that a program has is its template's to begin with."""
    call("off", name="resting")  # no page of a new template is in the swap
    with Program("sleeper", SLEEPER) as program, login("rested", timeout=TIMEOUT) as session:
        assert program.line() == "ready"
        session.call("app:hold", SIZE)
        template, sleeps, idle = template_of("resting"), leaf_of("sleeper"), leaf_of("rested")
        of_others = reclaimed(template)  # earlier ones had its name
        (pid,) = (w["pid"] for w in ps()["workers"] if w["pocket"] == "sleeper")
        assert wait_for(lambda: reclaimed(idle))
        time.sleep(2 * IDLE_AFTER)
        assert not reclaimed(sleeps) and reclaimed(template) == of_others
        assert (sleeps / "memory.swap.current").read_text() == "0\n"
        assert swapped(pid) == 0
        program.signal(signal.SIGTERM)
        assert os.waitstatus_to_exitcode(program.end()["status"]) == -signal.SIGTERM
        assert wait_for(lambda: len(reclaimed(template)) > len(of_others))  # now that nobody uses it


# -- admission


@contextmanager
def rules(**values: object) -> Iterator[None]:
    """[admission], while it lasts."""
    configure("admission", "[admission]\n" + "".join(f"{key} = {value!r}\n" for key, value in values.items()))
    try:
        yield
    finally:
        configure("admission", "")


class Launch(threading.Thread):
    """A login of a pocket beside the test."""

    def __init__(self, name: str = "second"):
        super().__init__()
        self.name_of_pocket = name
        self.said: list[str] = []
        self.worked = False
        self.start()

    def run(self) -> None:
        with login(self.name_of_pocket, timeout=TIMEOUT, progress=self.said.append) as session:
            self.worked = session.call("app:nothing") is None

    def waits(self, why: str = "") -> bool:
        return wait_for(lambda: any(line.startswith("waiting for memory: ") and why in line for line in self.said))

    def works(self) -> bool:
        self.join(TIMEOUT)
        return self.worked


def refused(name: str = "second") -> errors.LoginRefused:
    with pytest.raises(errors.LoginRefused) as caught, login(name, timeout=TIMEOUT):
        pass
    assert caught.value.code == "host-memory"
    return caught.value


def test_a_launch_without_room_waits_until_there_is_and_what_runs_goes_on():
    with login("first", timeout=TIMEOUT) as session:
        with rules(reserve="1T", wait=600):
            launch = Launch()
            assert launch.waits("are kept in reserve")
            assert session.call("app:nothing") is None
            assert [w["pocket"] for w in ps()["workers"]] == ["first"]
            assert not launch.worked
        assert launch.works()


def test_a_launch_that_waited_long_enough_is_refused_with_what_to_do():
    with rules(reserve="1T", wait=2):
        begun = time.monotonic()
        message = refused().message
        assert 2 < time.monotonic() - begun < 20
        assert re.search(
            "second was not started: a worker needs about 32M, and this host has [0-9]+M available", message
        )
        assert "it waited 2 s. End something (pocket ps), or change [admission] in pocketd.conf" in message
        done = pocket("run", "--service", "plain", "--dir", str(SCRATCH / "second"), "-c", "", check=False)
        assert done.returncode == 125
        assert "an ad hoc run was not started" in done.stderr


def test_where_the_queue_is_full_a_launch_is_refused_at_once():
    with rules(reserve="1T", wait=600, queue=1):
        launch = Launch()
        assert launch.waits()
        assert "1 launches wait already" in refused().message
        assert launch.is_alive()
    assert launch.works()


def test_a_caller_that_gives_up_leaves_the_queue():
    def has_place() -> bool:
        said: list[str] = []
        with pytest.raises((errors.Timeout, errors.LoginRefused)):
            login("second", timeout=2, progress=said.append)
        return any(line.startswith("waiting for memory: ") for line in said)

    with rules(reserve="1T", wait=600, queue=1):
        assert has_place()
        assert wait_for(has_place, 60)


def test_what_a_pocket_was_promised_is_not_available_to_others():
    """memory.low of a pocket that runs; for its own next worker it is there."""
    with rules(wait=1):
        with login("first", timeout=TIMEOUT) as session:
            pocket("set", "first", "memory.low=64G")
            assert re.search("and 6[0-9]{4}M are promised to others", refused().message)
            with login("first", timeout=TIMEOUT) as its_own:
                assert its_own.call("app:nothing") is session.call("app:nothing") is None
        assert settled("first")
        assert Launch().works()
        assert "a worker needs about 65536M" in refused("first").message  # more than this host could promise


@contextmanager
def stalling(count: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """By processes, no pocket's, that live in a third of the memory that they use. Gives one."""
    place = CGROUPS / "hog"
    place.mkdir()
    code = f"b = bytearray({120 // count} << 20)\nwhile True:\n  for n in range(0, len(b), 4096): b[n] = 1"
    (place / "memory.max").write_text(str(40 << 20))
    command = ["sh", "-c", f"echo 0 >{place}/cgroup.procs; exec python3 -c '{code}'"]
    hogs = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield hogs[0]
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
        place.rmdir()


def test_a_host_that_stalls_for_memory_keeps_launches_waiting(swap):
    with stalling() as hog, rules(wait=600, pressure=5):
        assert wait_for(lambda: hog.poll() is not None or full("avg10") > 5)
        launch = Launch()
        assert launch.waits("this host stalls for memory")
        hog.kill()
        assert launch.works()


def test_slots_give_way_and_then_templates_the_least_used_first(swap):
    """Launches meanwhile go the long way; when it is over, all is made again that is wanted."""
    for name in ("newer", "older"):
        assert wait_for(lambda name=name: pocket("warm", name) and slots(name) == 1)
    with login("newer", timeout=TIMEOUT) as session:  # it was made first, and is used last
        assert session.call("app:nothing") is None
    assert wait_for(lambda: slots("newer") == 1)
    before = len(journal())
    with stalling(4), rules(wait=600, pressure=100):
        assert wait_for(lambda: len(given_up(before)) == 2, 100), (
            Path("/proc/pressure/memory").read_text() + journal()[before:][-3000:]
        )
        assert (slots("older"), slots("newer")) == (0, 0)
        assert Launch("older").works()
    said = journal()[before:]
    assert given_up(before) == ["older", "newer"]
    assert said.index("slots-gave-way") < said.index("pocket-given-up")
    assert "this host stalls for memory" in said
    for name in ("older", "newer"):
        assert wait_for(lambda name=name: pocket("warm", name) and slots(name) == 1)
        pocket("cool", name)


def given_up(since: int) -> list[str]:
    """The pockets whose templates gave way, in their order."""
    return re.findall(r"pocket-given-up .*\bpocket=(\S+) why=\"?this host", journal()[since:])


def test_a_pocket_that_stalls_at_its_own_limit_costs_no_other_what_it_has(swap):
    """Neither their slots nor their launches' start, though all that the host's pressure says is that it stalls."""
    assert wait_for(lambda: pocket("warm", "kept") and slots("kept") == 1)  # what gave way before is made after a while
    before = len(journal())
    with rules(wait=600, pressure=5):
        pocket("set", "thrashes", "memory.max=60M")  # the rules' reading would take it back
        with Program("thrashes", THRASHES) as program:
            assert program.line() == "ready"
            assert wait_for(lambda: full("avg10") > 10)
            assert wait_for(at_once)
            launch = Launch("thrashes")
            assert launch.waits("most of it this pocket at its own memory.max or memory.high")
            assert full("avg10") > 5
            assert slots("kept") == 1
            assert "slots-gave-way" not in journal()[before:]
            program.signal(signal.SIGKILL)
            assert launch.works()
    assert settled("thrashes")
    pocket("cool", "kept")


def slots(name: str) -> int:
    (found,) = (row["slots"] for row in ps()["pockets"] if row["name"] == name)
    return int(found)


def at_once() -> bool:
    """Whether a launch of another pocket does not wait for memory."""
    said: list[str] = []
    with login("second", timeout=TIMEOUT, progress=said.append) as session:
        assert session.call("app:nothing") is None
    return not any(line.startswith("waiting for memory: ") for line in said)


def full(key: str) -> float:
    """Of the time in which all that could run waited for memory: percent (avg10) or microseconds (total)."""
    text = Path("/proc/pressure/memory").read_text()
    (found,) = re.findall(rf"^full .*\b{key}=([0-9.]+)", text, re.MULTILINE)
    return float(found)


# -- systemd at work


@pytest.fixture
def unwatched():
    """No watchdog ends a pocketd that is stopped now and then, on a machine that is slow already."""
    drop_in = Path("/etc/systemd/system/pocketd.service.d/unwatched.conf")
    drop_in.parent.mkdir(exist_ok=True)
    drop_in.write_text("[Service]\nWatchdogSec=0\n")
    for words in (("daemon-reload",), ("restart", "pocketd.service")):
        systemctl(*words)
    yield
    drop_in.unlink()
    if not list(drop_in.parent.iterdir()):
        drop_in.parent.rmdir()
    for words in (("daemon-reload",), ("restart", "pocketd.service")):
        systemctl(*words)


def test_the_end_of_many_other_jobs_does_not_hide_that_of_ours(unwatched):
    """Each job of systemd's is told to all who wait for one; pocketd, stopped now and then, hears of many at once."""
    Path("/run/systemd/system/noise@.service").write_text("[Service]\nType=oneshot\nExecStart=/bin/true\n")
    main, over = int(show("pocketd.service", "MainPID")), threading.Event()

    def noise() -> None:
        while not over.is_set():
            systemctl("start", *(f"noise@{n}" for n in range(10)))

    def stops() -> None:
        while not over.wait(0.5):
            os.kill(main, signal.SIGSTOP)
            over.wait(0.3)
            os.kill(main, signal.SIGCONT)

    threads = [threading.Thread(target=target) for target in (noise, stops)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            call("off", name="resting")
            call("on", name="resting")
    finally:
        over.set()
        for thread in threads:
            thread.join(TIMEOUT)


# -- clocks


@pytest.fixture
def watchdog():
    """pocketd's watchdog on a short chain, in seconds; a function that waits until it has been fed for that long."""
    interval = 20  # of an emulated machine, which has others beside it
    drop_in = Path("/etc/systemd/system/pocketd.service.d")
    drop_in.mkdir(exist_ok=True)
    (drop_in / "clock.conf").write_text(f"[Service]\nWatchdogSec={interval}\n")
    systemctl("daemon-reload")
    systemctl("restart", "pocketd.service")

    def fed() -> bool:
        end = (time.monotonic() + interval) * 1e6
        return wait_for(lambda: int(show("pocketd.service", "WatchdogTimestampMonotonic")) > end)

    yield fed
    (drop_in / "clock.conf").unlink()
    if not list(drop_in.iterdir()):
        drop_in.rmdir()
    systemctl("daemon-reload")
    systemctl("restart", "pocketd.service")


@pytest.fixture
def clock():
    """A function that moves the clock by some seconds. It is right again at the end."""
    right = time.time() - time.monotonic()

    def move(seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    yield move
    time.clock_settime(time.CLOCK_REALTIME, right + time.monotonic())


def ages() -> list[float]:
    reply = ps()
    return [row["age"] for kind in ("services", "templates", "workers") for row in reply[kind]]


@pytest.mark.slow
def test_clocks_that_jump_end_nothing_and_refuse_nobody(watchdog, clock):
    """A day ahead, then two days back."""
    day = 86400.0
    with Program("sleeper", SLEEPER) as program, login("first", timeout=TIMEOUT) as session:
        assert program.line() == "ready"
        before = {w["session"] for w in ps()["workers"]}
        main = show("pocketd.service", "MainPID")
        for seconds in (day, -2 * day):
            clock(seconds)
            assert session.call("app:nothing") is None
            with rules(
                wait=120, reserve=f"{room() - (60 << 20)}"
            ):  # room for one worker; those that are there have grown
                with login("second", timeout=TIMEOUT) as other:
                    assert other.call("app:nothing") is None
            assert settled("second")
            assert min(ages()) >= 0
            assert not re.search(r"-\d+[smhd]\b", pocket("ps").stdout)
            assert watchdog()
            assert {w["session"] for w in ps()["workers"]} == before
            assert show("pocketd.service", "MainPID") == main
        call("reload", name="plain")  # files of this host are of the future now
        with login("second", timeout=TIMEOUT) as other:
            assert other.call("app:nothing") is None
        program.signal(signal.SIGTERM)
        assert os.waitstatus_to_exitcode(program.end()["status"]) == -signal.SIGTERM


def room() -> int:
    (found,) = re.findall(r"^MemAvailable: +([0-9]+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found) << 10
