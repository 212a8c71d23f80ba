"""Layers in the extended format, stored as docs/concepts/format.md says with the slow twin's packing, and their weights
by the formula in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.native import reference
from tests.support.gptq_checkpoints import GPTQLayer, shuffled


def extended(layer: GPTQLayer) -> tuple[Any, torch.Tensor]:
    """The module with `layer`'s tensors in the extended format, and its weight W [K, N] in float64."""
    K, N, size = layer.K, layer.N, layer.group_size
    rows, columns = -(-K // 128) * 128, -(-N // 64) * 64
    G = 1 if size == -1 else rows // size
    zeros = layer.zeros
    points, scales = np.zeros((G, columns), np.int64), torch.zeros(G, columns, dtype=layer.scale_dtype)
    points[: layer.G, :N], scales[: layer.G, :N] = zeros, layer.scale_tensor
    group = np.minimum(np.arange(rows) // (rows if size == -1 else size), G - 1)
    order = np.argsort(layer.groups, kind="stable")
    stored = points[group].copy()  # padding: the zero point
    stored[:K, :N] = layer.codes[order]
    state = {
        "marlin_qweight": reference.pack_marlin(torch.from_numpy(stored), layer.bits),
        "marlin_scales": reference.permute_scales(scales),
    }
    symmetric, sequential = not isinstance(layer.stored_zero, np.ndarray), isinstance(layer.g_idx, str)
    if not symmetric:
        state["marlin_qzeros"] = reference.pack_zeros(torch.from_numpy(points), layer.bits)
    if not sequential:
        state["marlin_perm"] = torch.from_numpy(order.astype(np.int32))
    module = MarlinLinear(
        K, N, bits=layer.bits, group_size=size, sym=symmetric, desc_act=not sequential, extended=True,
        scale_dtype=layer.scale_dtype,
    )  # fmt: skip
    module.load_state_dict(state)
    return module, torch.from_numpy(layer.weight)


def points(G: int, N: int, bits: int) -> Any:
    return np.random.default_rng(6).integers(0, 2**bits - 1, (G, N))


EXTENDED = {
    "groups of 32": {"group_size": 32},
    "8 bits": {"bits": 8, "group_size": 64},
    "8 bits, one group": {"bits": 8, "group_size": -1},
    "asymmetric": {"group_size": 128, "stored_zero": points(3, 256, 4)},
    "asymmetric, 8 bits": {"bits": 8, "group_size": 128, "stored_zero": points(3, 256, 8)},
    "asymmetric, one group": {"group_size": -1, "stored_zero": points(1, 256, 4)},
    "act-order": {"group_size": 128, "g_idx": shuffled(384, 128)},
    "bf16 scales": {"scale_dtype": torch.bfloat16},
    "padded": {"K": 200, "N": 96, "group_size": 32},
    "padded rows": {"K": 200, "N": 128, "group_size": 32},
    "padded columns": {"K": 256, "N": 96, "group_size": 32},
    "padded and everything": {
        "K": 352, "N": 104, "bits": 8, "group_size": 32, "g_idx": shuffled(352, 32), "stored_zero": points(11, 104, 8),
        "scale_dtype": torch.bfloat16,
    },
}  # fmt: skip
