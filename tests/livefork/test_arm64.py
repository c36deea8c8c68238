"""Live fork on aarch64, in an emulated machine with a Debian kernel."""

from __future__ import annotations

from pathlib import Path

from tests.livefork import arm64

HERE = Path(__file__).parent


def test_threads_come_back_on_aarch64(tmp_path: Path) -> None:
    arm64.check_tools()
    program = tmp_path / "try"
    arm64.build([HERE / "threads.c", arm64.ROOT / "nsutil" / "livefork.c"], program)
    assert "100 forks, all threads answered" in arm64.run(program, ["100"], tmp_path, timeout=300)
