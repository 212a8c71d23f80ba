"""Bringing a GPTQ layer's scales to fp16, the only type that the original Marlin format has, without losing any; and to
fp16 or bf16, which the extended format has.

A scale may round (bf16 has a wider range and fp32 more digits than fp16); it may not overflow, and a scale that
is not zero may not become zero, because then every weight of its group would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import bf16

F16 = npt.NDArray[np.float16]
NOT_FINITE = "scales contain inf or NaN"


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
    """Turn `raw` [G, N], as read from a file of safetensors dtype F16, F32 or BF16 (the latter as uint16), into
    fp16."""
    if dtype == "F16":
        scales = raw
        if ((raw.view(np.uint16) & 0x7C00) == 0x7C00).any():  # an exponent of all ones: inf or NaN
            return ScaleFit(scales, NOT_FINITE)
        return ScaleFit(scales)
    wide = bf16.widened(raw)
    if not np.isfinite(wide).all():
        return ScaleFit(np.zeros(raw.shape, np.float16), NOT_FINITE)
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
    """Turn `raw` [G, N], as in `to_fp16`, into what the extended format stores: fp16 where it can hold them, else bf16.

    bf16 scales are kept as they are where fp16 would round them, which it does only below 2^-14. fp32 scales beyond
    fp16's range are rounded to bf16.
    """
    half = to_fp16(raw, dtype)
    return half if _fp16_will_do(half, dtype) else to_bf16(raw, dtype)


def _fp16_will_do(half: ScaleFit | LayerFit, dtype: str) -> bool:
    return dtype == "F16" or (half.problem is None and (dtype == "F32" or half.rounding == 0))


def to_bf16(raw: npt.NDArray[Any], dtype: str) -> ScaleFit:
    """Turn `raw` [G, N] of dtype F32 or BF16, as in `to_fp16`, into bf16, as uint16."""
    if dtype == "BF16":
        return ScaleFit(raw, None if bf16.finite(raw).all() else NOT_FINITE)
    if not np.isfinite(raw).all():
        return ScaleFit(np.zeros(raw.shape, np.uint16), NOT_FINITE)
    rounded = bf16.rounded(raw)
    if not bf16.finite(rounded).all():
        return ScaleFit(rounded, "F32 scales beyond what bf16 can hold")
    if ((raw != 0) & ~bf16.nonzero(rounded)).any():
        return ScaleFit(rounded, "F32 scales so small that they would be 0 in bf16")
    wide = bf16.widened(rounded).astype(np.float64)
    nonzero = raw != 0
    error = np.divide(np.abs(wide - raw), np.abs(raw, dtype=np.float64), out=np.zeros(raw.shape), where=nonzero)
    return ScaleFit(rounded, None, float(error.max(initial=0.0)))


@dataclass(frozen=True)
class LayerFit:
    """What becomes of all scales of a layer: the dtype in which they are stored, as safetensors names it; why they
    cannot be, if so; the largest relative error; whether every one is 0."""

    dtype: str
    problem: str | None
    rounding: float
    zero: bool


def fit_layer(strips: Callable[[], Iterable[npt.NDArray[Any]]], dtype: str, *, extended: bool) -> LayerFit:
    """Decide over a layer's scales, which come in `strips` [rows, N] as a file of `dtype` has them, once or twice."""
    half = _together("F16", dtype, (to_fp16(raw, dtype) for raw in strips()))
    if not extended or _fp16_will_do(half, dtype):
        return half
    return _together("BF16", dtype, (to_bf16(raw, dtype) for raw in strips()))


def _together(stored: str, dtype: str, fits: Iterable[ScaleFit]) -> LayerFit:
    """Return one verdict for all strips: of several problems, the one that would be found first if they were one."""
    problems: set[str | None] = set()
    rounding, zero = 0.0, True
    for fit in fits:
        problems.add(fit.problem)
        rounding = max(rounding, fit.rounding)
        zero = zero and fit.problem is None and not bf16.nonzero(fit.scales.view(np.uint16)).any()  # as for fp16
    found = sorted(filter(None, problems), key=lambda problem: (problem != NOT_FINITE, "beyond" not in problem))
    return LayerFit(stored, found[0] if found else None, 0.0 if found else rounding, zero)


def as_stored(raw: npt.NDArray[Any], dtype: str, stored: str) -> ScaleFit:
    """Return some scales of a layer, as a file of `dtype` has them, in the dtype on which `fit_layer` decided."""
    return to_fp16(raw, dtype) if stored == "F16" else to_bf16(raw, dtype)
