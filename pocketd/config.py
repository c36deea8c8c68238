"""Configuration files to frozen definitions: pocketd.conf, its drop-ins, and the authors' pocket.toml.

All problems are collected and nothing is raised: a service or pocket with a problem is left out, together with what
depends on it, and the rest stands. A file of the operator's that is not TOML may have held anything, a right taken
away included, so then nothing stands.

Whoever wrote a pocket.toml is not trusted: it is opened without following links, only as a regular file and only up to
a size, and may not give rights.
"""

from __future__ import annotations

import difflib
import errno
import grp
import os
import pwd
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from cgroup.limits import Limits
from nsutil.beneath import open_as_named
from pocketd import schema
from pocketd.definitions import NAME, VERBS, Admission, Config, Holding, Pocket, Problem, Service, describe
from pocketd.schema import Entry, Reader, Refusals, Table, dotted

__all__ = ["AUTHORS_FILE", "DEFAULT_PATH", "Config", "Problem", "describe", "load"]

DEFAULT_PATH = Path("/etc/pocketd/pocketd.conf")
AUTHORS_FILE = "pocket.toml"
AUTHORS_LIMIT = 64 * 1024  # bytes
# tomllib's time grows with the square of a dotted key's parts, and a key stands on one line: 30 KB of "a.a.a..." took
# 1.6 s, in which the daemon would serve nobody.
AUTHORS_LINE = 1000  # bytes

# What there is without any pocketd.conf.
_BUILT_IN = {"service": {"tensorflow": {"runtime": "tensorflow"}}}


def load(path: Path = DEFAULT_PATH, explicit: bool = True, refusals: Refusals | None = None) -> Config:
    """Read the configuration at `path`, with the drop-ins `PATH.d/*.conf` beside it in the order of their names.

    Later files win key by key. Where the file is missing, that is a problem if it was named by somebody (`explicit`),
    and otherwise the built-in configuration takes its place. `refusals` (Hierarchy.refusals) says which limits this
    host cannot enforce; without it that is not asked. Raises nothing but what Python itself raises.
    """
    loading = _Loading(refusals or (lambda names: []))
    tree = loading.read(path, explicit)
    if loading.problems:
        return loading.nothing(tree)
    return loading.define(tree)


class _Loading:
    """One load: what was read so far, and all that is wrong."""

    def __init__(self, refusals: Refusals):
        self.refusals = refusals
        self.problems: list[Problem] = []
        self.invalid: dict[str, list[Problem]] = {}
        self.services: dict[str, Service] = {}
        self.pockets: dict[str, Pocket] = {}
        self.parsed: dict[str, tuple[Pocket, Table]] = {}  # every pocket, rejected or not, and its merged table
        self.notices: list[str] = []
        self.run_limits: Limits = MappingProxyType({})
        self.admission = Admission()
        self.held = Holding()

    def config(self) -> Config:
        return Config(
            services=MappingProxyType(self.services),
            pockets=MappingProxyType(self.pockets),
            run_limits=self.run_limits,
            admission=self.admission,
            held=self.held,
            problems=tuple(self.problems),
            invalid=MappingProxyType({name: tuple(problems) for name, problems in self.invalid.items()}),
            notices=tuple(self.notices),
        )

    def reject(self, name: str, *problems: Problem) -> None:
        """`name` cannot be used, for these reasons."""
        self.services.pop(name, None)
        self.pockets.pop(name, None)
        self.problems.extend(problems)
        self.invalid.setdefault(name, []).extend(problems)

    # Files

    def read(self, path: Path, explicit: bool) -> Table:
        """The operator's files, laid over each other."""
        files = sorted(path.with_name(path.name + ".d").glob("*.conf"))
        if explicit or os.path.lexists(path):
            files.insert(0, path)
            tree = Table(path)
        else:
            tree = wrap(_BUILT_IN, path)
        for file in files:
            try:
                data = file.read_bytes()
            except OSError as e:
                self.problems.append(Problem(file, "", None, f"cannot be read: {e.strerror}; name a file that can"))
                continue
            found = self.parse(data, file, self.problems)
            tree = lay_over(tree, found)
        return tree

    def parse(self, data: bytes, file: Path, problems: list[Problem]) -> Table:
        """The tables of one file, none where it is not TOML."""
        try:
            return wrap(tomllib.loads(data.decode()), file)
        except UnicodeDecodeError as e:
            problems.append(Problem(file, "", None, f"is not UTF-8 (at byte {e.start}); save it as UTF-8"))
        except (ValueError, RecursionError) as e:
            # tomllib's text ends in "(at line 3, column 5)" or "(at end of document)".
            found = re.search(r"\(at line (\d+), column \d+\)$", str(e))
            line = int(found[1]) if found else data.count(b"\n") + 1
            said = "nested too deeply" if isinstance(e, RecursionError) else str(e)
            problems.append(Problem(file, "", None, f"is not TOML: {schema.show(said)[1:-1]}", line))
        return Table(file)

    def nothing(self, tree: Table) -> Config:
        """No definition at all: what the unreadable file would have changed, nobody knows."""
        reasons = list(self.problems)
        for kind in ("service", "pocket"):
            named = tree.get(kind)
            self.invalid.update((name, reasons) for name in (named if isinstance(named, Table) else ()))
        self.invalid["defaults.run"] = reasons
        return self.config()

    # Definitions

    def define(self, tree: Table) -> Config:
        top = Reader(tree, (), self.problems)
        services, pockets, defaults = top.table("service"), top.table("pocket"), top.table("defaults")
        self.admission = schema.admission(top.within("admission"))
        self.held = schema.held(top.within("held"))
        top.finish()
        kinds = Reader(defaults, ("defaults",), self.problems)
        pocket_limits, broken = self.default_limits(kinds.table("pocket"), "pocket")
        self.run_limits, broken_run = self.default_limits(kinds.table("run"), "run")
        if broken_run:
            self.invalid["defaults.run"] = list(broken_run)
        kinds.finish()
        for name, table in self.named("service", services):
            self.define_service(name, table)
        for name, table in self.named("pocket", pockets):
            self.define_pocket(name, table, pocket_limits, broken)
        for name in sorted(services.keys() & pockets.keys()):
            message = "is the name of a service too; services and pockets share their names, rename one"
            self.reject(name, Problem(pockets[name].file, dotted(("pocket", name)), None, message))
        self.depend()
        return self.config()

    def default_limits(self, table: Table, kind: str) -> tuple[Limits, list[Problem]]:
        """The limits of [defaults.KIND], and what is wrong with them."""
        own: list[Problem] = []
        reader = Reader(table, ("defaults", kind), own)
        found = schema.limits(reader.within("limits"), self.refusals)
        reader.finish()
        self.problems.extend(own)
        return found, own

    def named(self, kind: str, tables: Table) -> Iterator[tuple[str, Table]]:
        """The definitions among `tables`; what has a wrong name, or is no table, is rejected."""
        for name, table in tables.items():
            if not NAME.fullmatch(name):
                message = "is not a name; use a-z, 0-9 and '-', a letter first, at most 63 characters"
            elif name in VERBS:
                message = f"is a name that the pocket command needs for itself (pocket {name}); choose another"
            elif isinstance(table, Entry):
                message = f"is not a table; write [{kind}.{name}] and its keys beneath"
            else:
                yield name, table
                continue
            self.reject(name, Problem(table.file, dotted((kind, name)), None, message))

    def define_service(self, name: str, table: Table) -> None:
        own: list[Problem] = []
        self.services[name] = schema.service(name, Reader(table, ("service", name), own), self.refusals)
        if own:
            self.reject(name, *own)

    def define_pocket(self, name: str, table: Table, defaults: Limits, broken: list[Problem]) -> None:
        """One pocket; `defaults` are its limits where it names none, `broken` what is wrong with those."""
        own: list[Problem] = []
        path = Reader(table, ("pocket", name), own).take("dir", schema.directory, None)
        if path is not None:
            table = lay_over(self.authors(path, own), table)
        reader = Reader(table, ("pocket", name), own)
        pocket = schema.pocket(name, reader, self.refusals, path)
        named = {dotted(("defaults", "pocket", "limits", limit)) for limit in pocket.limits}
        if any(problem.key not in named for problem in broken):
            reader.fail("limits", "are not all there, as [defaults.pocket] has a problem itself; mend that one")
        own = [_as_the_author_sees(problem, name) for problem in own]
        self.parsed[name] = pocket, table
        self.pockets[name] = replace(pocket, limits=MappingProxyType({**defaults, **pocket.limits}))
        if own:
            self.reject(name, *own)
        self.notices.extend(
            f"{table.file}: {dotted(('pocket', name, 'may_run'))}: this host has no user or group {who!r} now"
            for who in pocket.may_run
            if not _known(who)
        )

    def authors(self, directory: Path, problems: list[Problem]) -> Table:
        """What the author of the pocket in `directory` wrote, without what authors may not write."""
        file = directory / AUTHORS_FILE
        try:
            data = read_untrusted(directory, AUTHORS_FILE, AUTHORS_LIMIT)
        except FileNotFoundError:
            return Table(file)
        except OSError as e:
            problems.append(Problem(file, "", None, f"cannot be read: {e.strerror}"))
            return Table(file)
        for number, line in enumerate(data.splitlines(), 1):
            if len(line) > AUTHORS_LINE:
                message = f"has a line of more than {AUTHORS_LINE} bytes; break it"
                problems.append(Problem(file, "", None, message, number))
                return Table(file)
        table = self.parse(data, file, problems)
        for key in [key for key in table if key in schema.OPERATORS]:
            reader = Reader(table, (), problems)
            if key in schema.RIGHTS:
                reader.fail(key, "is a right, which an author cannot give; it may stand in pocketd.conf only")
            else:
                reader.fail(key, "is for the host's operator to say; it may stand in pocketd.conf only")
            del table[key]
        return table

    # Between definitions

    def depend(self) -> None:
        """Reject pockets whose service cannot be used, or is not what they take it for."""
        for name, (pocket, table) in self.parsed.items():
            problems: list[Problem] = []
            self.check_service(pocket, Reader(table, ("pocket", name), problems))
            if problems:
                self.reject(name, *(_as_the_author_sees(problem, name) for problem in problems))

    def check_service(self, pocket: Pocket, reader: Reader) -> None:
        names = ", ".join(sorted(self.services)) or "none is defined that can be used"
        if pocket.service is None:
            if not pocket.requires and "service" not in reader:
                reader.fail("service", f"is missing; name one ({names}), or say by `requires` what it must have")
            self.check_held(pocket, reader, None)
            return
        service = self.services.get(pocket.service)
        if service is None:
            if pocket.service in self.invalid and pocket.service not in self.parsed:
                reader.fail("service", "cannot be used, as that service has a problem itself; mend that one")
            else:
                near = difflib.get_close_matches(pocket.service, self.services, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"name one: {names}"
                reader.fail("service", f"is not a service; {hint}")
            return
        for model in pocket.allow.models:
            if model not in service.models:
                deployed = ", ".join(sorted(service.models)) or "none"
                message = f"{model!r} is not a model of the service {service.name!r}; it has {deployed}"
                reader.within("allow").fail("models", message)
        self.check_held(pocket, reader, service.runtime)
        if pocket.program is not None and pocket.program.startswith("/") and service.runtime != "exec":
            message = 'is an absolute path, which only a service with runtime = "exec" runs; name it as beneath dir'
            reader.fail("program", message)

    def check_held(self, pocket: Pocket, reader: Reader, runtime: str | None) -> None:
        """What is done ahead of time must have something that it is done for. `runtime`: of its service, where that is
        known by now."""
        if pocket.preload:
            self.check_preload(pocket, reader, runtime)
        elif pocket.checkpoint and pocket.program is None:
            reader.fail("checkpoint", "is of no use without a program; name one, or leave it out")
        if pocket.checkpoint and runtime == "exec":
            reader.fail("checkpoint", 'is of no use in a service with runtime = "exec", whose programs start afresh')
        if pocket.checkpoint and pocket.cold:
            reader.fail("checkpoint", "contradicts cold = true: a program that is held shares what it did until then")
        if pocket.checkpoint is None:
            for key in ("rehearse", "rehearse_until", *(() if pocket.preload else ("max_age",))):
                if getattr(pocket, key) is not None:
                    reader.fail(key, 'is of no use without a checkpoint, such as checkpoint = "main"')
        elif pocket.rehearse is None and pocket.rehearse_until is not None:
            reader.fail("rehearse_until", "is of no use without a sample: rehearse = [ARGUMENTS]")

    def check_preload(self, pocket: Pocket, reader: Reader, runtime: str | None) -> None:
        for key in ("program", "checkpoint"):
            if getattr(pocket, key) is not None:
                reader.fail("preload", f"is for client mode, and {key} is for programs; leave one of the two out")
                return
        if runtime == "exec":
            reader.fail("preload", 'is of no use in a service with runtime = "exec", which has no Python')
        if pocket.cold:
            reader.fail("preload", "contradicts cold = true: sessions share what was done for all of them")


def _as_the_author_sees(problem: Problem, name: str) -> Problem:
    """The problem with its key as it stands in its file: in pocket.toml there is no table around it."""
    if problem.file.name != AUTHORS_FILE:
        return problem
    return replace(problem, key=problem.key.removeprefix(dotted(("pocket", name)) + "."))


def _known(who: str) -> bool:
    """Whether this host knows the user, or the "@group", now."""
    try:
        grp.getgrnam(who[1:]) if who.startswith("@") else pwd.getpwnam(who)
    except KeyError:
        return False
    return True


def wrap(tree: Mapping[str, object], file: Path) -> Table:
    """A TOML table with `file` at every value."""
    table = Table(file)
    for key, value in tree.items():
        table[key] = wrap(value, file) if isinstance(value, dict) else Entry(value, file)
    return table


def lay_over(below: Table, above: Table) -> Table:
    """Both tables as one; where both have a key that is not a table in both, `above` wins."""
    merged = Table(above.file)
    merged.update(below)
    for key, value in above.items():
        under = below.get(key)
        both = isinstance(value, Table) and isinstance(under, Table)
        merged[key] = lay_over(under, value) if both else value  # type: ignore[arg-type]
    return merged


def read_untrusted(directory: Path, name: str, limit: int) -> bytes:
    """A regular file of at most `limit` bytes that somebody not trusted may have put into `directory`.

    No link is followed, and a fifo or device is not waited for. Raises OSError.
    """
    parent = open_as_named(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=parent)
    except OSError as e:
        if e.errno == errno.ELOOP:
            raise OSError(e.errno, "it is a symbolic link, which is not followed; put the file itself there") from None
        raise
    finally:
        os.close(parent)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file; put one there")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(fd)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes; make it shorter")
    return data
