"""Pocket-rpc, as its authors built it (Park and others, HotEdge 2020): gRPC in front of a process that holds the model.
On a unix socket, with bytes as they are for a message, so that nothing is packed but the tensor itself.

usage: python -m bench.rpc FILE NAME    an app: the seconds from its channel's making to a result of the model, printed
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench import usage
from bench.launch import ENVIRONMENT, Failed
from bench.models import INPUTS
from bench.usage import Used

ROOT = Path(__file__).resolve().parents[1]
_SERVICE = "bench.Models"
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_START = "from bench import rpc; rpc.serve({address!r}, {files!r})"


class Rpc:
    """A handle to the server."""

    def __init__(self, address: str, pid: int):
        self.address = address
        self.pid = pid

    def command(self, name: str) -> list[str]:
        return [sys.executable, "-m", "bench.rpc", self.address, name]

    def used(self) -> Used:
        return usage.process(self.pid)


@contextmanager
def server(directory: Path, files: dict[str, Path]) -> Iterator[Rpc]:
    """One that holds these models, rehearsed; ended afterwards. Raises Failed."""
    address = f"unix:{directory / 'rpc.sock'}"
    code = _START.format(address=address, files={name: str(path) for name, path in files.items()})
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout
        if process.stdout.readline() != b"ready\n":
            raise Failed("the gRPC server does not come up")
        yield Rpc(address, process.pid)
    finally:
        process.communicate(timeout=60)


def serve(address: str, files: dict[str, str]) -> None:
    """Until standard input ends."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc  # type: ignore[import-untyped]
    import tensorflow as tf

    def method(call: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda request, context: call(request))

    def model(file: str) -> Any:
        loaded = tf.keras.models.load_model(file, compile=False)
        shape = (1, *loaded.input_shape[1:])
        function = tf.function(lambda pixels: loaded(pixels, training=False))
        function(tf.zeros(shape))

        def call(request: bytes) -> bytes:
            results = function(tf.constant(np.frombuffer(request, "float32").reshape(shape)))
            return bytes((results[0] if isinstance(results, list) else results).numpy().tobytes())

        return call

    methods = {name: method(model(file)) for name, file in files.items()}
    methods["null"] = method(lambda request: b"")
    serving = grpc.server(ThreadPoolExecutor(20), options=_OPTIONS)
    serving.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, methods),))
    serving.add_insecure_port(address)
    serving.start()
    print("ready", flush=True)
    sys.stdin.read()
    serving.stop(None)


class Channel:
    """A client's connection; needs no TensorFlow."""

    def __init__(self, address: str):
        import grpc

        self._channel = grpc.insecure_channel(address, options=_OPTIONS)

    def method(self, name: str) -> Any:
        """A function from bytes to bytes."""
        return self._channel.unary_unary(f"/{_SERVICE}/{name}")

    def close(self) -> None:
        self._channel.close()


def result(address: str, name: str) -> tuple[float, float, float]:
    """As measures.client_result: seconds to a first result, to the same again, and the sum of the result."""
    image = np.full(INPUTS[name], 0.5, "float32")
    began = time.monotonic()
    channel = Channel(address)
    method = channel.method(name)
    scores = np.frombuffer(method(image.tobytes()), "float32")
    first = time.monotonic()
    method(image.tobytes())
    again = time.monotonic()
    channel.close()
    return first - began, again - first, float(np.abs(scores).sum())


if __name__ == "__main__":
    print(*result(*sys.argv[1:]))
