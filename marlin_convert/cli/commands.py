"""The command line: options in, exit codes out. What it prints is drawn in `render`; what it does is in `convert`."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .._version import __version__
from ..errors import EXIT_CODES, MarlinConvertError, VerificationError, require
from ..formats.config import QUANT_METHODS

if TYPE_CHECKING:
    from ..conversion.convert import Options
    from ..hub.upload import Target
    from .output import Screen

# torch, numpy, rich and huggingface_hub are imported inside the commands: --help, --version and errors in the
# arguments answer at once.

F = TypeVar("F", bound=Callable[..., Any])

#: Whether OUT can be read and written is not for click to judge: a failure there has its own exit code.
OUT = click.Path(path_type=Path, readable=False)

#: Most rows of activations that `bench` takes.
MAX_BATCH = 1 << 20

DEMO_FOLDER = Path(__file__).parents[1] / "data" / "demo"
DEMO_PROMPT, DEMO_TOKENS = "And the king said unto the woman,", 32


class MainGroup(click.Group):
    """A group whose first command needs no name: `marlin-convert SOURCE OUT` is `marlin-convert convert SOURCE OUT`."""

    default = "convert"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, "--help", "-h", "--version"}:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "SOURCE OUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.commands[self.default]
        command.format_options(click.Context(command, parent=ctx), formatter)
        self.format_commands(ctx, formatter)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


def output_options(command: F) -> F:
    """The options of every command about what is printed."""
    command = click.option("-v", "--verbose", is_flag=True, help="Name every layer and note; show tracebacks of bugs.")(
        command
    )
    command = click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")(command)
    return click.option(
        "--json", "as_json", is_flag=True, help="Print one JSON document on standard output, for scripts."
    )(command)


def source_options(command: F) -> F:
    """The options of every command that reads a source."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", callback=_device,
        help="Where to compute. auto repacks on the CPU and verifies on a GPU of capability 8.0+ if there is one.",
    )(hub_options(command))  # fmt: skip


def hub_options(command: F) -> F:
    """The options of every command that may read from the Hub."""
    command = click.option(
        "--cache-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Hub cache to use instead of the standard one.",
    )(command)
    command = click.option(
        "--token", help="Hub token, for gated and private repositories (default: the one you logged in with)."
    )(command)
    return click.option("--revision", help="Branch, tag or commit of a Hub source.")(command)


def format_options(command: F) -> F:
    """The options of the commands that choose the result's format."""
    command = click.option(
        "--zero-points", type=click.Choice(("nibble", "word")),
        help="How to read an asymmetric source in which a zero point is 0, if nothing tells who wrote it.",
    )(command)  # fmt: skip
    return click.option(
        "--format", "format_", type=click.Choice(("auto", "marlin", "marlin-ext")), default="auto", show_default=True,
        help="auto: the original Marlin format if every layer fits it, else the extended one.",
    )(command)  # fmt: skip


def writing_options(command: F) -> F:
    """The options of the commands that write a checkpoint."""
    command = click.option(
        "--quant-method", type=click.Choice(QUANT_METHODS), default=QUANT_METHODS[0], show_default=True,
        help="quant_method in the result's config: gptq for vLLM ≤ 0.10.0 and AutoGPTQ, marlin for TGI.",
    )(command)  # fmt: skip
    command = click.option(
        "--max-shard-size", default="5GB", show_default=True, metavar="SIZE", callback=_shard_size,
        help="Largest weight file; one model.safetensors when everything fits.",
    )(command)  # fmt: skip
    return click.option(
        "--force", is_flag=True, help="Replace an earlier result of marlin-convert at OUT, or on the Hub."
    )(command)


def publishing_options(command: F) -> F:
    """The options of the commands that publish a result."""
    command = click.option("--commit-message", metavar="TEXT", help="Title of the commit on the Hub.")(command)
    command = click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")(command)
    command = click.option("--branch", help="Branch to commit to, created when missing (default: main).")(command)
    return click.option("--private", is_flag=True, help="Create the repository as a private one.")(command)


def _device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    from ..device import REQUEST

    if not REQUEST.fullmatch(value):
        raise click.BadParameter(f"{value!r} is no device; give auto, cpu, cuda or cuda:N.")
    return value


def _shard_size(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    import re

    if (
        not re.fullmatch(r"\d+(\.\d+)?\s*(KB|MB|GB|TB)", value.strip(), re.IGNORECASE)
        or float(re.split(r"[A-Za-z ]", value.strip())[0]) <= 0
    ):
        raise click.BadParameter(f"{value!r} is no size; write it like 5GB or 500MB.")
    return value


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="marlin-convert", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn a GPTQ checkpoint into a Marlin one, and prove that nothing was lost.

    SOURCE is a folder or a Hugging Face Hub id; OUT is the folder to create. OUT appears complete or not at all.
    """


@cli.command()
@click.argument("source")
@click.argument("out", required=False, type=OUT)
@click.option(
    "--verify",
    "with_verify",
    is_flag=True,
    help="Re-read the result from disk and check it against the source, layer by layer.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print what would happen to every layer, from headers alone; OUT is not needed."
)
@format_options
@writing_options
@click.option(
    "--low-disk",
    is_flag=True,
    help="Remove each file of a Hub source from the cache as soon as it is converted, if it was downloaded for it.",
)
@click.option(
    "--push-to-hub",
    metavar="[REPO_ID]",
    is_flag=False,
    flag_value="",
    default=None,
    help="Publish the result on the Hub (default: your name / the source's name + -marlin). Rights are checked first.",
)
@publishing_options
@source_options
@output_options
def convert(
    source: str, out: Path | None, with_verify: bool, dry_run: bool, format_: str, zero_points: str | None,
    force: bool, max_shard_size: str, quant_method: str, low_disk: bool, push_to_hub: str | None, private: bool,
    branch: str | None, create_pr: bool, commit_message: str | None, device: str, revision: str | None,
    token: str | None, cache_dir: Path | None, as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Convert SOURCE, a folder or a Hub id, into a Marlin checkpoint at OUT."""
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT': the folder to create (only --dry-run goes without).")
    if push_to_hub is None and (private or branch or create_pr or commit_message):
        raise click.UsageError("--private, --branch, --create-pr and --commit-message need --push-to-hub.")
    if push_to_hub is not None and dry_run:
        raise click.UsageError("Give --dry-run or --push-to-hub, not both.")
    screen = _screen(as_json, quiet, verbose)
    options = _options(
        device=device, format=format_, zero_points=zero_points, verify=with_verify, force=force,
        max_shard_size=max_shard_size, quant_method=quant_method, low_disk=low_disk,
        revision=revision, token=token, cache_dir=cache_dir,
        target=None if push_to_hub is None else _target(push_to_hub, private, branch, create_pr, commit_message),
    )  # fmt: skip
    if dry_run:
        from ..conversion.convert import plan_only

        origin, plan = plan_only(source, options)
        screen.plan(origin, plan)
        with _said_in_json(as_json):
            plan.require_convertible()
    elif out is not None:
        _convert(source, out, options, screen)


@cli.command()
@click.argument("source")
@click.argument("out", type=OUT)
@source_options
@output_options
def verify(
    source: str, out: Path, device: str, revision: str | None, token: str | None, cache_dir: Path | None,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Check the Marlin checkpoint OUT against the GPTQ checkpoint SOURCE that it was made from.

    Exactly (codes and scales, every element) and numerically (random activations through both). Writes verify.json
    into OUT.
    """
    from ..conversion.convert import verify_pair

    screen = _screen(as_json, quiet, verbose)
    options = _options(device=device, revision=revision, token=token, cache_dir=cache_dir)
    with screen.progress() as progress:
        report = verify_pair(source, out, options, progress)
    screen.verification(report, out)
    if not report.ok and not screen.silent:
        raise VerificationError("the Marlin checkpoint is not equal to its source; see the table above.")
    with _said_in_json(as_json):
        report.require_ok()


@cli.command()
@click.argument("out", required=False, type=OUT, default=Path("demo-out"))
@writing_options
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    callback=_device,
    help="Where to compute.",
)
@output_options
def demo(
    out: Path,
    force: bool,
    max_shard_size: str,
    quant_method: str,
    device: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Convert and verify a small real GPTQ checkpoint that ships with marlin-convert, and let both continue a prompt.

    Needs no network and no GPU. OUT defaults to ./demo-out. Without torch and transformers, there is no prompt.
    """
    screen = _screen(as_json, quiet, verbose)
    options = _options(
        device=device, verify=True, force=force, max_shard_size=max_shard_size, quant_method=quant_method
    )
    _convert(str(DEMO_FOLDER), out, options, screen, prompt=DEMO_PROMPT)


@cli.command()
@click.argument("out", type=OUT)
@click.argument("repo_id")
@publishing_options
@click.option("--force", is_flag=True, help="Overwrite other weights that the repository holds.")
@click.option("--token", help="Hub token that may write (default: the one you logged in with).")
@output_options
def push(
    out: Path, repo_id: str, private: bool, branch: str | None, create_pr: bool, commit_message: str | None,
    force: bool, token: str | None, as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Publish OUT, a finished result of marlin-convert, as the Hub repository REPO_ID.

    In one commit; the repository is created when missing. An upload that failed is taken up again: what has arrived
    is not sent again.
    """
    from ..conversion.convert import push_result

    screen = _screen(as_json, quiet, verbose)
    target = _target(repo_id, private, branch, create_pr, commit_message)
    screen.pushed(push_result(out, target, _options(force=force, token=token)))


@cli.command("to-gptq")
@click.argument("marlin")
@click.argument("out", type=OUT)
@click.option(
    "--v2", is_flag=True, help="Store zero points as they are (checkpoint_format gptq_v2), not less one (gptq)."
)
@click.option(
    "--max-shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=_shard_size,
    help="Largest weight file; one model.safetensors when everything fits.",
)
@click.option("--force", is_flag=True, help="Replace an earlier result of marlin-convert at OUT.")
@hub_options
@output_options
def to_gptq(
    marlin: str, out: Path, v2: bool, max_shard_size: str, force: bool, revision: str | None, token: str | None,
    cache_dir: Path | None, as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Restore the GPTQ checkpoint that MARLIN, a folder or a Hub id, was made from.

    Reads both Marlin formats, also of checkpoints that AutoGPTQ or others made. Codes, scales, zero points and g_idx
    are the original's, bit for bit.
    """
    from ..conversion.restore import restore

    screen = _screen(as_json, quiet, verbose)
    options = _options(force=force, max_shard_size=max_shard_size, revision=revision, token=token, cache_dir=cache_dir)
    with screen.progress() as progress:
        report = restore(marlin, out, options, progress, v2=v2)
    screen.restored(report)


@cli.command()
@click.argument("out")
@click.option("--prompt", required=True, help="The text to continue.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Stop after so many tokens, if the model does not stop before.",
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), metavar="T", help="Sample, at this temperature; 0 is greedy."
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    metavar="P",
    help="Sample from the most likely tokens that together have this probability.",
)
@click.option("--top-k", type=click.IntRange(min=1), metavar="K", help="Sample from the K most likely tokens.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Make sampling repeatable.")
@source_options
@output_options
def generate(
    out: str, prompt: str, max_new_tokens: int, temperature: float | None, top_p: float | None, top_k: int | None,
    seed: int | None, device: str, revision: str | None, token: str | None, cache_dir: Path | None,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Continue a prompt with the Marlin checkpoint OUT, a folder or a Hub id; the text appears while it is made.

    Greedy (the same text every time) unless --temperature, --top-p or --top-k is given. With --quiet, only the text.
    Without a GPU it is exact, and slow.
    """
    from ..engines.generate import Sampling
    from ..engines.generate import generate as continue_prompt

    screen = _screen(as_json, quiet, verbose)
    options = _options(device=device, revision=revision, token=token, cache_dir=cache_dir)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    with screen.text(prompt) as on_text:
        done = continue_prompt(out, prompt, sampling, options, on_text)
    screen.generated(done)


def _target(repo_id: str, private: bool, branch: str | None, create_pr: bool, message: str | None) -> Target:
    from ..hub.upload import Target

    return Target(repo_id, private, branch, create_pr, message)


def _batch(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        sizes = tuple(sorted({int(size) for size in value.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1 or sizes[-1] > MAX_BATCH:
        raise click.BadParameter(f"{value!r} is no list of batch sizes; write it like 1,16,256 (at most {MAX_BATCH}).")
    return sizes


def _preset(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None:
        from ..bench.products import PRESETS

        if value not in PRESETS:
            raise click.BadParameter(f"{value!r} is no preset; give {', '.join(PRESETS)}.")
    return value


@cli.command()
@click.argument("source", required=False)
@click.option(
    "--preset",
    metavar="mistral-7b|llama-3-8b|llama-70b",
    callback=_preset,
    help="Measure this model's layers, q, k, v and gate, up fused as engines run them (default: mistral-7b).",
)
@click.option(
    "--batch",
    metavar="M,M,...",
    callback=_batch,
    help="Batch sizes: rows of activations in a product (default: 1,2,4,...,4096).",
)
@click.option(
    "--tokens",
    is_flag=True,
    help="Measure the whole model SOURCE, a Marlin checkpoint: tokens per second against batch size, fp16 and Marlin.",
)
@click.option("--compare", is_flag=True, help="Measure vLLM's Marlin and humming-kernels too, if they are installed.")
@click.option(
    "--plot",
    "plot_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help='Draw speedup against batch size into a .png, .svg or .pdf; needs pip install "marlin-convert[plot]".',
)
@source_options
@output_options
def bench(
    source: str | None, preset: str | None, batch: tuple[int, ...] | None, tokens: bool, compare: bool,
    plot_file: Path | None, device: str, revision: str | None, token: str | None, cache_dir: Path | None,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Measure this GPU: fp16 (cuBLAS) against Marlin, for the layers of SOURCE or of a preset.

    SOURCE is a checkpoint, GPTQ or Marlin, a folder or a Hub id; its headers tell the shapes. Prints times, GB/s,
    TFLOP/s, speedup, and the share of what memory and tensor cores allow.
    """
    if source is not None and preset is not None:
        raise click.UsageError("Give a SOURCE or --preset, not both.")
    if tokens and (source is None or compare):
        raise click.UsageError("--tokens needs a SOURCE, a Marlin checkpoint, and does not go with --compare.")

    screen = _screen(as_json, quiet, verbose)
    plot = None
    if plot_file is not None:
        from .output import Plot

        plot = Plot(plot_file)
    options = _options(device=device, revision=revision, token=token, cache_dir=cache_dir)
    report: Any
    with screen.progress(timings=True) as progress:
        if tokens and source is not None:
            from ..bench import tokens as whole_model

            report = whole_model.run(source, batch=batch or whole_model.BATCH, options=options, progress=progress)
        else:
            from ..bench import products as layers

            report = layers.run(
                source, preset, batch=batch or layers.BATCH, compare=compare, options=options, progress=progress
            )
    problem = (plot.draw_tokens(report) if tokens else plot.draw(report)) if plot else None
    if problem:  # the numbers took minutes; they are shown all the same
        report.notes[problem.message] = ["--plot"]
    show: Callable[[Any, Path | None], None] = screen.tokens if tokens else screen.bench
    show(report, None if problem else plot_file)
    if problem:
        with _said_in_json(as_json):
            raise problem


def _convert(source: str, out: Path, options: Options, screen: Screen, prompt: str | None = None) -> None:
    """Convert; with a `prompt`, continue it with source and result."""
    from ..conversion.convert import AlreadyMarlin, convert

    screen.start(source, options)
    try:
        with screen.progress() as progress:
            report = convert(source, out, options, progress)
    except AlreadyMarlin as nothing:
        screen.already_marlin(str(nothing))
        return
    if prompt is None:
        screen.report(report)
        return
    from ..engines.generate import compare

    try:
        require("torch", "transformers")
        screen.doing("continuing a prompt with the source and with the result: loading torch and Transformers")
        texts = compare(Path(source), out, prompt, DEMO_TOKENS, str(report.device))
    except MarlinConvertError as error:  # the conversion is done, whatever runs here
        screen.report(report, missing=error.message)
    else:
        screen.report(report, texts)


@contextlib.contextmanager
def _said_in_json(as_json: bool) -> Iterator[None]:
    """With --json, the one document that was printed has named the problems: the exit code is all that is left."""
    try:
        yield
    except MarlinConvertError as error:
        if as_json:
            raise type(error)("") from None
        raise


def _options(**settings: Any) -> Options:
    from ..conversion.convert import Options

    return Options(**settings)


def _screen(as_json: bool, quiet: bool, verbose: bool) -> Screen:
    from .output import Screen

    return Screen(as_json=as_json, quiet=quiet, verbose=verbose)


def main(args: list[str] | None = None) -> None:
    """The program: runs `cli`, and turns every way of ending into one clear line and a documented exit code."""
    arguments = sys.argv[1:] if args is None else args
    for number in (signal.SIGTERM, signal.SIGHUP):  # end like Ctrl-C does: stop, clean up, say so
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal or a file name that is not UTF-8 is no reason to fail
    try:
        cli.main(args=arguments, prog_name="marlin-convert", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _fail(arguments, error.exit_code, type(error).__name__, error.format_message(), functools.partial(_show, error))
    except (KeyboardInterrupt, click.Abort):
        try:
            _fail(arguments, 130, "Interrupted", "interrupted; nothing half-done was left behind.")
        finally:
            _leave_download(130)
    except BrokenPipeError:  # the reader of a pipe went away (… | head)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # whichever it was: Python flushes both once more when it ends
            os.dup2(nowhere, stream.fileno())
        sys.exit(1)
    except Exception as error:
        if "--verbose" in arguments or "-v" in arguments:
            raise
        text = f"{type(error).__name__}: {error}; this is a bug. Run again with --verbose, and report what it prints."
        _fail(arguments, 70, "Bug", text)


def _leave_download(code: int) -> None:
    """Exit at once, with `code`, if a download that was interrupted still has threads."""
    hub = sys.modules.get("marlin_convert.hub.client")
    if hub and hub.downloading():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show(error: click.ClickException) -> None:
    if isinstance(error, MarlinConvertError):
        if error.message:
            click.echo(f"marlin-convert: {error.format_message()}", err=True)
    else:
        error.show()


def _fail(arguments: list[str], code: int, kind: str, text: str, show: Callable[[], None] | None = None) -> None:
    """Say what went wrong, for people on standard error and, with --json, for scripts on standard output; exit."""
    if "--json" in arguments and text:
        click.echo(json.dumps({"ok": False, "error": kind, "message": text, "exit_code": code}))
    elif show:
        show()
    else:
        click.echo(f"marlin-convert: {text}", err=True)
    sys.exit(code)
