"""The main path: from a source's checkpoint to a Marlin one, in the order in which it happens."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.output_folder import check_free, json_bytes, new_folder, replace_files, write_json
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import Shards, shard_names
from ..device import Device
from ..errors import (
    AlreadyMarlin,
    HubError,
    OutputError,
    SourceError,
    UnsupportedError,
)
from ..formats.gptq_config import find_configs
from ..formats.marlin_config import is_marlin, marlin_ext_settings, marlin_model_config, marlin_settings, ties
from ..hub.address import repository
from ..hub.client import is_folder
from ..hub.open import Source, fetch, opened_for_planning
from ..hub.upload import check_target, create_repository, default_name, push
from ..native import cpu
from ..native.choose import packer, usable_device
from ..options import (
    CARD_FILE,
    DEFAULT_SHARD_SIZE,
    REPORT_FILE,
    VERIFY_FILE,
    Format,
    HubAccess,
    Options,
    PublishTarget,
    QuantMethod,
)
from ..progress import BytesOnly, Progress
from .attest import write_statement
from .blocks import run_all
from .card import Made, model_card, with_verdict, write_card
from .digests import complete_report, digests, files_below, known_digests, report_with
from .files import copied_files, copy_files, needs_index, require_free_names
from .layer import Layer
from .pipeline import MarlinWriter
from .plan import Plan, make_plan
from .supply import Item, Supply, check_room, prefetching
from .verify import Verification, Verifier, verify


@dataclass
class Report:
    """What was done. Written to the output without the times, so that the same source gives the same bytes."""

    source: Source
    out: Path
    device: Device
    plan: Plan
    codec: str
    quant_method: QuantMethod
    remark: str | None = None  # about the device, if there is something to say
    source_quantization: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    options: Options = field(default_factory=Options)
    source_files: dict[str, str | None] = field(default_factory=dict)  # SHA-256 by name, None where not known
    result_files: dict[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0
    verification: Verification | None = None
    pushed: str | None = None  # the address of the commit on the Hub

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes of source tensors over the time of the whole run."""
        return self.plan.bytes_in / 1e9 / self.seconds if self.seconds else 0.0

    def as_file(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "marlin_convert": __version__,
            "source": self.source.label,
            "source_commit": self.source.commit,
            "format": plan.format.value,
            "group_size": None if plan.extended else plan.group_size,
            "why_extended": [{"reason": reason, "layers": names} for reason, names in plan.misfits.items()]
            if plan.extended
            else [],
            "layers_converted": len(plan.layers),
            "tensors_copied": len(plan.copies),
            "bytes_in": plan.bytes_in,
            "bytes_out": plan.bytes_out,
            "largest_scale_rounding": plan.scale_rounding,
            "weight_files": self.files,
            "weights_beside": list(plan.weights_beside),
            "notes": [{"note": note, "layers": names} for note, names in plan.notes.items()],
            "source_quantization": self.source_quantization,
            "options": shaping(self.options),
            "source_files": self.source_files,
            "result_files": self.result_files,
            "verified": None if self.verification is None else self.verification.ok,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "ok": True,
            **self.as_file(),
            "out": str(self.out),
            "device": str(self.device),
            "remark": self.remark,
            "codec": self.codec,
            "seconds": round(self.seconds, 3),
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
            "verification": self.verification.as_dict() if self.verification else None,
            "pushed": self.pushed,
        }


def convert(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
) -> Report:
    """Convert `source`, a folder or a Hub id, into a Marlin checkpoint at `out`.

    `out` appears complete or not at all. Raises AlreadyMarlin when there is nothing to convert, and one of
    `errors`' exceptions, each with a message for the user, when it cannot be done.
    """
    options, progress, started = options or Options(), progress or Progress(), time.monotonic()
    out, access = Path(out), access or HubAccess()
    source, revision = repository(str(source), access.revision)
    access = replace(access, revision=revision)
    check_free(out, force=options.force)
    device, remark = usable_device(options.device, computes=options.verify)
    if options.low_disk and is_folder(source):
        raise SourceError(f"{source} is a folder; --low-disk applies to a Hub id only.")
    options = replace(options, target=_checked_target(source, options, access.token))
    with opened_for_planning(source, access, progress.meanwhile) as (origin, checkpoint):
        keep_apart(origin.folder, out)
        plan = make_plan(checkpoint, options.format, options.zero_points)
        if plan.already_marlin:
            raise AlreadyMarlin(f"{source} already is a Marlin checkpoint; there is nothing to convert.")
        plan.require_convertible()
        report = Report(origin, out, device, plan, cpu.describe(), options.quant_method, remark)
        report.source_quantization, report.options = source_quantization(checkpoint, plan), options
        require_free_names(checkpoint, shard_names(plan.out_tensors, options.max_shard_size))
        checkpoint.require_readable()
        remote = origin.hub.remote if origin.hub else None
        check_room(_bytes_needed(checkpoint, plan), checkpoint, remote, out, low_disk=options.low_disk)
        if options.target:
            create_repository(options.target, token=access.token)
        checkpoint.fetch_extra_files(progress.meanwhile)
        with new_folder(out, force=options.force) as folder:
            with (
                Shards(folder, plan.out_tensors, options.max_shard_size, index=needs_index(checkpoint)) as shards,
                prefetching(checkpoint, plan, origin.hub, shards, progress, low_disk=options.low_disk) as stop,
                _early_verifier(checkpoint, plan, folder, device, options, progress) as verifier,
            ):
                report.files = shards.files
                supply = Supply(checkpoint, plan, stop, drop=options.low_disk)
                writer = MarlinWriter(checkpoint, shards, progress, packer(device, options.device))
                write_tensors(writer, plan, progress, supply, verifier)
            write_configs(checkpoint, plan, folder, options.quant_method)
            copy_files(checkpoint, folder)
            if options.verify:
                with Checkpoint(folder) as written:
                    report.verification = (
                        verifier.report(written) if verifier else verify(checkpoint, plan, written, device, progress)
                    )
                report.verification.require_ok()
                write_json(folder / VERIFY_FILE, report.verification.as_dict())
            write_card(folder, model_card(checkpoint, plan, made(report, options)))
            _note_digests(report, checkpoint, folder, progress)
            write_json(folder / REPORT_FILE, report.as_file())
            checkpoint.require_unchanged()
    report.seconds = time.monotonic() - started
    if options.attest:
        write_statement(options.attest, report.as_file(), out / REPORT_FILE)
    if options.target:
        with progress.waiting(f"uploading to {options.target.repo_id}"):
            report.pushed = push_result(out, options.target, force=options.force, token=access.token)
    return report


def push_result(out: Path, target: PublishTarget, *, force: bool = False, token: str | None = None) -> str:
    """Publish the finished result `out`; the address of the commit. What stops it leaves `out` as it is."""
    if not (out / REPORT_FILE).is_file():
        raise SourceError(f"{out}: not a finished result of marlin-convert (it has no {REPORT_FILE}).")
    complete_report(out)
    try:
        return push(out, target, token=token, force=force)
    except HubError as error:
        words = ["marlin-convert", "push", str(out), target.repo_id]
        for name, value in (("branch", target.branch), ("commit-message", target.commit_message)):
            words += [f"--{name}", value] if value else []
        flags = {"private": target.private, "create-pr": target.create_pr, "force": force}
        words += [f"--{name}" for name, given in flags.items() if given]
        raise HubError(
            f"{error.message.rstrip('.')}. The result in {out} is kept; go on with `{shlex.join(words)}`."
        ) from None


def _checked_target(source: str, options: Options, token: str | None) -> PublishTarget | None:
    """Where the result will go, with its full name, once it is clear that it may."""
    target = options.target
    if target is None:
        return None
    if not target.repo_id:
        name = source if not is_folder(source) else Path(source).expanduser().resolve().name
        target = replace(target, repo_id=default_name(name))
    return check_target(target, token=token, force=options.force)


def plan_only(
    source: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
) -> tuple[Source, Plan]:
    """What `convert` would do with `source`, without reading any weight."""
    options, progress = options or Options(), progress or Progress()
    with opened_for_planning(str(source), access or HubAccess(), progress.meanwhile) as (origin, checkpoint):
        plan = make_plan(checkpoint, options.format, options.zero_points)
        if not plan.already_marlin:
            require_free_names(checkpoint, shard_names(plan.out_tensors, options.max_shard_size))
        return origin, plan


def verify_pair(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
) -> Verification:
    """Check an existing Marlin checkpoint `out` against its `source`; writes `verify.json` into `out`."""
    options, out, progress = options or Options(), Path(out), progress or Progress()
    device, _ = usable_device(options.device, computes=True)
    with opened(source, access or HubAccess(), progress) as (_, checkpoint), Checkpoint(out) as result:
        found = list(find_configs(result.configs).values())
        extended = bool(found) and found[0].get("checkpoint_format") == Format.MARLIN_EXT
        plan = make_plan(checkpoint, Format.MARLIN_EXT if extended else Format.MARLIN, options.zero_points)
        if plan.already_marlin:
            if found and is_marlin(found[0]):
                what = f"; give the checkpoint that {out} was made from."
            else:
                command = shlex.join(["marlin-convert", "verify", str(out), str(source)])
                what = f", and {out} is none: the source comes first. Run `{command}`."
            raise UnsupportedError(f"{source} is a Marlin checkpoint{what}")
        plan.require_convertible()
        report = verify(checkpoint, plan, result, device, progress)
        checkpoint.require_unchanged()
        result.require_unchanged()
    try:
        card = with_verdict(out, report)
        changed = {VERIFY_FILE: json_bytes(report.as_dict())} | ({CARD_FILE: card} if card else {})
        replace_files(out, changed | report_with(changed, out))
    except OSError as error:
        verdict = "equal to its source" if report.ok else "not equal to its source"
        raise OutputError(
            f"{out}: {verdict}, but {VERIFY_FILE} and {CARD_FILE} cannot be written there: {error.strerror}; what was "
            "there is as it was."
        ) from None
    return report


@contextlib.contextmanager
def opened(
    source: str | Path, access: HubAccess, progress: Progress, *, everything: bool = False
) -> Iterator[tuple[Source, Checkpoint]]:
    """Fetch `source` if it is on the Hub, with the weights beside the model's own if `everything` is asked for, and
    open it."""
    origin = fetch(
        str(source), revision=access.revision, token=access.token, cache_dir=access.cache_dir,
        meanwhile=progress.meanwhile, everything=everything,
    )  # fmt: skip
    with Checkpoint(origin.files) as checkpoint:
        yield origin, checkpoint


def source_quantization(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What only the source's files tell, for `to-gptq`: its settings, and the types of what was converted."""
    main = checkpoint.configs.get("config.json", {})
    return {
        "source_format": plan.source_format.name,
        "configs": find_configs(checkpoint.configs),
        "dtypes": {key: main.get(key) for key in ("torch_dtype", "dtype")},
        "ties": ties(main) if plan.lm_head else {},
        **plan.source_format.noted([layer.source for layer in plan.layers]),
    }


def write_tensors(
    writer: MarlinWriter, plan: Plan, progress: Progress, supply: Supply, verifier: Verifier | None
) -> None:
    """Stream every tensor. What is written is verified at once, if a `verifier` is given; then `supply` is told."""
    label = "converting and verifying" if verifier else "converting"
    progress.stage(label, plan.bytes_out * (2 if verifier else 1), len(plan.layers))

    def finished(item: Item) -> None:
        if verifier:
            verifier.check(item)
        supply.finished(item)

    tasks = (
        task
        for item in supply
        for task in writer.counted(
            item.name, writer.pieces(item), layer=isinstance(item, Layer), finished=partial(finished, item)
        )
    )
    run_all(tasks, on_stop=supply.stop)
    progress.end()


def write_configs(checkpoint: Checkpoint, plan: Plan, folder: Path, quant_method: QuantMethod) -> None:
    """config.json and quantize_config.json, with the same Marlin settings in both."""
    if plan.extended:
        settings = marlin_ext_settings({x.name: x.settings for x in plan.layers}, lm_head=plan.lm_head)
    else:
        settings = marlin_settings(
            plan.settings, group_size=plan.group_size, lm_head=plan.lm_head, quant_method=quant_method
        )
    if "config.json" in checkpoint.configs:
        config = marlin_model_config(
            checkpoint.configs["config.json"], settings, float16=not plan.extended, own_head=plan.lm_head
        )
        write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", settings)


def made(report: Report, options: Options) -> Made:
    """What the model card tells, beside the plan. Only options that shape the result are named in it."""
    named = []
    if options.max_shard_size != DEFAULT_SHARD_SIZE:
        named += ["--max-shard-size", str(options.max_shard_size)]
    if options.format != Options.format:
        named += ["--format", options.format.value]
    if options.zero_points:
        named += ["--zero-points", options.zero_points.value]
    if options.quant_method != Options.quant_method:
        named += ["--quant-method", options.quant_method.value]
    if options.verify:
        named += ["--verify"]
    return Made(
        report.source, options.quant_method, len(report.files), report.plan.scale_rounding, tuple(named),
        repo_id=options.target.repo_id if options.target else None, verification=report.verification,
    )  # fmt: skip


def _bytes_needed(checkpoint: Checkpoint, plan: Plan) -> int:
    # Headers, index, reports, and the file system's own needs.
    return plan.bytes_out + sum(copied_files(checkpoint).values()) + (16 << 20)


@contextlib.contextmanager
def _early_verifier(
    checkpoint: Checkpoint, plan: Plan, folder: Path, device: Device, options: Options, progress: Progress
) -> Iterator[Verifier | None]:
    """With `low_disk`, verification cannot wait: the source's files go away when they are converted."""
    if not (options.verify and options.low_disk):
        yield None
        return
    with Checkpoint(folder, steady=False) as written:
        yield Verifier(checkpoint, plan, written, device, BytesOnly(progress))


def shaping(options: Options) -> dict[str, Any]:
    """The options that shape a result, for its report: with them, the source and this version, it can be made again."""
    return {
        "format": options.format.value,
        "zero_points": None if options.zero_points is None else options.zero_points.value,
        "max_shard_size": options.max_shard_size,
        "quant_method": options.quant_method.value,
        "verify": options.verify,
        "published_as": None if options.target is None else options.target.repo_id,
    }


def _note_digests(report: Report, checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """SHA-256 of what was read and of what was written. Of weights, what the Hub says; hashing them here takes longer
    than converting them, and is done for a statement only."""
    origin, large = report.source, report.options.attest is not None
    paths = {name: checkpoint.path(name) for name in checkpoint.names}
    report.source_files = digests(
        paths, known_digests(origin), large=large and origin.hub is None, meanwhile=progress.meanwhile
    )
    report.result_files = digests(files_below(folder), {}, large=large, meanwhile=progress.meanwhile)


def keep_apart(source: Path, out: Path) -> None:
    """The source is never touched: the output is neither the source, nor inside it, nor around it."""
    a, b = (Path(os.path.realpath(path)) for path in (source, out))  # unlike resolve, no error for a loop of links
    if a == b or a in b.parents or b in a.parents:
        raise OutputError(f"{out}: it overlaps the source {source}; choose a folder outside it.")
