"""The C interface of the kernels for a block of experts: structures of kernels/marlin_cuda.h, held equal by a test."""

from __future__ import annotations

import ctypes

from .cuda_library import Weights


class StackArguments(ctypes.Structure):
    """marlin_cuda_stack_t"""

    _fields_ = (("weights", Weights), ("bias", ctypes.c_void_p))


class SetArguments(ctypes.Structure):
    """marlin_cuda_experts_t"""

    _fields_ = (
        *((name, StackArguments) for name in ("gate", "up", "down")),
        *((name, ctypes.c_int32) for name in ("first", "last")),
    )


class CallArguments(ctypes.Structure):
    """marlin_cuda_moe_t"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights", "position", "out", "scratch")),
        ("scratch_bytes", ctypes.c_size_t),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "ldx")),
        *((name, ctypes.c_int32) for name in ("top_k", "experts", "positions", "wide_ids")),
        *((name, ctypes.c_int32) for name in ("dtype", "device", "variant", "weights_on_input")),
        *((name, ctypes.c_int32) for name in ("activation", "joined")),
        *((name, ctypes.c_float) for name in ("limit", "alpha", "beta")),
        ("unused", ctypes.c_int32),
    )


class Layout(ctypes.Structure):
    """marlin_cuda_moe_layout_t: where a call leaves what is in between, in bytes of its scratch memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("bytes", "rows", "places", "first_row", "gate", "up", "hidden", "down")),
        *((name, ctypes.c_int64) for name in ("gathered", "gathered_up", "gathered_columns", "hidden_columns")),
        *((name, ctypes.c_int32) for name in ("block_m", "rounds_weights")),
    )


def variant(
    block_m: int = 0,
    block_n: int = 0,
    split: int = 0,
    one_by_one: bool = False,
    portable: bool = False,
    rounding: bool = False,
) -> int:
    """Return MARLIN_CUDA_MOE_VARIANT, for tests and measurements."""
    return block_m | block_n << 10 | split << 20 | one_by_one << 24 | portable << 25 | rounding << 26
