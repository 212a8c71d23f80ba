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

PACKED = ("weight_packed", "weight_scale", "weight_zero_point")


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


def gptq(tensors: dict[str, torch.Tensor], layer: str, less: int, bits: int) -> Float:
    """W [K, N] of a GPTQ layer whose zero points are stored less `less`, none of them 0. Without zero points, it has
    `bits` and is symmetric; without g_idx, its rows are in the order of their groups."""
    qweight, scales = tensors[f"{layer}.qweight"].numpy(), tensors[f"{layer}.scales"].double().numpy()
    qzeros = tensors.get(f"{layer}.qzeros")
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if qzeros is not None:
        bits = 32 * qzeros.shape[1] // scales.shape[1]
        zeros = stream(qzeros.numpy(), bits, scales.shape[1]) + less
    K = qweight.shape[0] * 32 // bits
    codes = stream(np.ascontiguousarray(qweight.T), bits, K).T
    order = tensors.get(f"{layer}.g_idx")
    groups = np.arange(K) // (K // len(scales)) if order is None else order.numpy()
    weight: Float = (codes - zeros[groups]) * scales[groups]
    return weight


def awq_gemm(tensors: dict[str, torch.Tensor], layer: str) -> Float:
    """W [K, N] of an AWQ layer: of eight columns, a word holds 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits up."""
    qweight, qzeros = (tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros"))
    scales = tensors[f"{layer}.scales"].double().numpy()
    N = scales.shape[1]
    columns = np.arange(N).reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)
    codes, zeros = np.empty((len(qweight), N), np.int64), np.empty(scales.shape, np.int64)
    codes[:, columns], zeros[:, columns] = stream(qweight, 4, N), stream(qzeros, 4, N)
    groups = np.arange(len(codes)) // (len(codes) // len(scales))
    return (codes - zeros[groups]) * scales[groups]


def awq_gemv(tensors: dict[str, torch.Tensor], layer: str, group_size: int) -> Float:
    """W [K, N] of an AWQ layer in the layout gemv: each output's codes together, in their order; scales and zero points
    of its groups too, and beyond them padding."""
    qweight, qzeros = (tensors[f"{layer}.{part}"].numpy() for part in ("qweight", "qzeros"))
    scales = tensors[f"{layer}.scales"].double().numpy()
    K = 8 * qweight.shape[1]
    groups = np.arange(K) // group_size
    steps = stream(qweight, 4, K) - stream(qzeros, 4, scales.shape[1])[:, groups]
    weight: Float = (steps * scales[:, groups]).T
    return weight


def quantized(tensors: dict[str, torch.Tensor], layer: str, config: dict[str, Any]) -> Float:
    """W [K, N] of a layer with a qweight, as its config says that it is packed."""
    packing = config.get("packing_format", "")
    if config["quant_method"] == "awq" and config.get("version") == "gemv":
        return awq_gemv(tensors, layer, config["group_size"])
    if config["quant_method"] == "awq" or packing.endswith("awq"):
        return awq_gemm(tensors, layer)
    less = packing.endswith("auto_gptq") or config.get("checkpoint_format") == "gptq"
    return gptq(tensors, layer, int(less), config["bits"])


def experts(tensors: dict[str, torch.Tensor], stack: str) -> dict[str, Float]:
    """Of experts stacked in packed tensors of three dimensions: W [K, N] of each one's layers, by the names that they
    would have alone; a gate's outputs come before an up's."""
    owner, _, name = stack.rpartition(".")
    names, holder = {
        "input_linear": (("w1", "w3"), f"{owner}.experts"),
        "output_linear": (("w2",), f"{owner}.experts"),
        "gate_up_proj": (("gate_proj", "up_proj"), owner),
    }.get(name, ((name,), owner))
    found: dict[str, Float] = {}
    for expert in range(len(tensors[f"{stack}.weight_packed"])):
        own = {f"{stack}.{p}": t[expert] for p in PACKED if (t := tensors.get(f"{stack}.{p}")) is not None}
        own[f"{stack}.weight_shape"] = tensors[f"{stack}.weight_shape"][1:]
        halves = np.split(compressed_tensors(own, stack), len(names), axis=1)
        found |= {f"{holder}.{expert}.{part}": half for part, half in zip(names, halves, strict=True)}
    return found


def read(folder: Path) -> dict[str, Float]:
    """Every quantized layer of a checkpoint, by name: W [K, N]."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("reference"):
            tensors |= load_file(file)
    found: dict[str, Float] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        if part == "weight_packed":
            found |= experts(tensors, name) if tensor.ndim == 3 else {name: compressed_tensors(tensors, name)}
        elif part == "qweight":
            found[name] = quantized(tensors, name, config(folder))
    return found


def config(folder: Path) -> dict[str, Any]:
    """The quantization config of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return found
