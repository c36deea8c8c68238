"""The `tensorflow` runtime: TensorFlow and Keras imported but never eager; Keras models and SavedModels.

Inputs are adopted without a copy (dlpack). A Keras model is called through one tf.function made when it is loaded, so
that a call costs what the graph costs and results are those of `model(x, training=False)` within float rounding.
"""

from __future__ import annotations

import inspect
import os
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from runtime.interface import TOLD, CannotLoad, Model, keras_backend

# TF_CPP_* only filters log lines; a caller that differs in those is still served warm.
VARIABLES: Tuple[str, ...] = (
    "TF_[!C]*", "TF_C[!P]*", "TF_CP[!P]*", "TF2_*", "KERAS_*", "XLA_*", "OMP_*", "GOMP_*", "KMP_*", "MKL_*",
    "OPENBLAS_*", "GOTO_*", "BLIS_*", "ONEDNN_*", "DNNL_*", "CUDA_*", "NPY_*", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION",
)  # fmt: skip

# oneDNN's own allocator keeps what a model's loading and rehearsal needed; the C library's can give it back, so that
# workers do not carry it.
ENVIRONMENT = {"TF_ONEDNN_USE_SYSTEM_ALLOCATOR": "1", **TOLD}
defaults = keras_backend


def preload(names: List[str]) -> None:
    """Import TensorFlow, numpy and Keras, and what a script's first lines would still load lazily. Stays uneager."""
    global VARIABLES
    import keras
    import numpy  # noqa: F401
    import tensorflow as tf

    if not tf.test.is_built_with_cuda():  # scripts like to switch off GPUs by one, which means nothing to it
        VARIABLES = tuple(pattern for pattern in VARIABLES if pattern != "CUDA_*")
    # Lazy loaders: each of these names costs milliseconds to a script that is the first to say it.
    for module in (tf.keras, keras.applications, keras.saving, tf.compat.v1, tf.data, tf.lite, tf.saved_model):
        dir(module)


def load_file(path: str) -> Model:
    """A Keras model (.keras, .h5) or a SavedModel directory. Raises CannotLoad for anything else."""
    import tensorflow as tf

    if os.path.isdir(path):
        if not os.path.exists(os.path.join(path, "saved_model.pb")):
            raise CannotLoad("the directory holds no saved_model.pb")
        return SavedModel(tf.saved_model.load(path))
    if path.endswith((".keras", ".h5", ".hdf5")):
        return KerasModel(tf.keras.models.load_model(path, compile=False))
    raise CannotLoad("TensorFlow loads .keras and .h5 files and SavedModel directories")


def adopt_object(made: Any) -> Optional[Model]:
    """A Keras model that a factory made, or an object that holds Keras models; None for anything else."""
    import tensorflow as tf

    if isinstance(made, tf.keras.Model):
        return KerasModel(made)
    return Holder(made) if next(nested_models(made), None) is not None else None


def arrays(value: Any) -> Any:
    """An eager tensor's memory as numpy array; a copy where it is not this host's. Of a variable, of TensorFlow's or of
    Keras', what it holds. None for anything else."""
    import numpy as np
    import tensorflow as tf

    if isinstance(value, tf.keras.Variable):
        value = value.value
    if isinstance(value, tf.Variable):
        value = value.value()
    if not isinstance(value, tf.Tensor):
        return np.asarray(value) if hasattr(type(value), "__array__") and not isinstance(value, np.generic) else None
    try:
        return np.asarray(memoryview(value))  # .numpy() would copy
    except (TypeError, ValueError, BufferError):
        return np.asarray(value.numpy())  # of one number, and of words, no array


def adopt(value: Any) -> Any:
    """numpy arrays in `value`, nested as it is, as tensors over the same memory."""
    import numpy as np

    if isinstance(value, np.ndarray):
        return _adopt(value)
    if isinstance(value, dict):
        return {k: adopt(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(adopt(v) for v in value)
    return value


def _worded(value: Any, inputs: Optional[List[Dict[str, Any]]]) -> Any:
    """Lists of words as tensors, for Keras takes no others. A list with one for each of several inputs stays."""
    import tensorflow as tf

    if inputs and all(takes["dtype"] != "string" for takes in inputs):
        return value
    if isinstance(value, dict):
        return {k: _worded(v, None) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == len(inputs or ()) > 1:
        return [_worded(v, None) for v in value]
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return tf.constant(value) if isinstance(first, (str, bytes)) else value


def _adopt(array: Any) -> Any:
    import tensorflow as tf

    # from_dlpack aborts the process on an address that is not a multiple of 64; what it refuses otherwise is copied.
    if array.flags.c_contiguous and array.flags.writeable and array.size and not array.ctypes.data % 64:
        try:
            return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
        except (TypeError, BufferError, ValueError, RuntimeError, tf.errors.OpError):
            pass  # a dtype that one of the two does not exchange: bfloat16
    return tf.convert_to_tensor(array)


class KerasModel(Model):
    """Called with tensors it runs as a graph in inference; with keyword arguments directly, as Keras itself would.

    A graph is what its Python did when it was traced: it is traced again after a call of a method that is not Keras'
    own, which may have changed what it goes by. One graph does for many shapes, and so sees less of them than Keras,
    which looks at those that do not fit what the model takes itself.
    """

    def __init__(self, model: Any):
        super().__init__(model, keras_inputs(model))
        self._relaxed: Optional[bool] = True  # one graph for many shapes; False: one for each; None: no graph
        self._graph = self._traced()

    def _traced(self) -> Callable[..., Any]:
        import tensorflow as tf

        return self._run if self._relaxed is None else tf.function(self._run, reduce_retracing=self._relaxed)

    def _run(self, *args: Any) -> Any:
        return self.object(*args, training=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [adopt(_worded(a, self.inputs)) for a in args]
        if kwargs:
            return self.object(*tensors, **{"training": False, **{k: adopt(v) for k, v in kwargs.items()}})
        if self._relaxed is None or not self._fits(tensors):
            return self._run(*tensors)
        try:
            return self._graph(*tensors)
        except Exception:
            # A model whose Python cannot be traced, or not for shapes in general. If it fails directly too, that is the
            # error to show.
            result = self._run(*tensors)
            self._relaxed = False if self._relaxed else None
            self._graph = self._traced()
            return result

    def _fits(self, tensors: List[Any]) -> bool:
        """Whether shapes are as the model says that it takes them, as far as it does."""
        if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
            tensors = list(tensors[0])
        if not self.inputs or len(tensors) != len(self.inputs):
            return True
        return all(_is_of(tensor, takes["shape"]) for tensor, takes in zip(tensors, self.inputs))

    def method(self, name: str) -> Callable[..., Any]:
        found = super().method(name)
        module = getattr(found, "__module__", None) or ""
        if module.partition(".")[0] in ("keras", "tensorflow"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            finally:
                self._graph = self._traced()

        return call

    def rehearse(self) -> None:
        example = zeros(self.inputs)
        if example is not None:
            self(_as_taken(self.object, example))


class SavedModel(Model):
    """Its serving_default signature, by position in the order of input names or by keyword; or what it itself calls.

    A signature with one output gives that output itself. `method(name)` is another signature, or an attribute.
    """

    def __init__(self, loaded: Any):
        super().__init__(loaded)
        self._signatures: Dict[str, Any] = dict(getattr(loaded, "signatures", {}) or {})
        default = self._signatures.get("serving_default")
        if default is None and len(self._signatures) == 1:
            default = next(iter(self._signatures.values()))
        if default is None and not callable(loaded):
            raise CannotLoad(f"the SavedModel has no serving_default signature; it has {sorted(self._signatures)}")
        self._default = _signature(default) if default is not None else _adopting(loaded)
        if default is not None:
            _, takes = default.structured_input_signature
            self.inputs = [_described(name, spec.dtype.name, spec.shape) for name, spec in sorted(takes.items())]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._default(*args, **kwargs)

    def method(self, name: str) -> Callable[..., Any]:
        if name in self._signatures:
            return _signature(self._signatures[name])
        return _adopting(super().method(name))

    def rehearse(self) -> None:
        example = zeros(self.inputs)
        if example is not None:
            self(*example)


class Holder(Model):
    """An object with Keras models in it, such as a detector of several stages. Its methods get numpy arrays.

    What it does with its models is its own business; each is run once directly, which makes kernels and weights warm.
    """

    def rehearse(self) -> None:
        for model in nested_models(self.object):
            example = zeros(keras_inputs(model), free=64)
            if example is not None:
                model(_as_taken(model, example))


def _as_taken(model: Any, example: List[Any]) -> Any:
    """One for each input, in the dict or whatever else the model was made with."""
    import tensorflow as tf

    takes = getattr(model, "_inputs_struct", None)  # of keras.Functional, which says it nowhere else
    if takes is not None:
        of = {id(taken): value for taken, value in zip(model.inputs, example)}
        return tf.nest.pack_sequence_as(takes, [of[id(taken)] for taken in tf.nest.flatten(takes)])
    return example[0] if len(example) == 1 else example


def _is_of(tensor: Any, shape: Optional[List[Optional[int]]]) -> bool:
    given = getattr(tensor, "shape", None)
    if shape is None or given is None:
        return True
    return len(given) == len(shape) and all(n is None or n == m for n, m in zip(shape, given))


def _signature(function: Any) -> Callable[..., Any]:
    names = sorted(function.structured_input_signature[1])

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"the model takes {len(names)} inputs ({', '.join(names)}), not {len(args)}")
        given = {**dict(zip(names, args)), **kwargs}
        result = function(**{k: adopt(v) for k, v in given.items()})
        return next(iter(result.values())) if isinstance(result, dict) and len(result) == 1 else result

    return call


def _adopting(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*map(adopt, args), **{k: adopt(v) for k, v in kwargs.items()})


def nested_models(made: Any, depth: int = 3) -> Iterator[Any]:
    """Keras models among an object's attributes, and in lists and dicts there, a few levels deep."""
    import tensorflow as tf

    if isinstance(made, tf.keras.Model):
        yield made
    elif depth:
        held = made if isinstance(made, (list, tuple)) else vars(made) if hasattr(made, "__dict__") else made
        for value in held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ():
            yield from nested_models(value, depth - 1)


def keras_inputs(model: Any) -> Optional[List[Dict[str, Any]]]:
    """What a Keras model takes; None when it does not say."""
    takes = getattr(model, "inputs", None)
    if not isinstance(takes, (list, tuple)) or not takes:
        # A subclassed model; many say what they take as the default of their build().
        usual = inspect.signature(model.build).parameters.get("input_shape")
        shape = usual.default if usual else None
        return [_described("inputs", "float32", shape)] if isinstance(shape, tuple) and shape else None
    return [
        _described(t.name.partition(":")[0], getattr(t.dtype, "name", None) or str(t.dtype), t.shape) for t in takes
    ]


def _described(name: str, dtype: str, shape: Any) -> Dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": None if shape is None or _rank(shape) is None else list(shape)}


def _rank(shape: Any) -> Optional[int]:
    try:
        return len(shape)
    except ValueError:  # a TensorShape of unknown rank
        return None


def zeros(inputs: Optional[List[Dict[str, Any]]], free: Optional[int] = None) -> Optional[List[Any]]:
    """Zeros for each input: batch 1, other free dimensions `free`; None when a shape is not known well enough."""
    import tensorflow as tf

    if not inputs:
        return None
    made = []
    for takes in inputs:
        shape = takes["shape"]
        if shape is None or takes["dtype"] == "string":
            return None
        whole = [1 if i == 0 and n is None else free if n is None else n for i, n in enumerate(shape)]
        if None in whole:
            return None
        made.append(tf.zeros(whole, takes["dtype"]))
    return made
