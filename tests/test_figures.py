"""The documentation's figures are those that were stored: its tables, and its pictures, drawn again."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


def stored(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return document


def test_the_table_of_layers() -> None:
    """docs/kernels/results.md has the times that are stored, and the factors that follow from them."""
    page = (
        (ROOT / "docs" / "kernels" / "results.md").read_text().replace("**", "").replace("\N{MULTIPLICATION SIGN}", "x")
    )
    lines = page[page.index("| layer (KxN) | M |") :].split("\n\n")[0].splitlines()[2:]
    rows = stored("layers_h200")["rows"]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] in ("", f"{row['k']}x{row['n']} ({row['layer']})")
        ways = ("cublas", "marlin", "machete", "humming", "gemm")
        assert cells[1:7] == [str(row["m"]), *(f"{row[x]:.1f}" for x in ways)]
        best = min(row["marlin"], row["machete"], row["humming"])
        assert cells[7:10] == [f"{x:.2f}" for x in (row["gemm"] / best, row["gemm"] / row["cublas"])] + [
            f"{row['early']:.1f}"
        ]


def test_the_table_of_conversions() -> None:
    page = (ROOT / "docs" / "guides" / "is-it-faster.md").read_text()
    for row in stored("conversion")["rows"]:
        name = row["what"].replace("convert", "marlin-convert")
        memory = f"{row['peak_mb']} MB " if row["peak_mb"] else ""
        assert f"| `{name}` | {row['seconds']:.2f} | {row['times_cp']:.2f} | {memory}|\n" in page


def drawn(picture: Path) -> tuple[list[tuple[float, float]], list[str]]:
    """Where a picture has markers and corners of bars, and its texts."""
    svg = picture.read_text(encoding="utf-8")
    places = re.findall(r'<use xlink:href="[^"]+" x="([\d.]+)" y="([\d.]+)"', svg)
    places += re.findall(r"[ML] ([\d.]+) ([\d.]+) ?\n", svg)
    return [(float(x), float(y)) for x, y in places], re.findall(r"<!-- (.+?) -->", svg)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib, an extra, is not installed")
def test_the_pictures_are_drawn_from_the_stored_figures(tmp_path: Path) -> None:
    from tools import figures

    figures.main(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"layers_h200.svg", "vllm_h200.svg", "conversion.svg"}
    for name in names:
        (places, texts), (published, published_texts) = drawn(tmp_path / name), drawn(IMAGES / name)
        assert texts == published_texts
        assert len(places) > 4
        assert len(places) == len(published)
        for now, then in zip(places, published, strict=True):
            assert now == pytest.approx(then, abs=1)  # of 576 or 360 points; fonts and versions move them a little
    texts = drawn(tmp_path / "vllm_h200.svg")[1]
    assert "1.50x" in texts  # batch 1: 430.4 / 286.6
    assert "slower than fp16" in drawn(tmp_path / "layers_h200.svg")[1]
