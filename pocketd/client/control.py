"""The control socket from the client's side: one request, its progress, one reply.

Used by the client library and by the `pocket` command alike.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from typing import Any, Callable, Dict, Iterable, Optional

from nsutil.messages import MessageError
from pocketd import wire
from pocketd.client import errors

DEFAULT_RUNTIME_DIR = "/run/pocketd"
SOCKET = "pocketd.sock"
SLOW = 0.25  # seconds without an answer


def runtime_dir(given: Optional[str] = None) -> str:
    """The runtime directory of the pocketd that is meant: `given`, else POCKETD_RUNTIME_DIR, else the default."""
    return given or os.environ.get("POCKETD_RUNTIME_DIR") or DEFAULT_RUNTIME_DIR


class Lost(errors.NotRunning):
    """pocketd went away in mid-call, before its reply."""


class Control:
    """A connection to pocketd. Not for two threads at once.

    Raises errors.NotRunning when nobody listens, errors.Timeout when pocketd does not accept in time.
    """

    def __init__(self, directory: Optional[str] = None, timeout: Optional[float] = None):
        self.path = os.path.join(runtime_dir(directory), SOCKET)
        self._last = 0
        self._sock = _connect(self.path, timeout)

    def call(
        self,
        op: str,
        fds: Iterable[int] = (),
        progress: Optional[Callable[[str], None]] = None,
        timeout: Optional[float] = None,
        slow: Optional[Callable[[], None]] = None,
        **fields: Any,
    ) -> Dict[str, Any]:
        """Make one request and wait for its reply, which is returned as a map.

        The descriptors stay the caller's. `progress` is called with each line that pocketd sends meanwhile, `slow` when
        nothing has come for a quarter of a second. `timeout`
        is in seconds for the whole call. Raises errors.Timeout, Lost when pocketd ended before it answered, and the
        typed form of whatever error pocketd replies; PocketError for codes without a type.
        """
        self._last += 1
        id = self._last
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._wait(deadline, op)
            try:
                wire.send(self._sock, {"op": op, "id": id, **fields}, fds)
            except BrokenPipeError:
                pass  # closed on the other side, which may have said why
            if slow and not select.select([self._sock], [], [], SLOW)[0]:
                slow()
            while True:
                self._wait(deadline, op)
                message, received = wire.receive(self._sock)
                received.close()
                if message.get("id") is None and "error" in message:  # pocketd will not hear any request now
                    raise errors.of(wire.Error.unwire(message["error"]))
                if message.get("id") != id:
                    continue
                if "progress" in message:
                    if progress:
                        progress(str(message["progress"]))
                elif "error" in message:
                    raise errors.of(wire.Error.unwire(message["error"]))
                else:
                    return message
        except socket.timeout:
            raise errors.Timeout(f"pocketd did not answer {op!r} within {timeout:g} s") from None
        except (EOFError, ConnectionError):
            raise Lost(f"pocketd ended before it answered {op!r} (socket {self.path})") from None
        except MessageError as e:
            raise errors.ProtocolError(f"pocketd's answer to {op!r} is not understood: {e}") from None

    def _wait(self, deadline: Optional[float], op: str) -> None:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise socket.timeout()
        self._sock.settimeout(left)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connect(path: str, timeout: Optional[float]) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if timeout is not None:  # not settimeout, with which connect(2) fails at once where the queue is full (unix(7))
            limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        sock.connect(path)
        sock.settimeout(timeout)
    except BaseException as e:
        sock.close()
        if isinstance(e, (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)):
            missing = "no socket at" if not isinstance(e, ConnectionRefusedError) else "nobody listens at"
            raise errors.NotRunning(
                f"pocketd is not running ({missing} {path}); start it with `systemctl start pocketd`, "
                "or name another one's directory by POCKETD_RUNTIME_DIR"
            ) from None
        if isinstance(e, PermissionError):
            raise errors.LoginRefused(f"pocketd's socket {path} may not be used: {e.strerror}") from None
        if isinstance(e, (socket.timeout, BlockingIOError)):
            raise errors.Timeout(f"pocketd does not accept connections at {path}") from None
        if isinstance(e, OSError):
            raise errors.NotRunning(f"pocketd cannot be reached at {path}: {e.strerror or e}") from None
        raise
    return sock
