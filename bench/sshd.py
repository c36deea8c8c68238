"""Pocket-ssh, as its authors built it (Park and others, HotEdge 2020): sshd in a service's container that has the
runtime's files, and each app a command by ssh in there. No Docker is needed to measure it: sshd stands in mount and pid
namespaces of its own, with a key made for the run, on a port of loopback.
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import fetched, usage
from bench.fetched import Missing
from bench.launch import ENVIRONMENT, Failed
from bench.started import Started, process
from bench.usage import Used

# In the namespaces: a private /run, and the unprivileged user that sshd has by its Debian package.
_SETUP = """\
mount -t tmpfs tmpfs /run && mkdir /run/sshd && chmod 755 /run/sshd &&
mount --bind {passwd} /etc/passwd && exec {sshd} -D -e -f {config} 2>{log}
"""
_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/host
AuthorizedKeysFile {place}/client.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin yes
MaxStartups 100
"""


class Sshd:
    """A handle to one that is up."""

    def __init__(self, ssh: str, place: Path, port: int, pid: int):
        self.pid = pid  # PID 1 of its namespaces
        self._command = [ssh, "-F", "none", "-p", str(port), "-i", str(place / "client"), "-T", "-q"]
        for option in ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes"):
            self._command += ["-o", option]
        self._command.append("root@127.0.0.1")

    def start(self, directory: Path, program: str, *words: str) -> Started:
        variables = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        remote = ["exec", "env", *variables, sys.executable, str(directory / program), *words]
        command = [*self._command, f"cd {shlex.quote(str(directory))} && {shlex.join(remote)}"]
        return process(command, directory, {**ENVIRONMENT, **fetched.environment()})

    def used(self) -> Used:
        """All that ran in there and has ended."""
        return usage.process(self.pid)

    def settle(self) -> None:
        """Wait until no login is left. Raises Failed."""
        end = time.monotonic() + 30
        while Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text():
            if time.monotonic() > end:
                raise Failed("sshd has logins left after 30 s")
            time.sleep(0.01)


@contextmanager
def sshd(directory: Path) -> Iterator[Sshd]:
    """One that is up, ended afterwards with all that runs in it. Raises Missing."""
    place = directory / "sshd"
    place.mkdir(mode=0o700)
    server, ssh, keygen = (fetched.program(name) for name in ("sshd", "ssh", "ssh-keygen"))
    environment = {**ENVIRONMENT, **fetched.environment()}
    for name in ("host", "client"):
        command = [keygen, "-q", "-t", "ed25519", "-N", "", "-f", str(place / name)]
        subprocess.run(command, env=environment, check=True, stdin=subprocess.DEVNULL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (place / "config").write_text(_CONFIG.format(port=port, place=place))
    users = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith("sshd:")]
    (place / "passwd").write_text("\n".join([*users, "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin", ""]))
    paths = {"passwd": place / "passwd", "config": place / "config", "log": place / "log", "sshd": server}
    setup = _SETUP.format(**{name: shlex.quote(str(path)) for name, path in paths.items()})
    namespaces = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
    process = subprocess.Popen([*namespaces, "sh", "-c", setup], env=environment, stdin=subprocess.DEVNULL)
    try:
        _await(process, port, place / "log")
        (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        yield Sshd(ssh, place, port, int(pid))
    finally:
        process.kill()
        process.wait()


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.02)
    said = log.read_text(errors="replace") if log.exists() else ""
    raise Missing(f"sshd does not come up: {said.strip()}")
