"""The program on a GPU: repacked there, verified with the bundled kernels there, the same bytes as from the CPU."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_convert.native import cuda

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]


def demo(out: Path, device: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "marlin_convert.cli", "demo", str(out), "--device", device, "--json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    report: dict[str, Any] = json.loads(process.stdout)
    return report


def test_demo(tmp_path: Path) -> None:
    on_gpu, on_cpu = demo(tmp_path / "gpu", "cuda:0"), demo(tmp_path / "cpu", "cpu")
    checked = on_gpu["verification"]
    assert checked["ok"]
    assert checked["device"].startswith("cuda:0 (")
    assert len(checked["layers"]) == 56
    # fp16 outputs: rounding alone gives about 2^-12 relative; exactly 0 would mean that the kernel was not asked.
    assert all(0 < layer["relative_error"] <= 1e-3 for layer in checked["layers"])
    files = [tmp_path / name / "model.safetensors" for name in ("gpu", "cpu")]
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in files}) == 1
    assert on_cpu["verification"]["device"] == "cpu"


def test_verify_finds_what_is_wrong_on_the_gpu(tmp_path: Path) -> None:
    """Scales of one layer doubled in the file: the product must tell, whatever the exact check says."""
    from marlin_convert.checkpoint.reader import Checkpoint
    from marlin_convert.cli.commands import DEMO_FOLDER
    from marlin_convert.conversion.plan import make_plan
    from marlin_convert.conversion.products import product_for
    from marlin_convert.device import pick_device
    from marlin_convert.formats.layout import permute_scales
    from marlin_convert.formats.scales import to_fp16
    from tests.support.products import groups_of

    with Checkpoint(DEMO_FOLDER) as source:
        layer = make_plan(source, "marlin").layers[0]
        scales = to_fp16(source.read(layer.source.scales), layer.source.scales.dtype).scales
        qweight = source.read(layer.source.weight)
        B = cuda.repack(torch.from_numpy(qweight).cuda()).cpu().numpy()
        errors = []
        for factor in (1, 2):
            product = product_for(
                pick_device("cuda:0"), layer, groups_of(scales, permute_scales(scales * factor)), None, None
            )
            product.add_source(0, qweight)
            product.add_stored(0, B)
            errors.append(product.errors()[1])
    assert errors[0] <= 1e-3
    assert errors[1] == pytest.approx(1, rel=1e-2)
