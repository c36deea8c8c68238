"""The exec runtime: any program of the root file system or of the pocket."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest

from tests.conftest import TIMEOUT


def script(programs, text, name="app.sh"):
    path = programs.write(name, text)
    path.chmod(0o755)
    return f"./{name}"


def test_a_shell_script_has_its_arguments_streams_and_status(programs):
    name = script(programs, '#!/bin/sh\necho "$0" "$#" "$@"\ncat\necho error >&2\npwd\numask\nexit 7\n')
    words: list[str | bytes] = ["a b", "", b"\xff"]
    expected = subprocess.run([name, *words], cwd=programs.place, input=b"in\n", capture_output=True, umask=0o27)
    found = programs.pocket(name, *words, input=b"in\n", umask=0o27)
    assert (found.status, found.out, found.err) == (expected.returncode, expected.stdout, expected.stderr)


def test_a_program_of_path(programs):
    assert programs.pocket("echo", "a", "b").out == b"a b\n"
    assert programs.pocket("/bin/sh", "-c", "exit 9").status == 9


def test_its_environment_is_the_callers_to_the_letter(programs):
    env = {"MINE": "é", "LANG": None, "LC_ALL": None}
    environment = programs.environment(env)
    environment.pop("POCKETD_RUNTIME_DIR")
    expected = subprocess.run(["env"], env=environment, capture_output=True).stdout
    found = programs.pocket("env", env=env)
    assert sorted(found.out.splitlines()) == sorted(expected.splitlines())


@pytest.mark.parametrize("name", ["missing", "./missing", "/no/such/program"])
def test_a_program_that_is_not_there_is_127(programs, name):
    ended = programs.pocket(name)
    assert (ended.status, ended.out) == (127, b"")
    assert ended.err == f"pocket: {name}: No such file or directory\n".encode()


def test_a_program_that_cannot_be_executed_is_126(programs):
    programs.write("app.sh", "#!/bin/sh\n")
    ended = programs.pocket("./app.sh")
    assert (ended.status, ended.err) == (126, b"pocket: ./app.sh: Permission denied\n")
    assert programs.pocket(".").status == 126


def test_a_script_without_a_first_line_or_with_a_missing_interpreter(programs):
    name = script(programs, "echo from the shell\n")
    assert programs.pocket(name).status in (0, 126)
    name = script(programs, "#!/no/such/interpreter\n", "wrong.sh")
    ended = programs.pocket(name)
    assert ended.status in (126, 127) and ended.err.startswith(b"pocket: ./wrong.sh: ")


def test_signals_are_as_for_any_program(programs):
    """Python ignores SIGPIPE; a program that it starts must not inherit that. What the caller ignores stays ignored."""

    def masks(text: bytes) -> dict[str, int]:
        lines = [line.split(":\t") for line in text.decode().splitlines() if line.startswith("Sig")]
        # 32 and 33 are glibc's own: its posix_spawn leaves them ignored, and nobody can tell.
        return {name: int(value, 16) & ~(3 << 31) for name, value in lines if name != "SigQ"}

    command = ["cat", "/proc/self/status"]
    expected = masks(subprocess.run(command, capture_output=True, check=True).stdout)
    assert masks(programs.pocket(*command).out) == expected
    assert expected["SigIgn"] >> 12 & 1 == 0  # SIGPIPE


def test_a_reader_that_goes_away_ends_it_by_sigpipe(programs):
    process = subprocess.Popen(
        programs.pocket_command("yes"), env=programs.environment(None), cwd=programs.place, stdout=subprocess.PIPE
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(TIMEOUT) == -signal.SIGPIPE


def test_no_descriptor_is_open_but_the_three(programs):
    assert programs.pocket("ls", "/proc/self/fd").out == b"0\n1\n2\n3\n"


def test_signals_reach_it(programs, begun):
    name = script(programs, "#!/bin/sh\ntrap 'echo term; exit 3' TERM\necho ready\nwhile :; do sleep 0.05; done\n")
    process = begun(programs.pocket_command(name), env=programs.environment(None), cwd=programs.place)
    process.terminate()
    out, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (3, b"term\n")


def test_death_by_a_signal(programs):
    assert programs.pocket("sh", "-c", "kill -9 $$").status == -9


def test_node(programs):
    node = shutil.which("node")
    if not node:
        pytest.skip("node is not installed")
    name = "app.js"
    programs.write(
        name,
        "const os = require('os');\nconsole.log(process.argv.slice(2), process.cwd(), [3, 1, 2].sort());\n"
        "process.on('exit', () => console.error('bye'));\nsetTimeout(() => process.exit(6), 10);\n",
    )
    expected = subprocess.run([node, name, "a", ""], cwd=programs.place, capture_output=True, timeout=TIMEOUT)
    found = programs.pocket(node, name, "a", "")
    if found.status == 127:
        pytest.skip(f"{node} is outside what a service shows")
    assert (found.status, found.out, found.err) == (expected.returncode, expected.stdout, expected.stderr)
