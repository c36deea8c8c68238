"""What a worker may do beside a container of podman's, found by the same program (survey.py) inside both: the table in
docs/security.md.

usage, as root, where podman and systemd are, such as in the test VM, which shows the programs of its host (Debian:
apt-get install podman uidmap):

    python -m tests.vm --run 'python -m bench.isolation /run/vm/results/isolation.json'
    python -m bench.isolation --show RESULTS.JSON       print the table

A third run of the program, by an unprivileged user who is confined by nothing, says which calls the kernel itself
refuses: what differs from it is the filter's doing.
"""

from __future__ import annotations

import json
import os
import platform
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.own import OwnPocketd

HERE = Path(__file__).resolve().parent
USER = "nobody"
PYTHON = "/usr/bin/python3"
PLAIN, PODMAN, WORKER = "no container, user nobody", "rootless podman, defaults", "worker"
CONFIG = """
[service.plain]
runtime = "python"

[pocket.surveyed]
service = "plain"
dir = "{place}"
program = "survey.py"
"""


def plain(place: Path) -> str:
    return run([PYTHON, str(place / "survey.py")], user=USER, extra_groups=[], cwd="/")


def podman(place: Path) -> str:
    """A container of an unprivileged user's own, with podman's defaults; its root file system is this host's /usr."""
    name = f"survey-{os.getpid()}"
    run(["useradd", "--create-home", name])
    try:
        for file in ("/etc/subuid", "/etc/subgid"):
            if not any(line.startswith(f"{name}:") for line in Path(file).read_text().splitlines()):
                with open(file, "a") as out:
                    out.write(f"{name}:1000000:65536\n")
        run(["loginctl", "enable-linger", name])
        user = pwd.getpwnam(name)
        root = Path(user.pw_dir) / "rootfs"
        for directory in ("usr", "etc", "proc", "sys", "dev", "tmp", "run"):
            (root / directory).mkdir(parents=True)
        for link in ("bin", "lib", "lib64", "sbin"):
            (root / link).symlink_to(f"usr/{link}")
        shutil.copy(place / "survey.py", root)
        subprocess.run(["chown", "-R", f"{user.pw_uid}:{user.pw_gid}", user.pw_dir], check=True)
        words = ["podman", "run", "--rm", "--network", "none", "-v", "/usr:/usr:ro", "--rootfs", str(root)]
        environment = {
            "HOME": user.pw_dir, "PATH": os.defpath + ":/usr/sbin", "XDG_RUNTIME_DIR": f"/run/user/{user.pw_uid}"
        }  # fmt: skip
        who = {"user": name, "group": user.pw_gid, "extra_groups": [], "cwd": user.pw_dir, "env": environment}
        return run([*words, PYTHON, "/survey.py"], **who)
    finally:
        run(["loginctl", "disable-linger", name])
        subprocess.run(["userdel", "--remove", "--force", name], stderr=subprocess.DEVNULL)


def worker(place: Path) -> str:
    config = place / "pocketd.conf"
    app = place / "app"
    app.mkdir()
    shutil.copy(place / "survey.py", app)
    config.write_text(CONFIG.format(place=app))
    with OwnPocketd(place, config) as pocketd:
        pocketd.turn_on("plain")
        return pocketd.command("surveyed").stdout


def run(command: list[str], **options: Any) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=900, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def table(results: Mapping[str, Any]) -> str:
    """The results as a table of Markdown."""
    found = results["surveys"]
    by = [found[name] for name in (PLAIN, PODMAN, WORKER)]
    rows = [["", PLAIN, PODMAN, WORKER], ["---"] * 4]

    def row(what: str, of: Any) -> None:
        rows.append([what, *(str(of(survey)) for survey in by)])

    row("uid, as the host counts", host_uid)
    row("capabilities it has; that an execve may give", lambda s: f"{bits(s, 'CapEff')}; {bits(s, 'CapBnd')}")
    row("no_new_privs", lambda s: "yes" if s["status"]["NoNewPrivs"] == "1" else "no")
    row("setuid programs that would count", lambda s: s["setuid"])
    row("namespaces of its own", lambda s: own_namespaces(s, found[PLAIN]))
    row(f"system calls refused that it may make unconfined, of {len(by[0]['calls'])}", lambda s: len(refused(s, by[0])))
    row("- of these refused by the one and not by the other", lambda s: named(others(s, by, results["names"])))
    row("files of /proc/sys that it may write", lambda s: s["sysctls"])
    row("paths of the kernel it can read or write", lambda s: ", ".join(open_paths(s)) or "none")
    row("directories it may write in", lambda s: ", ".join(s["writable"]) or "none")
    row("unix sockets that take its connection: by path", lambda s: ", ".join(s["sockets"]) or "none")
    row("abstract unix sockets it sees", lambda s: s["abstract"])
    row("network interfaces", lambda s: ", ".join(s["interfaces"]))
    row("files in /dev", lambda s: len(s["devices"]))
    row("processes it sees", lambda s: s["processes"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def host_uid(survey: Mapping[str, Any]) -> int:
    uid = int(survey["status"]["Uid"].split()[0])
    for inside, outside, count in survey["uid_map"]:
        if int(inside) <= uid < int(inside) + int(count):
            return int(outside) + uid - int(inside)
    return uid


def bits(survey: Mapping[str, Any], field: str) -> int:
    return int(survey["status"][field], 16).bit_count()


def own_namespaces(survey: Mapping[str, Any], host: Mapping[str, Any]) -> str:
    own = [
        kind for kind, link in survey["namespaces"].items() if link != host["namespaces"][kind] and "_for_" not in kind
    ]
    return ", ".join(own) or "none"


def refused(survey: Mapping[str, Any], unconfined: Mapping[str, Any]) -> set[str]:
    """The calls that end in EPERM or ENOSYS here and otherwise where nothing is filtered."""
    return {
        number
        for number, ended in survey["calls"].items()
        if ended in ("EPERM", "ENOSYS", "EACCES", "EAFNOSUPPORT") and unconfined["calls"][number] != ended
    }


def others(survey: Mapping[str, Any], by: list[Any], names: Mapping[str, str]) -> list[str]:
    _, container, pocket = by
    if survey is container:
        only = refused(container, by[0]) - refused(pocket, by[0])
    elif survey is pocket:
        only = refused(pocket, by[0]) - refused(container, by[0])
    else:
        only = set()
    return sorted(names.get(number, number) for number in only)


def named(calls: list[str]) -> str:
    return ", ".join(calls) or "none"


def open_paths(survey: Mapping[str, Any]) -> list[str]:
    return [f"{path} ({state})" for path, state in survey["paths"].items() if state in ("readable", "writable")]


def call_names(count: int) -> dict[str, str]:
    import pyseccomp

    names = {}
    for number in range(count):
        try:
            names[str(number)] = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number).decode()
        except ValueError:
            pass  # newer than libseccomp
    return names


def main() -> None:
    if sys.argv[1:2] == ["--show"]:
        print(table(json.loads(Path(sys.argv[2]).read_text())))
        return
    missing = [name for name in ("podman", "newuidmap") if shutil.which(name) is None]
    if missing:
        sys.exit(f"bench.isolation: {', '.join(missing)}: not installed; on Debian: apt-get install podman uidmap")
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results/isolation.json"
    with tempfile.TemporaryDirectory(prefix="isolation-") as directory:
        place = Path(directory)
        place.chmod(0o755)
        shutil.copy(HERE / "survey.py", place)
        surveys = {}
        for name, how in ((PLAIN, plain), (PODMAN, podman), (WORKER, worker)):
            print(f"{name} ...", file=sys.stderr)
            surveys[name] = json.loads(how(place))
    version = subprocess.run(["podman", "--version"], capture_output=True, text=True).stdout.strip()
    results = {
        "surveys": surveys,
        "names": call_names(600),
        "machine": {"kernel": platform.release(), "podman": version, "machine": platform.machine()},
    }
    out.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
