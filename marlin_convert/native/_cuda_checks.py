"""Arguments of the functions of `cuda`, checked: TypeError for a wrong type, ValueError for a wrong shape, size or
place; both name the argument, what it is and what it should be.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

from ..formats.layout import EXT_BITS, TILE_K, pack_factor
from .cuda_library import DTYPES, GROUP_SIZES, K_MULTIPLE, N_MULTIPLE

T: TypeAlias = torch.Tensor


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, tensor: T, dtypes: tuple[torch.dtype, ...], dims: int = 2) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name} is {dtype_name(tensor.dtype)}; it should be {wanted}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should have {dims} dimensions")


def check_shape(name: str, tensor: T, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {list(shape)}")


def check_memory(device: torch.device, **tensors: T | None) -> None:
    """Check that all are on `device`, a GPU, contiguous and aligned to 16 bytes, as the kernels load them."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device or device.type != "cuda":
            where = f"{device}, like the first argument" if device.type == "cuda" else "a CUDA device"
            raise ValueError(f"{name} is on {tensor.device}; it should be on {where}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it should be contiguous")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} starts at an address that is not a multiple of 16; it should be")


def _check_bits(bits: int) -> None:
    if bits not in EXT_BITS:
        raise ValueError(f"bits is {bits}; it should be 4 or 8")


def stored_size(name: str, tensor: T, bits: int, gptq: bool = False) -> tuple[int, int]:
    """Return (K, N) of codes in tile order, or as GPTQ has them."""
    _check_bits(bits)
    check_tensor(name, tensor, (torch.int32,))
    rows, columns = tensor.shape
    factor = pack_factor(bits)
    K, N = (rows * factor, columns) if gptq else (rows * TILE_K, columns * factor // TILE_K)
    if K == 0 or K % K_MULTIPLE or N == 0 or N % N_MULTIPLE or (not gptq and columns * factor % TILE_K):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, so K = {K} and N = {N}; both should be multiples of 64"
        )
    return K, N


def _unpadded(name: str, value: int | None, stored: int) -> int:
    if value is None:
        return stored
    if not 0 < value <= stored:
        raise ValueError(f"{name} is {value}; it should be from 1 to {stored}, the stored size")
    return int(value)


def layer_sizes(
    B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
) -> tuple[int, int, int, int, int]:
    """Return (K, N, G, in_features, out_features) of a layer, its shapes and types checked."""
    K, N = stored_size("B", B, bits)
    check_tensor("s", s, (torch.float16, torch.bfloat16))
    G = s.shape[0]
    if s.shape[1] != N or (G != 1 and (G == 0 or K % G or K // G not in GROUP_SIZES)):
        counts = ", ".join(str(K // size) for size in reversed(GROUP_SIZES) if K % size == 0 and size < K)
        raise ValueError(
            f"s has shape {tuple(s.shape)}; it should be [G, {N}] with G = 1{' or one of ' if counts else ''}{counts}"
        )
    rows, columns = _unpadded("in_features", in_features, K), _unpadded("out_features", out_features, N)
    if zeros is not None:
        check_tensor("zeros", zeros, (torch.int32,))
        check_shape("zeros", zeros, (G, N // pack_factor(bits)))
    if perm is not None:
        check_tensor("perm", perm, (torch.int32,), 1)
        check_shape("perm", perm, (rows,))
    return K, N, G, rows, columns


def check_activations(a: T, bias: T | None, in_features: int, out_features: int) -> None:
    if a.dtype not in DTYPES:
        raise TypeError(f"a is {dtype_name(a.dtype)}; it should be float16 or bfloat16")
    if a.dim() == 0 or a.shape[-1] != in_features:
        raise ValueError(f"a has shape {tuple(a.shape)}; its last dimension should be in_features = {in_features}")
    if bias is not None:
        if bias.dtype != a.dtype:
            raise TypeError(f"bias is {dtype_name(bias.dtype)}; it should be of a's dtype")
        check_shape("bias", bias, (out_features,))
