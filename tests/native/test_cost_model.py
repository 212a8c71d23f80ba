"""Of the instances and splits of each kernel, the cost model's choice against the best measured time.

The timings were taken on an H100 and an H200; benchmarks/cost_model/fit.py reads them, and compiles the model from the
library's source, as it does to fit it.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def fit() -> ModuleType:
    if shutil.which(shlex.split(os.environ.get("CXX") or "g++")[0]) is None:
        pytest.skip("no C++ compiler")
    path = Path(__file__).parents[2] / "benchmarks/cost_model/fit.py"
    spec = importlib.util.spec_from_file_location("fit_cost_model", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("measured", "products", "on_average"),
    [
        ("sm80_on_h200", 339, 0.015),
        ("sm90_on_h200", 120, 0.01),
        ("sm90_wide_on_h100", 69, 0.01),
        ("sm90_wide_on_h200", 68, 0.01),
    ],
)
def test_the_choice_is_near_the_best(
    fit: ModuleType, tmp_path: Path, measured: str, products: int, on_average: float
) -> None:
    timings = fit.Timings.read(measured)
    predicted = fit.Model(tmp_path, measured).predict(timings)
    lost = fit.losses(timings, predicted)
    assert len(lost) == products
    assert (predicted > 0).all()
    assert lost.max() <= 0.1
    assert lost.mean() <= on_average


def test_constants_go_by_the_memory(fit: ModuleType, tmp_path: Path) -> None:
    """A Hopper GPU has the constants of that of the two measured whose memory is nearer to its own."""
    library = fit.Model(tmp_path, "sm90_on_h200").lib

    def constants(kernel: int, terabytes_per_second: float) -> bytes:
        found = np.zeros(64)
        pointer = found.ctypes.data_as(fit.ctypes.c_void_p)
        library.marlin_cost_model_constants(kernel, fit.ctypes.c_double(terabytes_per_second * 1e6), pointer)
        return found.tobytes()

    for kernel in (1, 2):
        h100, h200 = constants(kernel, 3.35), constants(kernel, 4.9)
        assert h100 != h200
        assert constants(kernel, 2.0) == h100  # an H100 with PCI Express
        assert constants(kernel, 4.8) == h200
    # gemm_sm80 was measured on an H200 alone; elsewhere the rate of memory is scaled.
    model = fit.Model(tmp_path, "sm80_on_h200")
    memory = model.names.index("memory")
    h100, h200 = (np.frombuffer(constants(0, rate))[memory] for rate in (2.45, 4.9))
    assert h100 * 2 == pytest.approx(h200)
