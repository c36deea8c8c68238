"""What of a pocket's files cannot be watched is said."""

from __future__ import annotations

import asyncio

from pocketd import files


def test_more_directories_than_are_watched(tmp_path, capfd):
    for n in range(files._MOST + 10):
        (tmp_path / f"{n}").mkdir()

    async def watch() -> None:
        watched = files.Files()
        watched.watch("p", [str(tmp_path)], (), (), lambda path: None, lambda: None, 1.0)

    asyncio.run(watch())
    said = capfd.readouterr().err
    assert "files-not-watched" in said and f"more than {files._MOST} directories" in said


def test_fewer_are(tmp_path, capfd):
    (tmp_path / "one/two").mkdir(parents=True)

    async def watch() -> None:
        files.Files().watch("p", [str(tmp_path)], (), (), lambda path: None, lambda: None, 1.0)

    asyncio.run(watch())
    assert "files-not-watched" not in capfd.readouterr().err
