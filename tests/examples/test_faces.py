"""The faces example: the main job from end to end, what it refuses to call equal, and that it stops what it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "faces"
COMMAND = [sys.executable, str(EXAMPLE / "main_job.py")]
FACE = {"box": [182, 64, 83, 107], "confidence": 0.9991, "keypoints": {"nose": [224, 126]}}

real = pytest.mark.skipif(
    os.geteuid() != 0 or not (Path(sys.executable).parent / "pocketd").exists(),
    reason="needs root, and pocketd in this environment",
)


@pytest.fixture(scope="module")
def main_job():
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLE))
    try:
        import main_job

        yield main_job
    finally:
        sys.path[:] = before
        for name in ("main_job", "apps", "measure", "own_pocketd"):
            sys.modules.pop(name, None)


@pytest.fixture
def nothing_left(main_job, tmp_path, monkeypatch):
    """What the main job may leave, looked for where the kernel shows it, after the test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    cgroup2 = sys.modules["own_pocketd"].cgroup2()

    def seen() -> set[str]:
        commands = set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    command += f"in {os.readlink(entry / 'cwd')}"
                except OSError:
                    continue
                if str(tmp_path) in command or "/run/pocketd-example-" in command:
                    commands.add(f"process {entry.name}: {command}")
        cgroups = {f"cgroup {path}" for path in cgroup2.glob("pocketd-example-*")}
        places = [*tmp_path.glob("pocketd-example-*"), *Path("/run").glob("pocketd-example-*")]
        return commands | cgroups | {f"directory {path}" for path in places}

    before = seen()
    yield
    assert seen() == before


@real
def test_every_way_finds_the_same_face_and_the_pocket_is_sooner(nothing_left, tmp_path):
    done = subprocess.run(
        [*COMMAND, "--runs", "1", "--apps", "2", "--json", str(tmp_path / "numbers.json")],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "All 7 runs found the same: 1 face" in done.stdout
    monolith, program, client, monoliths, clients = json.loads((tmp_path / "numbers.json").read_text())
    assert [len(way["batches"][0]["runs"]) for way in (monolith, program, client, monoliths, clients)] == [
        1,
        1,
        1,
        2,
        2,
    ]

    def first_run(way):
        return way["batches"][0]["runs"][0]

    for way in (program, client):  # loose, since this is no benchmark: an import of TensorFlow would miss it by far
        assert first_run(way)["first_line"] < first_run(monolith)["first_line"] / 3
        assert first_run(way)["memory"]["private"] < first_run(monolith)["memory"]["private"] / 2
    for name in ("monolith.png", "program.png", "client.png"):
        assert (EXAMPLE / "out" / name).read_bytes().startswith(b"\x89PNG")


@real
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
@pytest.mark.parametrize("moment", ["-- monolith,", "loading tensorflow", "-- client mode"])
def test_stopped_at_any_moment_it_leaves_nothing(nothing_left, stop, moment):
    job = subprocess.Popen(
        [*COMMAND, "--runs", "1", "--apps", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert job.stderr
    with job:
        for line in job.stderr:
            if moment in line:
                job.send_signal(stop)
                break
        else:
            pytest.fail(f"it never said {moment!r}")
        said = job.stderr.read()
    assert job.returncode == 128 + stop, said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "found",
    [
        [],
        [FACE, FACE],
        [{**FACE, "box": [182, 64, 83, 108]}],
        [{**FACE, "keypoints": {"nose": [225, 126]}}],
        [{**FACE, "confidence": 0.9993}],
    ],
    ids=["none", "two", "another box", "another point", "another confidence"],
)
def test_other_faces_than_the_monolith_s_are_refused(main_job, found):
    def way(name, faces):
        run = main_job.Run(1.0, 2.0, faces)
        return main_job.Way(name, [main_job.Batch([run], main_job.measure.Memory(0, 0, 0))], 0)

    main_job.same_faces([way("monolith", [FACE]), way("client", [{**FACE, "confidence": 0.99905}])])
    with pytest.raises(main_job.Trouble, match="client found other faces"):
        main_job.same_faces([way("monolith", [FACE]), way("client", found)])
    with pytest.raises(main_job.Trouble, match="no face"):
        main_job.same_faces([way("monolith", []), way("client", [])])
