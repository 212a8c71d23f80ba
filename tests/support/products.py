"""Scales for the products that a verification computes, out of arrays instead of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from marlin_convert.conversion.layer_reader import Groups
from marlin_convert.conversion.products import LayerGroups


def groups_of(scales: npt.NDArray[Any], s: npt.NDArray[Any]) -> LayerGroups:
    """The scales of a symmetric layer, as the source has them and as they are stored."""

    def some(array: npt.NDArray[Any]) -> Callable[[int, int], Groups]:
        return lambda first, count: Groups(np.ascontiguousarray(array[first : first + count]), None)

    return LayerGroups(some(scales), some(s))
