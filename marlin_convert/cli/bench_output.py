"""What `bench` prints: the machine, a table for each layer or one for a model, notes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import size
from .output import Screen
from .tables import bench_table, clocks_text, served_table, tokens_table

if TYPE_CHECKING:
    from ..bench.results import Machine
    from ..bench.results import Report as BenchReport
    from ..bench.served import Report as ServedReport
    from ..bench.tokens import Report as TokenReport


class BenchScreen(Screen):
    """Where `bench` prints."""

    def bench(self, report: BenchReport, plot: Path | None) -> None:
        """Show the result of `marlin-convert bench`: one table for each layer."""
        self._json({**report.as_dict(), "plot": plot and str(plot)})
        limits = report.limits
        self._machine(report.machine, report.peers)
        self._say(
            f"measured here: copy {limits.copy_bytes_per_s / 1e12:.2f} TB/s (read + write), "
            f"fp16 product {limits.fp16_flop_per_s / 1e12:.0f} TFLOP/s"
        )
        for layer in report.layers:
            self._say()
            self._table(bench_table(report, layer))
        self._say()
        self._say(
            "times in us; fp16: torch.matmul (cuBLAS); GB/s, TFLOP/s and share of the limit are Marlin's; "
            "dequantize: where it runs as dequantize + cuBLAS"
        )
        self._bench_end(report.notes, plot)

    def _machine(self, machine: Machine, peers: dict[str, str] | None = None) -> None:
        versions = ", ".join(f"{name} {version}" for name, version in {**machine.versions, **(peers or {})}.items())
        self._say(
            f"{machine.name} ({machine.device}), capability {machine.capability}, {machine.multiprocessors} "
            f"multiprocessors, L2 {size(machine.l2_bytes)}, driver {machine.driver}{clocks_text(machine.clocks)}"
        )
        self._say(versions)

    def _bench_end(self, notes: dict[str, list[str]], plot: Path | None) -> None:
        for note, where in notes.items():
            places = where if self.verbose or len(where) <= 3 else [*where[:3], f"and {len(where) - 3} more"]
            self._note(f"{note}: {'; '.join(places)}")
        if plot:
            self._say(f"plot:  {plot}")

    def drawn_again(self, document: dict[str, Any], plot: Path) -> None:
        """Show the result of `marlin-convert bench --from-json`: the document that was drawn, and where to."""
        self._json({**document, "plot": str(plot)})
        self._say(f"plot:  {plot}")

    def tokens(self, report: TokenReport, plot: Path | None) -> None:
        """Show the result of `marlin-convert bench --tokens`."""
        self._json({**report.as_dict(), "plot": plot and str(plot)})
        self._machine(report.machine)
        method = report.as_dict()["method"]
        sizes = ", ".join(f"{name} {size(count)}" for name, count in report.weight_bytes.items())
        self._say()
        self._table(tokens_table(report))
        self._say()
        self._say(
            f"decoding behind {method['context']} tokens, all sequences together; "
            + "; ".join(f"{name}: {how}" for name, how in report.execution.items())
            + f"; memory of the model: {sizes}"
        )
        self._bench_end(report.notes, plot)

    def served(self, report: ServedReport, plot: Path | None) -> None:
        """Show the result of `marlin-convert bench --tokens --engine vllm`."""
        self._json({**report.as_dict(), "plot": plot and str(plot)})
        self._machine(report.machine)
        self._say()
        self._table(served_table(report))
        self._say()
        self._say(report.method())
        for label, kernels in report.kernels().items():
            self._say(f"{label} on {kernels}")
        self._bench_end(report.notes, plot)
