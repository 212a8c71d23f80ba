#!/usr/bin/env python3
"""Fits the constants of the cost model (kernels/cuda/cost_model.cpp) to measured times.

    python benchmarks/cost_model/fit.py [KERNEL_on_GPU] [--rounds N]

Times are in timings_KERNEL_on_GPU.csv, a row for each product, instance and split; microseconds, medians of replays of
CUDA graphs that rotate through weights larger than L2 (`python benchmarks/gemm.py --only gemm --no-peers --choices`;
sm80 with that kernel forced). The model itself is compiled from the library's source, so what is fitted is what runs.
Lessens what choosing by the model costs against the best measured time, and the errors of the predictions. Prints the
constants and how good the choice is. Needs g++ (or $CXX) and no GPU.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import os
import random
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
#: Each fit's kernel, as marlin_cost_model_constants counts them, and the GPU's memory in bytes per us.
FITS = {
    "sm80_on_h200": (0, 4.9e6),
    "sm90_on_h200": (1, 4.9e6),
    "sm90_wide_on_h100": (2, 3.35e6),
    "sm90_wide_on_h200": (2, 4.9e6),
}
MULTIPROCESSORS = 132
#: How many clusters of 1 .. 8 blocks that H200 holds at once, as its timings tell: with more tiles they are far longer.
CLUSTERS = (ctypes.c_int * 8)(132, 66, 42, 30, 22, 20, 15, 14)
#: The constants that are fitted, for each kernel; the others of the struct are no part of a choice.
FITTED = (
    (
        "launch", "memory", "step", "step_column", "step_output", "step_product", "step_weights", "sm_bytes",
        "any_groups", "group", "group_output", "zero_points", "shared", "shared_kb", "whole_kb", "misaligned",
        "misaligned_kb", "stream_k",
    ),
    (
        "launch", "memory", "step", "step_column", "step_output", "group", "group_output", "zero_points",
        "cluster_rank", "cluster_kb", "wave", "shared", "shared_kb", "misaligned", "misaligned_kb",
    ),
    (
        "launch", "memory", "clock", *(f"step_floor[{i}]" for i in range(12)), "tile_end", "tile_end_output",
        "exchange", "exchange_output", "exchange_misaligned", "stream_k", "beyond_l2", "product_flops", "copied_kb",
    ),
)  # fmt: skip


class TileShape(ctypes.Structure):
    """TileShape of cost_model.h."""

    _fields_ = (
        ("clusters", ctypes.c_bool),
        ("wide", ctypes.c_bool),
        *((name, ctypes.c_int) for name in ("block_m", "block_n", "block_k", "bits", "stages", "blocks", "decodes")),
        ("scaled", ctypes.c_bool),
        ("any_groups", ctypes.c_bool),
    )


class Problem(ctypes.Structure):
    """Problem of cost_model.h."""

    _fields_ = (*((name, ctypes.c_int64) for name in "MNKG"), ("zeros", ctypes.c_bool))


class Timings:
    """Measured times, each of an instance and a split; those of a product stand together."""

    def __init__(self, rows: list[dict[str, str]]) -> None:
        def key(row: dict[str, str]) -> tuple[str, ...]:
            return tuple(row[name] for name in ("m", "n", "k", "bits", "group_size", "zeros"))

        rows = sorted(rows, key=key)
        self.names = [row["instance"] for row in rows]
        self.us = np.array([float(row["us"]) for row in rows])
        self.splits = (ctypes.c_int * len(rows))(*(int(row["split"]) for row in rows))
        self.tiles = (TileShape * len(rows))(*map(tile_of, self.names))
        self.problems = (Problem * len(rows))(*map(problem_of, rows))
        keys = [key(row) for row in rows]
        firsts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
        #: The first row of each product.
        self.firsts = np.array(firsts)
        #: For each row, the best time of its product.
        self.best = np.repeat(np.minimum.reduceat(self.us, firsts), np.diff([*firsts, len(rows)]))

    @classmethod
    def read(cls, fit: str) -> Timings:
        with Path(__file__).with_name(f"timings_{fit}.csv").open() as file:
            return cls(list(csv.DictReader(file)))


class Model:
    """The cost model, compiled from the library's source, with constants that can be changed."""

    def __init__(self, folder: Path, fit: str) -> None:
        source, library = ROOT / "kernels/cuda/cost_model.cpp", folder / "cost_model.so"
        command = [*shlex.split(os.environ.get("CXX") or "g++"), "-std=c++17", "-O2", "-shared", "-fPIC"]
        subprocess.run([*command, "-DMARLIN_COST_MODEL_LIBRARY", str(source), "-o", str(library)], check=True)
        self.lib = ctypes.CDLL(str(library))
        header = (ROOT / "kernels/cuda/cost_model.h").read_text()
        body = re.search(r"struct CostModel \{(.*?)\};", header, re.DOTALL)
        assert body
        self.names: list[str] = []  # of the struct's doubles, in order; of arrays, name[i], counted through
        for name, sizes in re.findall(r"^  double (\w+)((?:\[\d+\])*)", body[1], re.MULTILINE):
            count = math.prod(int(size) for size in re.findall(r"\d+", sizes))
            self.names += [f"{name}[{i}]" for i in range(count)] if sizes else [name]
        self.constants = (ctypes.c_double * len(self.names))()
        loop, memory = FITS[fit]
        self.lib.marlin_cost_model_constants(loop, ctypes.c_double(memory), ctypes.byref(self.constants))
        self.fitted = FITTED[loop]

    def __getitem__(self, name: str) -> float:
        return float(self.constants[self.names.index(name)])

    def __setitem__(self, name: str, value: float) -> None:
        self.constants[self.names.index(name)] = value

    def predict(self, timings: Timings) -> np.ndarray:
        """The predicted times in microseconds; infinite where the library would not lay the work out so."""
        us = np.empty(len(timings.us))
        self.lib.marlin_cost_model_predict(
            ctypes.byref(self.constants), timings.tiles, timings.problems, timings.splits, len(us), MULTIPROCESSORS,
            CLUSTERS, us.ctypes.data_as(ctypes.c_void_p),
        )  # fmt: skip
        return us


#: What sm80's names do not tell (gemm_sm80_*.cu), where not 128 rows of K in a step, one block an SM, a warp along M.
BLOCK_K = {"m8n128_b4_g128": 256, "m128n256": 64, "m64n256k64": 64}
BLOCKS = {"m32n128_b8": 2, "m16n128": 3, "m32n128": 3, "m64n128": 2}
DECODES = {"m128": 2}


def tile_of(name: str) -> TileShape:
    parts = re.fullmatch(r"(sm80|sm90|sm90_wide)_m(\d+)n(\d+)(?:k64)?_b([48])_g\w+", name)
    assert parts, name
    m, n, bits = map(int, parts.groups()[1:])
    if parts[1] != "sm80":
        wide = parts[1] == "sm90_wide"
        return TileShape(not wide, wide, m, n, 64 if wide else 128, bits, 4, 1, 1)

    def told(table: dict[str, int], otherwise: int) -> int:
        return next((v for start, v in table.items() if name.startswith(f"sm80_{start}")), otherwise)

    block_k, blocks, decodes = told(BLOCK_K, 128), told(BLOCKS, 1), told(DECODES, 1)
    scaled = m >= 32 or (m, n) == (16, 128)
    return TileShape(False, False, m, n, block_k, bits, 4, blocks, decodes, scaled, "_gany" in name)


def problem_of(row: dict[str, str]) -> Problem:
    k, size = int(row["k"]), int(row["group_size"])
    return Problem(int(row["m"]), int(row["n"]), k, 1 if size < 0 else k // size, row["zeros"] == "1")


def losses(timings: Timings, predicted: np.ndarray) -> np.ndarray:
    """For each product, by how much (0: not at all) the chosen is slower than the best measured."""
    ends = [*timings.firsts[1:], len(predicted)]
    chosen = [first + int(predicted[first:end].argmin()) for first, end in zip(timings.firsts, ends, strict=True)]
    return np.asarray(timings.us[chosen] / timings.best[chosen] - 1)


def badness(model: Model, timings: Timings) -> float:
    """What is made small: losses by the choice, the large ones most, and a little of the errors of predictions."""
    predicted = model.predict(timings)
    lost = losses(timings, predicted)
    near = (timings.us < 1.5 * timings.best) & np.isfinite(predicted)
    error = np.log(predicted[near] / timings.us[near])
    return float(lost.mean() + 0.5 * lost.max() + 2 * (lost**2).mean() + 0.5 * (error**2).mean())


def fit(model: Model, timings: Timings, rounds: int) -> None:
    """Changes one to three constants at a time by a random factor, and keeps what is better."""
    best = badness(model, timings)
    randomly = random.Random(1)
    for i in range(rounds):
        for _ in range(100):
            names = randomly.sample(model.fitted, randomly.randint(1, 3))
            old = [model[name] for name in names]
            for name in names:
                model[name] *= math.exp(randomly.gauss(0, randomly.choice((0.3, 0.1, 0.03))))
            new = badness(model, timings)
            if new < best:
                best = new
            else:
                for name, value in zip(names, old, strict=True):
                    model[name] = value
        print(f"round {i + 1}: {best:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fit", nargs="?", choices=FITS, default="sm80_on_h200")
    parser.add_argument("--rounds", type=int, default=40, help="0: only say how good the library's constants are")
    options = parser.parse_args()
    timings = Timings.read(options.fit)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(Path(folder), options.fit)
        fit(model, timings, options.rounds)
        lost = losses(timings, model.predict(timings))
    for name in model.fitted:
        print(f"  m.{name} = {model[name]:.4g};")
    print(f"{len(lost)} products: {lost.mean():.1%} slower than the best on average, {lost.max():.1%} at most")


if __name__ == "__main__":
    main()
