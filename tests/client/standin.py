"""Stands in for pocketd and a service's init in the client's tests: logins only, each a plain fork into the real loop.

usage: standin.py RUNTIME RUNTIME_DIR MODELS(json)

Every login has a parent of its own, which holds the hold socket as init does. Models are loaded in the worker, since a
plain fork cannot carry a framework that has run. Some names make it misbehave as a service can.
"""

import importlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

from pocketd import wire
from runtime import models as loading
from runtime import session


def main() -> None:
    name, directory, models = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    runtime = importlib.import_module(f"runtime.{name}")
    runtime.preload(["numpy"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(os.path.join(directory, "pocketd.sock"))
    listener.listen(16)
    print("ready", flush=True)
    lost = set()
    while True:
        connection, _ = listener.accept()
        try:
            request, fds = wire.receive(connection)
        except EOFError:
            connection.close()
            continue
        with fds, connection:
            if request["name"] == "lost" and request["session"] not in lost:
                lost.add(request["session"])  # as a pocketd that dies before it replies
                continue
            answer(connection, request, dict(zip(request["roles"], fds, strict=True)), runtime, models)


def answer(connection: socket.socket, request: wire.Message, fds: dict, runtime: Any, models: dict) -> None:
    id = request["id"]
    if request["name"] == "missing":
        error = wire.Error("unknown-name", "there is no service or pocket 'missing'; there is python")
        wire.send(connection, {"id": id, "error": error.wire()})
        return
    if request["name"] == "silent":
        import time

        time.sleep(1)
        return
    wire.send(connection, {"id": id, "progress": "starting"})
    said, tell = os.pipe()
    if os.fork() == 0:
        connection.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        init(request, fds, runtime, models, tell)
    os.close(tell)
    pid = int(os.read(said, 16))
    os.close(said)
    reply = {"service": "python", "pocket": None, "models": sorted(models), "pid": pid}
    wire.send(connection, {"id": id, "ok": True, **reply})


def init(request: wire.Message, fds: dict, runtime: Any, models: dict, tell: int) -> None:
    """Parent of one worker: ends it when the hold socket ends, reports how it ended."""
    try:
        hold = socket.socket(fileno=os.dup(fds["hold"]))
        sock = socket.socket(fileno=os.dup(fds["session"]))
        os.closerange(3, min(hold.fileno(), sock.fileno(), tell))
        pid = os.fork()
        if pid == 0:
            os._exit(worker(request, sock, hold, fds, runtime, models))
        sock.close()
        for fd in fds.values():
            if fd not in (hold.fileno(), tell):
                try:
                    os.close(fd)
                except OSError:
                    pass
        os.write(tell, str(pid).encode())
        os.close(tell)
        pidfd = os.pidfd_open(pid)
        ready, _, _ = select.select([pidfd, hold.fileno()], [], [])
        if hold.fileno() in ready:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        report = {"op": "exit", "status": status}
        if request["name"] == "limited":
            report["error"] = wire.Error(
                "memory", "memory.max of 800M was reached", pocket="limited", limit=800 << 20, peak=None
            ).wire()
        wire.send(hold, report)
    except OSError:
        pass
    finally:
        os._exit(0)


def worker(
    request: wire.Message, sock: socket.socket, hold: socket.socket, fds: dict, runtime: Any, models: dict
) -> int:
    hold.close()
    if "dir" in fds:
        os.fchdir(fds["dir"])
    for fd in fds.values():
        try:
            os.close(fd)
        except OSError:
            pass
    start, _ = wire.receive(sock)
    if request["name"] == "broken":
        error = wire.Error("launch", "the pocket's directory cannot be attached")
        wire.send(sock, {"op": "failed", "error": error.wire()})
        return 125
    loaded = {name: loading.load(runtime, name, source) for name, source in models.items()}
    return session.serve(sock, start, runtime, loaded, os.getcwd())


if __name__ == "__main__":
    main()
