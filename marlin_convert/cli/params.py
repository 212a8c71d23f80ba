"""The options that several commands share, collected into one argument each; how output options are found.

Groups are decorators: `@hub_options` gives a command --revision, --token and --cache-dir, and one argument `access`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import EXIT_CODES, OptionError
from ..options import (
    DEFAULT_SHARD_SIZE,
    Format,
    HubAccess,
    Options,
    PublishTarget,
    QuantMethod,
    Word,
    ZeroPointReading,
    shard_size,
)
from .examples import EXAMPLES

F = TypeVar("F", bound=Callable[..., Any])

#: Paths, of which click does not check whether they can be read and written: such a failure has its own exit code.
OUT = click.Path(path_type=Path, readable=False)
FILE = click.Path(path_type=Path, readable=False, dir_okay=False)
FOLDER = click.Path(path_type=Path, readable=False, file_okay=False)

#: The largest batch size that `bench` accepts.
MAX_BATCH = 1 << 20


@dataclass
class OutputOptions:
    """What is printed, and how: one JSON document, nothing but errors, every detail."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    #: What the command reads, as the user named it.
    source: str | None = None


class Command(click.Command):
    """A command that knows how to print before it knows whether its arguments are right.

    `OutputOptions`, the object that the program was started with, is filled from the arguments as click itself reads
    them (`-qv` is -q and -v; `--prompt --json` is a prompt), up to the first mistake that cannot be passed over.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        output = ctx.find_object(OutputOptions)
        if output is not None:
            tolerant = click.Context(
                self, resilient_parsing=True, ignore_unknown_options=True, help_option_names=ctx.help_option_names
            )
            found, _, _ = self.make_parser(tolerant).parse_args(args=list(args))
            output.as_json, output.quiet, output.verbose = (
                bool(found.get(name)) for name in ("as_json", "quiet", "verbose")
            )
            read = next((found[name] for name in ("source", "marlin", "list_file") if found.get(name)), None)
            output.source = read if isinstance(read, str) else None
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write options by what they are about, in the order of GROUPS."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *GROUPS)}
        title_of = {name: title for title, names in GROUPS.items() for name in names}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                name = "help" if "--help" in parameter.opts else parameter.name or ""
                sections[title_of.get(name, "Options")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        _write_examples(self.name or "", formatter)


def _write_examples(command: str, formatter: click.HelpFormatter) -> None:
    with formatter.section("Examples"):
        formatter.write_dl(list(EXAMPLES[command].items()))


#: Options that commands share, by their titles in --help; a command's own come before them.
GROUPS = {
    "The result": ("format", "zero_points", "quant_method", "max_shard_size", "force", "verify", "attest"),
    "Look first": ("dry_run", "engine", "tensor_parallel"),
    "Hugging Face Hub": ("revision", "token", "cache_dir", "low_disk"),
    "Publish": ("push_to_hub", "private", "branch", "create_pr", "commit_message"),
    "Where and how": ("device", "as_json", "quiet", "verbose", "version", "help"),
}


class MainGroup(click.Group):
    """A group whose first command needs no name: `marlin-convert SOURCE OUT` is `marlin-convert convert SOURCE OUT`."""

    command_class = Command
    default = "convert"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args[:1] == ["help"] and not os.path.lexists("help"):
            args = [*(name for name in args[1:2] if name in self.commands), "--help"]
        if args and args[0] not in {*self.commands, "--help", "-h", "--version"}:
            self._refuse_mistyped(args[0])
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def _refuse_mistyped(self, word: str) -> None:
        """Say which command was meant, for a word that is no folder, near none and no Hub id of anybody's."""
        commands = [name for name, command in self.commands.items() if not command.hidden]
        folders: list[str] = []
        with contextlib.suppress(OSError):
            folders = [entry.name for entry in os.scandir() if entry.is_dir()]
        near = difflib.get_close_matches(word, [*commands, *folders], 1, 0.65)
        if near and near[0] in commands and "/" not in word and not os.path.lexists(word):
            raise click.UsageError(f"There is no command {word!r}; did you mean `marlin-convert {near[0]}`?")

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "SOURCE OUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        command = self.commands[self.default]
        command.format_options(click.Context(command, parent=ctx), formatter)
        self.format_commands(ctx, formatter)
        _write_examples("", formatter)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


class WordChoice(click.Choice):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A `Word`, by its spelling."""

    def __init__(self, words: type[Word]) -> None:
        super().__init__([word.value for word in words])
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Word:
        try:
            return self._words.chosen(value, "the option")
        except OptionError:
            return self._words(super().convert(value, param, ctx))  # fails with click's own message


# ---- Options on their own ----


def _device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    from ..device import REQUEST

    if not REQUEST.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a device; give auto, cpu, cuda or cuda:N.")
    return value


def _shard_size(ctx: click.Context, parameter: click.Parameter, value: str) -> int | str:
    try:
        return shard_size(value)
    except OptionError as error:
        raise click.BadParameter(error.message) from None


def batch_sizes(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Read a list such as 1,16,256."""
    if value is None:
        return None
    try:
        sizes = tuple(sorted({int(size) for size in value.split(",")}))
    except ValueError:
        sizes = (0,)
    if sizes[0] < 1 or sizes[-1] > MAX_BATCH:
        raise click.BadParameter(
            f"{value!r} is not a list of batch sizes; write it like 1,16,256 (at most {MAX_BATCH})."
        )
    return sizes


def device_option(help: str) -> Callable[[F], F]:
    """Return the option --device, of which a command says what it is for."""
    return click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda|cuda:N", callback=_device, help=help
    )


where_to_compute = device_option(
    "Where to compute. auto repacks on the CPU and verifies on a GPU of capability 8.0+ if there is one."
)
shard_size_option = click.option(
    "--max-shard-size", default=DEFAULT_SHARD_SIZE, show_default=True, metavar="SIZE", callback=_shard_size,
    help="Largest weight file; one model.safetensors when everything fits.",
)  # fmt: skip
force_option = click.option("--force", is_flag=True, help="Replace an earlier result of marlin-convert at OUT.")
attest_option = click.option(
    "--attest", metavar="FILE", type=FILE,
    help="Write an in-toto statement: the SHA-256 of every file of the result and of its source. Sign it yourself.",
)  # fmt: skip


# ---- Groups of options ----


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator for `options`, shown in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def collected(name: str, kind: Callable[..., Any], *options: Callable[[Any], Any]) -> Callable[[F], F]:
    """Do what `together` does, and give the command one argument `name`, a `kind` of the options' values by their
    names."""

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def collecting(*args: Any, **values: Any) -> Any:
            values[name] = kind(**{field: values.pop(field) for field in fields})
            return command(*args, **values)

        before = len(getattr(command, "__click_params__", []))
        collecting = together(*options)(collecting)
        fields = [parameter.name for parameter in collecting.__click_params__[before:]]  # type: ignore[attr-defined]
        return collecting  # type: ignore[return-value]

    return decorate


#: What is printed: read by `Command` for every command, so that its function gets none of them.
output_options = together(
    click.option(
        "--json", "as_json", is_flag=True, expose_value=False,
        help="Print one JSON document on standard output, for scripts.",
    ),
    click.option("-q", "--quiet", is_flag=True, expose_value=False, help="Print nothing but errors."),
    click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, help="Name every layer and note; show tracebacks of bugs."
    ),
)  # fmt: skip

#: For commands that may read from the Hub: `access`, a HubAccess.
hub_options = collected(
    "access", HubAccess,
    click.option("--revision", help="Branch, tag or commit of a Hub source."),
    click.option(
        "--token", help="Hub token, for gated and private repositories (default: the one you logged in with)."
    ),
    click.option(
        "--cache-dir", type=FOLDER,
        help="Hub cache to use instead of the standard one.",
    ),
)  # fmt: skip

#: For commands that read a source: `device`, and `access` as above.
source_options = together(where_to_compute, hub_options)

zero_points_option = click.option(
    "--zero-points", type=WordChoice(ZeroPointReading),
    help="How to read an asymmetric source in which a zero point is 0, if nothing tells who wrote it.",
)  # fmt: skip

#: For commands that choose the result's format: `format`, `zero_points`.
format_options = together(
    click.option(
        "--format", type=WordChoice(Format), default=Format.AUTO.value, show_default=True,
        help="auto: the original Marlin format if every layer fits it, else the extended one.",
    ),
    zero_points_option,
)  # fmt: skip

#: For commands that write a Marlin checkpoint: `force`, `max_shard_size`, `quant_method`.
writing_options = together(
    click.option("--force", is_flag=True, help="Replace an earlier result of marlin-convert at OUT, or on the Hub."),
    shard_size_option,
    click.option(
        "--quant-method", type=WordChoice(QuantMethod), default=QuantMethod.GPTQ.value,
        show_default=True,
        help="quant_method in the result's config: gptq for vLLM ≤ 0.10.0 and AutoGPTQ, marlin for TGI.",
    ),
)  # fmt: skip

#: For a conversion: `options`, the Options but for their target.
conversion_options = collected(
    "options", Options,
    click.option(
        "--verify", is_flag=True, help="Re-read the result from disk and check it against the source, layer by layer."
    ),
    format_options,
    writing_options,
    click.option(
        "--low-disk", is_flag=True,
        help="Remove each file of a Hub source from the cache as soon as it is converted, if it was downloaded for it.",
    ),
    attest_option,
    where_to_compute,
)  # fmt: skip


@dataclass(frozen=True)
class DryRun:
    """Whether nothing is to be written, and what is to be said of the result."""

    dry_run: bool
    engine: str | None
    tensor_parallel: int | None

    def __post_init__(self) -> None:
        if self.engine is not None and not self.dry_run:
            raise click.UsageError("--engine needs --dry-run.")
        if self.tensor_parallel is not None and self.engine not in ("vllm", "sglang"):
            raise click.UsageError("--tensor-parallel needs --engine vllm or sglang: Transformers' result is not cut.")


#: For a conversion that may be planned only: `dry`, a DryRun.
dry_run_options = collected(
    "dry", DryRun,
    click.option(
        "--dry-run", is_flag=True, help="Print what would happen to every layer, from headers alone; OUT is not needed."
    ),
    click.option(
        "--engine", type=click.Choice(["vllm", "sglang", "transformers"]),
        help="With --dry-run: say what this engine does with the result.",
    ),
    click.option(
        "--tensor-parallel", type=click.IntRange(1, 1024), metavar="RANKS",
        help="With --engine vllm or sglang: say what its cut for so many ranks means, too.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Publishing:
    """How a result is published; the command says as what."""

    private: bool
    branch: str | None
    create_pr: bool
    commit_message: str | None

    @property
    def given(self) -> bool:
        return any(asdict(self).values())

    def target(self, repo_id: str) -> PublishTarget:
        return PublishTarget(repo_id, **asdict(self))


#: For commands that publish a result: `publishing`, a Publishing.
publishing_options = collected(
    "publishing", Publishing,
    click.option("--private", is_flag=True, help="Create the repository as a private one."),
    click.option("--branch", help="Branch to commit to, created when missing (default: main)."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing."),
    click.option("--commit-message", metavar="TEXT", help="Title of the commit on the Hub."),
)  # fmt: skip
