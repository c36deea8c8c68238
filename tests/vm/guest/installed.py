"""pocketd as an operator has it: installed under /usr/local, run by systemd, configured in /etc/pocketd."""

from __future__ import annotations

import os
import select
import subprocess
from pathlib import Path
from typing import Any

from nsutil.messages import MessageError
from pocketd import wire
from pocketd.client.control import Control
from pocketd.client.handshake import Login, open_login
from tests.conftest import ROOT, TIMEOUT, wait_for

WHEELS = ROOT / ".cache/vm/wheels"
NEXT = ROOT / ".cache/vm/next"
BIN = Path("/usr/local/bin")
CONFIGURATION = Path("/etc/pocketd/pocketd.conf")
DROP_INS = Path("/etc/pocketd/pocketd.conf.d")
RUNTIME = Path("/run/pocketd")
CGROUPS = Path("/sys/fs/cgroup")
SLICE = CGROUPS / "pocketd.slice"
BASE = """
[service.plain]
runtime = "python"
stop_timeout = 5

[service.programs]
runtime = "exec"
stop_timeout = 5
"""


def run(*command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": TIMEOUT, **options}
    done = subprocess.run(command, **options)
    assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
    return done


def systemctl(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("systemctl", *words, check=check)


def show(unit: str, name: str) -> str:
    return systemctl("show", "-P", name, unit).stdout.strip()


def journal(unit: str = "pocketd.service") -> str:
    run("journalctl", "--sync")
    return run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout


def deploy(goal: str, wheel: Path) -> None:
    """`make install` or `make uninstall`, with no network: from wheels that were made before. An emulated machine takes
    minutes to install pip and to compile all that there is: the checkout's pip does it, without bytecode."""
    environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "EXTRAS": "", "SOURCE": str(wheel)}
    environment |= {"PIP_NO_COMPILE": "1", "PIP": f"{ROOT / '.venv/bin/python'} -m pip"}
    run(ROOT / "deploy/install", goal, env={**os.environ, **environment})


def install(place: Path = WHEELS) -> None:
    (wheel,) = place.glob("pocketd-*.whl")
    deploy("install", wheel)


def configure(name: str, text: str) -> None:
    """A drop-in, in force when this returns."""
    DROP_INS.mkdir(parents=True, exist_ok=True)
    (DROP_INS / f"50-{name}.conf").write_text(text)
    with Control() as control:
        reply = control.call("reload", timeout=TIMEOUT, name=None)
    assert reply["problems"] == [], reply


def call(op: str, **fields: Any) -> dict[str, Any]:
    with Control() as control:
        return control.call(op, timeout=TIMEOUT, **fields)


def ps() -> dict[str, Any]:
    return call("ps")


def pocket(*words: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    return run(BIN / "pocket", *words, check=check, **options)


def cgroup_of(name: str, service: str = "plain") -> Path:
    """The cgroup of a pocket, which has its limits."""
    (found,) = SLICE.glob(f"pocketd-{service}*.scope/service/pockets/{name}")
    return found


class Program:
    """A program in a pocket, as `pocket run` holds it, without the second and a half that starting that costs here."""

    def __init__(self, name: str, code: str, *arguments: str, directory: str | None = None):
        self.read, out = os.pipe()
        inside, self.write = os.pipe()
        environment = {b"PATH": b"/usr/bin:/bin", b"LANG": b"C.UTF-8"}
        start = {
            "kind": "code",
            "program": code.encode(),
            "arguments": [a.encode() for a in arguments],
            "environment": list(environment.items()),
            "directory": (directory or f"/var/lib/vm-scratch/{name}").encode(),
            "umask": 0o22,
            "ignored": [],
            "blocked": [],
            "limits": {},
            "cold": False,
            "stdio": [0, 1, 2],
        }
        try:
            with Control() as control:
                self.login: Login = open_login(
                    control, mode="program", name=name, directory=directory, start=start, fds=[inside, out, out],
                    timeout=TIMEOUT,
                )  # fmt: skip
        finally:
            os.close(inside)
            os.close(out)
        self.said = b""

    def line(self) -> str:
        """Its next line; what there is of it, when no more comes."""
        while b"\n" not in self.said and select.select([self.read], [], [], TIMEOUT)[0]:
            more = os.read(self.read, 65536)
            if not more:
                break
            self.said += more
        line, _, self.said = self.said.partition(b"\n")
        return line.decode()

    def say(self, text: str) -> str:
        """Write a line to it, and read the one it answers with."""
        os.write(self.write, text.encode() + b"\n")
        return self.line()

    def signal(self, number: int) -> None:
        wire.send(self.login.hold, {"op": "signal", "signal": number, "group": False})

    def end(self) -> dict[str, Any]:
        """What its caller is told at its end: {"status": ..., "error": ...}."""
        self.login.hold.settimeout(TIMEOUT)
        try:
            while True:
                message, fds = wire.receive(self.login.hold)
                fds.close()
                if message["op"] == "exit":
                    return message
        except (EOFError, OSError, MessageError) as e:
            return {"error": {"code": "lost", "message": str(e)}}

    def close(self) -> None:
        self.login.session.close()
        self.login.hold.close()
        os.close(self.read)
        os.close(self.write)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def settled(pocket_name: str) -> bool:
    """Wait until no cgroup of a pocket is left."""
    return wait_for(lambda: not list(SLICE.glob(f"*.scope/service/pockets/{pocket_name}")))
