"""The torch twin of the native code: slow, obvious, index by index from `layout.tile_position`.

It says what the fast code must compute: tests compare each fast path with it, bit for bit, and `ops` falls back to it
where the native library is missing. It works for tensors of any device.

torch is imported only inside the functions, so that importing this module costs nothing.

K and N are read off the shapes: `qweight` int32 [K bits/32, N], `B` int32 [K/16, N bits/2]; codes are int64 [K, N] with
values 0 .. 2^bits - 1. `bits` is 4 unless said otherwise, or 8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..formats import layout
from ..formats.layout import BITS, TILE_K, TILE_N, pack_factor, tile_words, zero_point

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# ---- Codes [K, N] and their two packings ----


def unpack_gptq(qweight: Tensor, bits: int = BITS) -> Tensor:
    """Turn `qweight` int32 [K bits/32, N] into codes int64 [K, N]."""
    rows, N = _shape(qweight, "qweight")
    codes = _codes(qweight, bits)  # [rows, N, codes in a word]: neighbours along K
    return codes.permute(0, 2, 1).reshape(rows * pack_factor(bits), N)


def pack_gptq(codes: Tensor, bits: int = BITS) -> Tensor:
    """Turn codes [K, N] of any integer dtype into `qweight` int32 [K bits/32, N]."""
    K, N = _shape(codes, "codes")
    factor = pack_factor(bits)
    if K % factor:
        raise ValueError(f"codes has K = {K} rows; K should be a multiple of {factor}")
    return _words(codes.reshape(K // factor, factor, N).permute(0, 2, 1), bits)


def unpack_marlin(B: Tensor, bits: int = BITS) -> Tensor:
    """Turn `B` int32 [K/16, N bits/2] into codes int64 [K, N]."""
    import torch

    K, N = marlin_size(B, bits)
    codes = _codes(B.reshape(K // TILE_K, N // TILE_N, tile_words(bits)), bits)  # [K/16, N/64, words, codes in a word]
    tiles = torch.empty((K // TILE_K, N // TILE_N, TILE_K, TILE_N), dtype=torch.int64, device=B.device)
    rows, columns = _tile_positions(B.device, bits)
    tiles[:, :, rows, columns] = codes
    return tiles.permute(0, 2, 1, 3).reshape(K, N)


def pack_marlin(codes: Tensor, bits: int = BITS) -> Tensor:
    """Turn codes [K, N] of any integer dtype into `B` int32 [K/16, N bits/2]."""
    K, N = _shape(codes, "codes")
    layout.check_tiles(K, N)
    tiles = codes.reshape(K // TILE_K, TILE_K, N // TILE_N, TILE_N).permute(0, 2, 1, 3)
    rows, columns = _tile_positions(codes.device, bits)
    return _words(tiles[:, :, rows, columns], bits).reshape(layout.b_shape(K, N, bits))


def gptq_to_marlin(qweight: Tensor, bits: int = BITS) -> Tensor:
    """Turn `qweight` int32 [K bits/32, N] into `B` int32 [K/16, N bits/2]."""
    return pack_marlin(unpack_gptq(qweight, bits), bits)


def marlin_to_gptq(B: Tensor, bits: int = BITS) -> Tensor:
    """Turn `B` int32 [K/16, N bits/2] into `qweight` int32 [K bits/32, N]: the inverse of `gptq_to_marlin`."""
    return pack_gptq(unpack_marlin(B, bits), bits)


def arrange(codes: Tensor, padded: tuple[int, int], fill: Tensor, perm: Tensor | None = None) -> Tensor:
    """Turn codes [K, N] in the source's order into codes of `padded` = (K', N') as stored: row k is row perm[k];
    padding is `fill` [K', N']."""
    K, N = _shape(codes, "codes")
    stored = fill.to(codes.dtype).expand(padded).clone()
    stored[:K, :N] = codes if perm is None else codes[perm.long()]
    return stored


# ---- Zero points ----


def unpack_zeros(qzeros: Tensor, bits: int) -> Tensor:
    """Turn `marlin_qzeros` int32 [G, N' bits/32] into zero points int64 [G, N'] in their own order of columns."""
    G, words = _shape(qzeros, "qzeros")
    packed = _codes(qzeros, bits).reshape(G, words * pack_factor(bits))
    permuted = _permute_columns(packed, _inverse(layout.ZERO_INTERLEAVE[bits]))
    return _permute_columns(permuted, _inverse(layout.SCALE_PERMUTATION))


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Turn zero points [G, N'] of any integer dtype into `marlin_qzeros` int32 [G, N' bits/32]."""
    G, N = _shape(zeros, "zeros")
    permuted = _permute_columns(zeros, layout.SCALE_PERMUTATION)
    packed = _permute_columns(permuted, layout.ZERO_INTERLEAVE[bits])
    return _words(packed.reshape(G, N // pack_factor(bits), pack_factor(bits)), bits)


# ---- Weights ----


def permute_scales(scales: Tensor) -> Tensor:
    """Turn `scales` [G, N] into `s` [G, N], as `layout.permute_scales`, for tensors of any dtype."""
    return _permute_columns(scales, layout.scale_permutation(scales.shape[0]))


def unpermute_scales(s: Tensor) -> Tensor:
    """Turn `s` [G, N] into `scales` [G, N]: the inverse of `permute_scales`."""
    return _permute_columns(s, _inverse(layout.scale_permutation(s.shape[0])))


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None = None, *, bits: int = BITS, dtype: torch.dtype | None = None
) -> Tensor:
    """Return W [K, N] = (code - zero) * scale, rounded once to `dtype` (that of the scales if None).

    codes [K, N]; `scales` fp16 or bf16 [G, N] with any G dividing K; `zeros` integers [G, N], the middle of the codes
    if None.
    """
    import torch

    K, N = _shape(codes, "codes")
    G = scales.shape[0]
    if scales.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"scales has dtype {scales.dtype}; it should be torch.float16 or torch.bfloat16")
    if tuple(scales.shape) != (G, N) or G == 0 or K % G:
        raise ValueError(f"scales has shape {tuple(scales.shape)}; it should be [G, {N}] with G dividing K = {K}")
    if zeros is not None and zeros.shape != scales.shape:
        raise ValueError(f"zeros has shape {tuple(zeros.shape)}; it should be {tuple(scales.shape)}, as scales")
    zero = zero_point(bits) if zeros is None else zeros.to(torch.int64).repeat_interleave(K // G, dim=0)
    # An integer below 256 times an fp16 or bf16 value is exact in fp32, so that only the last step rounds.
    exact = (codes - zero).to(torch.float32) * scales.to(torch.float32).repeat_interleave(K // G, dim=0)
    return exact.to(scales.dtype if dtype is None else dtype)


def dequantize_gptq(qweight: Tensor, scales: Tensor) -> Tensor:
    """Return W fp16 [K, N] of a symmetric 4-bit GPTQ layer; `scales` fp16 [G, N]."""
    return dequantize(unpack_gptq(qweight), scales)


def dequantize_marlin(B: Tensor, s: Tensor) -> Tensor:
    """Return W fp16 [K, N] of an original Marlin layer; `s` fp16 [G, N] in Marlin's order of columns."""
    return dequantize(unpack_marlin(B), unpermute_scales(s))


def dequantize_layer(
    B: Tensor,
    s: Tensor,
    zeros: Tensor | None = None,
    perm: Tensor | None = None,
    *,
    bits: int = BITS,
    in_features: int | None = None,
    out_features: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return W [in_features, out_features] of a layer as stored in either format, in the order of the source's rows.

    `B` int32 [K'/16, N' bits/2], `s` [G, N'], `zeros` int32 [G, N' bits/32] and `perm` int32 [in_features] are the
    checkpoint's tensors. in_features and out_features are K' and N' unless given. Rounded once to `dtype`: float16,
    bfloat16 or float32 (exact); that of `s` if None.
    """
    import torch

    zero_points = None if zeros is None else unpack_zeros(zeros, bits)
    stored = dequantize(unpack_marlin(B, bits), unpermute_scales(s), zero_points, bits=bits, dtype=dtype)
    W = stored[: in_features or stored.shape[0], : out_features or stored.shape[1]]
    if perm is None:
        return W.contiguous()
    if perm.shape != (W.shape[0],):
        raise ValueError(f"perm has shape {tuple(perm.shape)}; it should be [{W.shape[0]}]")
    natural = torch.empty_like(W)
    natural[perm.long()] = W
    return natural


def matmul(x: Tensor, W: Tensor) -> Tensor:
    """Compute x [M, K] @ W [K, N], summed in fp64; fp32 [M, N]."""
    import torch

    return torch.matmul(x.to(torch.float64), W.to(torch.float64)).to(torch.float32)


def matmul_gptq(x: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    """Compute x [M, K] @ W [K, N] of a GPTQ layer, with the weights rounded to fp16; fp32 [M, N]."""
    return matmul(x, dequantize_gptq(qweight, scales))


def matmul_marlin(x: Tensor, B: Tensor, s: Tensor) -> Tensor:
    """Return the same as `matmul_gptq` of a Marlin layer."""
    return matmul(x, dequantize_marlin(B, s))


# ---- Helpers ----


def marlin_size(B: Tensor, bits: int = BITS) -> tuple[int, int]:
    """Return (K, N) of a Marlin `B` int32 [K/16, N bits/2]."""
    rows, words = _shape(B, "B")
    K, N = rows * TILE_K, words * pack_factor(bits) // TILE_K
    layout.check_tiles(K, N)
    return K, N


def _shape(matrix: Tensor, name: str) -> tuple[int, int]:
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it should have two dimensions")
    rows, columns = matrix.shape
    return int(rows), int(columns)


def _tile_positions(device: torch.device, bits: int) -> tuple[Tensor, Tensor]:
    """Return rows and columns, int64 [words of a tile, codes in a word], of each code of a tile."""
    import torch

    positions = [[layout.tile_position(w, p, bits) for p in range(pack_factor(bits))] for w in range(tile_words(bits))]
    rows, columns = torch.tensor(positions, device=device).unbind(-1)
    return rows, columns


def _codes(words: Tensor, bits: int) -> Tensor:
    """Turn int32 [...] into int64 [..., 32 / bits], the lowest bits first."""
    import torch

    shifts = torch.arange(0, 32, 32 // pack_factor(bits), device=words.device)
    codes: Tensor = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes


def _words(codes: Tensor, bits: int) -> Tensor:
    """Turn integers 0 .. 2^bits - 1 [..., 32 / bits], the lowest bits first, into int32 [...]."""
    import torch

    shifts = torch.arange(0, 32, 32 // pack_factor(bits), device=codes.device)
    words = (codes.to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(permutation.index(i) for i in range(len(permutation)))


def _permute_columns(scales: Tensor, permutation: tuple[int, ...]) -> Tensor:
    rows, N = _shape(scales, "scales")
    if N == 0 or N % len(permutation):
        raise ValueError(f"scales has N = {N} columns; N should be a positive multiple of {len(permutation)}")
    return scales.reshape(rows, -1, len(permutation))[:, :, list(permutation)].reshape(rows, N)
