"""Bringing a GPTQ layer's scales to fp16, the only type that the original Marlin format has, without losing any; and to
fp16 or bf16, which the extended format has.

A scale may round (bf16 has a wider range and fp32 more digits than fp16); it may not overflow, and a scale that
is not zero may not become zero, because then every weight of its group would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import bf16

F16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class ScaleFit:
    """`scales` in fp16 [G, N], or bf16 as uint16; `problem`: why they cannot be used, if so; `rounding`: the largest
    relative error."""

    scales: npt.NDArray[Any]
    problem: str | None = None
    rounding: float = 0.0

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return "BF16" if self.scales.dtype == np.uint16 else "F16"


def to_fp16(raw: npt.NDArray[Any], dtype: str) -> ScaleFit:
    """`raw` [G, N] as read from a file of safetensors dtype F16, F32 or BF16 (the latter as uint16) → fp16."""
    if dtype == "F16":
        scales = raw
        if ((raw.view(np.uint16) & 0x7C00) == 0x7C00).any():  # an exponent of all ones: inf or NaN
            return ScaleFit(scales, "scales contain inf or NaN")
        return ScaleFit(scales)
    wide = bf16.widened(raw)
    if not np.isfinite(wide).all():
        return ScaleFit(np.zeros(raw.shape, np.float16), "scales contain inf or NaN")
    with np.errstate(over="ignore", under="ignore"):
        scales = wide.astype(np.float16)
    if np.isinf(scales).any():
        return ScaleFit(scales, f"{dtype} scales beyond what fp16 can hold (65504)")
    nonzero = wide != 0
    if (nonzero & (scales == 0)).any():
        return ScaleFit(scales, f"{dtype} scales so small that they would be 0 in fp16")
    difference = np.abs(scales.astype(np.float64) - wide)
    rounding = float(
        np.max(np.divide(difference, np.abs(wide), out=np.zeros_like(difference), where=nonzero), initial=0.0)
    )
    return ScaleFit(scales, None, rounding)


def to_extended(raw: npt.NDArray[Any], dtype: str) -> ScaleFit:
    """`raw` [G, N] as in `to_fp16` → what the extended format stores: fp16 where it can hold them, else bf16.

    bf16 scales are kept as they are where fp16 would round them, which it does only below 2^-14. fp32 scales beyond
    fp16's range are rounded to bf16.
    """
    half = to_fp16(raw, dtype)
    if dtype == "F16" or (half.problem is None and (dtype == "F32" or half.rounding == 0)):
        return half
    if dtype == "BF16":
        return ScaleFit(raw) if bf16.finite(raw).all() else ScaleFit(raw, "scales contain inf or NaN")
    if not np.isfinite(raw).all():
        return half
    rounded = bf16.rounded(raw)
    if not bf16.finite(rounded).all():
        return ScaleFit(rounded, "F32 scales beyond what bf16 can hold")
    if ((raw != 0) & ~bf16.nonzero(rounded)).any():
        return ScaleFit(rounded, "F32 scales so small that they would be 0 in bf16")
    wide = bf16.widened(rounded).astype(np.float64)
    nonzero = raw != 0
    error = np.divide(np.abs(wide - raw), np.abs(raw, dtype=np.float64), out=np.zeros(raw.shape), where=nonzero)
    return ScaleFit(rounded, None, float(error.max(initial=0.0)))
