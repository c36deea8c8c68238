"""What a runtime is: a module of this package with these names, and what a loaded model is.

VARIABLES               fnmatch patterns of the environment variables that it reads when it is imported
ENVIRONMENT             variables that its templates start with, unless the service's definition has them
defaults()              of those variables, what it has gone by where they are not set, as far as it tells
preload(names)          import it, so that everything after is quick; nothing that a plain fork would lose
load_file(path)         a Model from a file or directory by the framework's own loader
adopt_object(object)    a Model of what a factory made, or None when it is nothing special to this runtime
arrays(value)           a framework's tensor as numpy array without a copy where that can be; None for anything else
"""

from __future__ import annotations

import sys
from typing import Any, Callable, Dict, List, Optional

# What libraries do at their import unless they are told, and what no live fork can carry over: jemalloc's thread for
# work in the background blocks all signals, and its copies in pyarrow (which pandas and lightgbm import) and polars
# start one; onnxruntime opens a database for telemetry.
TOLD = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "_RJEM_MALLOC_CONF": "background_thread:false",
    "ORT_DISABLE_TELEMETRY": "1",
}


def keras_backend() -> Dict[str, str]:
    """Which one Keras has, where it is imported. Programs like to say so before they import it."""
    keras = sys.modules.get("keras.src.backend.config")
    return {"KERAS_BACKEND": keras.backend()} if keras else {}


class Model:
    """A model as a session calls it. Tensors arrive as numpy arrays over shared memory, 64-byte aligned.

    They are the caller's memory during the call; what keeps one keeps it as it was at the end of that. Results may be
    nested lists, tuples and dicts of plain values, numpy arrays and tensors of the framework.
    """

    def __init__(self, object: Any, inputs: Optional[List[Dict[str, Any]]] = None):
        self.object = object
        self.inputs = inputs
        """What it takes, as maps with name, dtype and shape (None for a free dimension); None when it does not say."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.object(*args, **kwargs)

    def method(self, name: str) -> Callable[..., Any]:
        """A public method of the object. Raises AttributeError."""
        if name.startswith("_"):
            raise AttributeError(f"{name!r} is not public")
        found = getattr(self.object, name)
        if not callable(found):
            raise AttributeError(f"{name!r} of this model is not a method")
        function: Callable[..., Any] = found
        return function

    def rehearse(self) -> None:
        """Run once what can be run without knowing what it is for, so that a worker's first call is warm."""


class CannotLoad(Exception):
    """No loader of this runtime knows the file, or its loader's package is not there."""
