"""Pockets that run at once share nothing that either could see."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT, service_environment, toml_table
from tests.launch.both import Both, read_line

TEN = 10


@pytest.fixture
def ten(pocketd, tmp_path, begun):
    """A function that starts a program in ten pockets, each with a directory of its own, held at its first line."""

    def start(program, service="plain", words=lambda n: (), env=lambda n: {}):
        found = []
        for n in range(TEN):
            both = Both(pocketd, tmp_path / f"pocket-{n}", service)
            both.write("app.py", program)
            command = both.pocket_command("app.py", *words(n))
            found.append(begun(command, env=both.environment(env(n)), cwd=both.place, stdin=subprocess.PIPE))
        return found

    return start


def say(process, text=b"\n"):
    process.stdin.write(text)
    process.stdin.flush()


def leaf_of(pocketd, directory):
    worker = next(w for w in pocketd.workers() if w["directory"] == str(directory))
    return next(pocketd.cgroup_path.glob(f"*/service/pockets/*/{worker['session']}")), worker


WORK = """
    import sys, time
    print("ready", flush=True); sys.stdin.readline()
    begun, cpu = time.monotonic(), time.process_time()
    while time.process_time() - cpu < 0.3: sum(range(1000))
    print(begun, time.monotonic(), flush=True); sys.stdin.readline()
"""


def test_ten_compute_at_once_each_charged_to_its_own_cgroup(pocketd, ten, tmp_path):
    processes = ten(WORK)
    leaves = [leaf_of(pocketd, tmp_path / f"pocket-{n}")[0] for n in range(TEN)]
    assert len(set(leaves)) == TEN
    before = [usage(leaf) for leaf in leaves]
    for p in processes:
        say(p)
    spans = [tuple(map(float, read_line(p.stdout.fileno()).split())) for p in processes]
    assert max(begin for begin, _ in spans) < min(end for _, end in spans), spans  # all ten at the same time
    for leaf, was in zip(leaves, before, strict=True):
        assert 300_000 <= usage(leaf) - was < 1_000_000, leaf
    for p in processes:
        say(p)
        assert p.wait(TIMEOUT) == 0


def usage(leaf):
    for line in (leaf / "cpu.stat").read_text().splitlines():
        if line.startswith("usage_usec "):
            return int(line.split()[1])
    raise AssertionError(f"no usage_usec in {leaf}/cpu.stat")


LOOK = """
    import ctypes, glob, json, mmap, os, socket, sys, tempfile
    from multiprocessing import resource_tracker, shared_memory
    me = sys.argv[1]
    open("mine", "w").write(me); open("/tmp/mine-" + me, "w").close()
    open(os.path.expanduser("~/mine-" + me), "w").close()
    fd = os.open("/dev/shm/mine-" + me, os.O_CREAT | os.O_RDWR); os.write(fd, me.encode())
    abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0of-pocket"); abstract.listen()
    named = socket.socket(socket.AF_UNIX); named.bind("/tmp/socket")
    tcp = socket.socket(); tcp.bind(("127.0.0.1", 47474)); tcp.listen()
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0x1234, 4096, 0o1600 | 0o666)
    queue = libc.msgget(0x1234, 0o1666)
    semaphore = libc.semget(0x1234, 1, 0o1666)
    print("ready", flush=True); sys.stdin.readline()
    seen = {
        "pids": sorted(int(p) for p in os.listdir("/proc") if p.isdigit()),
        "tmp": sorted(n for n in os.listdir("/tmp") if n.startswith("mine-")),
        "shm": os.listdir("/dev/shm"),
        "home": sorted(n for n in os.listdir(os.path.expanduser("~")) if n.startswith("mine-")),
        "beside": sorted(n for n in os.listdir("..")),
        "sockets": sum("of-pocket" in line for line in open("/proc/net/unix")),
        "ipc": [len(open("/proc/sysvipc/" + k).readlines()) - 1 for k in ("shm", "msg", "sem")],
        "mine": open("mine").read(),
        "hostname": os.uname().nodename,
        "cgroup": open("/proc/self/cgroup").read().splitlines()[-1],
        "namespaces": {n: os.readlink("/proc/self/ns/" + n) for n in os.listdir("/proc/self/ns")},
        "mounts": [line.split()[4] for line in open("/proc/self/mountinfo")],
        "pts": os.listdir("/dev/pts"),
        "made": [segment >= 0, queue >= 0, semaphore >= 0],
    }
    print(json.dumps(seen), flush=True); sys.stdin.readline()
"""


def test_none_sees_anothers_files_processes_or_shared_memory(pocketd, ten, tmp_path):
    processes = ten(LOOK, words=lambda n: [f"number-{n}"])
    for p in processes:
        say(p)
    found = [json.loads(read_line(p.stdout.fileno())) for p in processes]
    for n, seen in enumerate(found):
        assert seen["made"] == [True] * 3  # else it would show nothing
        assert seen["pids"] == [1, 2]
        assert seen["tmp"] == seen["home"] == [f"mine-number-{n}"]
        assert seen["shm"] == [f"mine-number-{n}"]
        assert seen["beside"] == [f"pocket-{n}"]
        assert (seen["sockets"], seen["ipc"], seen["mine"]) == (1, [1, 1, 1], f"number-{n}")
        assert seen["pts"] == ["ptmx"]
        assert not any(f"pocket-{other}" in m for m in seen["mounts"] for other in range(TEN) if other != n)
        assert seen["cgroup"] == "0::/"
    for kind in ("mnt", "pid", "ipc", "uts", "net", "cgroup"):
        assert len({seen["namespaces"][kind] for seen in found}) == TEN, kind
    assert len({seen["hostname"] for seen in found}) == TEN
    uids = {leaf_of(pocketd, tmp_path / f"pocket-{n}")[1]["pid"] for n in range(TEN)}
    assert len({Path(f"/proc/{pid}").stat().st_uid for pid in uids}) == TEN
    for p in processes:
        say(p)
        assert p.wait(TIMEOUT) == 0


ATTACK = """
    import os, signal, sys
    print("ready", flush=True); sys.stdin.readline()
    done = []
    for pid in [*range(3, 400), *map(int, sys.argv[1:]), -1]:
        if pid == os.getpid(): continue
        try: os.kill(pid, 0 if pid == -1 else signal.SIGKILL); done.append(pid)
        except OSError: pass
    try: os.kill(1, signal.SIGKILL)
    except OSError: pass
    for pid in [1, *map(int, sys.argv[1:])]:
        for name in ("mem", "root/etc/passwd", "environ", "fd/0", "cwd/app.py"):
            try: open(f"/proc/{pid}/{name}", "rb").read(1); done.append((pid, name))
            except OSError: pass
    print(done, flush=True); sys.stdin.readline()
"""


def test_none_reaches_anothers_processes_by_any_pid(pocketd, ten, tmp_path):
    processes = ten(ATTACK)
    workers = {w["directory"]: w for w in pocketd.workers() if w["directory"].startswith(str(tmp_path))}
    assert len(workers) == TEN
    for p in processes:
        say(p)
    for p in processes:
        assert read_line(p.stdout.fileno()) == b"[]\n"
    for worker in workers.values():
        assert Path(f"/proc/{worker['pid']}").exists()
    for p in processes:
        say(p)
        assert p.wait(TIMEOUT) == 0


# Looks through all memory of its own that can be read. What it looks for is put together only here.
SCAN = """
    import os, sys
    wanted = b"-".join([b"marker", b"of", b"another"])
    sys.stdin.readline() if "wait" in sys.argv else None
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            place, mode, *rest = line.split()
            if "r" not in mode or rest[-1] in ("[vvar]", "[vsyscall]", "[vvar_vclock]"): continue
            start, end = (int(n, 16) for n in place.split("-"))
            at = start
            while at < end:
                memory.seek(at)
                try: data = memory.read(min(end - at, 1 << 22))
                except OSError: break
                if not data: break
                # our own constants are the only ones that may be found: they stand alone, not followed by a number
                i = data.find(wanted)
                while i >= 0:
                    found += data[i + len(wanted):i + len(wanted) + 1] == b":"
                    i = data.find(wanted, i + 1)
                at += len(data)
    print("found", found)
"""


@pytest.mark.parametrize("service", ["plain", "tensorflow"])
def test_none_finds_anothers_argument_environment_or_input_in_its_memory(pocketd, tmp_path, begun, service):
    """Neither of launches before it nor of those that run beside it. The same look finds its own."""
    secret = "marker-of-" + "another:{}"
    holder = Both(pocketd, tmp_path / "holder", service)
    holder.write("app.py", "import sys; text = sys.stdin.readline(); print('ready', flush=True); sys.stdin.readline()")
    beside = []
    for n in range(3):
        mine = secret.format(n)
        holder.pocket("-c", "import sys; sys.stdin.read()", mine, env={"SECRET": mine}, input=mine.encode())
    for n in range(2):
        process = subprocess.Popen(
            holder.pocket_command("app.py", secret.format(n)),
            env=holder.environment({"SECRET": secret.format(n)}),
            cwd=holder.place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        beside.append(process)
        say(process, secret.format(n).encode() + b"\n")
        assert read_line(process.stdout.fileno()) == b"ready\n"
    looker = Both(pocketd, tmp_path / "looker", service)
    looker.write("app.py", SCAN)
    ended = looker.pocket("app.py")
    assert (ended.status, ended.out) == (0, b"found 0\n"), ended.shown()
    own = looker.pocket("app.py", secret.format("mine"))
    assert own.status == 0 and own.out != b"found 0\n", own.shown()  # so it would have found it
    for process in beside:
        process.communicate(b"\n", timeout=TIMEOUT)


def test_a_template_never_holds_what_a_caller_sent(pocketd, both):
    """All memory of init and templates, looked through from outside."""
    secret = b"secret-of-" + b"a-caller-%d" % time.monotonic_ns()
    both.write("app.py", "import sys; sys.stdin.read()")
    for _ in range(3):
        assert both.pocket("app.py", secret, env={"SECRET": secret.decode()}, input=secret).status == 0
    pids = [t["pid"] for t in pocketd.ps()["templates"]] + [s["pid"] for s in pocketd.ps()["services"] if s["pid"]]
    assert pids
    for pid in [*pids, pocketd.process.pid]:
        assert not holds(pid, secret), pid
    assert holds(os.getpid(), secret)


def holds(pid, wanted):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps.read().splitlines():
            place, mode, *rest = line.split()
            if "r" not in mode or rest[-1].startswith("[v") or ("w" not in mode and rest[-1].startswith("/")):
                continue
            at, end = (int(n, 16) for n in place.split("-"))
            before = b""
            while at < end:
                memory.seek(at)
                try:
                    data = memory.read(min(end - at, 1 << 22))
                except OSError:
                    break
                if not data or wanted in before[-100:] + data:
                    if data:
                        return True
                    break
                before, at = data, at + len(data)
    return False


def test_a_pocket_has_no_network(both):
    both.write(
        "app.py",
        """
        import socket
        print([name for _, name in socket.if_nameindex()])
        s = socket.socket(); s.bind(("127.0.0.1", 0)); s.listen()
        socket.create_connection(s.getsockname()); print("lo")
        for family, address in ((socket.AF_INET, ("192.0.2.1", 80)), (socket.AF_INET6, ("2001:db8::1", 80))):
            try: socket.socket(family).connect(address); print("connected")
            except OSError as e: print(e.errno)
        """,
    )
    assert both.pocket("app.py").out == b"['lo']\nlo\n101\n101\n"  # ENETUNREACH


def test_a_file_of_anothers_cannot_be_named(pocketd, tmp_path):
    one, other = Both(pocketd, tmp_path / "one"), Both(pocketd, tmp_path / "other")
    other.write("secret", "secret")
    one.write("app.py", f"import os; print(os.path.exists('{other.place}/secret'), os.path.exists('../other'))")
    (one.place / "link").symlink_to("../other/secret")
    assert one.pocket("app.py").out == b"False False\n"
    one.write("app.py", "open('link')")
    assert b"FileNotFoundError" in one.pocket("app.py").err


ESCAPES = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    def attempt(name, *args):
        r = getattr(libc, name)(*args)
        print(name, "done" if r >= 0 else "refused")
    attempt("mount", b"none", b"/tmp", b"tmpfs", 0, None)
    attempt("umount2", b"/tmp", 2)
    attempt("unshare", 0x20000)
    attempt("chroot", b"/tmp")
    attempt("sethostname", b"x", 1)
    attempt("setuid", 0)
    attempt("setgid", 0)
    attempt("ptrace", 16, 1, None, None)
    attempt("kill", 1, 9)
    for path in ("/proc/1/ns/mnt", "/proc/1/root", "/proc/1/cwd"):
        try: os.listdir(path) if path.endswith("root") else os.open(path, os.O_RDONLY); print(path, "done")
        except OSError: print(path, "refused")
    try: os.mknod("device", 0o20666, os.makedev(1, 3)); print("mknod done")
    except OSError: print("mknod refused")
"""


def test_ways_out_are_closed(both):
    both.write("app.py", ESCAPES)
    ended = both.pocket("app.py")
    lines = ended.out.decode().splitlines()
    assert ended.status == 0 and len(lines) == 13, ended.shown()
    assert [line for line in lines if not line.endswith("refused")] == []


def test_nothing_is_mounted_on_a_shared_file_system(own_pocketd, tmp_path, begun):
    """Under systemd every mount of the host is shared: what a worker mounts must not appear there, nor in others."""
    shared = tmp_path / "shared"
    (shared / "app/out").mkdir(parents=True)
    (shared / "app/app.py").write_text("import sys; print('ready', flush=True); sys.stdin.read()")
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    try:
        subprocess.run(["mount", "--make-shared", shared], check=True)
        before = Path("/proc/self/mountinfo").read_text()
        daemon = own_pocketd(f"""
            [service.plain]
            runtime = "python"
            env = {toml_table(service_environment())}
            [pocket.app]
            service = "plain"
            dir = "{shared}/app"
            program = "app.py"
            mounts = ["{shared}:/shown:rw"]
            allow = {{ write = ["out"] }}
        """)
        words = {"env": daemon.environment, "stdin": subprocess.PIPE}
        running = [begun(daemon.command("app"), **words) for _ in range(6)]
        assert Path("/proc/self/mountinfo").read_text() == before
        counts = {len(Path(f"/proc/{w['pid']}/mountinfo").read_text().splitlines()) for w in daemon.workers()}
        assert len(counts) == 1
        for process in running:
            process.kill()
            process.wait()
        assert daemon.settled()
        assert Path("/proc/self/mountinfo").read_text() == before
    finally:
        subprocess.run(["umount", "--recursive", shared], check=True)
