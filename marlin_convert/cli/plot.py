"""What `bench --plot` draws: from what `bench --json` prints, so that a picture can be drawn again without a GPU."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.output_folder import replace_files
from ..errors import INSTALL_PLOT, MarlinConvertError, OutputError, SourceError

#: One line: its points (batch size, value).
Points = list[tuple[int, float]]


class Plot:
    """Speedup over fp16, or tokens per second, against batch size, as an image at `path`.

    Made before the measurement, so that what is missing is said at once: MarlinConvertError without matplotlib or
    for a file type that it cannot write, OutputError for a folder that is not there.
    """

    IDEAL = 4  # times fewer bits to read than fp16 has

    def __init__(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MarlinConvertError(
                f"--plot needs matplotlib ({error}): {INSTALL_PLOT}, or leave --plot out."
            ) from None
        self.path, self._figure = path, Figure(figsize=(8, 5), layout="constrained")
        types = self._figure.canvas.get_supported_filetypes()
        if path.suffix.lower().removeprefix(".") not in types:
            raise MarlinConvertError(f"{path}: matplotlib writes no such file; end its name in .png, .svg or .pdf.")
        if not os.path.isdir(path.parent):  # noqa: PTH112 - no error where it may not be seen
            raise OutputError(f"{path}: there is no folder {path.parent}; create it first.")

    def draw(self, document: Mapping[str, Any]) -> OutputError | None:
        """Draw and write the image; the error when it cannot be written. Raises KeyError, TypeError, AttributeError or
        ValueError for what is no document of `bench`."""
        axes = self._figure.subplots()
        if "layers" in document:
            self._speedups(axes, document["layers"])
        else:
            self._tokens(axes, _rates(document))
        axes.set_title(f"Marlin on {document['machine']['name']}: {document['title']}".replace("$", r"\$"))
        axes.grid(alpha=0.3)
        axes.legend()
        image = io.BytesIO()
        self._figure.savefig(image, dpi=150, format=self.path.suffix.lower().removeprefix("."))
        try:
            replace_files(self.path.parent, {self.path.name: image.getvalue()})
        except OSError as error:
            return OutputError(f"{self.path}: the plot cannot be written: {error.strerror or error}.")
        return None

    def draw_again(self, document: Mapping[str, Any], label: str) -> None:
        """Draw a document that was read from a file, which `label` names. Raises SourceError where it is none, and
        OutputError when the image cannot be written."""
        try:
            problem = self.draw(document)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise SourceError(f"{label}: it is not what `marlin-convert bench --json` prints.") from None
        if problem:
            raise problem

    def _speedups(self, axes: Any, layers: list[dict[str, Any]]) -> None:
        lines = {
            f"{x['name']} {x['K']} x {x['N']}": [(cell["M"], cell["marlin"]["speedup"]) for cell in x["cells"]]
            for x in layers
        }
        self._lines(axes, lines)
        axes.axhline(self.IDEAL, color="0.4", linestyle="--", linewidth=1, label=f"ideal {self.IDEAL}x")
        axes.axhspan(0, 1, color="0.9", zorder=0, label="slower than fp16")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size M")
        axes.set_ylabel("speedup over fp16 (cuBLAS)")

    def _tokens(self, axes: Any, lines: dict[str, Points]) -> None:
        """Marlin first, then what it is compared with; its points say how many times as fast as the first of those."""
        self._lines(axes, lines)
        marlin, *others = lines.values()
        if others:
            below = dict(others[0])
            for batch, rate in marlin:
                if batch in below:
                    axes.annotate(
                        f"{rate / below[batch]:.2f}x", (batch, rate), xytext=(0, 6), textcoords="offset points",
                        ha="center", fontsize=8,
                    )  # fmt: skip
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.margins(y=0.1)
        axes.set_xlabel("batch size" + (f" (factors: Marlin / {list(lines)[1]})" if others else ""))
        axes.set_ylabel("tokens per second, all sequences")

    def _lines(self, axes: Any, lines: dict[str, Points]) -> None:
        for label, points in lines.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=label)
        self._batches(axes, {batch for points in lines.values() for batch, _ in points})

    @staticmethod
    def _batches(axes: Any, sizes: set[int]) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted(sizes)
        axes.set_xticks(ticks, labels=[str(M) for M in ticks])
        axes.minorticks_off()


def _rates(document: Mapping[str, Any]) -> dict[str, Points]:
    """Tokens per second of each way that a whole model was run, Marlin first; what failed is left out."""
    from ..bench.served import FP16, GPTQ, LABELS, MARLIN

    lines: dict[str, Points] = {}
    for side in (MARLIN, GPTQ, FP16):
        if "sides" not in document:
            lines[LABELS[side]] = [(x["batch"], x[side]) for x in document["cells"] if x.get(side) is not None]
        elif side in document["sides"]:
            lines[LABELS[side]] = [(x["batch"], x["tokens_per_s"]) for x in document["sides"][side]["decode"]]
    return {label: points for label, points in lines.items() if points}
