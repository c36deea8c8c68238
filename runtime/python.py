"""The `python` runtime: any modules, by `preload`; models by onnxruntime, by torch (TorchScript), or by a factory."""

from __future__ import annotations

import importlib
import sys
from typing import Any, Dict, List, Optional

from runtime.interface import TOLD, CannotLoad, Model, keras_backend

# What is preloaded is anybody's choice, so these are the prefixes of all that are commonly read at import.
VARIABLES = (
    "OMP_*", "GOMP_*", "KMP_*", "MKL_*", "OPENBLAS_*", "GOTO_*", "BLIS_*", "ONEDNN_*", "DNNL_*", "NPY_*", "CUDA_*",
    "TORCH_*", "PYTORCH_*", "TORCHINDUCTOR_*", "ATEN_*", "ORT_*", "JAX_*", "XLA_*", "KERAS_*", "TF_[!C]*", "TF_C[!P]*",
    "OPENCV_*", "HF_*", "TRANSFORMERS_*", "SKLEARN_*", "JOBLIB_*", "SCIPY_*", "POLARS_*", "ARROW_*", "MPL*",
    "NUMBA_*", "TQDM_*", "MATPLOTLIBRC",
)  # fmt: skip

ENVIRONMENT: Dict[str, str] = TOLD
defaults = keras_backend


def preload(names: List[str]) -> None:
    """Import each module. An error of one is its own, with its traceback."""
    for name in names:
        importlib.import_module(name)


def load_file(path: str) -> Model:
    """An .onnx model, or a TorchScript .pt where torch is. Raises CannotLoad for anything else."""
    try:
        if path.endswith(".onnx"):
            import onnxruntime

            return OnnxModel(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
        if path.endswith((".pt", ".ts")):
            import torch

            return TorchModel(torch.jit.load(path, map_location="cpu").eval())
    except ImportError as e:
        raise CannotLoad(f"{e}; add the package to the service's preload") from e
    raise CannotLoad("this runtime loads .onnx files and TorchScript .pt files; use a factory for others")


def adopt_object(made: Any) -> Optional[Model]:
    """A torch module is called with torch tensors; anything else as it is."""
    torch = sys.modules.get("torch")
    return TorchModel(made.eval()) if torch and isinstance(made, torch.nn.Module) else None


def arrays(value: Any) -> Any:
    """A tensor of torch, jax or another framework with `__array__` as numpy array; None for anything else."""
    torch = sys.modules.get("torch")
    if torch and isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    np = sys.modules.get("numpy")
    if np is None or not hasattr(value, "__array__"):
        return None
    return np.asarray(value)


class OnnxModel(Model):
    """Inputs by position, in the model's own order, or by keyword. One output is given itself, several as a list."""

    def __init__(self, session: Any):
        described = [
            {"name": i.name, "dtype": _dtype(i.type), "shape": [_length(n) for n in i.shape]}
            for i in session.get_inputs()
        ]
        super().__init__(session, described)
        self._names = [i.name for i in session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self._names):
            raise TypeError(f"the model takes {len(self._names)} inputs ({', '.join(self._names)}), not {len(args)}")
        results = self.object.run(None, {**dict(zip(self._names, args)), **kwargs})
        return results[0] if len(results) == 1 else results

    def rehearse(self) -> None:
        import numpy as np

        assert self.inputs is not None
        shapes = [[1 if k == 0 and n is None else n for k, n in enumerate(i["shape"])] for i in self.inputs]
        if all(i["dtype"] for i in self.inputs) and all(None not in s for s in shapes):
            self(*(np.zeros(s, i["dtype"]) for s, i in zip(shapes, self.inputs)))


class TorchModel(Model):
    """Called without gradients; tensors share the arena's memory."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.inference_mode():
            return self.object(*map(_torch, args), **{k: _torch(v) for k, v in kwargs.items()})


def _torch(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {k: _torch(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_torch(v) for v in value)
    return value


def _dtype(name: str) -> Optional[str]:
    """numpy's name for onnxruntime's "tensor(float)"."""
    inner = name[len("tensor(") : -1] if name.startswith("tensor(") else ""
    known: Dict[str, str] = {"float": "float32", "double": "float64"}
    return None if inner in ("", "string") else known.get(inner, inner)


def _length(n: Any) -> Optional[int]:
    return n if isinstance(n, int) else None
