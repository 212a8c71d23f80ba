"""Draw what `bench --tokens --engine vllm --json` printed, as that command would: `python tools/tokens_picture.py`.

From benchmarks/results/vllm_h100.json into docs/images/vllm_h100.svg, or from and into other files that are named.
"""

import json
import os
import sys
from pathlib import Path

import matplotlib

from marlin_convert.bench.served import Report
from marlin_convert.cli.plot import Plot

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "vllm_h100.json"
PICTURE = ROOT / "docs" / "images" / "vllm_h100.svg"


def main(figures: Path = FIGURES, picture: Path = PICTURE) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "marlin-convert"  # the same bytes from the same figures …
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # … on any day
    problem = Plot(picture).draw_tokens(Report.from_dict(json.loads(figures.read_text(encoding="utf-8"))))
    if problem:
        raise problem


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
