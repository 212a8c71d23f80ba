"""A reader of the extended format, written from docs/concepts/format.md alone, without the package. Slow and plain.

It also holds a checkpoint to what the page says about padding: weights, scales and zero points that are 0, and codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

Float = npt.NDArray[np.float64]
Int = npt.NDArray[np.int64]


def codes(weight: torch.Tensor, bits: int, N: int) -> Int:
    """marlin_qweight [K'/16, N' bits/2] → codes [K', N']."""
    rows = weight.shape[0]
    words = weight.numpy().view(np.uint32).reshape(rows, N // 64, -1).astype(np.int64)
    assert words.shape[2] == {4: 128, 8: 256}[bits]
    found = np.zeros((16 * rows, N), np.int64)
    for w in range(words.shape[2]):
        for p in range(32 // bits):
            if bits == 4:
                lane, j = w // 4, w % 4
                g, t = lane // 4, lane % 4
                row, column = 2 * t + 8 * (p & 1) + (p >> 2), 16 * j + g + 8 * ((p >> 1) & 1)
            else:
                lane, j, h = w // 8, w % 8 // 2, w % 2
                g, t = lane // 4, lane % 4
                row, column = 2 * t + 8 * (p & 1) + (p >> 1), 16 * j + g + 8 * h
            found[row::16, column::64] = words[:, :, w] >> bits * p & 2**bits - 1
    return found


def scales(stored: torch.Tensor) -> Float:
    """marlin_scales [G, N'] → scales [G, N'] in the order of the columns."""
    permuted = stored.double().numpy()
    found = np.empty_like(permuted)
    for start in range(0, permuted.shape[1], 64 if len(permuted) > 1 else 32):
        for i in range(8 if len(permuted) > 1 else 4):
            for j in range(8):
                column = i + 8 * j if len(permuted) > 1 else 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]
                found[:, start + column] = permuted[:, start + 8 * i + j]
    return found


def zeros(stored: torch.Tensor, bits: int) -> Int:
    """marlin_qzeros [G, N' bits/32] → zero points [G, N'] in the order of the columns."""
    words = stored.numpy().view(np.uint32).astype(np.int64)
    packed = np.stack([words >> bits * i & 2**bits - 1 for i in range(32 // bits)], 2).reshape(len(words), -1)
    interleave = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    permuted, found = np.empty_like(packed), np.empty_like(packed)
    for start in range(0, packed.shape[1], len(interleave)):
        for i, place in enumerate(interleave):
            permuted[:, start + place] = packed[:, start + i]
    for start in range(0, packed.shape[1], 64):
        for i in range(8):
            for j in range(8):
                found[:, start + i + 8 * j] = permuted[:, start + 8 * i + j]
    return found


def read(folder: Path) -> dict[str, Float]:
    """The weights [K, N] of every quantized layer, in float64, which holds them exactly."""
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config == json.loads((folder / "quantize_config.json").read_text())
    assert (config["quant_method"], config["checkpoint_format"]) == ("gptq", "marlin_ext")
    assert config["marlin_ext_version"] == 1
    assert "is_marlin_format" not in config
    names = [name.removesuffix(".marlin_qweight") for name in tensors if name.endswith(".marlin_qweight")]
    assert set(config.get("layers", {})) <= set(names)
    common = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act")}
    return {name: layer(tensors, name, common | config.get("layers", {}).get(name, {})) for name in names}


def layer(tensors: dict[str, torch.Tensor], name: str, settings: dict[str, Any]) -> Float:
    bits, group_size = settings["bits"], settings["group_size"]
    qweight, marlin_scales = tensors[f"{name}.marlin_qweight"], tensors[f"{name}.marlin_scales"]
    qzeros, perm = tensors.get(f"{name}.marlin_qzeros"), tensors.get(f"{name}.marlin_perm")
    stored_K, stored_N = 16 * qweight.shape[0], marlin_scales.shape[1]
    K, N = settings.get("in_features", stored_K), settings.get("out_features", stored_N)
    assert (stored_K, stored_N) == (-(-K // 128) * 128, -(-N // 64) * 64)
    assert qweight.shape[1] == stored_N * bits // 2
    G = 1 if group_size == -1 else stored_K // group_size
    assert len(marlin_scales) == G
    assert (qzeros is None, perm is None) == (settings["sym"], not settings["desc_act"])

    code, scale = codes(qweight, bits, stored_N), scales(marlin_scales)
    zero = np.full((G, stored_N), 2 ** (bits - 1)) if qzeros is None else zeros(qzeros, bits)
    group = np.zeros(stored_K, int) if G == 1 else np.arange(stored_K) // group_size
    weight = (code - zero[group]) * scale[group]

    used = 1 if G == 1 else -(-K // group_size)  # groups that are not padding alone
    assert not weight[K:].any()
    assert not scale[used:].any()
    assert not scale[:, N:].any()
    assert (code[K:] == zero[group][K:]).all()
    if qzeros is not None:
        assert not zero[used:].any()
        assert not zero[:, N:].any()
        assert not code[:, N:].any()

    found = np.empty((K, N))
    found[np.arange(K) if perm is None else perm.numpy()] = weight[:K, :N]
    return found
