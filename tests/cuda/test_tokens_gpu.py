"""`marlin-convert bench --tokens` on a GPU: graphs decode what eager code decodes, and the command's output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import marlin_convert
from marlin_convert.bench.tokens import GRAPHS, LAUNCHES, Decoder, capture, time_on_gpu
from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.convert import convert
from marlin_convert.native import cuda
from marlin_convert.options import Options
from tests.support.tiny_models import llama, make, mixtral

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]


@pytest.mark.parametrize("batch", [1, 16])
def test_a_graph_decodes_what_launches_decode(tmp_path: Path, batch: int) -> None:
    model = marlin_convert.load(make(tmp_path, llama()).out, device="cuda:0")

    def decoded(step: Any) -> torch.Tensor:
        decoder.prefill()
        made = [decoder.tokens.clone()]
        for _ in range(8):
            step()
            made.append(decoder.tokens.clone())
        return torch.cat(made, dim=1)

    decoder = Decoder(model, batch, context=20, steps=8)
    launched = decoded(decoder.step)
    graph = capture(decoder)
    assert torch.equal(decoded(graph.replay), launched)
    assert torch.equal(decoded(graph.replay), launched)
    assert launched.unique().numel() > 3


def test_timing(tmp_path: Path) -> None:
    model = marlin_convert.load(make(tmp_path, llama()).out, device="cuda:0")
    seconds, execution, why = time_on_gpu(Decoder(model, 4), 64)
    assert (execution, why) == (GRAPHS, None)
    assert 1e-6 < seconds < 1e-1


def test_experts_are_launched_and_it_is_said(tmp_path: Path) -> None:
    """They ask the GPU which experts have tokens, which no graph can hold."""
    model = marlin_convert.load(make(tmp_path, mixtral()).out, device="cuda:0")
    seconds, execution, why = time_on_gpu(Decoder(model, 2), 8)
    assert execution == LAUNCHES
    assert why
    assert seconds > 0
    with torch.no_grad():  # the failed capture leaves the GPU as it was
        assert model(torch.ones(1, 4, dtype=torch.int64, device="cuda")).logits.isfinite().all()


def test_command(tmp_path: Path) -> None:
    convert(DEMO_FOLDER, tmp_path / "out", Options(device="cpu"))
    command: list[Any] = [
        sys.executable,
        "-m",
        "marlin_convert.cli",
        "bench",
        tmp_path / "out",
        "--tokens",
        "--batch",
        "1,8",
        "--json",
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout)
    assert [cell["batch"] for cell in report["cells"]] == [1, 8]
    assert all(cell["fp16"] > 10 and cell["marlin"] > 10 for cell in report["cells"])
    assert report["method"]["execution"] == {"marlin": GRAPHS, "fp16": GRAPHS}
