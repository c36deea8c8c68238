"""What can go wrong for an app that uses a service, as types.

Each is a `PocketError` with a code for programs, a message for people and a dict of details. They are wire errors, so
an error that the daemon or the worker sends becomes the type of its code here.
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Type

from pocketd import wire


class PocketError(wire.Error):
    """The base of all: `code`, `message`, `detail`."""

    def __init__(self, message: str, code: Optional[str] = None, **detail: Any):
        super().__init__(code or self.default_code, message, **detail)

    default_code = "failed"


class NotRunning(PocketError):
    """There is no pocketd to talk to."""

    default_code = "not-running"


class LoginRefused(PocketError):
    """pocketd knows the caller and says no: no such service or pocket, not allowed, a limit that cannot be enforced."""

    default_code = "refused"


class ServiceFailed(PocketError):
    """The service or the worker could not be started; the message has the reason, the template's own words included."""

    default_code = "service-failed"


class UnknownModel(PocketError):
    """No model of that name may be used in this session, or no model can be loaded from that file."""

    default_code = "unknown-model"


class BadTensor(PocketError):
    """A tensor, handle or arena that cannot be used."""

    default_code = "bad-tensor"


class BadValue(PocketError):
    """A value that cannot travel between client and worker."""

    default_code = "bad-value"


class Timeout(PocketError, TimeoutError):
    """No reply in time. The call goes on to its end in the worker or is interrupted there; the session stays usable."""

    default_code = "timeout"


class Cancelled(PocketError):
    """The call was cancelled. The session stays usable."""

    default_code = "cancelled"


class SessionClosed(PocketError):
    """The session was closed on this side, or belongs to the process that this one was forked from."""

    default_code = "closed"


class ProtocolError(PocketError):
    """The peer sent what it must not; the session is over."""

    default_code = "protocol"


class WorkerDied(PocketError):
    """The worker ended in mid-session: `exit_code` or `signal` (the other is None; both when unknown), and `reason`,
    one line such as the memory limit that killed it, or None."""

    default_code = "worker-died"

    def __init__(
        self,
        message: str,
        exit_code: Optional[int] = None,
        signal: Optional[int] = None,
        reason: Optional[str] = None,
        **detail: Any,
    ):
        super().__init__(message, exit_code=exit_code, signal=signal, reason=reason, **detail)
        self.exit_code = exit_code
        self.signal = signal
        self.reason = reason


class OutOfMemory(WorkerDied):
    """The kernel killed the worker for memory.

    `pocket`; `limit`, in bytes, is the memory.max that was reached, None where it was the host's memory or a limit
    above what the pocket runs in; `peak` is the most that was used under it, None before Linux 5.19.
    """

    default_code = "memory"

    def __init__(
        self,
        message: str,
        exit_code: Optional[int] = None,
        signal: Optional[int] = None,
        reason: Optional[str] = None,
        pocket: Optional[str] = None,
        limit: Optional[int] = None,
        peak: Optional[int] = None,
        **detail: Any,
    ):
        super().__init__(message, exit_code, signal, reason, pocket=pocket, limit=limit, peak=peak, **detail)
        self.pocket = pocket
        self.limit = limit
        self.peak = peak


class RemoteError(PocketError):
    """An exception in the worker: its type's name, its message, and its traceback as text in `remote_traceback`."""

    default_code = "remote"

    def __init__(self, message: str, type: str = "Exception", traceback: str = "", **detail: Any):
        super().__init__(message, type=type, traceback=traceback, **detail)
        self.type = type
        self.remote_traceback = traceback

    def __str__(self) -> str:
        said = f"{self.type}: {self.message}" if self.message else self.type
        return f"{said}\n\nIn the worker:\n{self.remote_traceback.rstrip()}" if self.remote_traceback else said


_TYPES: Dict[str, Type[PocketError]] = {
    t.default_code: t
    for t in (NotRunning, LoginRefused, ServiceFailed, UnknownModel, BadTensor, BadValue, Cancelled, ProtocolError)
}


def of(error: wire.Error, default: Type[PocketError] = PocketError) -> PocketError:
    """The typed form of an error that travelled; `default` for a code that has no type of its own."""
    if isinstance(error, PocketError):
        return error
    detail = dict(error.detail)
    if error.code == RemoteError.default_code:
        kind, trace = str(detail.pop("type", "Exception")), str(detail.pop("traceback", ""))
        return RemoteError(error.message, kind, trace, **detail)
    return _TYPES.get(error.code, default)(error.message, error.code, **detail)
