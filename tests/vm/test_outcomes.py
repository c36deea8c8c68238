"""Tests that ran on no machine are found by comparing what runs say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.__main__ import report
from tests.vm.outcomes import Outcomes

ROOT = Path(__file__).parents[2]
TESTS = """
import pytest
def test_runs(): pass
def test_skips(): pytest.skip("no such thing here")
@pytest.mark.parametrize("n", [1, 2])
def test_half(n):
    if n == 2: pytest.skip("not two")
"""


def pytest_with(place: Path, *arguments: str, status: int = 0) -> Outcomes:
    to = place / "outcomes.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        str(place),
        "-p",
        "no:cacheprovider",
    ]
    command += ["-p", "tests.vm.outcomes", "--outcomes-to", str(to), *arguments]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).returncode == status
    return Outcomes.parse(to.read_text())


def test_a_run_writes_what_it_ran_and_what_it_skipped_and_why(tmp_path):
    (tmp_path / "test_few.py").write_text(TESTS)
    (tmp_path / "test_none.py").write_text(
        "import pytest\npytest.skip('not a file for here', allow_module_level=True)\n"
    )
    outcomes = pytest_with(tmp_path, str(tmp_path))
    assert outcomes.ran == {"test_few.py::test_runs", "test_few.py::test_half[1]"}
    assert outcomes.skipped == {
        "test_few.py::test_skips": "no such thing here",
        "test_few.py::test_half[2]": "not two",
        "test_none.py": "not a file for here",
    }


def test_another_run_takes_only_what_was_skipped(tmp_path):
    test = tmp_path / "test_few.py"
    test.write_text(TESTS)
    first = tmp_path / "first.json"
    first.write_text(pytest_with(tmp_path, str(test)).text())
    test.write_text(TESTS.replace("pytest.skip", "print"))
    second = pytest_with(tmp_path, "--skipped-in", str(first), str(test))
    assert second.ran == {"test_few.py::test_skips", "test_few.py::test_half[2]"}


def test_what_ran_in_one_place_is_not_missed(capsys):
    host = Outcomes({"a"}, {"b": "no memory controller", "c.py": "no c"})
    assert report(host, {"newest": Outcomes({"b", "c.py::test_c"}, {"a": "not in a VM"})})
    assert "2 tests were skipped on the host, 2 of them ran in the VM" in capsys.readouterr().out


def test_what_ran_nowhere_is_named_and_fails(capsys):
    assert not report(Outcomes(set(), {"a": "no a"}), {"newest": Outcomes({"b"}, {"a": "no a there"})})
    assert "RAN NOWHERE, WHICH FAILS: a: no a" in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["could not import 'torch'", "this host has no GPU of NVIDIA's"])
def test_what_is_optional_is_named_but_does_not_fail(capsys, reason):
    assert report(Outcomes(set(), {"a": reason}), {})
    assert f"RAN NOWHERE (optional): a: {reason}" in capsys.readouterr().out


def test_each_failure_is_named_at_the_end(tmp_path, capsys):
    (tmp_path / "test_few.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError\n"
        "def test_runs(): pass\n"
        "def test_fails(): assert 0\n"
        "def test_has_no_fixture(broken): pass\n"
    )
    outcomes = pytest_with(tmp_path, str(tmp_path), status=1)
    assert not report(Outcomes(), {"newest": outcomes})
    names = ("test_fails", "test_has_no_fixture")
    assert capsys.readouterr().out.splitlines()[-2:] == [f"test: FAILED on newest: test_few.py::{n}" for n in names]
