"""What a configuration defines: services, pockets, defaults; and what is wrong with it. Plain frozen values.

`config.load` makes them; everything else of the daemon takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cgroup.limits import Limits
from pocketd.paths import Mount

NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
# `pocket NAME ...` and `pocket VERB ...` share their first word.
VERBS = frozenset(
    "allow cool deny doctor events exec images inspect logs off on pocketize ps reload run set stop suggest "
    "top warm".split()
)

Runtime = Literal["tensorflow", "python", "exec"]
Start = Literal["demand", "boot", "manual"]
Exit = Literal["fast", "full"]
Network = Literal["none", "host"]
Reload = Literal["beside", "replace"]
Idle = Literal["keep", "reclaim"]


def _empty() -> Any:
    """A field that is an empty mapping where it is not given."""
    return field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class ModelFile:
    """A model in a file or directory of the host that the framework's own loader reads."""

    path: Path


@dataclass(frozen=True)
class ModelFactory:
    """A model that `module`'s `attribute` makes when it is called in the service."""

    module: str
    attribute: str


@dataclass(frozen=True)
class Service:
    name: str
    runtime: Runtime = "tensorflow"
    rootfs: Path | None = None  # None: "host", the allowlist of the host's own file system
    python: Path | None = None  # as the service's root file system has it; None: the one that pocketd runs on
    start: Start = "demand"
    exit: Exit = "fast"
    env: Mapping[str, str] = _empty()
    preload: tuple[str, ...] = ()  # modules that runtime "python" imports
    models: Mapping[str, ModelFile | ModelFactory] = _empty()
    limits: Limits = _empty()
    reload: Reload = "beside"
    stop_timeout: float = 10.0  # seconds that workers have from SIGTERM to SIGKILL at power-off and `pocket off`
    idle: Idle = "keep"
    idle_after: float = 60.0  # seconds without work before idle memory is reclaimed
    may_run: tuple[str, ...] | None = None  # who, besides root, may run ad hoc in it; None: whoever may connect

    def wire(self) -> dict[str, Any]:
        """It as a map of plain values, for `unwire`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        models = {
            name: str(m.path) if isinstance(m, ModelFile) else f"{m.module}:{m.attribute}"
            for name, m in self.models.items()
        }
        paths = {key: str(values[key]) if values[key] else None for key in ("rootfs", "python")}
        plain = {"env": dict(self.env), "limits": dict(self.limits), "preload": list(self.preload)}
        return {**values, **paths, **plain, "models": models}

    @classmethod
    def unwire(cls, m: Mapping[str, Any]) -> Service:
        """What `wire` made, by this version or the one before: what it does not know is left out."""
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in m.items() if key in known}
        values.update({key: Path(values[key]) for key in ("rootfs", "python") if values.get(key)})
        values.update({key: MappingProxyType(values[key]) for key in ("env", "limits") if key in values})
        values["preload"] = tuple(values.get("preload", ()))
        values["may_run"] = tuple(values["may_run"]) if values.get("may_run") is not None else None
        models = {
            name: ModelFile(Path(text)) if text.startswith("/") else ModelFactory(*text.split(":", 1))
            for name, text in m.get("models", {}).items()
        }
        return cls(**{**values, "models": MappingProxyType(models)})


@dataclass(frozen=True)
class User:
    """Whom a pocket's processes run as; never uid 0."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Allow:
    """A pocket's rights. All else is off."""

    network: Network = "none"
    models: tuple[str, ...] = ()
    write: tuple[str, ...] = ()  # relative to the pocket's directory, without ".."
    devices: tuple[str, ...] = ()  # device files of the host


@dataclass(frozen=True)
class Pocket:
    name: str
    dir: Path  # absolute, symbolic links resolved; it is still to be opened without following any
    service: str | None  # None: any service that satisfies `requires`
    requires: tuple[str, ...] = ()  # requirements in the form of PEP 508, without markers
    program: str | None = None  # beneath `dir`; absolute for a service of `exec`. None: client mode
    packages: str | None = None  # a directory beneath `dir` that comes first on sys.path
    env: Mapping[str, str] = _empty()
    limits: Limits = _empty()  # those of [defaults.pocket] included
    may_run: tuple[str, ...] = ()  # user names, "@group"s and "cgroup:/PATH"s, besides root
    run_as: User | None = None  # None: an id of its own
    allow: Allow = Allow()
    mounts: tuple[Mount, ...] = ()
    threads: int | None = None  # that its libraries compute with; None: as many as its limits allow processors
    cold: bool = False  # a fresh interpreter for each run: no page, address layout or hash seed shared with others
    checkpoint: str | None = None  # where its program is held (runtime.checkpoint); None: nowhere
    rehearse: tuple[str, ...] | None = None  # a sample's arguments, for one run ahead of time; None: there is none
    rehearse_until: str | None = None  # "output", "rehearsed" or seconds; None: until the program ends
    max_age: float | None = None  # seconds until a template is made anew
    preload: tuple[str, ...] = ()  # client mode: modules to import, and functions "module:function" to call, beforehand
    warm: int = 0  # slots: workers made ahead of time (pocketd.slots)

    @property
    def mode(self) -> Literal["program", "client"]:
        """Of its launches, as far as they can come from what was made ahead of time."""
        return "program" if self.program else "client"

    @property
    def is_held(self) -> bool:
        """Whether it is to have a template of its own."""
        return bool(self.checkpoint if self.program else self.preload)


@dataclass(frozen=True)
class Admission:
    """[admission]: when a launch waits for memory, and for how long; how many sessions one user may have."""

    reserve: int = 64 << 20  # bytes that launches leave to the host
    pressure: float = 40.0  # percent of time that all stalls for memory (PSI, full avg10)
    queue: int = 64  # launches that may wait
    wait: float = 30.0  # seconds
    sessions: int = 256  # of one user at once; root's are not counted


@dataclass(frozen=True)
class Holding:
    """[held]: what pockets that are held may cost."""

    budget: int | None = None  # bytes of their own that they and their slots may have together
    timeout: float = 120.0  # seconds that a program may take to its checkpoint, or a pocket's modules to be preloaded


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the configuration. `message` says what, and what would be right."""

    file: Path
    key: str  # dotted, as TOML would write it; "" for the file as a whole
    value: str | None  # as TOML would write it, shortened; None where there is no value to show
    message: str
    line: int | None = None  # where the file is not TOML at all


@dataclass(frozen=True)
class Config:
    """Definitions that are right, and all that is wrong.

    `invalid` holds what cannot be used, by name, with the reasons: services, pockets, and "defaults.run" where ad hoc
    runs would go without a limit that was asked for.
    """

    services: Mapping[str, Service]
    pockets: Mapping[str, Pocket]
    run_limits: Limits = _empty()  # [defaults.run]: of ad hoc runs
    admission: Admission = Admission()
    held: Holding = Holding()
    problems: tuple[Problem, ...] = ()
    invalid: Mapping[str, tuple[Problem, ...]] = _empty()
    notices: tuple[str, ...] = ()  # not wrong, and worth a line in the log


def describe(problems: Iterable[Problem]) -> str:
    """One line each for a terminal: FILE: KEY = VALUE: what is wrong; what would be right."""
    lines = []
    for problem in problems:
        where = f"{problem.file}:{problem.line}" if problem.line else str(problem.file)
        what = problem.key if problem.value is None else f"{problem.key} = {problem.value}"
        lines.append(f"{where}: {what}: {problem.message}" if what else f"{where}: {problem.message}")
    return "\n".join(lines)
