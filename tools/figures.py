"""Draw the documentation's figures from what measurements left in benchmarks/results: `python tools/figures.py`.

    layers_h200.json  what `benchmarks/gemm.py --json` writes: products of layers, in microseconds
    vllm_h200.json    what `marlin-convert bench MARLIN --tokens --engine vllm --source GPTQ --json` prints
    conversion.json   what `benchmarks/convert.py --verify --json` writes

Each becomes an SVG of the same name in docs/images, or in the folder that is named; the same figures give the same
bytes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from marlin_convert.cli.plot import Plot

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "images"


def stored(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def of_layers(measured: dict[str, Any]) -> dict[str, Any]:
    """The products' times as `bench` would print them, as far as they are drawn."""
    layers: dict[str, dict[str, Any]] = {}
    for row in (row for row in measured["rows"] if row["weights"] == measured["rows"][0]["weights"]):
        layer = layers.setdefault(row["layer"], {"name": row["layer"], "K": row["k"], "N": row["n"], "cells": []})
        layer["cells"].append({"M": row["m"], "marlin": {"speedup": row["cublas"] / row["gemm"]}})
    return measured | {"layers": list(layers.values())}


def draw_conversion(measured: dict[str, Any], picture: Path) -> None:
    """Seconds of a conversion and of `cp -r` of the same checkpoint, as bars."""
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    rows = measured["rows"]
    bars = axes.barh([row["what"] for row in rows], [row["seconds"] for row in rows], color=["0.7", "C0", "C0"])
    labels = [f"{row['seconds']:.2f} s" for row in rows[:1]]
    labels += [f"{row['seconds']:.2f} s, {row['times_cp']:.2f}x, {row['peak_mb']} MB of memory" for row in rows[1:]]
    axes.bar_label(bars, labels, padding=4)
    axes.invert_yaxis()
    axes.set_xlim(right=1.75 * max(row["seconds"] for row in rows))
    axes.set_xlabel("seconds, until the data is on disk")
    axes.set_title(f"{measured['checkpoint']}: {measured['machine']}")
    figure.savefig(picture)


def main(images: Path = IMAGES) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "marlin-convert"  # the same bytes from the same figures …
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # … on any day
    for name, document in (("layers_h200", of_layers(stored("layers_h200"))), ("vllm_h200", stored("vllm_h200"))):
        Plot(images / f"{name}.svg").draw_again(document, name)
    draw_conversion(stored("conversion"), images / "conversion.svg")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
