"""Processes that keep whoever measures them waiting: pocketd serves others, and says what they have."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketd import wire
from pocketd.client.control import Control
from tests.conftest import Pocketd, service_environment, toml_table, wait_for
from tests.launch import fuse
from tests.launch.test_faults import children
from tests.launch.test_wire_limits import NOBODY, ask, connect

# A page of its file is dirty; once it hears a word it takes the page away, which waits for the file system with the
# lock of its mappings held, and makes others until it waits for that lock.
STUCK = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
page = mmap.mmap(os.open("/silent/file", os.O_RDWR), 4096)
page[0] = 1
address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=libc.munmap, args=(address, 4096)).start()
while True:
    mmap.mmap(-1, 4096)
"""
OTHER = "import sys; print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def daemon(own_pocketd: Any, tmp_path: Path, silent: fuse.Silent, monkeypatch: pytest.MonkeyPatch) -> Pocketd:
    text = f'[service.plain]\nruntime = "python"\nenv = {toml_table(service_environment())}\n'
    for name, program in (("stuck", STUCK), ("other", OTHER)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "app.py").write_text(program)
        text += f'[pocket.{name}]\nservice = "plain"\ndir = "{tmp_path / name}"\nprogram = "app.py"\n'
        text += f'mounts = ["{silent.place}:/silent:rw"]\n' if name == "stuck" else ""
    found: Pocketd = own_pocketd(text)
    (found.runtime_dir / "pocketd.sock").chmod(0o666)
    monkeypatch.chdir(found.runtime_dir)
    return found


@pytest.fixture
def stuck(daemon: Pocketd, silent: fuse.Silent, begun: Callable[..., subprocess.Popen[bytes]]) -> Iterator[None]:
    """Both run, and one of them cannot be measured."""
    for name in ("other", "stuck"):
        process = begun(daemon.command(name), env=daemon.environment, stdin=subprocess.PIPE)
    (pid,) = (w["pid"] for w in daemon.workers() if w["pocket"] == "stuck")
    silent.silence()
    assert process.stdin
    process.stdin.write(b"\n")
    process.stdin.flush()
    try:
        assert wait_for(lambda: not measured(pid))
        yield
    finally:
        silent.end()  # nothing else ends who waits for it


def measured(pid: int) -> bool:
    """Whether the kernel says at once how much memory a process has."""
    try:
        subprocess.run(["cat", f"/proc/{pid}/smaps_rollup"], stdout=subprocess.DEVNULL, timeout=0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_ps_says_what_others_have_and_leaves_nothing(daemon: Pocketd, stuck: None) -> None:
    with Control(str(daemon.runtime_dir)) as control:
        shown = control.call("ps", timeout=10)
    private = {w["pocket"]: w["private"] for w in shown["workers"]}
    assert private["stuck"] is None and private["other"] > 0
    assert shown["templates"][0]["private"] > 0
    assert wait_for(lambda: not children(daemon.process.pid))


def test_nobody_waits_and_who_may_not_see_it_does_not_look(daemon: Pocketd, stuck: None) -> None:
    with connect() as root, connect(NOBODY) as other:
        wire.send(root, {"op": "ps", "id": 1})
        other.settimeout(10)
        assert ask(other, "ps")["workers"] == []
        root.setblocking(False)
        with pytest.raises(BlockingIOError):  # it still looks
            root.recv(1)
        root.settimeout(10)
        assert len(wire.receive(root)[0]["workers"]) == 2
