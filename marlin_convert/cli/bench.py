"""The command `bench`: its arguments, and what measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import INSTALL_PLOT
from ..options import PRESETS, HubAccess
from .params import FILE, Command, OutputOptions, batch_sizes, collected, output_options, source_options
from .showing import named_in_json


@dataclass(frozen=True)
class WholeModel:
    """Whether a whole model is measured, and how."""

    tokens: bool
    engine: str | None
    gptq: str | None
    no_fp16: bool

    def __post_init__(self) -> None:
        if self.engine and not self.tokens:
            raise click.UsageError("--engine goes with --tokens: it runs whole models.")
        if (self.gptq or self.no_fp16) and not self.served:
            raise click.UsageError("--source and --no-fp16 go with --tokens --engine vllm.")

    @property
    def served(self) -> bool:
        return self.engine == "vllm"


_whole_model_options = collected(
    "model",
    WholeModel,
    click.option(
        "--tokens",
        is_flag=True,
        help="Measure the whole model SOURCE, a Marlin checkpoint: tokens per second by batch size, fp16 and Marlin.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["transformers", "vllm"]),
        help="With --tokens: what runs the model (default: transformers). vllm needs vLLM, and measures prompts, too.",
    ),
    click.option(
        "--source",
        "gptq",
        metavar="GPTQ",
        help="With --engine vllm: the GPTQ checkpoint that SOURCE was made of, measured beside it as vLLM chooses.",
    ),
    click.option("--no-fp16", is_flag=True, help="With --engine vllm: leave out the same model in fp16."),
)


@click.command(cls=Command)
@click.argument("source", required=False)
@click.option(
    "--preset",
    metavar="|".join(PRESETS),
    type=click.Choice(PRESETS),
    help="Measure this model's layers, q, k, v and gate, up fused as engines run them (default: mistral-7b).",
)
@click.option(
    "--batch",
    metavar="M,M,...",
    callback=batch_sizes,
    help="Batch sizes: rows of activations in a product (default: 1,2,4,...,4096).",
)
@_whole_model_options
@click.option("--compare", is_flag=True, help="Measure vLLM's Marlin and humming-kernels too, if they are installed.")
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=FILE,
    help=f"Draw speedup against batch size into a .png, .svg or .pdf; needs {INSTALL_PLOT}.",
)
@click.option(
    "--from-json",
    "run_file",
    metavar="RUN.json",
    type=FILE,
    help="With --plot: draw what an earlier run printed with --json, and measure nothing.",
)
@source_options
@output_options
@click.pass_obj
def bench(
    output: OutputOptions, /, source: str | None, preset: str | None, batch: tuple[int, ...] | None, model: WholeModel,
    compare: bool, plot_file: Path | None, run_file: Path | None, device: str, access: HubAccess,
) -> None:  # fmt: skip
    """Measure this GPU: fp16 (cuBLAS) against Marlin, for the layers of SOURCE or of a preset.

    SOURCE is a checkpoint, GPTQ or Marlin, a folder or a Hub id; its headers tell the shapes. Prints times, GB/s,
    TFLOP/s, speedup, and the share of what memory and tensor cores allow.
    """
    if run_file is not None:
        if plot_file is None or source or preset or batch or model.tokens or compare:
            raise click.UsageError("--from-json goes with --plot, and with nothing that is measured.")
        _draw_again(output, run_file, plot_file)
        return
    if source is not None and preset is not None:
        raise click.UsageError("Give a SOURCE or --preset, not both.")
    if model.tokens and (source is None or compare):
        raise click.UsageError("--tokens needs a SOURCE, a Marlin checkpoint, and does not go with --compare.")
    from .bench_output import BenchScreen

    screen, plot = BenchScreen(output), None
    if plot_file is not None:
        from .plot import Plot

        plot = Plot(plot_file)
    with screen.progress(timings=True) as progress:
        settings: dict[str, Any] = {"device": device, "access": access, "progress": progress}
        if model.served:
            settings |= {"gptq": model.gptq, "fp16": not model.no_fp16, "verbose": output.verbose}
        elif not model.tokens:
            settings |= {"preset": preset, "compare": compare}
        report = _measured(source, batch, settings, model)
    problem = plot.draw(report.as_dict()) if plot else None
    if problem:  # the numbers took minutes; they are shown all the same
        report.notes[problem.message] = ["--plot"]
    show = screen.served if model.served else screen.tokens if model.tokens else screen.bench
    show(report, None if problem else plot_file)
    if problem:
        with named_in_json(output):
            raise problem


def _draw_again(output: OutputOptions, run_file: Path, plot_file: Path) -> None:
    from ..checkpoint.bounded import read_json
    from .bench_output import BenchScreen
    from .plot import Plot

    document = read_json(run_file)
    Plot(plot_file).draw_again(document, str(run_file))
    BenchScreen(output).drawn_again(document, plot_file)


def _measured(source: str | None, batch: tuple[int, ...] | None, settings: dict[str, Any], model: WholeModel) -> Any:
    """Measure, with what the command line was given, layers, or a whole model in Transformers, or one in vLLM."""
    module: Any
    if model.served:
        from ..bench import served as module
    elif model.tokens:
        from ..bench import tokens as module
    else:
        from ..bench import products as module
    return module.run(source, batch=batch or module.BATCH, **settings)
