"""The `python` runtime's models: onnxruntime, TorchScript, and what it refuses."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketd.client import Session, UnknownModel


def make(code: str) -> None:
    """In a process of its own, so that no framework's threads are here."""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# What the onnx package makes of two nodes, Add and Mul, over inputs a and b of shape [n, 3]: outputs c and d.
TWO = base64.b64decode(
    "CAg6ewoOCgFhCgFiEgFjIgNBZGQKDgoBYQoBYhIBZCIDTXVsEgFnWhQKAWESDwoNCAESCQoDEgFuCgIIA1oUCgFiEg8KDQgBEgkKAxIBbgoCCANi"
    "FAoBYxIPCg0IARIJCgMSAW4KAggDYhQKAWQSDwoNCAESCQoDEgFuCgIIA0IECgAQDQ=="
)


def test_an_onnx_model_of_the_pocket_runs(session: Session, pocket: Path) -> None:
    pytest.importorskip("onnxruntime")
    (pocket / "two.onnx").write_bytes(TWO)
    model = session.load("two.onnx")
    assert [i["name"] for i in model.inputs] == ["a", "b"] and model.inputs[0]["shape"] == [None, 3]
    a, b = np.array([[1, 2, 3]], np.float32), np.array([[4, 5, 6]], np.float32)
    for total, product in (model(a, b), model(b=b, a=a)):
        assert total.tolist() == [[5, 7, 9]] and product.tolist() == [[4, 10, 18]]


def test_a_torchscript_model_of_the_pocket_runs(session: Session, pocket: Path) -> None:
    pytest.importorskip("torch")
    make(f"""
import torch
torch.jit.script(torch.nn.Sequential(torch.nn.ReLU())).save({str(pocket / "relu.pt")!r})
""")
    assert session.load("relu.pt")(np.array([-1, 2], np.float32)).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["detector.py", "weights.pth", "model.joblib"])
def test_other_files_are_refused_by_name(session: Session, pocket: Path, name: str) -> None:
    (pocket / name).touch()
    with pytest.raises(UnknownModel, match=name):
        session.load(name)
