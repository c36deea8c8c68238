"""What each table of the configuration may hold: keys, types, ranges. From TOML values to definitions.

A table is read key by key; whatever is wrong becomes a Problem, and reading goes on, so that all problems show at
once. Every message goes on from "KEY = VALUE: " and ends with what would be right.
"""

from __future__ import annotations

import difflib
import json
import os
import pwd
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from cgroup import limits as limits_of
from cgroup.limits import LimitError, Limits
from pocketd.definitions import Admission, Allow, Holding, ModelFactory, ModelFile, Pocket, Problem, Service, User
from pocketd.paths import Mount, parse_mount, refuse_directory

T = TypeVar("T")
_TOLD = 20  # problems of one kind that are told one by one: a table may be its author's, who is not trusted
D = TypeVar("D")

# The limits among those named that cannot be enforced on this host, with reasons: Hierarchy.refusals.
Refusals = Callable[[Collection[str]], list[tuple[str, str]]]


@dataclass(frozen=True)
class Entry:
    """A value and the file that it stands in."""

    value: object
    file: Path


class Table(dict[str, "Table | Entry"]):
    """A TOML table, its values marked with their files, so that tables of several files can be laid over each other."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file


def show(value: object) -> str:
    """A value as TOML would write it, on one line, at most 80 characters, nothing unprintable."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return "..."
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= 80 else text[:77] + "..."


def dotted(path: tuple[str, ...]) -> str:
    """A key as TOML would write it: pocket.detect.limits."memory.max"."""
    return ".".join(part if re.fullmatch("[A-Za-z0-9_-]+", part) else show(part) for part in path)


class Invalid(ValueError):
    """What is wrong with a value, and what would be right."""


class Reader:
    """Takes keys out of one table and collects what is wrong with them.

    Keys that nobody took are unknown: `finish` says so, with the nearest that was taken.
    """

    def __init__(self, table: Table, path: tuple[str, ...], problems: list[Problem]):
        self._table, self._path, self._problems = table, path, problems
        self._taken: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def fail(self, key: str, message: str) -> None:
        """Report the key, with its value where it has one."""
        found = self._table.get(key)
        file = found.file if found is not None else self._table.file
        value = show(found.value) if isinstance(found, Entry) else None
        self._problems.append(Problem(file, dotted((*self._path, key)), value, message))

    def take(self, key: str, parse: Callable[[object], T], default: D) -> T | D:
        """The parsed value of `key`; `default` where it is missing or wrong."""
        self._taken.append(key)
        found = self._table.get(key)
        if found is None:
            return default
        if isinstance(found, Table):
            self.fail(key, "is a table, and must be a single value")
            return default
        try:
            return parse(found.value)
        except ValueError as e:
            self.fail(key, str(e))
            return default

    def table(self, key: str) -> Table:
        """The table `key`, an empty one where it is missing or no table."""
        self._taken.append(key)
        found = self._table.get(key)
        if isinstance(found, Entry):
            self.fail(key, f"is not a table; write {dotted((key,))} = {{ NAME = VALUE }}")
        return found if isinstance(found, Table) else Table(self._table.file)

    def within(self, key: str) -> Reader:
        """A reader of `table(key)`."""
        return Reader(self.table(key), (*self._path, key), self._problems)

    def each(self, parse: Callable[[str, object], T]) -> Mapping[str, T]:
        """Every key of the table, parsed together with its value."""
        read = {}
        for key in self._table:
            marker = object()
            value = self.take(key, lambda value, key=key: parse(key, value), marker)  # type: ignore[misc]
            if value is not marker:
                read[key] = value
        return MappingProxyType(read)  # type: ignore[arg-type]

    def finish(self) -> None:
        unknown = [key for key in self._table if key not in self._taken]
        if len(unknown) > _TOLD:
            self.fail(unknown[_TOLD], f"is one of {len(unknown) - _TOLD} more keys that are not known here")
        for key in unknown[:_TOLD]:
            near = difflib.get_close_matches(key, self._taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"keys here are {', '.join(sorted(self._taken))}"
            self.fail(key, f"is not a key that is known here; {hint}")


# Values


def text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise Invalid("is not a text; write it in quotes")
    return value


def argument(value: object) -> str:
    """A word of a command line, which may be empty."""
    if not isinstance(value, str) or "\0" in value:
        raise Invalid("is not a text; write it in quotes")
    return value


def until(value: object) -> str:
    """When a rehearsal is over: "output", "rehearsed", or a number of seconds."""
    if value in ("output", "rehearsed"):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 3600:
        raise Invalid('is neither "output" nor "rehearsed" nor a number of seconds up to 3600')
    return str(float(value))


def choice(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            near = difflib.get_close_matches(str(value), words, n=1)
            hint = f"did you mean {show(near[0])}? " if near else ""
            raise Invalid(f"is not among the choices; {hint}choose {' or '.join(map(show, words))}")
        return value

    return parse


def several(parse: Callable[[object], T], example: str) -> Callable[[object], tuple[T, ...]]:
    """A list, each member parsed."""

    def parse_all(value: object) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise Invalid(f"is not a list; write {example}")
        parsed, wrong = [], []
        for member in value:
            try:
                parsed.append(parse(member))
            except ValueError as e:
                wrong.append(f"{show(member)} {e}")
        if len(wrong) > _TOLD:
            wrong[_TOLD:] = [f"and {len(wrong) - _TOLD} more"]
        if wrong:
            raise Invalid("; ".join(wrong))
        return tuple(parsed)

    return parse_all


def count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000:
        raise Invalid("is not a count; write a whole number from 0 to 10000")
    return value


def threads(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
        raise Invalid("is not a number of threads; write a whole number from 1 to 1024")
    return value


def sessions(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise Invalid("is not a number of sessions; write a whole number from 1 to 100000")
    return value


def yes_or_no(value: object) -> bool:
    if not isinstance(value, bool):
        raise Invalid("is not true or false")
    return value


def number(least: float, most: float, unit: str) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise Invalid(f"is not a number of {unit}; write one from {least:g} to {most:g}")
        return float(value)

    return parse


def seconds(least: float, most: float) -> Callable[[object], float]:
    return number(least, most, "seconds")


def size(value: object) -> int:
    parsed = limits_of.parse("memory.low", value)
    if parsed == "max":
        raise Invalid('is not a size; write one such as "256M"')
    return int(parsed)


def absolute(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value or ".." in value.split("/"):
        raise Invalid('is not an absolute path; write one such as "/srv/detect", without ".."')
    return Path(value)


def beneath(value: object) -> str:
    """A path that stays in the pocket's directory, as far as text can say; opening it must hold it there too."""
    parts = value.split("/") if isinstance(value, str) else []
    if not isinstance(value, str) or not value or value.startswith("/") or ".." in parts or "\0" in value:
        raise Invalid('is not a path beneath the pocket\'s directory; write one such as "detect.py", without ".."')
    return os.path.normpath(value)


def environment(name: str, value: object) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise Invalid("is not a name for an environment variable; use letters, digits and _")
    if not isinstance(value, str) or "\0" in value:
        raise Invalid(f"is not a text; write {show(str(value)) if isinstance(value, (int, float)) else 'it in quotes'}")
    return value


_MODULE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"


def module(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(_MODULE, value, re.ASCII):
        raise Invalid('is not the name of a module; write one such as "torch" or "torch.nn"')
    return value


def preloaded(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(rf"{_MODULE}(?::{_MODULE})?", value, re.ASCII):
        raise Invalid('is neither a module nor a function of one; write "app", or "app:ready" to have that called')
    return value


def model(name: str, value: object) -> ModelFile | ModelFactory:
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", name):
        raise Invalid("is not a name for a model; use letters, digits, '_', '.' and '-', at most 63")
    if isinstance(value, str) and value.startswith("/"):
        path = absolute(value)
        if not path.exists():
            raise Invalid("does not exist; name a model file that does")
        return ModelFile(path)
    if isinstance(value, str) and (found := re.fullmatch(rf"({_MODULE}):({_MODULE})", value, re.ASCII)):
        return ModelFactory(found[1], found[2])
    raise Invalid('is not a model; write a path such as "/srv/models/m.keras", or a factory "module:attribute"')


_CLAUSE = r"\s*(?:===?|~=|!=|<=?|>=?)\s*[A-Za-z0-9.*+!_-]+\s*"
_REQUIREMENT = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?\s*(?:{_CLAUSE}(?:,{_CLAUSE})*)?")


def requirement(value: object) -> str:
    if not isinstance(value, str) or len(value) > 200 or not _REQUIREMENT.fullmatch(value):
        raise Invalid('is not a requirement; write one such as "tensorflow>=2.15,<2.22"')
    return value


def mount(value: object) -> Mount:
    """A mount, the symbolic links of its source resolved now, once; what they lead to is judged as what is written."""
    parsed = parse_mount(text(value))
    try:
        resolved = parsed.source.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        raise Invalid("has a source that does not exist; name a file or directory that does") from None
    target = resolved if parsed.target == parsed.source else parsed.target
    if ":" in str(resolved):
        raise Invalid(f"has a source that leads to {resolved}, which has a colon in it")
    try:
        return parse_mount(f"{resolved}:{target}{':rw' if parsed.writable else ''}")
    except ValueError as e:
        raise Invalid(f"leads to {resolved}: it {e}") from None


def caller(value: object) -> str:
    known = r"@?[^\s:,@/\0]{1,255}|cgroup:/[^\s,\0]{1,1000}"
    if not isinstance(value, str) or not re.fullmatch(known, value):
        right = (
            'write "alice", "@vision" for a group, or "cgroup:/system.slice/door.service" for what runs in that cgroup'
        )
        raise Invalid(f"is neither a user nor a group nor a cgroup; {right}")
    return value


def user(value: object) -> User:
    right = "name a user of this host, or a number above 0"
    if isinstance(value, str):
        try:
            entry = pwd.getpwnam(value)
        except (KeyError, ValueError):
            raise Invalid(f"is no user of this host; {right}, or leave it out for an id of its own") from None
        found = User(entry.pw_uid, entry.pw_gid)
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (1 << 32) - 1:
        found = User(value, value)
    else:
        raise Invalid(f"is neither a user nor a uid; {right}")
    if found.uid == 0 or found.gid == 0:
        raise Invalid(f"is root, which no pocket runs as; {right}")
    return found


def network(value: object) -> str:
    if value in ("own", "container"):
        raise Invalid('is not offered by this version of pocketd; choose "none" or "host"')
    return choice("none", "host")(value)


# Devices that are the whole host: its memory and its ports.
_HOST = ("/dev/mem", "/dev/kmem", "/dev/port", "/dev/kcore")


def device(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/dev/") or os.path.normpath(value) != value or "\0" in value:
        raise Invalid('is not a device; write its path, such as "/dev/video0"')
    if value in _HOST:
        raise Invalid("is all of the host; no pocket gets it")
    return value


def directory(value: object) -> Path:
    """A pocket's directory, its symbolic links resolved now, once."""
    path = absolute(value)
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        raise Invalid("does not exist or cannot be read; name a directory that does") from None
    if not resolved.is_dir():
        raise Invalid("is not a directory; name one")
    if refusal := refuse_directory(resolved):
        raise Invalid(refusal if resolved == path else f"leads to {resolved}, which {refusal}")
    return resolved


def rootfs(value: object) -> Path | None:
    if value == "host":
        return None
    if isinstance(value, str) and value.startswith("oci:"):
        raise Invalid('images are not offered by this version of pocketd; name a directory, or write "host"')
    path = absolute(value)
    if path == Path("/"):
        raise Invalid('is all of the host; write "host" for the part of it that services may see')
    if not path.is_dir():
        raise Invalid('is not a directory; name one that holds a root file system, or write "host"')
    return path


# Tables


def limits(reader: Reader, refusals: Refusals) -> Limits:
    """A table of limits. A limit that this host cannot enforce is a problem like any other."""
    parsed = reader.each(_limit)
    for name, reason in refusals(parsed):
        reader.fail(name, reason)
    return parsed


def _limit(name: str, value: object) -> str:
    try:
        return limits_of.parse(name, value)
    except LimitError as e:
        raise Invalid(str(e)) from None


def service(name: str, reader: Reader, refusals: Refusals) -> Service:
    """[service.NAME]. Where the reader has reported a problem, the result is not to be used."""
    runtime = reader.take("runtime", choice("tensorflow", "python", "exec"), None)
    if "runtime" not in reader:
        reader.fail("runtime", 'is missing; choose "tensorflow" or "python" or "exec"')
    found = Service(
        name=name,
        runtime=runtime or "tensorflow",  # type: ignore[arg-type]
        rootfs=reader.take("rootfs", rootfs, None),
        python=reader.take("python", absolute, None),
        start=reader.take("start", choice("demand", "boot", "manual"), "demand"),  # type: ignore[arg-type]
        exit=reader.take("exit", choice("fast", "full"), "fast"),  # type: ignore[arg-type]
        env=reader.within("env").each(environment),
        preload=reader.take("preload", several(module, 'preload = ["torch"]'), ()),
        models=reader.within("models").each(model),
        limits=limits(reader.within("limits"), refusals),
        reload=reader.take("reload", choice("beside", "replace"), "beside"),  # type: ignore[arg-type]
        stop_timeout=reader.take("stop_timeout", seconds(0, 600), 10.0),
        idle=reader.take("idle", choice("keep", "reclaim"), "keep"),  # type: ignore[arg-type]
        idle_after=reader.take("idle_after", seconds(1, 86400), 60.0),
        may_run=reader.take("may_run", several(caller, 'may_run = ["alice", "@vision"]'), None),
    )
    if found.rootfs is None and found.python is not None and not os.access(found.python, os.X_OK):
        reader.fail("python", "is not a program that exists; name a Python interpreter")
    if runtime in ("tensorflow", "exec") and found.preload:
        reader.fail("preload", f'is for runtime = "python"; runtime {show(runtime)} has none')
    if runtime == "exec":
        for key in ("python", "models"):
            if key in reader:
                reader.fail(key, 'is of no use to runtime = "exec", which runs programs; leave it out')
    reader.finish()
    return found


def admission(reader: Reader) -> Admission:
    """[admission]."""
    default = Admission()
    found = Admission(
        reserve=reader.take("reserve", size, default.reserve),
        pressure=reader.take("pressure", number(1, 100, "percent"), default.pressure),
        queue=reader.take("queue", count, default.queue),
        wait=reader.take("wait", seconds(0, 3600), default.wait),
        sessions=reader.take("sessions", sessions, default.sessions),
    )
    reader.finish()
    return found


def held(reader: Reader) -> Holding:
    """[held]: what pockets that are held may cost."""
    default = Holding()
    found = Holding(
        budget=reader.take("budget", size, default.budget),
        timeout=reader.take("timeout", seconds(1, 3600), default.timeout),
    )
    reader.finish()
    return found


# A pocket's author may not give rights to the pocket.
RIGHTS = ("allow", "may_run", "run_as", "limits", "mounts")
OPERATORS = (*RIGHTS, "service", "dir", "warm")


def pocket(name: str, reader: Reader, refusals: Refusals, path: Path | None) -> Pocket:
    """[pocket.NAME], the author's keys laid under it. `path` is its directory, read before (`None`: it was wrong).

    Where the reader has reported a problem, the result is not to be used.
    """
    reader.take("dir", lambda value: None, None)
    if "dir" not in reader:
        reader.fail("dir", "is missing; name the directory that holds the pocket's files")
    allow = reader.within("allow")
    found = Pocket(
        name=name,
        dir=path or Path("/"),
        service=reader.take("service", text, None),
        requires=reader.take("requires", several(requirement, 'requires = ["tensorflow>=2.15"]'), ()),
        program=reader.take("program", _program, None),
        packages=reader.take("packages", beneath, None),
        env=reader.within("env").each(environment),
        limits=limits(reader.within("limits"), refusals),
        may_run=reader.take("may_run", several(caller, 'may_run = ["alice", "@vision"]'), ()),
        run_as=reader.take("run_as", user, None),
        allow=Allow(
            network=allow.take("network", network, "none"),  # type: ignore[arg-type]
            models=allow.take("models", several(text, 'models = ["mobilenet"]'), ()),
            write=allow.take("write", several(beneath, 'write = ["out"]'), ()),
            devices=allow.take("devices", several(device, 'devices = ["/dev/video0"]'), ()),
        ),
        mounts=reader.take("mounts", several(mount, 'mounts = ["/srv/data:/data:rw"]'), ()),
        threads=reader.take("threads", threads, None),
        cold=reader.take("cold", yes_or_no, False),
        warm=reader.take("warm", count, 0),
        checkpoint=reader.take("checkpoint", text, None),
        rehearse=reader.take("rehearse", several(argument, 'rehearse = ["sample.jpg"]'), None),
        rehearse_until=reader.take("rehearse_until", until, None),
        max_age=reader.take("max_age", seconds(1, 1e9), None),
        preload=reader.take("preload", several(preloaded, 'preload = ["app", "app:ready"]'), ()),
    )
    allow.finish()
    reader.finish()
    return found


def _program(value: object) -> str:
    # An absolute one is a program of an `exec` service's root; whether the service is one is seen later.
    return str(absolute(value)) if isinstance(value, str) and value.startswith("/") else beneath(value)
