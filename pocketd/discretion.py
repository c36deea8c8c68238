"""What is its operator's to know of a service, and not every caller's: the last words of a template that does not start
name files that are not the caller's, and may show what is in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nsutil import processes
from pocketd.wire import Error

Progress = Callable[[str], None]


@contextmanager
def for_operators(peer: processes.Peer | None, service: str) -> Iterator[None]:
    """Why a service does not start, root alone is told. `peer`: None where what is raised is kept, for whoever asks."""
    try:
        yield
    except Error as e:
        if peer and peer.uid == 0:
            raise
        text = (
            f"service {service} could not be started; its log, which is its operator's, says why: pocket logs {service}"
        )
        raise Error(e.code, text) from None


def starting(peer: processes.Peer, service: str, progress: Progress) -> Progress:
    """How far a service's start is, for root; that it is being started, for others."""
    return progress if peer.uid == 0 else lambda text: progress(f"{service}: starting")
