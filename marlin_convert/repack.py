"""The torch twin of the native code: slow, obvious, index by index from `layout.tile_position`.

It says what the fast code must compute: tests compare each fast path with it, bit for bit, and `ops` falls back to it
where the native library is missing. It works for tensors of any device.

torch is imported only inside the functions, so that importing this module costs nothing.

4-bit and symmetric only. K and N are read off the shapes: `qweight` int32 [K/8, N], `B` int32 [K/16, 2N]; codes are
int64 [K, N] with values 0..15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import layout
from .layout import BITS, PACK_FACTOR, TILE_K, TILE_N, TILE_WORDS, ZERO_POINT

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# ---- Codes [K, N] and their two packings ----


def unpack_gptq(qweight: Tensor) -> Tensor:
    """`qweight` int32 [K/8, N] -> codes int64 [K, N]."""
    rows, N = _shape(qweight, "qweight")
    nibbles = _nibbles(qweight)  # [K/8, N, 8], the nibbles of a word are neighbours along K
    return nibbles.permute(0, 2, 1).reshape(rows * PACK_FACTOR, N)


def pack_gptq(codes: Tensor) -> Tensor:
    """Codes [K, N] of any integer dtype -> `qweight` int32 [K/8, N]."""
    K, N = _shape(codes, "codes")
    if K % PACK_FACTOR:
        raise ValueError(f"codes has K = {K} rows; K should be a multiple of {PACK_FACTOR}")
    return _words(codes.reshape(K // PACK_FACTOR, PACK_FACTOR, N).permute(0, 2, 1))


def unpack_marlin(B: Tensor) -> Tensor:
    """`B` int32 [K/16, 2N] -> codes int64 [K, N]."""
    import torch

    K, N = marlin_size(B)
    nibbles = _nibbles(B.reshape(K // TILE_K, N // TILE_N, TILE_WORDS))  # [K/16, N/64, 128, 8]
    tiles = torch.empty((K // TILE_K, N // TILE_N, TILE_K, TILE_N), dtype=torch.int64, device=B.device)
    rows, columns = _tile_positions(B.device)
    tiles[:, :, rows, columns] = nibbles
    return tiles.permute(0, 2, 1, 3).reshape(K, N)


def pack_marlin(codes: Tensor) -> Tensor:
    """Codes [K, N] of any integer dtype -> `B` int32 [K/16, 2N]."""
    K, N = _shape(codes, "codes")
    layout.check_tiles(K, N)
    tiles = codes.reshape(K // TILE_K, TILE_K, N // TILE_N, TILE_N).permute(0, 2, 1, 3)
    rows, columns = _tile_positions(codes.device)
    return _words(tiles[:, :, rows, columns]).reshape(layout.b_shape(K, N))


def gptq_to_marlin(qweight: Tensor) -> Tensor:
    """`qweight` int32 [K/8, N] -> `B` int32 [K/16, 2N]."""
    return pack_marlin(unpack_gptq(qweight))


def marlin_to_gptq(B: Tensor) -> Tensor:
    """`B` int32 [K/16, 2N] -> `qweight` int32 [K/8, N]: the inverse of `gptq_to_marlin`."""
    return pack_gptq(unpack_marlin(B))


# ---- Weights ----


def permute_scales(scales: Tensor) -> Tensor:
    """`scales` [G, N] -> `s` [G, N], as `layout.permute_scales`, for tensors of any dtype."""
    return _permute_columns(scales, layout.scale_permutation(scales.shape[0]))


def unpermute_scales(s: Tensor) -> Tensor:
    """`s` [G, N] -> `scales` [G, N]: the inverse of `permute_scales`."""
    permutation = layout.scale_permutation(s.shape[0])
    return _permute_columns(s, tuple(permutation.index(i) for i in range(len(permutation))))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """W fp16 [K, N] = (code - 8) * scale, rounded once; codes [K, N], `scales` fp16 [G, N], any G dividing K."""
    import torch

    K, N = _shape(codes, "codes")
    G = scales.shape[0]
    if scales.dtype != torch.float16:
        raise TypeError(f"scales has dtype {scales.dtype}; it should be torch.float16")
    if tuple(scales.shape) != (G, N) or G == 0 or K % G:
        raise ValueError(f"scales has shape {tuple(scales.shape)}; it should be [G, {N}] with G dividing K = {K}")
    # An integer below 16 times an fp16 value is exact in fp32, so that only the last step rounds.
    exact = (codes - ZERO_POINT).to(torch.float32) * scales.to(torch.float32).repeat_interleave(K // G, dim=0)
    return exact.to(torch.float16)


def dequantize_gptq(qweight: Tensor, scales: Tensor) -> Tensor:
    """W fp16 [K, N] of a GPTQ layer; `scales` fp16 [G, N]."""
    return dequantize(unpack_gptq(qweight), scales)


def dequantize_marlin(B: Tensor, s: Tensor) -> Tensor:
    """W fp16 [K, N] of a Marlin layer; `s` fp16 [G, N] in Marlin's order of columns."""
    return dequantize(unpack_marlin(B), unpermute_scales(s))


def matmul(x: Tensor, W: Tensor) -> Tensor:
    """x [M, K] @ W [K, N], summed in fp64; fp32 [M, N]."""
    import torch

    return torch.matmul(x.to(torch.float64), W.to(torch.float64)).to(torch.float32)


def matmul_gptq(x: Tensor, qweight: Tensor, scales: Tensor) -> Tensor:
    """x [M, K] @ W [K, N] of a GPTQ layer, with the weights rounded to fp16; fp32 [M, N]."""
    return matmul(x, dequantize_gptq(qweight, scales))


def matmul_marlin(x: Tensor, B: Tensor, s: Tensor) -> Tensor:
    """The same as `matmul_gptq` of a Marlin layer."""
    return matmul(x, dequantize_marlin(B, s))


# ---- Helpers ----


def marlin_size(B: Tensor) -> tuple[int, int]:
    """(K, N) of a Marlin `B` int32 [K/16, 2N]."""
    rows, words = _shape(B, "B")
    K, N = rows * TILE_K, words * PACK_FACTOR // TILE_K
    layout.check_tiles(K, N)
    return K, N


def _shape(matrix: Tensor, name: str) -> tuple[int, int]:
    if matrix.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it should have two dimensions")
    rows, columns = matrix.shape
    return int(rows), int(columns)


def _tile_positions(device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns, int64 [128, 8], of each nibble of a tile."""
    import torch

    positions = [[layout.tile_position(w, p) for p in range(PACK_FACTOR)] for w in range(TILE_WORDS)]
    rows, columns = torch.tensor(positions, device=device).unbind(-1)
    return rows, columns


def _nibbles(words: Tensor) -> Tensor:
    """int32 [...] -> int64 [..., 8], lowest nibble first."""
    import torch

    shifts = torch.arange(0, 32, BITS, device=words.device)
    nibbles: Tensor = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**BITS - 1)
    return nibbles


def _words(nibbles: Tensor) -> Tensor:
    """Integers 0..15 [..., 8], lowest nibble first -> int32 [...]."""
    import torch

    shifts = torch.arange(0, 32, BITS, device=nibbles.device)
    words = (nibbles.to(torch.int64) << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _permute_columns(scales: Tensor, permutation: tuple[int, ...]) -> Tensor:
    rows, N = _shape(scales, "scales")
    if N == 0 or N % len(permutation):
        raise ValueError(f"scales has N = {N} columns; N should be a positive multiple of {len(permutation)}")
    return scales.reshape(rows, -1, len(permutation))[:, :, list(permutation)].reshape(rows, N)
