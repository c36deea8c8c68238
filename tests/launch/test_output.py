"""What clients' workers write goes to their service's log, by way of its init, which all of its pockets need."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pocketd.client import errors, login
from runtime import log
from tests.conftest import TIMEOUT, Pocketd, service_environment, toml_table, wait_for

APP = """
import os

def say(text):
    print(text, flush=True)

def flood():
    while True:
        os.write(1, b"x\\n" * 2048)
"""


@pytest.fixture
def daemon(own_pocketd: Any, tmp_path: Path) -> Pocketd:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/app.py").write_text(APP)
    found: Pocketd = own_pocketd(f"""
        [service.plain]
        runtime = "python"
        env = {toml_table(service_environment())}

        [pocket.app]
        service = "plain"
        dir = "{tmp_path / "app"}"

        [pocket.quiet]
        service = "plain"
        dir = "{tmp_path / "app"}"
    """)
    return found


def session(daemon: Pocketd, name: str = "app") -> Any:
    return login(name, runtime_dir=str(daemon.runtime_dir), timeout=TIMEOUT, call_timeout=TIMEOUT)


@contextlib.contextmanager
def beside(call: Any) -> Any:
    """A call in a thread of its own, until its session is closed."""

    def run() -> None:
        with contextlib.suppress(errors.PocketError, OSError):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


def logged(daemon: Pocketd) -> str:
    (found,) = daemon.state_dir.glob("services/plain.log")
    return found.read_text(errors="replace")


def test_a_flood_of_output_waits_in_its_pipe_and_pushes_nobodys_lines_out(daemon: Pocketd) -> None:
    with session(daemon, "quiet") as quiet:
        quiet.call("app:say", "remember me")
        assert wait_for(lambda: "remember me" in logged(daemon))
        with contextlib.ExitStack() as stack:
            flooding = session(daemon)
            stack.enter_context(beside(lambda: flooding.call("app:flood")))
            stack.callback(flooding.close)
            assert wait_for(lambda: logged(daemon).count(" x\n") > 5000)
            time.sleep(1)
            assert len(logged(daemon)) < log.LIMIT
            quiet.call("app:say", "and me")
            assert wait_for(lambda: "and me" in logged(daemon))
            assert "remember me" in logged(daemon)
            with session(daemon, "quiet") as another:
                another.call("app:say", "and another")
        quiet.call("app:say", "and me again")
        assert wait_for(lambda: "and me again" in logged(daemon))
        assert "remember me" in logged(daemon) and "and another" in logged(daemon)
    assert daemon.settled()


def test_an_init_with_more_than_a_thousand_descriptors_goes_on(daemon: Pocketd) -> None:
    """Which select(2) does not know. A session of a client is five of them."""
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(session(daemon, "quiet"))
        for _ in range(220):
            last = stack.enter_context(session(daemon))
        with beside(lambda: last.call("app:flood")):
            assert wait_for(lambda: logged(daemon).count(" x\n") > 1000)
            last.close()  # and much of it is in its pipe
        assert wait_for(lambda: len(daemon.workers()) == 220)
        first.call("app:say", "the first one")
        assert wait_for(lambda: "the first one" in logged(daemon))
    assert daemon.settled()
