"""Other kernels beside ours: found, called as they want it, left out with a note when they fail."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from marlin_convert.bench import products as b
from marlin_convert.bench import results
from marlin_convert.bench.products import Peer, Weights
from marlin_convert.bench.shapes import Shape
from marlin_convert.errors import DeviceError
from tests.support.bench import SHAPE, Bench, peer


def test_peers_join_and_fail_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    machine = Bench()

    def broken(shape: Shape, weights: Weights, device: torch.device) -> Callable[[torch.Tensor], results.Calls]:
        raise RuntimeError

    peers = [peer("good", machine, 4.0), peer("picky", machine, 1.0, lambda M: M > 1), Peer("broken", "0", broken)]
    report = b.bench("model", [SHAPE], machine.rig, batch=(1, 2, 4), peers=peers)
    assert report.peers == {"good": "1.2", "picky": "1.2", "broken": "0"}
    found = [{name: speed and speed.us for name, speed in c.peers.items()} for c in report.layers[0].cells]
    assert found == [
        {"good": 4.0, "picky": 1.0, "broken": None},
        {"good": 4.0, "picky": None, "broken": None},
        {"good": 4.0, "picky": None, "broken": None},
    ]
    assert report.notes == {
        "broken failed: RuntimeError": ["qkv 256 x 128"],
        "picky failed: ValueError: no such tile": ["qkv 256 x 128, M = 2", "qkv 256 x 128, M = 4"],
    }
    assert [(c.fp16.us, c.marlin.us) for c in report.layers[0].cells] == [(8.0, 2.0)] * 3
    out, err = capsys.readouterr()
    assert out == ""  # --json prints one document
    assert "good is talkative" in err
    cell = report.as_dict()["layers"][0]["cells"][1]
    assert cell["peers"]["good"]["speedup"] == 2.0
    assert cell["peers"]["picky"] is None


def test_a_peer_that_breaks_the_gpu() -> None:
    machine = Bench()
    synchronized = iter([True, False])  # after the limits; after the peer

    def synchronize() -> None:
        if not next(synchronized):
            raise RuntimeError("CUDA error: an illegal instruction was encountered")

    rig = replace(machine.rig, synchronize=synchronize)
    with pytest.raises(DeviceError, match=r"bad left the GPU unusable \(qkv 256 x 128, M = 1: ValueError: no such"):
        b.bench("model", [SHAPE], rig, batch=(1,), peers=[peer("bad", machine, 1.0, lambda M: True)])


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Put modules of our own where Python looks for vllm and humming."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "packages")

    def packages(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / "packages" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()

    yield packages
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("vllm", "humming"):
            del sys.modules[name]


def test_peers_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marlin_convert.bench.products.util.find_spec", lambda name: None)
    assert b.find_peers() == (
        [], {"vllm is not installed": ["--compare"], "humming-kernels is not installed": ["--compare"]}
    )  # fmt: skip


VLLM = {
    "vllm/__init__.py": "print('INFO: vllm says much')\n",
    "vllm/_custom_ops.py": "",
    "vllm/scalar_type.py": "class scalar_types: uint4b8 = 'uint4b8'\n",
    "vllm/model_executor/layers/quantization/utils/marlin_utils.py": """
import torch

def marlin_make_workspace_new(device):
    return torch.zeros(132, dtype=torch.int32, device=device)

def apply_gptq_marlin_linear(input, weight, weight_scale, weight_zp, g_idx, g_idx_sort_indices, workspace, wtype,
                             output_size_per_partition, input_size_per_partition, is_k_full, bias=None):
    N, K = output_size_per_partition, input_size_per_partition
    assert weight.shape == (K // 16, N * 2) and weight_scale.shape == (K // 128, N) and input.shape[1] == K
    assert weight_zp.numel() == g_idx.numel() == g_idx_sort_indices.numel() == 0 and workspace.numel() == 132
    assert wtype == 'uint4b8' and is_k_full is True
    return input.new_empty((input.shape[0], N))
""",
}
HUMMING = {
    "humming/__init__.py": "",
    "humming/layer.py": """
import torch

class HummingLayer(torch.nn.Module):
    def __init__(self, shape_n, shape_k, weight_config, torch_dtype):
        super().__init__()
        assert weight_config == {"dtype": "uint4", "group_size": 128} and torch_dtype == torch.float16
        self.shape = (shape_n, shape_k)

    def load_from_unquantized(self, weight):
        assert weight.shape == self.shape and weight.dtype == torch.float16
        self.loaded = True

    def transform(self):
        self.ready = self.loaded

    def forward(self, a):
        assert self.ready
        return a.new_empty((a.shape[0], self.shape[0]))
""",
}


def test_the_peers_are_called_as_they_want_it(
    packages: Callable[[dict[str, str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    packages(VLLM | HUMMING)
    peers, notes = b.find_peers()
    assert [(p.name, p.version, p.own_weights) for p in peers] == [
        ("vLLM Marlin", "unknown", False), ("humming", "unknown", True)
    ]  # fmt: skip
    assert notes == {}
    report = b.bench("model", [SHAPE], Bench().rig, batch=(3,), peers=peers)
    assert report.notes == {}
    assert all(report.layers[0].cells[0].peers.values())
    assert capsys.readouterr().out == ""


def test_peers_that_cannot_be_imported(packages: Callable[[dict[str, str]], None]) -> None:
    packages({"vllm/__init__.py": "raise RuntimeError('CUDA 12 is needed')", "humming/__init__.py": ""})
    peers, notes = b.find_peers()
    assert peers == []
    assert notes == {
        "vllm is installed and cannot be used: RuntimeError: CUDA 12 is needed": ["--compare"],
        "humming-kernels is installed and cannot be used: ModuleNotFoundError: No module named 'humming.layer'": [
            "--compare"
        ],
    }
