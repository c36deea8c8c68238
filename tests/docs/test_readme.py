"""What the README shows works as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pocketd.client import login
from pocketd.command import main as command
from tests.conftest import ROOT, TIMEOUT, service_environment, toml_table

README = (ROOT / "README.md").read_text()
SAVE = "import sys, keras; keras.applications.MobileNetV2(weights=None).save(sys.argv[1])"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_first_app_runs_with_the_configuration_beside_it(own_pocketd, tmp_path: Path):
    (app,), (configuration, *_) = blocks("python"), blocks("toml")
    assert len([line for line in app.splitlines() if line.strip()]) <= 10
    model = tmp_path / "mobilenet.keras"
    subprocess.run([sys.executable, "-c", SAVE, model], check=True, capture_output=True, timeout=TIMEOUT)
    assert "/srv/models/mobilenet.keras" in configuration
    text = configuration.replace("/srv/models/mobilenet.keras", str(model))
    daemon = own_pocketd(f"{text}env = {toml_table(service_environment())}\n")
    place = tmp_path / "app"
    place.mkdir()
    (place / "app.py").write_text(app)
    env = {**daemon.environment, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "app.py"], cwd=place, env=env, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr
    assert 0 <= int(done.stdout) < 1000


PROGRAM = """
import sys
import numpy as np

weights = np.arange(4.0)


def main():
    print(sys.argv[1], weights.sum())


main()
"""


def test_a_pocket_is_held_as_it_says(own_pocketd, tmp_path: Path):
    _, configuration, _ = blocks("toml")
    place = tmp_path / "detect"
    place.mkdir()
    (place / "detect.py").write_text(PROGRAM)
    (place / "sample.jpg").write_bytes(b"")
    service = '[service.tensorflow]\nruntime = "python"\n'  # the same but for the import
    daemon = own_pocketd(service + configuration.replace("/srv/detect", str(place)))
    suggested = daemon.pocket("suggest", "detect", "photo.jpg").stdout
    assert 'checkpoint = "main"' in suggested and 'rehearse = ["photo.jpg"]' in suggested
    assert daemon.pocket("warm", "detect").stdout.startswith("detect is held and rehearsed")
    assert daemon.pocket("detect", "photo.jpg").stdout == "photo.jpg 6.0\n"
    (row,) = daemon.ps()["pockets"]
    assert (row["held"], row["warm"]) == ("rehearsed", 2)


MODULE = """
found = []


def ready():
    found.append("made once")


def find(image):
    return [*found, image]
"""


def test_client_sessions_go_on_from_modules_as_it_says(own_pocketd, tmp_path: Path):
    _, _, configuration = blocks("toml")
    said = re.search(r'login\("(\w+)"\), session\.call\("(\w+:\w+)", image\)', configuration)
    assert said
    place = tmp_path / "vision"
    place.mkdir()
    (place / "app.py").write_text(MODULE)
    service = '[service.tensorflow]\nruntime = "python"\n'  # the same but for the import
    daemon = own_pocketd(service + configuration.replace("/srv/vision", str(place)))
    assert daemon.pocket("warm", said[1]).stdout.startswith("vision is held")
    with login(said[1], runtime_dir=str(daemon.runtime_dir)) as session:
        assert session.call(said[2], 3) == ["made once", 3]
    assert "way=held" in daemon.log.read_text()


def test_the_files_that_it_names_are_there():
    for path in re.findall(r"\]\(([\w./-]+)\)", README) + ["systemd/pocketd.service", "pocketd.conf", "examples/faces"]:
        assert (ROOT / path).exists(), path


def test_its_verbs_are_the_commands():
    shown = set(re.findall(r"`pocket (ps|logs|stop|run|set|inspect|reload|off|warm|cool|suggest)\b", README))
    assert shown == {"ps", "logs", "stop", "run", "set", "inspect", "reload", "off", "warm", "cool", "suggest"}
    assert {*command.VERBS, "run"} >= shown
