"""Of the tiles and splits for many rows on Hopper, the cost model's choice against the best measured time.

The timings were taken on one H100 80GB (benchmarks/cost_model); the model is compiled from the library's source.
"""

from __future__ import annotations

import csv
import ctypes
import os
import re
import shlex
import shutil
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMINGS = ROOT / "benchmarks/cost_model/timings_sm90_wide_on_h100.csv"

SHIM = """
#include "cost_model.h"
using namespace marlin;
extern "C" double predicted(int block_m, int block_n, int bits, int split, int64_t m, int64_t n, int64_t k, int64_t g,
                            bool zeros) {
  TileShape tile = {};
  tile.wide = true;
  tile.block_m = block_m;
  tile.block_n = block_n;
  tile.block_k = 64;
  tile.bits = bits;
  const Problem problem = {m, n, k, g, zeros};
  Schedule schedule;
  return make_schedule(tile, problem, split, true, 132, 0, &schedule)
             ? predict(kSm90WideOnH100, tile, problem, schedule).us
             : -1;
}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("model")
    (folder / "shim.cpp").write_text(SHIM)
    sources = [str(folder / "shim.cpp"), str(ROOT / "kernels/cuda/cost_model.cpp")]
    library = str(folder / "model.so")
    flags = ["-shared", "-fPIC", "-O1", "-std=c++17", f"-I{ROOT / 'kernels/cuda'}"]
    subprocess.run([*compiler, *flags, *sources, "-o", library], check=True)
    lib = ctypes.CDLL(library)
    lib.predicted.restype = ctypes.c_double
    lib.predicted.argtypes = [*[ctypes.c_int] * 4, *[ctypes.c_int64] * 4, ctypes.c_bool]
    return lib


@pytest.mark.slow
def test_the_choice_is_near_the_best(model: ctypes.CDLL) -> None:
    products = defaultdict(list)
    with TIMINGS.open() as file:
        for row in csv.DictReader(file):
            m, n, k, bits, group, zeros = (int(row[x]) for x in ("m", "n", "k", "bits", "group_size", "zeros"))
            tile = re.match(r"sm90_wide_m(\d+)n(\d+)_", row["instance"])
            assert tile
            predicted = model.predicted(
                int(tile[1]), int(tile[2]), bits, int(row["split"]), m, n, k, 1 if group < 0 else k // group, zeros
            )
            assert predicted > 0, row
            products[m, n, k, bits, group, zeros].append((predicted, float(row["us"])))
    lost = {product: min(timed)[1] / min(us for _, us in timed) for product, timed in products.items()}
    assert len(lost) > 40
    assert max(lost.values()) <= 1.1, max(lost, key=lambda product: lost[product])
    assert statistics.mean(lost.values()) <= 1.01
