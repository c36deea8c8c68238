"""A worker's steps, from its birth in a template to the first line of app code.

It is born with one thread, all signals blocked, in its leaf cgroup and pid namespace. It takes its place (namespaces,
mounts), gives up every privilege, and only then reads what the caller sent, lets the template's other threads come
back and runs the app. Whatever fails before that line is said on the session's socket, and the process ends with 125.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
from typing import Any, List, NoReturn, Optional, Sequence, Tuple

from nsutil import clone, memory, mounts, namespaces, privileges, processes
from nsutil.beneath import open_as_named
from nsutil.messages import MessageError
from pocketd import wire
from pocketd.wire import Error, Message
from runtime import checkpointed, cold, interpreter, observed, preloaded, program, randomness, session, slot, threads
from runtime.confinement import EMPTY, confine, homes_of, is_way_out
from runtime.trace import Trace

ORDERS = 1 << 20  # bytes, at most
CREDENTIALS = 1 << 20  # bytes, all together (systemd.exec(5), LoadCredential=); as much again for names and pages
FAILED = 125  # pocketd's own failure, as podman's


def run(
    template: Any,
    session_fd: int,
    orders: int,
    handed: List[int],
    joins: Tuple[int, int],
    trace: Trace,
) -> NoReturn:
    """Become the worker of one session.

    `orders` is pocketd's word in a sealed memfd (launch._orders); `handed`: the output pipe in client mode, the file
    trees, the credentials, the network; `joins`: its pause, and which namespaces of that one are made for it.
    """
    code = FAILED
    sock = socket.socket(fileno=session_fd)  # one it is: init has looked
    try:
        os.setsid()
        processes.close_others({session_fd, orders, joins[0], *handed, *template.reopen})
        namespaces.setns(*joins)
        os.close(joins[0])
        message = wire.unpack(memory.read_sealed(orders, ORDERS))
        os.close(orders)
        clone.renew(template.reopen)
        output = handed.pop(0) if message["mode"] in ("client", "hold") else -1
        if message["network"] == "host":
            namespaces.setns(handed.pop(), namespaces.CLONE_NEWNET)
        secrets = handed.pop() if message.get("credentials") else None
        hold = message.get("hold")
        cgroup = handed.pop() if hold else -1
        trace.mark("it has read its orders, and only its own descriptors")
        settle(message, handed, secrets, template)
        trace.mark("its mounts")
        if hold:
            enter(cgroup)
            printed = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdout", "stderr")]
            hold["shown"] = lay_over(message, sock, printed)
        confine(message, hold["filters"] if hold else template.begin.get("filters", ()))
        if hold:
            for fd in hold["shown"]:
                os.close(fd)
            privileges.dumpable(True)
            revive(message.get("pids_max"))
            randomness.renew()
            fit(template, message)
            interpreter.begin()
            kind = preloaded.Preloaded if "preload" in hold else checkpointed.Checkpointed
            held = kind(template, sock, message, output, printed)
            interpreter.finish(held.run(), full=message["exit"] == "full", last=held.report)
        trace.mark("its privileges are gone")
        waited = message.get("slot") is True
        if waited:
            revive(message.get("pids_max"))
            randomness.renew()
            fit(template, message)
            interpreter.begin()
            if message["mode"] == "client":
                template.pages.make()
            interpreter.touch(interpreter.set_streams)
            if message.get("program"):
                touch(template, message["program"])
            own, sock = sock, slot.wait(sock, trace)
            wire.send(own, {"op": "taken"})
            own.close()
        start, fds = wire.receive(sock)
        trace.mark("it has its caller's start")
        if start.get("mode") != message["mode"]:
            raise Error("bad-request", f"the login was for mode {message['mode']}, the start message is for another")
        given = fds.rest()
        sock = take_listening(start, given, sock, template.reopen)
        take_stdio(start, given, output)
        interpreter.adopt(start)
        threads.hint(message.get("threads"))
        trace.mark("environment, directory, streams are its caller's")
        difference = "" if message.get("cold") else cold.reason(template.runtime, template.begin, start)
        if difference is not None:
            if start.get("observe") is True:
                observed.run_cold(sock, difference)
            sock.close()
            trace.mark("it becomes a process of its own, which imports everything")
            trace.print(start.get("trace"))
            cold.run(template.begin, start, difference)
        privileges.dumpable(True)
        if not waited:
            revive(message.get("pids_max"))
            randomness.renew()
            fit(template, message)
            interpreter.begin()
        trace.mark("threads, random state, modules")
        trace.print(start.get("trace"))
        if message["mode"] == "client":
            processes.set_command_line([b"pocketd: worker of", message["hostname"].encode()])
            code = session.serve(sock, start, template.runtime, template.models, message["directory"], message)
        elif start.get("observe") is True:
            code = observed.run(sock, start, message)
        else:
            sock.close()
            code = program.run(start, message)
        interpreter.finish(code, full=message["exit"] == "full")
    except KeyboardInterrupt:
        interpreter.die_by(signal.SIGINT)
    except (EOFError, MessageError):
        pass  # the caller went before it said what to run
    except BaseException as e:
        tell(sock, e)
    os._exit(code)


def touch(template: Any, path: str) -> None:
    """In a slot: go through what is done with a start that names the program at `path`, which is most likely."""
    is_way_out(2)
    cold.reason(template.runtime, template.begin, {"mode": "program", "kind": "file", "program": os.fsencode(path)})
    program.prepare(path)


def fit(template: Any, message: Message) -> None:
    """Libraries compute with as many threads as the pocket's limits allow processors."""
    if message.get("threads"):
        threads.limit(message["threads"], template.pools)


def prepare_to_hold(ancestors: Tuple[int, ...]) -> int:
    """A pocket's template forks by itself, when it may do nothing any more: its children's pids shall begin above those
    of all templates that they descend from. Returns /proc/sys as it can be written now, for `confinement.seal_off`."""
    sysctl = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    fd = os.open("kernel/ns_last_pid", os.O_WRONLY | os.O_CLOEXEC, dir_fd=sysctl)
    os.write(fd, str(max(*ancestors, os.getpid())).encode())
    os.close(fd)
    return sysctl


def enter(cgroup: int) -> None:
    """Move to a leaf of its own beneath the cgroup that it was born in, at which its cgroup namespace is rooted by now:
    it forks into that one's other children. Takes over `cgroup`."""
    fd = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=cgroup)
    os.write(fd, b"0")
    os.close(fd)
    os.close(cgroup)


BESIDES = 2  # runs of the sample after those before the rehearsal: it itself, and one that shows what it left


def lay_over(message: Message, sock: socket.socket, printed: List[int]) -> List[int]:
    """Cover what a pocket's template may write with layers that take what is written, one for each run of its sample,
    and hand them to init, which takes them off one by one; and the files into which it prints. Returns descriptors of
    all that is or will be there."""
    shown: List[int] = []
    layers: List[List[int]] = []
    places = [p for p in message["mounts"] if p["writable"]] if message["hold"]["trials"] else []
    count = message["hold"]["trials"] + BESIDES if places else 0
    if places:
        mounts.tmpfs(EMPTY, size=message["tmp"])
        for number in range(count):
            layers.append([])
            for n, place in enumerate(places):
                if not number:
                    shown.append(open_as_named(place["target"], os.O_PATH))
                scratch = f"{EMPTY}/{number}-{n}"
                os.mkdir(scratch)
                mounts.overlay(place["target"], shown[n], scratch)
                layers[-1].append(open_as_named(place["target"], os.O_PATH | os.O_DIRECTORY))
                if place.get("alias"):
                    copy = mounts.open_tree("", at=layers[-1][-1])
                    mounts.attach_as_named(copy, place["alias"])
                    os.close(copy)
                    layers[-1].append(open_as_named(place["alias"], os.O_PATH | os.O_DIRECTORY))
        mounts.unmount(EMPTY)
    wire.send(sock, {"op": "printed"}, printed)
    for layer in layers:
        wire.send(sock, {"op": "layer"}, layer)
    namespace = os.open("ns/mnt", os.O_RDONLY | os.O_CLOEXEC, dir_fd=message["self"])
    wire.send(sock, {"op": "namespace"}, [namespace])
    os.close(namespace)
    return [*shown, *(fd for layer in layers for fd in layer)]


def revive(pids_max: Optional[str]) -> None:
    """Let the template's other threads come back. Where the pocket's limit leaves them no room, it is named: a worker
    cannot see the cgroups above its own."""
    try:
        clone.revive()
    except clone.CloneError as e:
        if e.errno != errno.EAGAIN or pids_max is None:
            raise
        text = f"pids.max of {pids_max} is too small, for pids.max counts threads: {e.strerror}"
        raise Error("limit", text, limit=int(pids_max)) from None


def tell(sock: socket.socket, e: BaseException) -> None:
    """Say on the session's socket why there will be no first line."""
    error = e if isinstance(e, Error) else Error("launch", f"{type(e).__name__}: {e}")
    try:
        wire.send(sock, {"op": "failed", "error": error.wire()}, flags=socket.MSG_DONTWAIT)
    except OSError:
        os.write(2, f"pocket: {error.message}\n".encode())


def settle(message: Message, trees: List[int], secrets: Optional[int], template: Any) -> None:
    """Take a place of one's own: cgroup namespace, host name, network, and the pocket's view of files."""
    namespaces.unshare(namespaces.CLONE_NEWCGROUP)
    namespaces.set_hostname(message["hostname"])
    if message["network"] == "none":
        namespaces.loopback_up()
    m = mounts
    made: List[str] = []
    owner = message["uid"], message["gid"]
    homes, places = homes_of(message), message["mounts"]
    if not all(os.path.lexists("/" + path.split("/")[1]) for path in (*homes, *(p["target"] for p in places))):
        m.writable_root(made, owner)
    m.mount("proc", "/proc", "proc", m.MS_NOSUID | m.MS_NODEV | m.MS_NOEXEC)
    # Where others' trees are, a path is no proof that this is the kernel's: what root writes there goes by this.
    message["self"] = os.open("/proc/self", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if "hold" in message:
        message["hold"]["sysctl"] = prepare_to_hold(template.ancestors)
    template.masks.apply()
    m.cover("/tmp", size=message["tmp"], mode=0o1777)
    m.tmpfs("/dev/shm", size=message["shm"], mode=0o1777)
    m.mount("mqueue", "/dev/mqueue", "mqueue", m.MS_NOSUID | m.MS_NODEV | m.MS_NOEXEC)
    m.mount("devpts", "/dev/pts", "devpts", m.MS_NOSUID | m.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,max=256")
    for home in homes:
        if not os.path.isdir(home):
            make_point(home, True, made, owner)
        m.cover(home, size=message["tmp"], mode=0o700)
        os.chown(home, message["uid"], message["gid"])
    if secrets is not None:
        show_credentials(secrets, message, made)
    if message.get("devices"):
        add_devices(message, made)
    # From the first tree on, what a path leads to is others' to decide, and may be a directory of the host's: nothing
    # is made there by root.
    privileges.leave_groups()
    with privileges.filing_as(*owner):
        for tree, place in sorted(zip(trees, places), key=lambda pair: len(pair[1]["target"])):
            try:
                attach(tree, place, made, owner)
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise
                text = f"{place['target']} cannot be shown: a part of it is a symbolic link; name what that leads to"
                raise Error("mount", text) from None
    m.seal(made)


def attach(tree: int, place: Message, made: List[str], owner: Tuple[int, int]) -> None:
    """Attach one tree at its target, and at its alias; descriptors are closed, since they lead out of here."""
    target = place["target"]
    if not os.path.lexists(target):
        make_point(target, place["directory"], made, owner)
    mounts.attach_as_named(tree, target)
    if place.get("alias"):
        copy = mounts.open_tree("", at=tree)
        mounts.attach_as_named(copy, place["alias"])
        os.close(copy)
    os.close(tree)


def make_point(target: str, directory: bool, made: List[str], owner: Tuple[int, int]) -> None:
    """Make a mount point; where that is not permitted, in a tmpfs over what is there."""
    like = "/" if directory else "/dev/null"
    try:
        mounts.point(target, like)
    except OSError:
        mounts.make_room(target, made, owner, EMPTY)
        mounts.point(target, like)


def add_devices(message: Message, made: List[str]) -> None:
    """Device files of the worker's own, on a /dev of its own: the service's is every worker's."""
    mounts.cover("/dev", size=1 << 16, flags=mounts.MS_NOSUID | mounts.MS_NOEXEC)
    made.append("/dev")
    for device in message["devices"]:
        path = device["path"]
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(path):
            os.mknod(path, device["kind"] | 0o600, device["number"])
            os.chown(path, message["uid"], message["gid"])


def show_credentials(fd: int, message: Message, made: List[str]) -> None:
    """Credentials as systemd shows them: a small read-only file system of the worker's own, not swapped where the
    kernel can help it (noswap: Linux 6.4). Takes over `fd`, a memfd made by the caller (pocketd.command.supervised)."""
    files = wire.field(wire.unpack(memory.read_sealed(fd, 2 * CREDENTIALS)), "files", dict)
    os.close(fd)
    target = message["credentials"]
    make_point(target, True, made, (message["uid"], message["gid"]))
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
    try:
        mounts.mount("tmpfs", target, "tmpfs", flags, f"size={2 * CREDENTIALS},mode=700,noswap")
    except OSError:
        mounts.tmpfs(target, size=2 * CREDENTIALS, mode=0o700, flags=flags)
    for name, content in files.items():
        if "/" in name or name in ("", ".", "..") or type(content) is not bytes:
            raise Error("bad-request", f"{name!r} is no credential")
        out = os.open(f"{target}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o400)
        os.fchown(out, message["uid"], message["gid"])
        with open(out, "wb", buffering=0) as file:
            file.write(content)
    os.chown(target, message["uid"], message["gid"])
    os.chmod(target, 0o500)
    mounts.set_attributes(mounts.AT_FDCWD, mounts.MOUNT_ATTR_RDONLY, path=target)


def take_listening(start: Message, fds: List[int], sock: socket.socket, held: Sequence[int]) -> socket.socket:
    """The sockets of sd_listen_fds(3), which end `fds` and leave it, become 3 and up; whatever stood there moves.

    `held` are files of the template's libraries, which know them by their numbers. Returns `sock` as it is afterwards.
    """
    count = wire.field(start, "listen", int, 0)
    if not count:
        return sock
    if not 0 < count <= len(fds):
        raise Error("bad-request", "the start message does not carry the sockets that it names")
    for fd in fds[len(fds) - count :]:
        refuse_ways_out(fd)
    places = range(3, 3 + count)
    taken = [fd for fd in held if fd in places]
    if taken:
        raise Error("listen", f"descriptor {taken[0]} is one of the service's own files; pass fewer sockets")
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, places.stop) for fd in (*fds, sock.fileno())]
    for fd in (*fds, sock.detach()):
        os.close(fd)
    sockets = moved[len(fds) - count : -1]
    fds[:] = moved[: len(fds) - count]
    for place, fd in zip(places, sockets):
        os.dup2(fd, place)  # inheritable, as systemd passes them
        os.close(fd)
    return socket.socket(fileno=moved[-1])


def refuse_ways_out(fd: int) -> None:
    if is_way_out(fd):
        text = "a directory cannot be a standard stream of a pocket: all that is above it could be reached by it"
        raise Error("bad-request", text)


def take_stdio(start: Message, fds: List[int], output: int) -> None:
    """Standard input, output and error: the caller's in program mode; nothing and the service's log in client mode."""
    if output >= 0:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        fds, present = [null, output, os.dup(output)], [0, 1, 2]
    else:
        present = wire.field(start, "stdio", list)
    if len(present) != len(fds) or any(n not in (0, 1, 2) for n in present):
        raise Error("bad-request", "the start message does not carry the descriptors that it names")
    for fd in fds:
        refuse_ways_out(fd)
    moved = [(n, fd if fd > 2 else os.dup(fd)) for n, fd in zip(present, fds)]
    for n, fd in moved:
        os.dup2(fd, n)  # inheritable, as standard streams are
        os.close(fd)
    for n in {0, 1, 2} - set(present):
        os.close(n)
