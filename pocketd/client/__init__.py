"""pocketd's client library: use a warm service from an app that holds no runtime itself.

    from pocketd.client import login
    with login("tensorflow") as session:
        model = session.model("mobilenet")
        image = session.tensor((1, 224, 224, 3), "float32")
        image.numpy()[...] = pixels
        scores = model(image)

Standard library and msgpack only; numpy is used when it is there. The asyncio form is `pocketd.client.aio`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocketd.client.errors import (
        BadTensor,
        BadValue,
        Cancelled,
        LoginRefused,
        NotRunning,
        OutOfMemory,
        PocketError,
        ProtocolError,
        RemoteError,
        ServiceFailed,
        SessionClosed,
        Timeout,
        UnknownModel,
        WorkerDied,
    )
    from pocketd.client.model import Model
    from pocketd.client.session import Session, login
    from pocketd.client.tensor import Tensor


__all__ = [
    "BadTensor",
    "BadValue",
    "Cancelled",
    "LoginRefused",
    "Model",
    "NotRunning",
    "OutOfMemory",
    "PocketError",
    "ProtocolError",
    "RemoteError",
    "ServiceFailed",
    "Session",
    "SessionClosed",
    "Tensor",
    "Timeout",
    "UnknownModel",
    "WorkerDied",
    "login",
]

# Where each name is. Imported when it is asked for: the `pocket` command uses parts of this package and starts often.
_PLACES = {"Model": "model", "Session": "session", "Tensor": "tensor", "login": "session"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"pocketd.client.{_PLACES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
