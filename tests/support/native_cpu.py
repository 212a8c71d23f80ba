"""The native CPU library in tests: each instruction set, the twin, random words and scales."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from marlin_convert.native import cpu

ISAS = ("plain", "avx2", "avx512")


def needs(isa: str) -> Any:
    """A parameter for an instruction set, skipped where it cannot run."""
    absent = isa not in cpu.available_isas()
    return pytest.param(isa, marks=pytest.mark.skipif(absent, reason=f"no {isa} here: {cpu.describe()}"))


every_isa = pytest.mark.parametrize("isa", [needs(isa) for isa in ISAS])
needs_native = pytest.mark.skipif(not cpu.native_available(), reason=cpu.describe())
both_backends = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "twin"])


def random_words(rows: int, columns: int, seed: int = 0) -> NDArray[np.int32]:
    info = np.iinfo(np.int32)
    return np.random.default_rng(seed).integers(info.min, info.max, (rows, columns), dtype=np.int32, endpoint=True)


def random_scales(G: int, N: int, seed: int = 0) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.2, 1, (G, N)) * rng.choice([-0.02, 0.02], (G, N))).astype(np.float16)


def twin(function: Callable[..., torch.Tensor], *arrays: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(function(*map(torch.from_numpy, arrays)).numpy())
