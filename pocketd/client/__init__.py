"""pocketd's client library: use a warm service from an app that holds no runtime itself.

    from pocketd.client import login
    with login("tensorflow") as session:
        model = session.model("mobilenet")
        image = session.tensor((1, 224, 224, 3), "float32")
        image.numpy()[...] = pixels
        scores = model(image)

Standard library and msgpack only; numpy is used when it is there. The asyncio form is `pocketd.client.aio`.
"""

from pocketd.client.errors import (
    BadTensor,
    BadValue,
    Cancelled,
    LoginRefused,
    NotRunning,
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
