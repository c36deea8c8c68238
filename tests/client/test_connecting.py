"""Reaching pocketd's socket when many want to."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from pathlib import Path

import pytest

from pocketd.client import errors
from pocketd.client.control import Control
from tests.conftest import TIMEOUT


@pytest.fixture
def crowded(tmp_path: Path):
    """A listening socket whose queue is full."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "pocketd.sock"))
    listener.listen(1)
    with listener, contextlib.ExitStack() as stack:
        while True:
            s = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            s.setblocking(False)
            try:
                s.connect(str(tmp_path / "pocketd.sock"))
            except BlockingIOError:
                break
        yield tmp_path, listener


def test_a_full_queue_is_waited_for(crowded):
    place, listener = crowded
    found = []

    def connect() -> None:
        with Control(str(place), TIMEOUT):
            found.append(True)

    thread = threading.Thread(target=connect)
    thread.start()
    thread.join(0.2)  # it would have failed by then
    assert thread.is_alive() and not found
    while thread.is_alive():
        if select.select([listener], [], [], 0.1)[0]:
            listener.accept()[0].close()
        thread.join(0.01)
    assert found == [True]


def test_a_full_queue_is_told_when_the_time_is_over(crowded):
    with pytest.raises(errors.Timeout, match="does not accept connections"):
        Control(str(crowded[0]), 0.2)
