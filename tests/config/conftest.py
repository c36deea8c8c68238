"""A directory for configuration files, and a pocket's directory beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pocketd import config
from pocketd.definitions import Config


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Where pocketd.conf is to be; `detect` is a pocket's directory beside it, with a model file."""
    (tmp_path / "detect").mkdir()
    (tmp_path / "m.keras").touch()
    return tmp_path / "pocketd.conf"


@pytest.fixture
def load(conf: Path) -> Callable[..., Config]:
    """Writes pocketd.conf and loads it; DIR in the text is the directory of the test."""

    def write_and_load(text: str, **arguments) -> Config:
        conf.write_text(text.replace("DIR", str(conf.parent)))
        return config.load(conf, **arguments)

    return write_and_load


@pytest.fixture
def author(conf: Path) -> Callable[[str], Path]:
    """Writes the pocket.toml of the pocket in DIR/detect."""

    def write(text: str) -> Path:
        path = conf.parent / "detect" / "pocket.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def drop_in(conf: Path) -> Callable[[str, str], Path]:
    """Writes pocketd.conf.d/NAME; DIR as in `load`."""

    def write(name: str, text: str) -> Path:
        path = conf.parent / "pocketd.conf.d" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("DIR", str(conf.parent)))
        return path

    return write
