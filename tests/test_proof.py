"""benchmarks/proof.py proves what is right, and only that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import marlin_convert
from marlin_convert.conversion.convert import convert
from marlin_convert.options import Options
from tests.support.cli import PATIENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DEMO = Path(marlin_convert.__file__).parent / "data" / "demo"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    convert(DEMO, tmp_path / "out", Options(device="cpu"))
    return tmp_path / "out"


def prove(out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, float]]:
    figures = out.parent / "figures.json"
    command: list[Any] = [
        sys.executable,
        ROOT / "benchmarks" / "proof.py",
        DEMO,
        out,
        ROOT / "tests" / "data" / "kjv_sample.txt",
    ]
    options: list[Any] = ["--device", "cpu", "--tokens", "200", "--new-tokens", "8", "--json", figures]
    process = subprocess.run([*command, *options], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert figures.exists(), process.stderr
    return process, json.loads(figures.read_text(encoding="utf-8"))


def test_the_demo_model_is_proved(out: Path) -> None:
    process, figures = prove(out)
    assert process.returncode == 0, process.stderr
    assert figures["logits_relative_error"] <= 2e-3
    assert figures["new_tokens_equal"] == 8
    assert "8 of 8" in process.stdout


def test_one_wrong_layer_is_not(out: Path) -> None:
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.s"].neg_()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    process, figures = prove(out)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("Not proved. logits: 0.002 is allowed")
    assert figures["logits_relative_error"] > 0.1
