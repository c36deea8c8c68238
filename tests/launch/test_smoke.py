"""The main job in small: a program in each kind of service."""

from __future__ import annotations


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
