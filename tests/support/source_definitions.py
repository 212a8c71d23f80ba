"""Readers of source formats, from their definitions alone, without the package: slow and plain, in float64."""

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


def stream(words: npt.NDArray[Any], bits: int, count: int) -> Int:
    """Rows of int32 words → `count` numbers each: number i is bits i·bits … of the row, the lowest of a word first."""
    rows = words.view(np.uint32).astype(np.int64)
    single = (rows[:, :, None] >> np.arange(32)) & 1
    single = single.reshape(len(rows), -1)[:, : count * bits].reshape(len(rows), count, bits)
    found: Int = (single << np.arange(bits)).sum(-1)
    return found


def compressed_tensors(tensors: dict[str, torch.Tensor], layer: str) -> Float:
    """W [K, N] of a pack-quantized layer: (code - zero) · scale, a code being the quantized number + 2^(bits-1)."""
    own = {part: tensors.get(f"{layer}.weight_{part}") for part in ("packed", "scale", "shape", "zero_point", "g_idx")}
    packed, scale, shape = (x for x in (own["packed"], own["scale"], own["shape"]) if x is not None)
    N, K = shape.tolist()
    bits = 32 * packed.shape[1] // K
    codes = stream(packed.numpy(), bits, K)  # [N, K]
    scales = scale.double().numpy()  # [N, G]
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    stored = own["zero_point"]
    if stored is not None and stored.dtype == torch.int8:
        zeros = stored.numpy().astype(np.int64) + 2 ** (bits - 1)
    elif stored is not None:
        zeros = stream(np.ascontiguousarray(stored.numpy().T), bits, N).T
    groups = np.arange(K) // (K // scales.shape[1]) if own["g_idx"] is None else own["g_idx"].numpy()
    return ((codes - zeros[:, groups]) * scales[:, groups]).T


def gptq_v2(tensors: dict[str, torch.Tensor], layer: str) -> Float:
    """W [K, N] of a GPTQ layer whose zero points are stored as they are; rows in order."""
    qweight, qzeros, scales = (tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    bits = 32 * qzeros.shape[1] // scales.shape[1]
    K = qweight.shape[0] * 32 // bits
    codes, zeros = stream(np.ascontiguousarray(qweight.T), bits, K).T, stream(qzeros, bits, scales.shape[1])
    groups = np.arange(K) // (K // len(scales))
    return (codes - zeros[groups]) * scales.astype(np.float64)[groups]


def awq_gemm(tensors: dict[str, torch.Tensor], layer: str) -> Float:
    """W [K, N] of an AWQ layer: of eight columns, a word holds 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    qweight, qzeros, scales = (tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros", "scales"))
    N = scales.shape[1]
    columns = np.arange(N).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    codes, zeros = np.empty((len(qweight), N), np.int64), np.empty(scales.shape, np.int64)
    codes[:, columns], zeros[:, columns] = stream(qweight, 4, N), stream(qzeros, 4, N)
    groups = np.arange(len(codes)) // (len(codes) // len(scales))
    return (codes - zeros[groups]) * scales.astype(np.float64)[groups]


def quantized(tensors: dict[str, torch.Tensor], layer: str) -> Float:
    """W [K, N] of a layer with a qweight: AWQ's has an eighth of the columns that its scales have."""
    packed_along_columns = tensors[f"{layer}.scales"].shape[1] == 8 * tensors[f"{layer}.qweight"].shape[1]
    return (awq_gemm if packed_along_columns else gptq_v2)(tensors, layer)


def read(folder: Path) -> dict[str, Float]:
    """Every quantized layer of a checkpoint, by name: W [K, N]."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "reference.safetensors":
            tensors |= load_file(file)
    names = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    others = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    found = {name: compressed_tensors(tensors, name) for name in names}
    return found | {name: quantized(tensors, name) for name in others}


def config(folder: Path) -> dict[str, Any]:
    """The quantization config of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found
