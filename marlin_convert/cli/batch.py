"""The command `batch`: its arguments, one display of all that goes on, and the table at the end."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import MarlinConvertError
from ..options import QuantMethod
from .params import (
    FOLDER,
    Command,
    OutputOptions,
    WordChoice,
    collected,
    device_option,
    format_options,
    output_options,
    shard_size_option,
)

if TYPE_CHECKING:
    from ..fleet.listing import Line
    from .output import Screen

#: Not looked at by click: what cannot be read or written has exit codes of its own.
_PATH = click.Path(path_type=Path, readable=False)

#: What a line came to, as the table names it, and its colour.
_STYLES = {"done": "green", "nothing": "", "refused": "yellow", "failed": "red", "before": "dim", "would convert": ""}


def _shard(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    """Read 2/8: the second of eight parts."""
    index, _, count = (value or "1/1").partition("/")
    if not (index.isascii() and index.isdigit() and count.isascii() and count.isdigit()):
        raise click.BadParameter(f"{value!r} is not a part; write it like 2/8.")
    if not 1 <= int(index) <= int(count) <= 1_000_000:
        raise click.BadParameter(f"{value!r} is not a part; of 8, there are 1/8 to 8/8.")
    return int(index), int(count)


#: How the list is worked through: `settings`, the fields of a Plan.
_plan_options = collected(
    "settings",
    dict,
    click.option(
        "--out", type=_PATH, metavar="DIR", help="Folder that the results go into, each under its target's name."
    ),
    click.option("--push-to-hub", "owner", metavar="ORG", help="Publish each result as a repository of ORG instead."),
    click.option("--private", is_flag=True, help="Create repositories as private ones."),
    click.option(
        "--jobs",
        type=click.IntRange(1, 256),
        metavar="N",
        help="Checkpoints at a time, each in its own process (default: 1; with --ray, as many as the cluster takes).",
    ),
    click.option(
        "--retries",
        type=click.IntRange(0, 100),
        default=2,
        show_default=True,
        metavar="R",
        help="Further tries where one fails by the network, the disk or the machine.",
    ),
    click.option("--dry-run", is_flag=True, help="Plan each checkpoint, from headers alone; nothing is written."),
    click.option("--force", is_flag=True, help="Replace earlier results at targets, or other weights on the Hub."),
    device_option("Where to compute."),
    click.option("--token", help="Hub token (default: the one you logged in with). It goes into no file."),
    click.option("--cache-dir", type=FOLDER, help="Hub cache to use."),
)

#: Where: `ray`, the fields of a Cluster.
_ray_options = collected(
    "ray",
    dict,
    click.option(
        "--ray", "address", metavar="ADDRESS", help="Work on the Ray cluster at ADDRESS (auto: the one here)."
    ),
    click.option(
        "--ray-resources",
        default="CPU=1",
        show_default=True,
        metavar="NAME=N,...",
        help="With --ray: what a checkpoint takes of a node.",
    ),
)

#: What lines do not say themselves: `defaults`, fields of the Options.
_line_options = collected(
    "defaults",
    dict,
    click.option("--verify", is_flag=True, help="Verify each result, unless its line says otherwise."),
    format_options,
    shard_size_option,
    click.option(
        "--quant-method",
        type=WordChoice(QuantMethod),
        default=QuantMethod.GPTQ.value,
        show_default=True,
        help="quant_method in the results' configs.",
    ),
    click.option("--low-disk", is_flag=True, help="Remove each downloaded file as soon as it is converted."),
)


@click.command(cls=Command)
@click.argument("list_file", metavar="LIST", type=_PATH)
@_plan_options
@click.option(
    "--state",
    "state_file",
    required=True,
    type=_PATH,
    metavar="FILE",
    help="What has become of each checkpoint. What it says is done is not done again.",
)
@click.option("--shard", "part", metavar="I/N", callback=_shard, help="Only part I of N of the list.")
@_ray_options
@_line_options
@output_options
@click.pass_obj
def batch(
    output: OutputOptions, /, list_file: Path, state_file: Path, part: tuple[int, int], settings: dict[str, Any],
    ray: dict[str, Any], defaults: dict[str, Any],
) -> None:  # fmt: skip
    """Convert every checkpoint of LIST: text, CSV or JSON lines, a source on each line.

    A line is SOURCE, and optionally TARGET, --revision and options of the conversion. Run it again to go on: what is
    done (this source at this commit, with these options, by this version) is passed over, what failed is tried again.
    """
    from ..fleet.batch import Plan, Processes, Runner, run, shard
    from ..fleet.listing import read_list
    from ..fleet.state import State
    from .output import Screen

    plan = Plan(**{**settings, "jobs": settings["jobs"] or 1})
    if (plan.out is None) == (plan.owner is None) and not (plan.dry_run and plan.out is None):
        raise click.UsageError("Give --out DIR or --push-to-hub ORG.")
    if plan.private and plan.owner is None:
        raise click.UsageError("--private needs --push-to-hub.")
    screen = Screen(output)
    lines = shard(read_list(list_file, defaults), part)
    state = State(state_file)
    with contextlib.ExitStack() as cleaning:
        runner: Runner = Processes()
        if ray["address"] is not None:
            from ..fleet.cluster import Cluster, resources

            needed = resources(ray["ray_resources"])
            cleaning.enter_context(contextlib.redirect_stdout(sys.stderr))  # Ray prints messages about its nodes there
            cluster = Cluster(ray["address"], retries=plan.retries, resources=needed)
            runner = cleaning.enter_context(contextlib.closing(cluster))
            plan = replace(plan, retries=0, jobs=settings["jobs"] or min(len(lines), 256))
        display = cleaning.enter_context(_display(screen, lines))
        outcomes = run(lines, plan, state, display, runner)
    rows = [_row(line, outcomes[line.number]) for line in lines]
    counts = Counter(row["status"] for row in rows)
    failed = [row for row in rows if row["status"] == "failed"]
    screen.batch(rows, dict(counts), _STYLES)
    if failed:
        error = MarlinConvertError(f"{len(failed)} of {len(rows)} checkpoints failed; run it again to try these again.")
        if output.as_json:  # the JSON document has already said it
            error = MarlinConvertError("")
        raise error


#: What is told of an outcome, and its type. One that was found, in the state file or in a result's report, may have
#: been written by anybody.
_TOLD = {"status": str, "settled": str, "message": str, "exit_code": int, "identity": str, "format": str, "layers": int,
         "bytes_in": int, "bytes_out": int, "verified": bool, "found": bool, "seconds": float}  # fmt: skip


def _row(line: Line, outcome: dict[str, Any]) -> dict[str, Any]:
    def told(name: str) -> Any:
        value = outcome.get(name)
        fits = type(value) is _TOLD[name] and (not isinstance(value, (int, float)) or abs(value) < 1 << 63)  # no NaN
        return value if fits else None

    return {"line": line.number, "source": line.source, "revision": line.revision, "target": line.target,
            **{name: told(name) for name in _TOLD}}  # fmt: skip


@contextlib.contextmanager
def _display(screen: Screen, lines: list[Line]) -> Iterator[_Display]:
    display = _Display(screen, len(lines))
    try:
        yield display
    finally:
        display.close()


class _Display:
    """One line a checkpoint that ends, and on a terminal one bar beside it for all that goes on."""

    def __init__(self, screen: Screen, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
        from rich.table import Column

        from .progress import FOR_BAR, LayerColumn, Roomy

        self._screen, self._total, self._ended = screen, total, 0
        self._lock, self._last = threading.Lock(), time.monotonic()
        self._running: dict[int, tuple[str, float]] = {}
        self._bars: Progress | None = None
        if not screen.silent and screen.err.is_terminal:
            fixed = [Column(no_wrap=True) for _ in range(2)]
            self._bars = Progress(
                Roomy(BarColumn(bar_width=10 if screen.err.width < 100 else 24), screen.err, FOR_BAR),
                MofNCompleteColumn(table_column=fixed[0]), TimeElapsedColumn(table_column=fixed[1]),
                LayerColumn(table_column=Column(no_wrap=True, ratio=1)),  # what is at hand, in the room that is left
                console=screen.err, transient=True, expand=True,
            )  # fmt: skip
            self._task = self._bars.add_task("", total=total, layer="")
            self._bars.start()

    def begun(self, line: Line) -> None:
        with self._lock:
            self._running[line.number] = line.source, 0.0
            self._show()

    def moved(self, line: Line, done: int, total: int) -> None:
        with self._lock:
            self._running[line.number] = line.source, done / max(1, total)
            self._show()

    def ended(self, line: Line, outcome: dict[str, Any]) -> None:
        with self._lock:
            self._running.pop(line.number, None)
            self._ended += 1
            self._show()
            self._screen.batch_line(f"{self._ended}/{self._total} {outcome['status']}: {line.source}")

    def _show(self) -> None:
        parts = [f"{name} {100 * share:.0f} %" for name, share in list(self._running.values())[:4]]
        more = f" and {len(self._running) - 4} more" if len(self._running) > 4 else ""
        if self._bars:
            self._bars.update(self._task, completed=self._ended, layer=", ".join(parts) + more)
        elif parts and time.monotonic() - self._last >= 5.0:
            self._last = time.monotonic()
            self._screen.batch_line(f"{self._ended}/{self._total} ended; now {', '.join(parts)}{more}")

    def close(self) -> None:
        if self._bars:
            self._bars.stop()
