"""A pytest plugin that writes which tests ran and which were skipped, and why, so that two runs can be compared:

pytest -p tests.vm.outcomes --outcomes-to FILE [--skipped-in FILE]
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

GUEST = "tests/vm/guest/"


@dataclass
class Outcomes:
    """Of one run of pytest: node ids of tests that ran, of those that were skipped with their reasons, and of those
    that failed, whether they ran or not."""

    ran: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    @classmethod
    def parse(cls, text: str | bytes) -> Outcomes:
        values = json.loads(text)
        return cls(set(values["ran"]), values["skipped"], set(values["failed"]))

    def text(self) -> str:
        return json.dumps({"ran": sorted(self.ran), "skipped": self.skipped, "failed": sorted(self.failed)}, indent=1)


class Recorder:
    def __init__(self, to: Path):
        self.to = to
        self.outcomes = Outcomes()

    def add(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.outcomes.skipped[report.nodeid] = reason.removeprefix("Skipped: ")
        if report.failed:
            self.outcomes.failed.add(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.add(report)  # a whole file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.add(report)
        if report.when == "call" and not report.skipped:
            self.outcomes.ran.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.to.parent.mkdir(parents=True, exist_ok=True)
        self.to.write_text(self.outcomes.text())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes-to", type=Path, help="write which tests ran and which were skipped")
    parser.addoption("--skipped-in", type=Path, help="outside the VM's own suite, run what this file says was skipped")


def pytest_configure(config: pytest.Config) -> None:
    if to := config.getoption("--outcomes-to"):
        config.pluginmanager.register(Recorder(to))


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    path = config.getoption("--skipped-in")
    if not path:
        return
    skipped = Outcomes.parse(path.read_text()).skipped
    wanted = [
        i for i in items if i.nodeid.startswith(GUEST) or i.nodeid in skipped or i.nodeid.split("::")[0] in skipped
    ]
    config.hook.pytest_deselected(items=[i for i in items if i not in wanted])
    items[:] = wanted
