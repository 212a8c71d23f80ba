"""Results of conversions: their weights beside the definition's, damage to them, and what verification says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.verify import LayerCheck, Verification
from marlin_convert.formats.marlin_config import read_marlin_settings
from marlin_convert.native import reference
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import Source, tensors_of

CPU = Options(device="cpu")


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def change(out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Edit the tensors of a converted checkpoint."""
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def layer_check(report: Verification, name: str) -> LayerCheck:
    return next(x for x in report.layers if x.name == name)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every quantized layer of a Marlin checkpoint, in float32, which holds them exactly."""
    tensors = tensors_of(folder)
    config = json.loads((folder / "quantize_config.json").read_text())
    read, found = read_marlin_settings(config), {}
    for name in tensors:
        layer, _, what = name.rpartition(".")
        if what == "B":
            found[layer] = reference.dequantize_layer(tensors[name], tensors[f"{layer}.s"], dtype=torch.float32)
        elif what == "marlin_qweight":
            own = read.layer(layer)
            found[layer] = reference.dequantize_layer(
                tensors[name], tensors[f"{layer}.marlin_scales"], tensors.get(f"{layer}.marlin_qzeros"),
                tensors.get(f"{layer}.marlin_perm"), bits=own.bits, in_features=own.in_features,
                out_features=own.out_features, dtype=torch.float32,
            )  # fmt: skip
    return found


def assert_exact(source: Source, out: Path) -> None:
    found = weights_of(out)
    assert sorted(found) == sorted(source.layers)
    for name, layer in source.layers.items():
        np.testing.assert_array_equal(found[name].double().numpy(), layer.weight, err_msg=name)


def assert_restored(source: Source, back: Path) -> None:
    found = tensors_of(back)
    assert sorted(found) == sorted(source.tensors)
    for name, tensor in source.tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
