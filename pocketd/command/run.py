"""`pocket run` and `pocket NAME`: an unmodified program in a pocket, with this process as its stand-in.

What belongs to the program goes to its worker directly, on the session's own socket: arguments, environment, standard
streams. What belongs to the process, signals one way and the exit status the other, goes over the hold socket, whose
other end is init's. This process ends as the program ended.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nsutil import signals
from nsutil.messages import MessageError
from pocketd import wire
from pocketd.client import errors
from pocketd.client.control import Control
from pocketd.client.handshake import RESTART, Login, ask, open_login, reach
from pocketd.command import supervised

FAILED, NOT_FOUND = 125, 127  # as podman's
START = 60.0  # seconds that pocketd may take to start, or to start again, where a unit waits for it

USAGE = """\
usage: pocket run [--service NAME] [--dir DIR] [--mount SRC[:DST][:rw]] [--cold] [--trace]
                  PROGRAM [ARG...]
       pocket run [OPTIONS] -m MODULE [ARG...]
       pocket run [OPTIONS] -c CODE [ARG...]
       pocket run [--adopt] [--trace] -p POCKET [ARG...]

Run a program in a pocket as `python PROGRAM ARG...` would, in a worker of a warm service.

  --service NAME            the service (default: the only one, or tensorflow)
  --dir DIR                 the pocket's files (default: the working directory)
  --mount SRC[:DST][:rw]    show SRC to the program as well, read-only unless :rw; may be repeated
  --cold                    a fresh interpreter instead of a fork of the warm one
  --trace                   where the time went until the program's first line, on standard error
  --runtime-dir DIR         another pocketd's runtime directory
  -p POCKET                 a pocket that has a definition
  --adopt                   its worker is in this process's own cgroup, as a systemd unit's; waits for pocketd to start
"""

_RLIMITS = ("RLIMIT_CORE", "RLIMIT_NOFILE", "RLIMIT_STACK", "RLIMIT_FSIZE", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_DATA")
_SEEN = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", sys.prefix)
# Nobody can catch these; and the kernel sends SIGCHLD for children, of which there are none.
_NOT_FORWARDED = {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}
# What ends or stops a command from a terminal.
_ENDS = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP}


class Usage(Exception):
    pass


@dataclass
class Request:
    name: str | None = None
    pocket: bool = False
    directory: str | None = None
    mounts: list[str] = field(default_factory=list)
    cold: bool = False
    adopt: bool = False
    trace: bool = False
    observe: bool = False  # for `pocket suggest`
    runtime_dir: str | None = None
    kind: str = "file"
    program: str = ""
    arguments: list[str] = field(default_factory=list)


def parse(words: list[str]) -> Request:
    """Options up to the program; everything behind it is the program's own."""
    r = Request()
    rest = list(words)

    def value(option: str) -> str:
        if not rest:
            raise Usage(f"{option} needs a value")
        return rest.pop(0)

    while rest:
        word = rest.pop(0)
        if word.startswith("--") and "=" in word:
            word, _, given = word.partition("=")
            if word in ("--cold", "--adopt", "--trace"):
                raise Usage(f"{word} takes no value")
            rest.insert(0, given)
        if word == "--service":
            r.name = value(word)
        elif word == "--dir":
            r.directory = value(word)
        elif word == "--mount":
            r.mounts.append(value(word))
        elif word == "--runtime-dir":
            r.runtime_dir = value(word)
        elif word == "--cold":
            r.cold = True
        elif word == "--adopt":
            r.adopt = True
        elif word == "--trace":
            r.trace = True
        elif word in ("-h", "--help"):
            print(USAGE, end="")
            sys.exit(0)
        elif word == "-p":
            r.name, r.pocket = value(word), True
            r.arguments = rest
            return r
        elif word in ("-m", "-c"):
            r.kind, r.program, r.arguments = {"-m": "module", "-c": "code"}[word], value(word), rest
            return r
        elif word == "--":
            r.program, r.arguments = value("--"), rest
            return r
        elif word.startswith("-") and word != "-":
            raise Usage(f"there is no option {word}; the program's own options come after the program")
        else:
            r.program, r.arguments = word, rest
            return r
    raise Usage("name a program")


def main(words: list[str], request: Request | None = None) -> NoReturn:
    """`pocket run WORDS...`. Ends this process as the program ended."""
    present = standard_streams()
    try:
        r = request or parse(words)
        with reach(r.runtime_dir, START) if r.adopt else Control(r.runtime_dir) as control:
            login = log_in(control, r, present)
        hold(login)
    except Usage as e:
        say(f"pocket run: {e}\n{USAGE}", end="")
        sys.exit(FAILED)
    except errors.PocketError as e:
        say(f"pocket: {e}")
        sys.exit(NOT_FOUND if e.code == "not-found" else FAILED)
    except (OSError, ValueError) as e:  # ValueError: more than a message can hold
        say(f"pocket: {e}")
        sys.exit(FAILED)


def standard_streams() -> list[int]:
    """Which of 0, 1 and 2 are open. The others are held with /dev/null, so that no socket of ours gets their number."""
    present = [n for n in (0, 1, 2) if is_open(n)]
    while (fd := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) < 3:
        pass
    os.close(fd)
    return present


def say(text: str, end: str = "\n") -> None:
    """A line of ours on standard error, if there is one that takes it."""
    if sys.stderr is not None:
        try:
            print(text, end=end, file=sys.stderr, flush=True)
        except OSError:
            pass


def log_in(control: Control, r: Request, stdio: list[int]) -> Login:
    """Ask for a worker; from here on signals wait to be passed on."""
    patience = START if r.adopt else RESTART
    environment = callers_environment()
    directory = r.directory or os.getcwd()
    start: dict[str, Any] = {}
    with ExitStack() as stack:
        given = supervised.take(environment, stack, lambda text: say(f"pocket: {text}"))
        if r.pocket:
            if not r.name:
                raise Usage("name a pocket")
            about = ask(control, "describe", {"name": r.name}, patience=patience)
            if about["kind"] != "pocket" or not about["program"]:
                raise errors.PocketError(
                    f"{r.name} is {'a service' if about['kind'] == 'service' else 'a pocket without a program'}; "
                    f"run a program in it by: pocket run --service {r.name} PROGRAM"
                )
            r.program = os.path.join(about["directory"], about["program"])
            environment.update({os.fsencode(k): os.fsencode(v) for k, v in about["environment"].items()})
            if about["packages"]:
                start["packages"] = os.path.join(about["directory"], about["packages"])
        environment.pop(b"POCKETD_RUNTIME_DIR", None)
        start.update(
            kind=r.kind,
            program=os.fsencode(r.program),
            arguments=[os.fsencode(a) for a in r.arguments],
            environment=list(environment.items()),
            directory=os.fsencode(os.getcwd()),
            umask=umask(),
            ignored=ignored(),
            blocked=[int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            limits={name: resource.getrlimit(getattr(resource, name))[0] for name in _RLIMITS},
            cold=r.cold,
            trace=time.monotonic() if r.trace else None,
            observe=r.observe,
            stdio=stdio,
            **given.start,
        )
        targets: list[dict[str, Any]] = []
        for text in r.mounts:
            source, target, writable = mount(text)
            fd = os.open(source, os.O_PATH | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            given.shared.append(("mount", fd))
            targets.append({"target": os.fsencode(target), "writable": writable})
        if not r.pocket:
            hint(r, os.path.realpath(directory), [os.fsdecode(t["target"]) for t in targets])
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _NOT_FORWARDED)

        def waits() -> None:
            """It takes a while, for which nobody who wants to end it should have to wait."""
            if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS - blocked)

        def said(text: str) -> None:
            waits()
            progress(text)

        login = open_login(
            control,
            mode="program",
            name=r.name,
            directory=None if r.pocket else directory,
            start=start,
            fds=[*stdio, *given.listening],
            progress=said,
            slow=waits,
            patience=patience,
            shared=given.shared,
            mounts=targets,
            adopt=r.adopt,
            **given.fields,
        )
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _NOT_FORWARDED)
        for fd in given.listening:  # the worker has them: what it closes is closed
            os.close(fd)
        return login


def callers_environment() -> dict[bytes, bytes]:
    """The environment that this process was started with: Python itself may have added LC_CTYPE since (PEP 538)."""
    with open("/proc/self/environ", "rb") as f:
        pairs = (entry.partition(b"=") for entry in f.read().split(b"\0"))
    return {name: value for name, equals, value in pairs if name and equals}


def progress(text: str) -> None:
    if os.isatty(2):
        say(text)


def mount(text: str) -> tuple[str, str, bool]:
    """SRC[:DST][:rw], relative to the working directory."""
    source, *rest = text.split(":")
    writable = rest[-1:] == ["rw"]
    if writable:
        rest.pop()
    if len(rest) > 1 or not source:
        raise Usage(f"--mount {text!r} is not SRC[:DST][:rw]")
    path = os.path.abspath(source)
    return path, os.path.abspath(rest[0]) if rest else path, writable


def hint(r: Request, directory: str, targets: list[str]) -> None:
    """One line for each argument that names a file which the program will not see."""
    tops = (directory, *targets, *_SEEN)
    unseen: dict[str, None] = {}
    words = [r.program, *r.arguments] if r.kind == "file" else r.arguments
    for word in words:
        for text in {word, word.partition("=")[2]}:
            if not os.path.exists(text):
                continue
            path = os.path.abspath(text)
            above = f"{directory}/".startswith(path.rstrip("/") + "/")  # seen as far as it leads there
            if not above and not any(path == top or path.startswith(top + "/") for top in tops):
                unseen[path] = None
    for path in unseen:
        say(f"pocket: the program does not see {path}; add --mount {path}")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def ignored() -> list[int]:
    """Signals that this process was started with as ignored (nohup); SIGPIPE and SIGXFSZ are Python's own doing."""
    mine = {signal.SIGPIPE, signal.SIGXFSZ, *_NOT_FORWARDED}
    return [int(n) for n in signal.valid_signals() - mine if signal.getsignal(n) == signal.SIG_IGN]


def hold(login: Login, ended: Callable[[Login], None] | None = None) -> NoReturn:
    """Pass signals on until the worker has ended, then end in the same way. `ended` is called before that."""
    forwarded = signal.valid_signals() - _NOT_FORWARDED
    for number in forwarded - set(ignored()):
        try:
            signal.signal(number, signal.SIG_DFL)  # an ignored signal would not reach the descriptor
        except (OSError, ValueError):
            pass
    fd = signals.descriptor(forwarded)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(login.hold, select.POLLIN)
    while True:
        ready = {which for which, _ in poll.poll()}
        if fd in ready:
            for received in signals.read(fd):
                forward(login.hold, received)
        if login.hold.fileno() in ready:
            try:
                message, fds = wire.receive(login.hold)
                fds.close()
            except (EOFError, OSError, MessageError):
                message = {"op": "exit", "error": wire.Error("service", "the service ended").wire()}
            if message.get("op") == "exit":
                if ended:
                    ended(login)
                end(login, message)
            if message.get("op") == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)  # the shell sees this process stop, and its SIGCONT is passed on


def forward(hold_socket: socket.socket, received: signals.Received) -> None:
    """What goes to a whole group, from a terminal, or SIGCONT from a shell's fg, goes to the worker's group."""
    group = received.code == signals.SI_KERNEL or received.number == signal.SIGCONT
    try:
        wire.send(hold_socket, {"op": "signal", "signal": received.number, "group": group})
    except OSError:
        pass  # the worker has ended; its status is what comes next


def end(login: Login, message: dict[str, Any]) -> NoReturn:
    status = message.get("status")
    error = message.get("error") or early_failure(login.session)
    if error:
        say(f"pocket: {wire.Error.unwire(error).message}")
    if not isinstance(status, int):
        sys.exit(FAILED)
    if os.WIFSIGNALED(status):
        die_by(os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def early_failure(session: socket.socket) -> Any:
    """What the worker said when it could not come to the program's first line."""
    session.setblocking(False)
    try:
        message, fds = wire.receive(session)
        fds.close()
    except (EOFError, OSError, MessageError):
        return None
    return message.get("error") if message.get("op") == "failed" else None


def die_by(number: int) -> NoReturn:
    """End by the same signal, with no core file of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)
