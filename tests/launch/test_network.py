"""A pocket's network: loopback of its own and nothing else, unless its definition allows the host's."""

from __future__ import annotations

import os
import socket
import subprocess

from pyroute2 import IPRoute, netns

from tests.conftest import TIMEOUT, service_environment, toml_table

HOLD = "import os, sys; print('ready', flush=True); sys.stdin.read()"


def links(pid: int) -> dict[str, str]:
    """The interfaces of a process's network namespace, by netlink from inside it: name -> state flag."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        netns.setns(f"/proc/{pid}/ns/net", flags=0)
        with IPRoute() as route:
            return {link.get("ifname"): "up" if link["flags"] & 1 else "down" for link in route.get_links()}
    finally:
        netns.setns(own)
        os.close(own)


def test_a_pocket_has_loopback_alone(pocketd, tmp_path, begun):
    command = pocketd.command("run", "--service", "plain", "-c", HOLD)
    process = begun(command, env=pocketd.environment, cwd=tmp_path, stdin=subprocess.PIPE)
    (pid,) = [w["pid"] for w in pocketd.workers()]
    found = links(pid)
    assert found.pop("lo") == "up"
    # The kernel itself makes its fallback tunnels in every namespace, down.
    assert all(state == "down" for state in found.values()), found
    assert os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
    process.communicate(timeout=TIMEOUT)


def test_the_hosts_network_is_a_right(own_pocketd, tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (app / "connect.py").write_text(
            f"import socket\ntry: socket.create_connection(('127.0.0.1', {port})).close(); print('reached')\n"
            "except OSError as e: print(e.strerror)\n"
        )
        daemon = own_pocketd(f"""
            [service.plain]
            runtime = "python"
            env = {toml_table(service_environment())}
            [pocket.inside]
            service = "plain"
            dir = "{app}"
            program = "connect.py"
            [pocket.outside]
            service = "plain"
            dir = "{app}"
            program = "connect.py"
            allow = {{ network = "host" }}
        """)
        assert daemon.pocket("inside").stdout == "Connection refused\n"
        assert daemon.pocket("outside").stdout == "reached\n"
