"""The main path: from a source's checkpoint to a Marlin one, in the order in which it happens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..checkpoint.output_folder import check_free, new_folder, write_json
from ..checkpoint.reader import Checkpoint
from ..checkpoint.writer import Shards, shard_names
from ..device import Device
from ..errors import AlreadyMarlin, SourceError
from ..hub.address import repository
from ..hub.client import is_folder
from ..hub.open import Source, opened_for_planning
from ..hub.upload import create_repository
from ..native import cpu
from ..native.choose import packer, usable_device
from ..options import REPORT_FILE, VERIFY_FILE, HubAccess, Options
from ..progress import BytesOnly, Progress
from .attest import check_place, write_statement
from .blocks import run_all
from .card import model_card, write_card
from .configs import write_configs
from .files import copied_files, copy_files, keep_apart, needs_index, require_free_names
from .layer import Layer
from .pipeline import MarlinWriter
from .plan import Plan, make_plan
from .publish import Publish, checked_target, push_result
from .report import Report, card_facts, note_digests, source_quantization
from .schedule import Item, Schedule, check_room, prefetching
from .verify import Verifier, verify


def convert(
    source: str | Path,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
    publish: Publish | None = None,
) -> Report:
    """Convert `source`, a folder or a Hub id, into a Marlin checkpoint at `out`.

    `out` appears complete or not at all; `publish`, by default `push_result`, takes it to `options.target`. Raises
    AlreadyMarlin when there is nothing to convert, and one of `errors`' exceptions, each with a message for the user,
    when it cannot be done.
    """
    options, progress, started = options or Options(), progress or Progress(), time.monotonic()
    out, access = Path(out), access or HubAccess()
    source, revision = repository(str(source), access.revision)
    access = replace(access, revision=revision)
    check_free(out, force=options.force)
    if options.attest:
        check_place(options.attest, out, source)
    device, device_note = usable_device(options.device, computes=options.verify)
    if options.low_disk and is_folder(source):
        raise SourceError(f"{source} is a folder; --low-disk applies to a Hub id only.")
    options = replace(options, target=checked_target(source, options, access.token))
    with opened_for_planning(source, access, progress.transfer) as (origin, checkpoint):
        keep_apart(origin.folder, out)
        report = Report(origin, out, device, _plan(checkpoint, options), cpu.describe(), options, device_note)
        report.source_quantization = source_quantization(checkpoint, report.plan)
        checkpoint.require_readable()
        remote = origin.hub.remote if origin.hub else None
        check_room(_bytes_needed(checkpoint, report.plan), checkpoint, remote, out, low_disk=options.low_disk)
        if options.target:
            create_repository(options.target, token=access.token)
        checkpoint.fetch_extra_files(progress.transfer)
        with new_folder(out, force=options.force) as folder:
            _fill(folder, checkpoint, report, progress)
            checkpoint.require_unchanged()
    report.seconds = time.monotonic() - started
    if options.attest:
        write_statement(options.attest, report.as_file(), out / REPORT_FILE)
    if options.target:
        with progress.waiting(f"uploading to {options.target.repo_id}"):
            report.pushed = (publish or push_result)(out, options.target, force=options.force, token=access.token)
    return report


def _plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan the conversion. Raises AlreadyMarlin, and what says that it cannot be done."""
    plan = make_plan(checkpoint, options.format, options.zero_points)
    if plan.already_marlin:
        raise AlreadyMarlin(f"{checkpoint.label} already is a Marlin checkpoint; there is nothing to convert.")
    plan.require_convertible()
    require_free_names(checkpoint, shard_names(plan.out_tensors, options.max_shard_size))
    return plan


def _fill(folder: Path, checkpoint: Checkpoint, report: Report, progress: Progress) -> None:
    """Write the whole result into the new `folder`: weights, configs, other files, proof, card, report."""
    plan, options, device = report.plan, report.options, report.device
    with (
        Shards(folder, plan.out_tensors, options.max_shard_size, index=needs_index(checkpoint)) as shards,
        prefetching(checkpoint, plan, report.source.hub, shards, progress, low_disk=options.low_disk) as stop,
        _early_verifier(checkpoint, plan, folder, device, options, progress) as verifier,
    ):
        report.files = shards.files
        schedule = Schedule(checkpoint, plan, stop, drop=options.low_disk)
        writer = MarlinWriter(checkpoint, shards, progress, packer(device, options.device))
        write_tensors(writer, plan, progress, schedule, verifier)
    write_configs(plan, folder, options.quant_method)
    copy_files(checkpoint, folder)
    if options.verify:
        with Checkpoint(folder) as written:
            report.verification = (
                verifier.report(written) if verifier else verify(checkpoint, plan, written, device, progress)
            )
        report.verification.require_ok()
        write_json(folder / VERIFY_FILE, report.verification.as_dict())
    write_card(folder, model_card(checkpoint, plan, card_facts(report, options)))
    note_digests(report, checkpoint, folder, progress)
    write_json(folder / REPORT_FILE, report.as_file())


def plan_only(
    source: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    access: HubAccess | None = None,
) -> tuple[Source, Plan]:
    """Return what `convert` would do with `source`, without reading any weight."""
    options, progress = options or Options(), progress or Progress()
    with opened_for_planning(str(source), access or HubAccess(), progress.transfer) as (origin, checkpoint):
        plan = make_plan(checkpoint, options.format, options.zero_points)
        if not plan.already_marlin:
            require_free_names(checkpoint, shard_names(plan.out_tensors, options.max_shard_size))
        return origin, plan


def write_tensors(
    writer: MarlinWriter, plan: Plan, progress: Progress, schedule: Schedule, verifier: Verifier | None
) -> None:
    """Stream every tensor. What is written is verified at once, if a `verifier` is given; then `schedule` is told."""
    label = "converting and verifying" if verifier else "converting"
    progress.stage(label, plan.bytes_out * (2 if verifier else 1), len(plan.layers))

    def finished(item: Item) -> None:
        if verifier:
            verifier.check(item)
        schedule.finished(item)

    tasks = (
        task
        for item in schedule
        for task in writer.counted(
            item.name, writer.pieces(item), layer=isinstance(item, Layer), finished=partial(finished, item)
        )
    )
    run_all(tasks, on_stop=schedule.stop)
    progress.end()


def _bytes_needed(checkpoint: Checkpoint, plan: Plan) -> int:
    # Headers, index, reports, and the file system's own needs.
    return plan.bytes_out + sum(copied_files(checkpoint).values()) + (16 << 20)


@contextlib.contextmanager
def _early_verifier(
    checkpoint: Checkpoint, plan: Plan, folder: Path, device: Device, options: Options, progress: Progress
) -> Iterator[Verifier | None]:
    """Return what verifies each part at once, with `low_disk`: the source's files go away when they are converted."""
    if not (options.verify and options.low_disk):
        yield None
        return
    with Checkpoint(folder, steady=False) as written:
        yield Verifier(checkpoint, plan, written, device, BytesOnly(progress))
