"""Random stored layers with their weights, for the tests of the engines."""

from __future__ import annotations

from typing import Any

import torch

from marlin_convert.engines import tensor_parallel
from marlin_convert.engines.tensor_parallel import Piece
from marlin_convert.formats.marlin_config import LayerSettings
from marlin_convert.native import reference


def random_layer(
    K: int, N: int, group: int = 128, bits: int = 4, asym: bool = False, order: bool = False, seed: int = 0
) -> tuple[Piece, torch.Tensor]:
    """A random layer, and its weight [K, N] in float64, computed from the definition."""
    generator = torch.Generator().manual_seed(seed)
    stored_K, stored_N = -(-K // 128) * 128, -(-N // 64) * 64
    G = 1 if group == -1 else stored_K // group
    codes = torch.randint(0, 2**bits, (stored_K, stored_N), generator=generator)
    scales = torch.randn(G, stored_N, generator=generator).half()
    zeros = torch.randint(0, 2**bits, (G, stored_N), generator=generator) if asym else None
    perm = torch.randperm(K, generator=generator).int() if order else None
    spread = stored_K // G
    zero = 2 ** (bits - 1) if zeros is None else zeros.repeat_interleave(spread, 0)
    stored = ((codes - zero) * scales.double().repeat_interleave(spread, 0))[:K, :N]
    weight = torch.empty_like(stored)
    weight[torch.arange(K) if perm is None else perm.long()] = stored
    tensors = {"weight": reference.pack_marlin(codes, bits), "scales": reference.permute_scales(scales)}
    if zeros is not None:
        tensors["zeros"] = reference.pack_zeros(zeros, bits)
    if perm is not None:
        tensors["perm"] = perm
    sizes = {"in_features": K if stored_K != K else None, "out_features": N if stored_N != N else None}
    settings = LayerSettings(bits, group, not asym, order, **sizes)
    return tensor_parallel.whole("x", settings, tensors), weight


def weight_of(piece: Piece) -> torch.Tensor:
    sizes: dict[str, Any] = {"bits": piece.bits, "in_features": piece.K, "out_features": piece.N}
    if piece.perm is not None and len(piece.perm) != piece.K:  # rows of zeros between others
        sizes["in_features"] = piece.stored_K
        W = reference.dequantize_layer(piece.weight, piece.scales, piece.zeros, **sizes, dtype=torch.float32).double()
        return torch.zeros(piece.K, piece.N, dtype=torch.float64).index_add(0, piece.perm.long(), W)
    return reference.dequantize_layer(
        piece.weight, piece.scales, piece.zeros, piece.perm, **sizes, dtype=torch.float32
    ).double()
