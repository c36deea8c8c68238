"""What runs for a service itself, init and templates, is root with little of root's power, and leaves nothing shared
that can be written. A service's models are trusted, so this is a second line: docs/security.md."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nsutil import privileges as p
from pocketd.client import login
from runtime.container import KEPT
from tests.conftest import TIMEOUT, Pocketd, bare_environment, toml_table
from tests.escape.attempt import Attempt, outcome
from tests.escape.conftest import IN_THE_VM, copy_program
from tests.escape.test_calls import FILTERED, HARMFUL, MODULES, ROOTS
from tests.escape.test_files import SETS

READ_ONLY = ("EROFS",)
# What templates, or their children before they are confined, do themselves.
_PLACING = (
    "keyctl", "setns", "mount", "bind", "umount", "pivot_root", "open_tree", "move_mount", "sethostname", "unshare",
    "clone", "remount", "process_vm_readv",
)  # fmt: skip
CALLS = {
    name: attempt
    for name, attempt in {**FILTERED, **ROOTS}.items()
    if not name.startswith((*_PLACING, "be uid 0", "ADDR_", "READ_", "mount_setattr", "PTRACE"))
}
FILES = {
    "write /proc/sys": Attempt("files.open_to_write", READ_ONLY, "root", given={"path": "/proc/sys/kernel/hostname"}),
    "write /sys": Attempt("files.open_to_write", READ_ONLY, "root", given={"path": "/sys/class/net/lo/mtu"}),
    **{
        f"a file in {path}": Attempt(
            "files.create_in", READ_ONLY, "host", given={"path": path}, elsewhere={"path": "/tmp"}
        )
        for path in ("/", "/usr", "/etc", "/run/pocketd/lib", "/home")
    },
}
WATCHED = {
    **CALLS,
    **FILES,
    **(MODULES if Path("/proc/modules").exists() else {}),
    **({**HARMFUL, **SETS} if IN_THE_VM else {}),
}
CODE = "import json, trusted; print(json.dumps([trusted.FOUND, trusted.MAPPED, trusted.writable_shared()]))"


@pytest.fixture(scope="module")
def trusting(tmp_path_factory) -> Iterator[Pocketd]:
    """A service whose templates make the attempts, and a pocket that may use its model."""
    place = Path(tempfile.mkdtemp(prefix="trusted-", dir="/var/tmp"))
    place.chmod(0o755)
    made = [sys.executable, "-m", "venv", "--without-pip", str(place / "env")]
    subprocess.run(made, check=True, timeout=TIMEOUT)
    packages = next((place / "env/lib").glob("python*/site-packages"))
    copy_program(packages)
    shutil.copy(packages / "tests/escape/inside/trusted.py", packages)
    asked = [{"attempt": a.name, "given": a.given} for a in WATCHED.values()]
    daemon = Pocketd(
        place,
        f"""
        [service.trusted]
        runtime = "python"
        python = "{place}/env/bin/python"
        preload = ["trusted"]
        models = {{ one = "trusted:model" }}
        env = {toml_table({"ASKED": json.dumps(asked)})}
        """,
    )
    (place / "app").mkdir()
    (place / "app/calls.py").write_text("import trusted\ndef found(): return trusted.FOUND\n")
    daemon.start()
    try:
        daemon.pocket("trusted", "on")
        yield daemon
    finally:
        daemon.close()
        shutil.rmtree(place)


def run(daemon: Pocketd, code: str) -> str:
    return daemon.pocket("run", "--service", "trusted", "-c", code, cwd=daemon.place / "app").stdout


@pytest.fixture(scope="module")
def found(trusting) -> dict[str, dict[str, Any]]:
    """By template, what each attempt came to there."""
    with login("trusted", directory=str(trusting.place / "app"), runtime_dir=str(trusting.runtime_dir)) as session:
        said = session.call("calls:found")
    assert set(said) == {"root", "models"} and run(trusting, "import trusted; print(*trusted.FOUND)") == "root\n"
    return {where: dict(zip(WATCHED, replies, strict=True)) for where, replies in said.items()}


@pytest.mark.parametrize("where", ["root", "models"])
@pytest.mark.parametrize("name", WATCHED)
def test_a_template_cannot(found, through, where, name):
    """Root's own attempt elsewhere gets through."""
    attempt = WATCHED[name]
    assert through(attempt) == attempt.through
    assert outcome(found[where][name]) in attempt.refused


def status(pid: int | str) -> dict[str, str]:
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def capabilities(pid: int | str) -> dict[str, int]:
    said = status(pid)
    return {kind: int(said[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}


def test_init_and_templates_hold_few_capabilities_and_give_none_on(trusting):
    """By the kernel, of each of their threads; a worker's first process, which holds its pid namespace, has none."""
    own = capabilities("self")["Prm"]
    kept = sum(1 << c for c in KEPT) & own
    assert KEPT == {
        *(p.CAP_SYS_ADMIN, p.CAP_NET_ADMIN, p.CAP_SETUID, p.CAP_SETGID, p.CAP_SETPCAP, p.CAP_CHOWN, p.CAP_FOWNER),
        *(p.CAP_MKNOD, p.CAP_DAC_OVERRIDE, p.CAP_KILL, p.CAP_SYS_CHROOT),
    }
    assert kept != own  # root here has more: so the file does say it
    shown = trusting.ps()
    init, templates = shown["services"][0]["pid"], [t["pid"] for t in shown["templates"]]
    assert len(templates) == 2
    for pid in (init, *templates):
        bounding = kept if pid == init else 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            sets = {"Inh": 0, "Prm": kept, "Eff": kept, "Bnd": bounding, "Amb": 0}
            assert capabilities(f"{pid}/task/{task.name}") == sets
            said = status(f"{pid}/task/{task.name}")
            assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
    pauses = [int(n) for n in Path(f"/proc/{init}/task/{init}/children").read_text().split()]
    named = [pid for pid in pauses if status(pid)["Name"] == "pause"]
    assert named and all(set(capabilities(pid).values()) <= {0, kept} for pid in named)
    assert all(capabilities(pid)["Prm"] == capabilities(pid)["Eff"] == 0 for pid in named)


def test_no_writable_shared_mapping_is_left_in_a_template(trusting):
    """Its module made two: what a worker writes there reaches neither the next worker nor the template."""
    _, at_import, left = json.loads(run(trusting, CODE))
    assert (at_import, left) == (2, 0)
    for template in trusting.ps()["templates"]:
        assert "rw-s" not in Path(f"/proc/{template['pid']}/maps").read_text()
    change = "import trusted; print([bytes(m[:6]) for m in trusted.SHARED]); trusted.SHARED[0][:6] = b'writer'; "
    change += "trusted.SHARED[1][:6] = b'writer'; print([bytes(m[:6]) for m in trusted.SHARED])"
    for _ in range(2):
        assert run(trusting, change) == f"{[b'before'] * 2}\n{[b'writer'] * 2}\n"


def test_without_that_what_is_written_there_reaches_others():
    """The same mappings and a plain fork: which is why."""
    code = """
import os, trusted
trusted.share()
if os.fork() == 0:
    for m in trusted.SHARED: m[:6] = b"writer"
    os._exit(0)
os.wait()
print([bytes(m[:6]) for m in trusted.SHARED])
"""
    script = [sys.executable, "-c", "import sys; from tests.escape.inside import trusted; "
              "sys.modules['trusted'] = trusted\n" + code]  # fmt: skip
    done = subprocess.run(script, env=bare_environment(), capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert done.stdout == f"{[b'writer'] * 2}\n"
