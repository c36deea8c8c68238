"""A model of a session, as an app calls it."""

from __future__ import annotations

from typing import Any, Dict, Optional


class Model:
    """Call it with tensors or arrays: `scores = model(image)`; or call a public method of the object that it is in the
    service: `faces.detect_faces(image)`, which is `faces.method("detect_faces")(image)`.

    In an asyncio session each call gives an awaitable. `timeout` in seconds may be given to each. `inputs` lists what
    the model takes, where it says so: maps with name, dtype and shape (None for a free dimension).
    """

    def __init__(self, session: Any, description: Dict[str, Any], method: Optional[str] = None):
        self._session = session
        self._description = description
        self._method = method

    @property
    def name(self) -> str:
        return str(self._description["name"])

    @property
    def inputs(self) -> Any:
        return self._description.get("inputs")

    def __call__(self, *args: Any, timeout: Optional[float] = None, **kwargs: Any) -> Any:
        return self._session.invoke(self._description["number"], self._method, args, kwargs, timeout)

    def method(self, name: str) -> Model:
        """A public method of the model's object, to be called like the model."""
        return Model(self._session, self._description, name)

    def __getattr__(self, name: str) -> Model:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.method(name)

    def __repr__(self) -> str:
        return f"Model({self.name!r}{', ' + self._method if self._method else ''})"
