"""The command `bench`: its arguments, and what measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import INSTALL_PLOT
from ..options import PRESETS, HubAccess
from .params import Command, OutputOptions, batch_sizes, output_options, source_options
from .showing import said_in_json


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
@click.option(
    "--tokens",
    is_flag=True,
    help="Measure the whole model SOURCE, a Marlin checkpoint: tokens per second against batch size, fp16 and Marlin.",
)
@click.option(
    "--engine",
    type=click.Choice(["transformers", "vllm"]),
    help="With --tokens: what runs the model (default: transformers). vllm needs vLLM, and measures prompts, too.",
)
@click.option(
    "--source",
    "gptq",
    metavar="GPTQ",
    help="With --engine vllm: the GPTQ checkpoint that SOURCE was made of, measured beside it on vLLM's own choice.",
)
@click.option("--no-fp16", is_flag=True, help="With --engine vllm: leave out the same model in fp16.")
@click.option("--compare", is_flag=True, help="Measure vLLM's Marlin and humming-kernels too, if they are installed.")
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Draw speedup against batch size into a .png, .svg or .pdf; needs {INSTALL_PLOT}.",
)
@source_options
@output_options
@click.pass_obj
def bench(
    output: OutputOptions, /, source: str | None, preset: str | None, batch: tuple[int, ...] | None, tokens: bool,
    engine: str | None, gptq: str | None, no_fp16: bool, compare: bool, plot_file: Path | None, device: str,
    access: HubAccess,
) -> None:  # fmt: skip
    """Measure this GPU: fp16 (cuBLAS) against Marlin, for the layers of SOURCE or of a preset.

    SOURCE is a checkpoint, GPTQ or Marlin, a folder or a Hub id; its headers tell the shapes. Prints times, GB/s,
    TFLOP/s, speedup, and the share of what memory and tensor cores allow.
    """
    if source is not None and preset is not None:
        raise click.UsageError("Give a SOURCE or --preset, not both.")
    if tokens and (source is None or compare):
        raise click.UsageError("--tokens needs a SOURCE, a Marlin checkpoint, and does not go with --compare.")
    if engine and not tokens:
        raise click.UsageError("--engine goes with --tokens: it runs whole models.")
    served = engine == "vllm"
    if (gptq or no_fp16) and not served:
        raise click.UsageError("--source and --no-fp16 go with --tokens --engine vllm.")

    from .bench_output import BenchScreen

    screen, plot = BenchScreen(output), None
    if plot_file is not None:
        from .plot import Plot

        plot = Plot(plot_file)
    with screen.progress(timings=True) as progress:
        settings: dict[str, Any] = {"device": device, "access": access, "progress": progress}
        if served:
            settings |= {"gptq": gptq, "fp16": not no_fp16, "verbose": output.verbose}
        elif not tokens:
            settings |= {"preset": preset, "compare": compare}
        report = _measured(source, batch, settings, whole=tokens, served=served)
    problem = (plot.draw_tokens(report) if tokens else plot.draw(report)) if plot else None
    if problem:  # the numbers took minutes; they are shown all the same
        report.notes[problem.message] = ["--plot"]
    show = screen.served if served else screen.tokens if tokens else screen.bench
    show(report, None if problem else plot_file)
    if problem:
        with said_in_json(output):
            raise problem


def _measured(
    source: str | None, batch: tuple[int, ...] | None, settings: dict[str, Any], *, whole: bool, served: bool
) -> Any:
    """Measure, with what the command line was given, layers, or a whole model in Transformers, or one in vLLM."""
    module: Any
    if served:
        from ..bench import served as module
    elif whole:
        from ..bench import tokens as module
    else:
        from ..bench import products as module
    return module.run(source, batch=batch or module.BATCH, **settings)
