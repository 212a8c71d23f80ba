"""Tables that the command line prints, and the words in them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from ..conversion.plan import Plan
from ..options import FORMAT_NAMES
from ..text import size

if TYPE_CHECKING:
    from ..bench.results import Cell, LayerResult
    from ..bench.results import Report as BenchReport
    from ..bench.served import Report as ServedReport
    from ..bench.tokens import Report as TokenReport
    from ..conversion.verify import Verification

#: Rows of a table; the rest is only counted (--verbose shows all).
SHORT_TABLE = 12


def plan_table(source: str, plan: Plan) -> Table:
    """Return what becomes of the layers, those that are alike in one row."""
    title = f"{source}, {plan.source_title} → {FORMAT_NAMES[plan.format]}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading, justify in (
        ("layers", "right"),
        ("K x N", "left"),
        ("bits", "right"),
        ("group", "right"),
        ("", "left"),
        ("scales", "left"),
        ("", "left"),
    ):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    kinds = Counter((x.K, x.N, x.bits, x.group_size, x.kind, x.source.scales.dtype) for x in plan.layers)
    for (K, N, bits, group, kind, dtype), count in kinds.items():
        table.add_row(str(count), f"{K} x {N}", str(bits), str(group), kind, dtype.lower(), "convert")
    return table


def verification_table(report: Verification, *, verbose: bool) -> tuple[Table, int]:
    """Return what verifying has shown, and how many layers are left out of it."""
    table = Table(box=None, pad_edge=False)
    for heading, justify in (
        ("layer", "left"),
        ("K x N", "left"),
        ("exact", "left"),
        ("max error", "right"),
        ("relative", "right"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    bad = [x for x in report.layers if not x.ok]
    shown = report.layers if verbose or len(report.layers) <= SHORT_TABLE else bad or report.layers[:SHORT_TABLE]
    for x in shown:
        verdict = Text("equal") if x.ok else Text(x.problem or "differs", "red")
        errors = ("-", "-") if x.max_error is None else (f"{x.max_error:.2e}", f"{x.relative_error:.2e}")
        table.add_row(x.name, f"{x.K} x {x.N}", verdict, *errors)
    return table, len(report.layers) - len(shown)


def batch_table(rows: list[dict[str, Any]], styles: dict[str, str], *, verbose: bool, narrow: bool = False) -> Table:
    """Return what became of each line of a list; where it is `narrow`, without sizes and times."""
    table = Table(box=None, pad_edge=False)
    for heading in ("line", "source", "", *(() if narrow else ("in", "out", "s")), ""):
        right = heading in ("line", "in", "out", "s")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        status, message = row["status"], " ".join(str(row["message"] or "").split())
        word = f"before: {row['settled']}" if status == "before" else status
        sizes = [size(row[key]) if row[key] else "-" for key in ("bytes_in", "bytes_out")]
        short = message if verbose or len(message) <= 100 else f"{message[:99]}…"
        seconds = "-" if row["seconds"] is None or status == "before" else f"{row['seconds']:.1f}"
        numbers = () if narrow else (*sizes, seconds)
        table.add_row(str(row["line"]), row["source"], Text(word, styles.get(status, "")), *numbers, short)
    return table


def bench_table(report: BenchReport, layer: LayerResult) -> Table:
    """Return a layer's times and rates by batch size."""
    shape = layer.shape
    kind = f", {shape.kind}" if shape.kind else ""
    many = f", {shape.count} layers" if shape.count > 1 else ""
    title = f"{report.title} {shape.name}  {shape.K} x {shape.N}, group {shape.group_size}{kind}{many}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for heading in ("M", "fp16", "Marlin", *report.peers, "speedup", "GB/s", "TFLOP/s", "of limit", "", ""):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for cell in layer.cells:
        table.add_row(*_bench_row(cell))
    return table


def _bench_row(cell: Cell) -> list[str]:
    marlin = cell.marlin
    peers = [f"{speed.us:.1f}" if speed else "-" for speed in cell.peers.values()]
    return [
        str(cell.M), f"{cell.fp16.us:.1f}", f"{marlin.us:.1f}", *peers, f"{cell.speedup:.2f}x",
        f"{marlin.gb_per_s:.0f}", f"{marlin.tflop_per_s:.1f}", f"{100 * marlin.share_of_limit:.0f} %", marlin.bound,
        "dequantize" if cell.method == "dequantize" else "",
    ]  # fmt: skip


def tokens_table(report: TokenReport) -> Table:
    """Return tokens a second by batch size, in fp16 and in Marlin."""
    table = Table(title=f"{report.title}: tokens/s", title_justify="left", box=None, pad_edge=False)
    for heading in ("batch", "fp16", "Marlin", "speedup"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in report.cells:
        rates = [f"{rate:.1f}" if rate else "-" for rate in (cell.fp16, cell.marlin)]
        table.add_row(str(cell.batch), *rates, f"{cell.speedup:.2f}x" if cell.speedup else "-")
    return table


def served_table(report: ServedReport) -> Table:
    """Return tokens a second in vLLM, of each side."""
    table = Table(title=f"{report.title} in vLLM: tokens/s", title_justify="left", box=None, pad_edge=False)
    first, *rows = report.table()
    for heading in first:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def clocks_text(clocks: dict[str, float | None] | None) -> str:
    """Return the clocks under load, as far as the driver tells them."""
    known = {key: value for key, value in (clocks or {}).items() if value is not None}
    parts = [
        f"{name} {known[key]:.0f}" + (f" of {known[most]:.0f} MHz" if most in known else " MHz")
        for name, key, most in (("SM", "sm_mhz", "max_sm_mhz"), ("memory", "memory_mhz", "max_memory_mhz"))
        if key in known
    ]
    return f"; under load {', '.join(parts)}" if parts else "; clocks unknown (no nvidia-ml-py, or no answer)"
