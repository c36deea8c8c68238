"""Tests that ran on no machine are found by comparing what runs say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


def pytest_with(place: Path, *arguments: str) -> Outcomes:
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
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
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
    assert report(host, [Outcomes({"b", "c.py::test_c"}, {"a": "not in a VM"})])
    assert "2 tests were skipped on the host, 2 of them ran in the VM" in capsys.readouterr().out


def test_what_ran_nowhere_is_named_and_fails(capsys):
    assert not report(Outcomes(set(), {"a": "no a"}), [Outcomes({"b"}, {"a": "no a there"})])
    assert "RAN NOWHERE: a: no a" in capsys.readouterr().out


def test_a_package_that_is_optional_is_named_but_does_not_fail(capsys):
    assert report(Outcomes(set(), {"a": "could not import 'torch'"}), [Outcomes()])
    assert "RAN NOWHERE (optional): a: could not import 'torch'" in capsys.readouterr().out
