"""Pockets that may use a GPU: each worker has a context of its own, made after its fork.

They need a device of NVIDIA's and a torch that uses it, and skip elsewhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from pocketd.client import login
from tests.conftest import CONFIG, Pocketd
from tests.launch.held.pocket import Pocket, Pockets, popen

DEVICES = [path for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm") if os.path.exists(path)]
PROGRAM = """
import sys
import torch
a = torch.arange(1 << 16, dtype=torch.float32).reshape(256, 256) / 65536
{before}
here = 1
if torch.cuda.is_available():
    b = a.cuda()
    print(torch.cuda.get_device_name(0), (b @ b).sum().item(), sys.argv[1:])
else:
    print("no device", sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if not DEVICES:
        pytest.skip("this host has no GPU of NVIDIA's")
    code = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        pytest.skip("no torch here uses the GPU")


@pytest.fixture
def make(own_pocketd: Callable[[str], Pocketd], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pocket]:
    """`make(source, checkpoint, **keys)`: a pocket of a service that has torch."""
    variables = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    env = "{ " + ", ".join(f'{name} = "{value}"' for name, value in variables.items()) + " }"
    service = f'\n[service.torch]\nruntime = "python"\npreload = ["torch"]\nenv = {env}\n'
    pools = Pockets(own_pocketd(CONFIG + service), tmp_path_factory.mktemp("gpu"))

    def make(source: str, checkpoint: str | None = None, devices: bool = True, **keys: object) -> Pocket:
        if devices:
            keys["allow"] = {"devices": DEVICES}
        return pools.make(source, checkpoint, service="torch", **keys)

    return make


def test_a_pocket_that_may_uses_the_gpu_and_no_other(make: Callable[..., Pocket]) -> None:
    source = PROGRAM.format(before="")
    make(source).same("a", "b", way="root")
    assert make(source, devices=False).pocket("a").out == b"no device ['a']\n"


def test_a_pocket_held_before_it_uses_the_gpu(make: Callable[..., Pocket]) -> None:
    pocket = make(PROGRAM.format(before=""), "here = 1")
    pocket.warm()
    expected = pocket.same("0").out
    runs = [popen(pocket, str(n)) for n in range(4)]
    for n, run in enumerate(runs):
        out, err = run.communicate(timeout=120)
        assert out == expected.replace(b"'0'", b"'%d'" % n), err


@pytest.mark.parametrize("before", ["kept = a.cuda()", "torch.cuda.init()"])
def test_a_context_before_the_checkpoint_is_named(make: Callable[..., Pocket], before: str) -> None:
    pocket = make(PROGRAM.format(before=before), "here = 1")
    why = pocket.refused()
    assert "(device: /dev/nvidia0)" in why and "Open it after that" in why and len(why) < 1000, why
    pocket.same("x", way="root")


def test_a_program_that_asks_for_a_gpu_and_has_none_is_held(make: Callable[..., Pocket]) -> None:
    """CUDA's library leaves pipes and threads behind also where it finds no device."""
    pocket = make(PROGRAM.format(before="torch.cuda.is_available()"), "here = 1", devices=False)
    pocket.warm()
    assert pocket.from_held("x").out == b"no device ['x']\n"


def test_a_function_that_uses_the_gpu(make: Callable[..., Pocket]) -> None:
    source = "import torch\ndef double(n):\n    return torch.tensor(float(n)).cuda().mul(2).item()\n"
    pocket = make(source, program=None, preload=["app"])
    for _ in range(2):
        with login(pocket.name, runtime_dir=str(pocket.pocketd.runtime_dir)) as session:
            assert [session.call("app:double", n) for n in (1, 2, 3)] == [2, 4, 6]
