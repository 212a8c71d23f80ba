"""What `bench --plot` draws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import INSTALL_PLOT, MarlinConvertError, OutputError

if TYPE_CHECKING:
    from ..bench.results import Report as BenchReport
    from ..bench.served import Report as ServedReport
    from ..bench.tokens import Report as TokenReport


class Plot:
    """Speedup over fp16 against batch size, one line for each layer, as an image at `path`.

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
        if not path.parent.is_dir():
            raise OutputError(f"{path}: there is no folder {path.parent}; create it first.")

    def draw(self, report: BenchReport) -> OutputError | None:
        """Draw and write the image; the error when it cannot be written."""
        axes = self._figure.subplots()
        for layer in report.layers:
            rows, speedups = [cell.M for cell in layer.cells], [cell.speedup for cell in layer.cells]
            axes.plot(rows, speedups, marker="o", markersize=4, label=str(layer.shape))
        axes.axhline(self.IDEAL, color="0.4", linestyle="--", linewidth=1, label=f"ideal {self.IDEAL}x")
        axes.axhspan(0, 1, color="0.9", zorder=0, label="slower than fp16")
        self._batches(axes, {cell.M for layer in report.layers for cell in layer.cells})
        axes.set_ylim(bottom=0)
        axes.set_xlabel("batch size M")
        axes.set_ylabel("speedup over fp16 (cuBLAS)")
        return self._written(axes, report.machine.name, report.title)

    def draw_tokens(self, report: TokenReport | ServedReport) -> OutputError | None:
        """Draw the same for tokens per second, one line for Marlin and one for each of the others, both axes
        logarithmic."""
        axes = self._figure.subplots()
        curves = report.curves()
        for label, points in curves.items():
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=4, label=label)
        self._batches(axes, {batch for points in curves.values() for batch, _ in points})
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("batch size")
        axes.set_ylabel("tokens per second, all sequences")
        return self._written(axes, report.machine.name, report.title)

    @staticmethod
    def _batches(axes: Any, sizes: set[int]) -> None:
        axes.set_xscale("log", base=2)
        ticks = sorted(sizes)
        axes.set_xticks(ticks, labels=[str(M) for M in ticks])
        axes.minorticks_off()

    def _written(self, axes: Any, machine: str, title: str) -> OutputError | None:
        axes.set_title(f"Marlin on {machine}: {title}".replace("$", r"\$"))
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            self._figure.savefig(self.path, dpi=150)
        except OSError as error:
            return OutputError(f"{self.path}: the plot cannot be written: {error.strerror or error}.")
        return None
