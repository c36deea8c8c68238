"""The main job in small: a program in each kind of service."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TIMEOUT


def test_a_program_runs_in_a_pocket(pocketd, tmp_path):
    (tmp_path / "app.py").write_text("import sys; print('hello', sys.argv[1:]); sys.exit(3)")
    done = pocketd.pocket("run", "--service", "plain", "app.py", "x", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "hello ['x']\n", "")


def test_a_shell_script_runs_in_a_pocket(pocketd, tmp_path):
    script = tmp_path / "app.sh"
    script.write_text("#!/bin/sh\necho hello $1; exit 4\n")
    script.chmod(0o755)
    done = pocketd.pocket("run", "--service", "programs", "./app.sh", "x", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, "hello x\n", "")


def test_the_installed_command_is_not_confused_by_the_programs_modules(pocketd, tmp_path):
    command = Path(sys.executable).parent / "pocket"
    if not command.exists():
        pytest.skip(f"pocketd is not installed beside {sys.executable}")
    (tmp_path / "json.py").write_text("marker = 'the program has its own'")
    (tmp_path / "socket.py").write_text("raise SystemExit('taken for the standard library')")
    env = {**pocketd.environment, "PYTHONPATH": str(tmp_path)}
    code = "import json; print(json.marker)"
    words = [str(command), "run", "--service", "plain", "-c", code]
    done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the program has its own\n", "")
