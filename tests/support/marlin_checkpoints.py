"""Marlin checkpoints of the extended format, and whether a folder has the very tensors that are expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from marlin_convert.native import reference
from tests.support.gptq_checkpoints import GPTQLayer, plain_tensors, tensors_of


def assert_same_tensors(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = tensors_of(folder)
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def marlin_ext(folder: Path, layers: dict[str, GPTQLayer], **changes: Any) -> None:
    """Write `layers` in the extended format, as docs/concepts/format.md has it, by the slow twin."""
    tensors, entries = dict(plain_tensors()), {}
    for name, layer in layers.items():
        group = -1 if layer.G == 1 else layer.group_size
        stored_group = -1 if group == -1 else next(size for size in (128, 64, 32, 16) if group % size == 0)
        K, N = -(-layer.K // 128) * 128, -(-layer.N // 64) * 64
        repeat = 1 if group == -1 else group // stored_group
        G = 1 if group == -1 else K // stored_group
        middle = 2 ** (layer.bits - 1)
        sym = not isinstance(layer.stored_zero, np.ndarray)

        def rows(values: Any, dtype: torch.dtype, G: int = G, N: int = N, repeat: int = repeat) -> torch.Tensor:
            padded = torch.zeros(G, N, dtype=dtype)
            repeated = torch.as_tensor(values).to(dtype).repeat_interleave(repeat, 0)[:G]
            padded[: repeated.shape[0], : repeated.shape[1]] = repeated
            return padded

        zeros = rows(np.asarray(layer.stored_zero) + 1, torch.int64) if not sym else torch.full((G, N), middle)
        order = np.argsort(layer.groups, kind="stable")
        of_row = torch.zeros(K, dtype=torch.long) if group == -1 else torch.arange(K) // stored_group
        codes = zeros[of_row]
        codes[: layer.K, : layer.N] = torch.from_numpy(layer.codes[order])
        tensors[f"{name}.marlin_qweight"] = reference.pack_marlin(codes, layer.bits)
        tensors[f"{name}.marlin_scales"] = reference.permute_scales(rows(layer.scale_tensor, layer.scale_tensor.dtype))
        act_order = not np.array_equal(order, np.arange(layer.K))
        if not sym:
            tensors[f"{name}.marlin_qzeros"] = reference.pack_zeros(zeros, layer.bits)
        if act_order:
            tensors[f"{name}.marlin_perm"] = torch.from_numpy(order.astype(np.int32))
        if layer.bias:
            tensors[f"{name}.bias"] = layer.bias_tensor
        entries[name] = {"bits": layer.bits, "group_size": stored_group, "sym": sym, "desc_act": act_order}
        if layer.K != K:
            entries[name]["in_features"] = layer.K
        if layer.N != N:
            entries[name]["out_features"] = layer.N
        if stored_group != group:
            entries[name]["source_group_size"] = group
    folder.mkdir()
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    settings = {
        "quant_method": "gptq", "checkpoint_format": "marlin_ext", "marlin_ext_version": 1, "bits": 4,
        "group_size": 128, "sym": True, "desc_act": False, "lm_head": False, "layers": entries, **changes,
    }  # fmt: skip
    config = {"model_type": "llama", "torch_dtype": "bfloat16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
