"""bfloat16 in numpy, which has no such type: arrays of uint16 hold the bits, the upper half of a float32's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]


def widened(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return bf16 (as uint16), fp16 or float32 `values` as float32, exactly."""
    if values.dtype != np.uint16:
        return values.astype(np.float32)
    return (values.astype(np.uint32) << 16).view(np.float32)


def rounded(values: npt.NDArray[np.float32]) -> Bits:
    """Round finite float32 `values` to bf16: to the nearest, ties to even; beyond its range, infinity."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)


def finite(values: Bits) -> npt.NDArray[np.bool_]:
    """Tell for each bf16 value whether it is neither infinite nor NaN."""
    found: npt.NDArray[np.bool_] = (values & 0x7F80) != 0x7F80
    return found


def nonzero(values: Bits) -> npt.NDArray[np.bool_]:
    """Tell for each bf16 value whether it is not 0, of either sign."""
    found: npt.NDArray[np.bool_] = (values & 0x7FFF) != 0
    return found
