"""Arguments of the functions of `cpu`: TypeError for a wrong type or dtype, ValueError for a wrong shape or value; both
name the argument. And arrays as the library and torch take them.
"""

from __future__ import annotations

import ctypes
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..formats import layout

if TYPE_CHECKING:
    from torch import Tensor

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
#: fp16, or bf16 as uint16
ScaleArray = NDArray[Any]


def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def to_torch(array: NDArray[Any]) -> Tensor:
    import torch

    # torch needs aligned, writable memory; the twin is slow anyway.
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.contiguous().numpy())


def check_array(array: Any, name: str, dtype: Any, ndim: int | None = None, *, rows_apart: bool = False) -> None:
    """Check an array's type, dimensions and memory. `rows_apart`: some columns of a matrix will do, each row
    C-contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it should be a numpy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it should be {np.dtype(dtype)}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it should have {ndim} dimensions")
    if rows_apart and array.ndim == 2 and array.size and array[0].flags.c_contiguous and array.strides[0] > 0:
        return
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; it should be C-contiguous")


def gptq_size(qweight: Int32Array, bits: int) -> tuple[int, int]:
    """Return (K, N) of `qweight` int32 [K bits/32, N]."""
    factor = layout.pack_factor(bits)
    check_array(qweight, "qweight", np.int32, 2)
    return whole_tiles(qweight, "qweight", qweight.shape[0] * factor, qweight.shape[1])


def marlin_size(B: Int32Array, bits: int) -> tuple[int, int]:
    """Return (K, N) of `B` int32 [K/16, N bits/2]."""
    words = layout.TILE_K // layout.pack_factor(bits)  # for a column
    check_array(B, "B", np.int32, 2)
    if B.shape[1] % words:
        raise ValueError(f"B has shape {B.shape}; it should be [K/16, {words}N]")
    return whole_tiles(B, "B", B.shape[0] * layout.TILE_K, B.shape[1] // words)


def whole_tiles(array: NDArray[Any], name: str, K: int, N: int) -> tuple[int, int]:
    try:
        layout.check_tiles(K, N)
    except ValueError as error:
        raise ValueError(f"{name} has shape {array.shape}: {error}") from None
    return K, N


def check_rows(array: Any, name: str, dtype: Any) -> None:
    """Check a matrix, or some columns of one: each row C-contiguous."""
    check_array(array, name, dtype, 2, rows_apart=True)


def stride(matrix: NDArray[Any]) -> int:
    """Return elements from a row to the next."""
    return max(
        int(matrix.strides[0]) // matrix.itemsize, int(matrix.shape[1])
    )  # numpy may give any stride where there is a single row


def check_fill(fill: NDArray[np.uint8], K: int, N: int, bits: int) -> None:
    check_array(fill, "fill", np.uint8, 1)
    if not K or not N or fill.size < N:
        raise ValueError(f"fill has shape {fill.shape}; it should be [N'] with N' at least N = {N}")
    if int(fill.max()) >> bits:
        raise ValueError(f"fill has {fill.max()}; a code has {bits} bits")


def check_perm(perm: Int32Array, K: int) -> None:
    check_array(perm, "perm", np.int32, 1)
    if perm.size != K or int(perm.min()) < 0 or int(perm.max()) >= K:
        raise ValueError(f"perm has shape {perm.shape}; it should be the numbers 0 .. {K - 1} in some order")


def sorted_size(
    qweight: Int32Array, bits: int, perm: Int32Array, fill: NDArray[np.uint8], rows: int
) -> tuple[int, int]:
    """Return (K, N) of `qweight` int32 [K bits/32, N], the other arguments checked."""
    check_rows(qweight, "qweight", np.int32)
    K, N = qweight.shape[0] * layout.pack_factor(bits), qweight.shape[1]
    check_fill(fill, K, N, bits)
    check_perm(perm, K)
    if np.bincount(perm, minlength=K).max() > 1:
        raise ValueError(f"perm has a number twice; it should be the numbers 0 .. {K - 1} in some order")
    if operator.index(rows) < K:
        raise ValueError(f"rows is {rows}; it should be at least K = {K}")
    layout.check_tiles(rows, fill.size)
    return K, N


def output_array(
    out: Int32Array | None, shape: tuple[int, int], source: Int32Array, *, rows_apart: bool = False
) -> Int32Array:
    if out is None:
        return np.empty(shape, np.int32)
    check_array(out, "out", np.int32, rows_apart=rows_apart)
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; it should be {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; it should be writable")
    if np.may_share_memory(out, source):
        raise ValueError("out overlaps the input; it should be memory of its own")
    return out


def check_scales(scales: ScaleArray, name: str, zeros: NDArray[np.uint8] | None, N: int) -> int:
    if isinstance(scales, np.ndarray) and scales.dtype == np.uint16:
        check_array(scales, name, np.uint16, 2)
    else:
        check_array(scales, name, np.float16, 2)
    if scales.shape[1] != N or scales.shape[0] == 0:
        raise ValueError(f"{name} has shape {scales.shape}; it should be [G, N] with N = {N}")
    if zeros is not None:
        check_array(zeros, "zeros", np.uint8)
        if zeros.shape != scales.shape:
            raise ValueError(f"zeros has shape {zeros.shape}; it should be {scales.shape}, as {name}")
    return int(scales.shape[0])


def check_groups(scales: ScaleArray, name: str, zeros: NDArray[np.uint8] | None, K: int, N: int) -> int:
    G = check_scales(scales, name, zeros, N)
    if K % G or (K // G) % layout.TILE_K:
        raise ValueError(
            f"{name} has shape {scales.shape}: G = {G}; K / G should be a multiple of {layout.TILE_K}, with K = {K}"
        )
    return G


def check_product(
    x: Float32Array,
    scales: ScaleArray,
    scales_name: str,
    zeros: NDArray[np.uint8] | None,
    y: Float32Array,
    k0: int,
    kb: int,
    N: int,
    rows_per_group: int,
) -> None:
    check_array(x, "x", np.float32, 2)
    check_array(y, "y", np.float32, 2)
    (M, K), G = x.shape, check_scales(scales, scales_name, zeros, N)
    if rows_per_group <= 0 or rows_per_group % layout.TILE_K:
        raise ValueError(f"rows_per_group is {rows_per_group}; it should be a positive multiple of {layout.TILE_K}")
    if M == 0 or G * rows_per_group != K:
        raise ValueError(
            f"x has shape {x.shape}; it should be [M, K] with K = G * rows_per_group = {G * rows_per_group}"
        )
    if k0 < 0 or k0 % layout.TILE_K or k0 + kb > K:
        raise ValueError(
            f"k0 is {k0}; it should be a multiple of {layout.TILE_K} and leave room for {kb} rows in K = {K}"
        )
    if y.shape != (M, N):
        raise ValueError(f"y has shape {y.shape}; it should be {(M, N)}")
    if not y.flags.writeable:
        raise ValueError("y is read-only; it should be writable")
    if np.may_share_memory(x, y):
        raise ValueError("y overlaps x; it should be memory of its own")
