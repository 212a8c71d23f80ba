"""The command `generate`: how tokens are chosen, and a prompt through a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..options import HubAccess
from .params import Command, OutputOptions, collected, output_options, source_options

if TYPE_CHECKING:
    from ..engines.generate import Sampling


def _sampling(**values: Any) -> Sampling:
    from ..engines.generate import Sampling

    return Sampling(**values)


_sampling_options = collected(
    "sampling",
    _sampling,
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=128,
        show_default=True,
        metavar="N",
        help="Stop after so many tokens, if the model does not stop before.",
    ),
    click.option(
        "--temperature", type=click.FloatRange(min=0), metavar="T", help="Sample, at this temperature; 0 is greedy."
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        metavar="P",
        help="Sample from the most likely tokens that together have this probability.",
    ),
    click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="Sample from the K most likely tokens."),
    click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Make sampling repeatable."),
)


@click.command(cls=Command)
@click.argument("out")
@click.option("--prompt", required=True, help="The text to continue.")
@_sampling_options
@source_options
@output_options
@click.pass_obj
def generate(
    output: OutputOptions, /, out: str, prompt: str, sampling: Sampling, device: str, access: HubAccess
) -> None:
    """Continue a prompt with the Marlin checkpoint OUT, a folder or a Hub id; the text appears while it is made.

    Greedy (the same text every time) unless --temperature, --top-p or --top-k is given. With --quiet, only the text.
    Without a GPU it is exact, and slow.
    """
    from ..engines.generate import generate as continue_prompt
    from .generate_output import GenerateScreen

    output.source = out
    screen = GenerateScreen(output)
    with screen.progress() as progress, screen.text(prompt) as on_text:
        done = continue_prompt(out, prompt, sampling, device, on_text, progress, access=access)
    screen.generated(done)
