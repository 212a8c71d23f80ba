"""The commands: arguments in, a call of what does the work, and a screen that shows what came of it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .._version import __version__
from ..errors import INSTALL_WEB, AlreadyMarlin, HubError, MarlinConvertError, VerificationError, require
from ..interrupts import ignore_signals
from ..options import HubAccess, Options, ZeroPointReading
from ..progress import StageTimes
from .batch import batch
from .bench import bench
from .generate import generate
from .params import (
    FOLDER,
    OUT,
    DryRun,
    MainGroup,
    OutputOptions,
    Publishing,
    attest_option,
    collected,
    conversion_options,
    device_option,
    dry_run_options,
    force_option,
    hub_options,
    output_options,
    publishing_options,
    shard_size_option,
    source_options,
    writing_options,
    zero_points_option,
)
from .showing import named_in_json, screen_for

if TYPE_CHECKING:
    from ..conversion.plan import Plan
    from ..engines.transformers_trial import Trial
    from .output import Screen

# torch, numpy, rich and huggingface_hub are imported inside the commands: --help, --version and errors in the
# arguments answer at once.

DEMO_FOLDER = Path(__file__).parents[1] / "data" / "demo"
DEMO_PROMPT, DEMO_TOKENS = "And the king said unto the woman,", 32


@click.group(cls=MainGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="marlin-convert", message="%(prog)s %(version)s")
def cli() -> None:
    """Turn a GPTQ, AWQ or compressed-tensors checkpoint into a Marlin one, and prove that nothing was lost.

    SOURCE is a folder or a Hugging Face Hub id; OUT is the folder to create. OUT appears complete or not at all.
    """


cli.add_command(batch)


@cli.command()
@click.argument("source")
@click.argument("out", required=False, type=OUT)
@conversion_options
@dry_run_options
@click.option(
    "--push-to-hub",
    metavar="[REPO_ID]",
    is_flag=False,
    flag_value="",
    default=None,
    help="Publish the result on the Hub (default: your name / the source's name + -marlin). Rights are checked first.",
)
@publishing_options
@hub_options
@output_options
@click.pass_obj
def convert(
    output: OutputOptions, /, source: str, out: Path | None, options: Options, dry: DryRun, push_to_hub: str | None,
    publishing: Publishing, access: HubAccess,
) -> None:  # fmt: skip
    """Convert SOURCE, a folder or a Hub id, into a Marlin checkpoint at OUT."""
    if out is None and not dry.dry_run:
        raise click.UsageError("Missing argument 'OUT': the folder to create (only --dry-run goes without).")
    if push_to_hub is None and publishing.given:
        raise click.UsageError("--private, --branch, --create-pr and --commit-message need --push-to-hub.")
    if push_to_hub is not None and dry.dry_run:
        raise click.UsageError("Give --dry-run or --push-to-hub, not both.")
    if options.attest is not None and dry.dry_run:
        raise click.UsageError("Give --dry-run or --attest, not both.")
    screen = screen_for(output)
    if push_to_hub is not None:
        options = replace(options, target=publishing.target(push_to_hub))
    if dry.dry_run:
        from ..conversion.convert import plan_only

        with screen.progress() as progress:
            origin, plan = plan_only(source, options, progress, access=access)
        trial = _tried(plan, options, screen) if dry.engine == "transformers" else None
        served = dry.engine if dry.engine in ("vllm", "sglang") else None
        screen.plan(origin, plan, options, trial, served, dry.tensor_parallel or 1)
        with named_in_json(output):
            plan.require_convertible()
    elif out is not None:
        _convert(source, out, options, access, screen)


@cli.command()
@click.argument("source")
@click.argument("out", required=False, type=OUT)
@zero_points_option
@attest_option
@source_options
@output_options
@click.pass_obj
def verify(
    output: OutputOptions, /, source: str, out: Path | None, zero_points: ZeroPointReading | None,
    attest: Path | None, device: str, access: HubAccess,
) -> None:  # fmt: skip
    """Check the Marlin checkpoint OUT against the checkpoint SOURCE that it was made from.

    Exactly (codes and scales, every element) and numerically (random activations through both). Writes verify.json
    into OUT.

    A result of marlin-convert alone, a folder or a Hub id, names its source: both are then read from the Hub in parts,
    and every file of the result is compared with what its source gives. Nothing is written.
    """
    screen = screen_for(output)
    if out is None:
        if zero_points is not None:
            raise click.UsageError("--zero-points is for SOURCE and OUT: a result alone says how its source is read.")
        from ..conversion.proof import prove

        with screen.progress() as progress:
            proof = prove(source, device, progress, attest=attest, access=access)
        screen.proof(proof, attest if proof.ok else None)
        if not proof.ok and not screen.silent:
            raise VerificationError("the result is not exactly what its source gives; see above.")
        with named_in_json(output):
            proof.require_ok()
        return
    if attest is not None:
        raise click.UsageError("--attest is for a conversion, or for verify with a result alone.")
    from ..conversion.pair import verify_pair

    with screen.progress() as progress:
        report = verify_pair(source, out, device, progress, access=access, zero_points=zero_points)
    screen.verification(report, out)
    if not report.ok and not screen.silent:
        raise VerificationError("the Marlin checkpoint is not equal to its source; see the table above.")
    with named_in_json(output):
        report.require_ok()


@cli.command()
@click.argument("out", required=False, type=OUT, default=Path("demo-out"))
@collected("options", partial(Options, verify=True), writing_options, device_option("Where to compute."))
@output_options
@click.pass_obj
def demo(output: OutputOptions, /, out: Path, options: Options) -> None:
    """Convert and verify a small real GPTQ checkpoint that ships with marlin-convert, and let both continue a prompt.

    Needs no network and no GPU. OUT defaults to ./demo-out. Without torch and transformers, there is no prompt.
    """
    _convert(str(DEMO_FOLDER), out, options, HubAccess(), screen_for(output), prompt=DEMO_PROMPT)


@cli.command()
@click.argument("out", type=OUT)
@click.argument("repo_id")
@publishing_options
@click.option("--force", is_flag=True, help="Overwrite other weights that the repository holds.")
@click.option("--token", help="Hub token that may write (default: the one you logged in with).")
@output_options
@click.pass_obj
def push(
    output: OutputOptions, /, out: Path, repo_id: str, publishing: Publishing, force: bool, token: str | None
) -> None:
    """Publish OUT, a finished result of marlin-convert, as the Hub repository REPO_ID.

    In one commit; the repository is created when missing. An upload that failed is taken up again: what has arrived
    is not sent again.
    """
    from ..conversion.publish import push_result

    output.source = str(out)
    screen = screen_for(output)
    with screen.progress() as progress, progress.waiting(f"uploading {out} to {repo_id}"), _naming_push(force):
        address = push_result(out, publishing.target(repo_id), force=force, token=token)
    screen.pushed(address)


@cli.command("to-gptq")
@click.argument("marlin")
@click.argument("out", type=OUT)
@click.option(
    "--v2", is_flag=True, help="Store zero points as they are (checkpoint_format gptq_v2), not less one (gptq)."
)
@shard_size_option
@force_option
@hub_options
@output_options
@click.pass_obj
def to_gptq(
    output: OutputOptions, /, marlin: str, out: Path, v2: bool, max_shard_size: str, force: bool, access: HubAccess
) -> None:
    """Make a GPTQ checkpoint of MARLIN, a folder or a Hub id.

    If it was made from one, that: codes, scales, zero points and g_idx are the original's, bit for bit. Reads both
    Marlin formats, also of checkpoints that AutoGPTQ or others made, and of sources in other formats (see `restore`).
    """
    from ..conversion.restore import restore

    screen = screen_for(output)
    with screen.progress() as progress:
        report = restore(marlin, out, progress, v2=v2, access=access, max_shard_size=max_shard_size, force=force)
    screen.restored(report)


@cli.command()
@click.argument("marlin")
@click.argument("out", type=OUT)
@shard_size_option
@force_option
@hub_options
@output_options
@click.pass_obj
def restore(
    output: OutputOptions, /, marlin: str, out: Path, max_shard_size: str, force: bool, access: HubAccess
) -> None:
    """Restore the checkpoint that MARLIN, a folder or a Hub id, was made from, in its own format.

    Its tensors are the original's, bit for bit: GPTQ, AWQ, compressed-tensors or AutoRound.
    """
    from ..conversion.restore import restore as work

    screen = screen_for(output)
    with screen.progress() as progress:
        report = work(marlin, out, progress, original=True, access=access, max_shard_size=max_shard_size, force=force)
    screen.restored(report)


cli.add_command(generate)


@cli.command()
@output_options
@click.pass_obj
def env(output: OutputOptions, /) -> None:
    """Say what a bug report needs: versions, CPU, GPUs, libraries, settings.

    Of variables that may hold secrets only the names are said.
    """
    from .environment import environment

    screen_for(output).environment(environment())


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    metavar="N",
    help="Port to listen at; 0 takes the first that is free.",
)
@click.option(
    "--work-dir",
    type=FOLDER,
    help="Folder for what is at work: the result until it is published (default: one in the temporary folder).",
)
@click.option("--no-browser", is_flag=True, help="Only print the page's address.")
@output_options
@click.pass_obj
def web(output: OutputOptions, /, host: str, port: int, work_dir: Path | None, no_browser: bool) -> None:
    """Plan, convert and publish in a browser: a page on this computer, until Ctrl-C.

    Whoever has the address that is printed may use the login of this computer (`hf auth login`); anybody else needs a
    token. With another --host than this computer itself, everybody does. Needs Gradio and matplotlib.
    """
    require("gradio", "matplotlib", install=INSTALL_WEB)
    from ..web.page import serve

    screen = screen_for(output)
    serve(host, port, work_dir, browser=not no_browser, say=screen.serving)


def _tried(plan: Plan, options: Options, screen: Screen) -> Trial | None:
    """Return what Transformers does with the result; None if there is none."""
    require("torch", "transformers")
    if plan.refusals or plan.already_marlin:
        return None
    from ..conversion.configs import result_config

    with screen.doing("trying the result in Transformers"):
        from ..engines.transformers_trial import try_loading

        return try_loading(result_config(plan, options.quant_method), plan.out_tensors)


def _convert(
    source: str, out: Path, options: Options, access: HubAccess, screen: Screen, prompt: str | None = None
) -> None:
    """Convert; with a `prompt`, continue it with source and result."""
    from ..conversion.convert import convert

    screen.start()
    try:
        with screen.progress() as progress, _naming_push(options.force):
            timed = StageTimes(progress)
            report = convert(source, out, options, timed, access=access)
            if prompt is None:
                ignore_signals()  # the result is complete
    except AlreadyMarlin as nothing:
        screen.already_marlin(nothing.message)
        return
    if prompt is None:
        screen.report(report, timed.stages)
        return
    from ..engines.generate import compare

    try:
        require("torch", "transformers")
        with screen.doing("continuing a prompt with source and result"):
            texts = compare(Path(source), out, prompt, DEMO_TOKENS, str(report.device))
    except MarlinConvertError as error:  # the conversion is complete, even if nothing can run here
        screen.report(report, timed.stages, missing=error.message)
    else:
        screen.report(report, timed.stages, texts)


@contextlib.contextmanager
def _naming_push(force: bool) -> Iterator[None]:
    """Say by which command a result that could not be published can be, when what stopped it is mended."""
    from ..conversion.publish import UploadError

    try:
        yield
    except UploadError as error:
        target = error.target
        words = ["marlin-convert", "push", str(error.out), target.repo_id]
        for name, value in (("branch", target.branch), ("commit-message", target.commit_message)):
            words += [f"--{name}", value] if value else []
        flags = {"private": target.private, "create-pr": target.create_pr, "force": force}
        words += [f"--{name}" for name, given in flags.items() if given]
        raise HubError(f"{error.message.rstrip('.')}; go on with `{shlex.join(words)}`.") from None


cli.add_command(bench)
