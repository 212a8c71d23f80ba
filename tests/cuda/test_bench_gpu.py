"""`bench` on a GPU: its clock is plausible, its numbers are within what the hardware allows, its memory comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_convert.bench import products as b
from marlin_convert.bench import results
from marlin_convert.bench.gpu import cuda_rig
from marlin_convert.bench.shapes import Shape
from marlin_convert.device import pick_device
from marlin_convert.native import cuda

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]


@pytest.fixture
def rig() -> results.Rig:
    return cuda_rig(pick_device("cuda"))


def program(*args: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "marlin_convert.cli", *map(str, args), "--json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    document: dict[str, Any] = json.loads(process.stdout)
    return document


def test_the_clock_agrees_with_the_wall(rig: results.Rig) -> None:
    """Products that take milliseconds, one after the other: the host's clock sees the same."""
    x = torch.randn((8192, 8192), dtype=torch.float16, device=rig.device)
    product = partial(torch.matmul, x, x, out=torch.empty_like(x))
    ours = rig.time([product])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        product()
    torch.cuda.synchronize()
    assert ours == pytest.approx((time.perf_counter() - start) / 50 * 1e6, rel=0.2)


def test_the_clock_sees_no_launches(rig: results.Rig) -> None:
    """A tiny kernel takes a microsecond or two in a graph, and several to launch from Python."""
    x = torch.zeros(16, device=rig.device)
    assert 0.3 < rig.time([x.zero_] * 8) < 5


def test_limits(rig: results.Rig) -> None:
    limits, machine = b.measure_limits(rig)
    # The slowest GPU of compute capability 8.0 and newer moves some 100 GB/s, the fastest has about 2.5 PFLOP/s.
    assert 0.05e12 < limits.copy_bytes_per_s < 20e12
    assert 2e12 < limits.fp16_flop_per_s < 5e15
    assert machine.name == torch.cuda.get_device_name(rig.device)
    assert machine.l2_bytes == rig.l2_bytes > 0
    if machine.clocks is not None:  # nvidia-ml-py is there
        assert machine.clocks["sm_mhz"] is None or machine.clocks["sm_mhz"] > 200  # under load


def test_memory_comes_back(rig: results.Rig) -> None:
    b.bench("warm", [Shape("x", 4096, 4096, 32)], rig, batch=(1,))  # workspaces are made, and stay
    before = torch.cuda.memory_allocated(rig.device)
    report = b.bench("model", [Shape("x", 4096, 4096, 32), Shape("y", 4096, 4096, 1)], rig, batch=(1, 512, 2048))
    assert [len(layer.cells) for layer in report.layers] == [3, 3]
    assert report.notes == {}
    # Workspaces of cuBLAS and of the kernels stay; weights (67 MB for two of them as fp16) do not.
    assert torch.cuda.memory_allocated(rig.device) - before < 64 << 20


def test_a_layer_that_does_not_fit_is_noted(rig: results.Rig) -> None:
    report = b.bench("model", [Shape("x", 512, 512, 4), Shape("huge", 1 << 20, 1 << 20, 1)], rig, batch=(1,))
    assert [layer.shape.name for layer in report.layers] == ["x"]
    assert any(note.startswith("left out: it needs") for note in report.notes)


def test_the_program() -> None:
    document = program("bench", "--preset", "mistral-7b", "--batch", "1,16,1024")
    assert [(x["name"], x["K"], x["N"]) for x in document["layers"]] == [
        ("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 28672), ("down", 14336, 4096)
    ]  # fmt: skip
    for layer in document["layers"]:
        assert [cell["M"] for cell in layer["cells"]] == [1, 16, 1024]
        for cell in layer["cells"]:
            for product in (cell["fp16"], cell["marlin"]):
                # A kernel that only reads is a little faster than a copy; a shape may suit cuBLAS better than 8192³.
                assert 0.02 < product["share_of_limit"] < 1.25, (layer["name"], cell)
            chosen = cuda.dequantizing_pays(cell["M"], layer["N"], layer["K"], 0)
            assert cell["marlin"]["method"] == ("dequantize" if chosen else "kernel")
    gate_up = document["layers"][2]["cells"]
    assert gate_up[0]["marlin"]["speedup"] > 1.5
    assert gate_up[1]["marlin"]["speedup"] > 1.5


def test_the_program_on_its_own_output(tmp_path: Path) -> None:
    program("demo", tmp_path / "out", "--device", "cpu")
    document = program("bench", tmp_path / "out", "--batch", "1,33")
    assert document["layers"]
    assert all(cell["fp16"]["us"] > 0 < cell["marlin"]["us"] for x in document["layers"] for cell in x["cells"])


def test_peers_are_measured_or_named() -> None:
    document = program("bench", "--batch", "1", "--compare")
    said = " ".join(note["note"] for note in document["notes"])
    for name, package in (("vLLM Marlin", "vllm"), ("humming", "humming-kernels")):
        measured = [cell["peers"].get(name) for layer in document["layers"] for cell in layer["cells"]]
        assert all(measured) or package in said or f"{name} failed" in said
