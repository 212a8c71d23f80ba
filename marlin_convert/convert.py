"""The main path: from a GPTQ checkpoint to a Marlin one, in the order in which it happens."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import __version__, ops
from .card import CARD_FILE, Made, model_card, tell_verification, write_card
from .checkpoint import Checkpoint, Tensor
from .config import marlin_model_config, marlin_settings
from .device import CPU, Device, pick_device
from .errors import DeviceError, HubError, MarlinConvertError, OutputError, SourceError, UnsupportedError
from .hub import Source, Target, check_target, create_repository, default_name, fetch, headers_only, is_folder, push
from .layout import PACK_FACTOR, TILE_K, permute_scales, unpermute_scales
from .plan import Layer, Plan, make_plan, span
from .progress import Progress
from .publish import REPORT_FILE, Shards, check_free, check_space, new_folder, write_json
from .scales import to_fp16
from .stream import Buffers, byte_blocks, row_blocks, run_all
from .verify import Verification, code_difference, verify

DEFAULT_SHARD_SIZE = "5GB"  # as Transformers cuts its shards
VERIFY_FILE = "verify.json"


@dataclass(frozen=True)
class Options:
    """How to convert; the command line's options of the same names."""

    device: str = "auto"
    verify: bool = False
    force: bool = False
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    quant_method: str = "gptq"  # "gptq" or "marlin": the quant_method that the result's config names
    revision: str | None = None
    token: str | None = None
    cache_dir: Path | None = None
    target: Target | None = None  # where to publish the result; an empty repo_id: named after the source


@dataclass
class Report:
    """What was done. Written to the output without the times, so that the same source gives the same bytes."""

    source: Source
    out: Path
    device: Device
    plan: Plan
    codec: str
    remark: str | None = None  # about the device, if there is something to say
    scale_rounding: float = 0.0
    files: list[str] = field(default_factory=list)
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
            "format": "marlin",
            "group_size": plan.group_size,
            "layers_converted": len(plan.layers),
            "tensors_copied": len(plan.copies),
            "bytes_in": plan.bytes_in,
            "bytes_out": plan.bytes_out,
            "largest_scale_rounding": self.scale_rounding,
            "weight_files": self.files,
            "notes": [{"note": note, "layers": names} for note, names in plan.notes.items()],
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


class AlreadyMarlin(Exception):
    """The source is a Marlin checkpoint."""


def convert(
    source: str | Path, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Report:
    """Convert `source`, a folder or a Hub id, into a Marlin checkpoint at `out`.

    `out` appears complete or not at all. Raises AlreadyMarlin when there is nothing to convert, and one of
    `errors`' exceptions, each with a message for the user, when it cannot be done.
    """
    options, progress, started = options or Options(), progress or Progress(), time.monotonic()
    out = Path(out)
    check_free(out, force=options.force)
    device, remark = usable_device(options)
    options = replace(options, target=_checked_target(str(source), options))
    with opened(source, options) as (origin, checkpoint):
        keep_apart(origin.folder, out)
        plan = make_plan(checkpoint)
        if plan.already_marlin:
            raise AlreadyMarlin(f"{source} already is a Marlin checkpoint; there is nothing to convert.")
        plan.require_convertible()
        report = Report(origin, out, device, plan, ops.describe(), remark)
        report.scale_rounding = check_scales(checkpoint, plan)
        check_space(out.parent, _bytes_needed(checkpoint, plan))
        if options.target:
            create_repository(options.target, token=options.token)
        with new_folder(out, force=options.force) as folder:
            with Shards(folder, plan.out_tensors, options.max_shard_size) as shards:
                write_tensors(checkpoint, plan, shards, progress, packer(device, options))
                shards.write_index()
                report.files = shards.files
            write_configs(checkpoint, plan, folder, options.quant_method)
            copy_extra_files(checkpoint, folder)
            if options.verify:
                with Checkpoint(folder) as written:
                    report.verification = verify(checkpoint, plan, written, device, progress)
                report.verification.require_ok()
                write_json(folder / VERIFY_FILE, report.verification.as_dict())
            write_card(folder, model_card(checkpoint, plan, _made(report, options)))
            write_json(folder / REPORT_FILE, report.as_file())
    report.seconds = time.monotonic() - started
    if options.target:
        report.pushed = push_result(out, options.target, options)
    return report


def push_result(out: Path, target: Target, options: Options) -> str:
    """Publish the finished result `out`; the address of the commit. What stops it leaves `out` as it is."""
    if not (out / REPORT_FILE).is_file():
        raise SourceError(f"{out}: not a finished result of marlin-convert (it has no {REPORT_FILE}).")
    try:
        return push(out, target, token=options.token, force=options.force)
    except HubError as error:
        words = ["marlin-convert", "push", str(out), target.repo_id]
        for name, value in (("branch", target.branch), ("commit-message", target.commit_message)):
            words += [f"--{name}", value] if value else []
        flags = {"private": target.private, "create-pr": target.create_pr, "force": options.force}
        words += [f"--{name}" for name, given in flags.items() if given]
        raise HubError(
            f"{error.message.rstrip('.')}. The result in {out} is kept; go on with `{shlex.join(words)}`."
        ) from None


def _checked_target(source: str, options: Options) -> Target | None:
    """Where the result will go, with its full name, once it is clear that it may."""
    target = options.target
    if target is None:
        return None
    if not target.repo_id:
        name = source if not is_folder(source) else Path(source).expanduser().resolve().name
        target = replace(target, repo_id=default_name(name))
    return check_target(target, token=options.token, force=options.force)


def plan_only(source: str | Path, options: Options | None = None) -> tuple[Source, Plan]:
    """What `convert` would do with `source`, without reading any weight."""
    with looked_at(source, options or Options()) as (origin, checkpoint):
        return origin, make_plan(checkpoint)


def verify_pair(
    source: str | Path, out: str | Path, options: Options | None = None, progress: Progress | None = None
) -> Verification:
    """Check an existing Marlin checkpoint `out` against its GPTQ `source`; writes `verify.json` into `out`."""
    options, out = options or Options(), Path(out)
    device, _ = usable_device(replace(options, verify=True))
    with opened(source, options) as (_, checkpoint), Checkpoint(out) as result:
        plan = make_plan(checkpoint)
        if plan.already_marlin:
            raise UnsupportedError(
                f"{source} is a Marlin checkpoint; give the GPTQ checkpoint that {out} was made from."
            )
        plan.require_convertible()
        check_scales(checkpoint, plan)
        report = verify(checkpoint, plan, result, device, progress)
    try:
        write_json(out / VERIFY_FILE, report.as_dict())
        tell_verification(out, report)
    except OSError as error:
        raise OutputError(f"{out / VERIFY_FILE}: cannot be written: {error.strerror}.") from None
    return report


@contextlib.contextmanager
def opened(source: str | Path, options: Options) -> Iterator[tuple[Source, Checkpoint]]:
    """Fetch `source` if it is on the Hub, and open it."""
    origin = fetch(str(source), revision=options.revision, token=options.token, cache_dir=options.cache_dir)
    with Checkpoint(origin.folder) as checkpoint:
        yield origin, checkpoint


@contextlib.contextmanager
def looked_at(source: str | Path, options: Options) -> Iterator[tuple[Source, Checkpoint]]:
    """Open `source` for planning only: on the Hub, no weight is fetched."""
    looking = headers_only(str(source), revision=options.revision, token=options.token, cache_dir=options.cache_dir)
    with looking as origin, Checkpoint(origin.folder) as checkpoint:
        yield origin, checkpoint


def check_scales(checkpoint: Checkpoint, plan: Plan) -> float:
    """Read every layer's scales once, before anything is written; the largest relative rounding error to fp16.

    Raises UnsupportedError that names all layers whose scales fp16 cannot hold.
    """
    problems: dict[str, list[str]] = {}
    largest = 0.0
    for layer in plan.layers:
        fit = to_fp16(checkpoint.read(layer.scales), layer.scales.dtype)
        largest = max(largest, fit.rounding)
        if fit.problem:
            problems.setdefault(fit.problem, []).append(layer.name)
    if problems:
        lines = [f"  - {problem}: {span(names)}" for problem, names in problems.items()]
        raise UnsupportedError(
            "the original Marlin format keeps scales in fp16, and these do not fit; nothing was converted:\n"
            + "\n".join(lines)
        )
    return largest


def usable_device(options: Options) -> tuple[Device, str | None]:
    """The device that `options` ask for, its kernels loaded if they will be used, and a remark for the user.

    Raises DeviceError when it was asked for by name and cannot be used. With "auto", a GPU whose kernels are not
    there gives way to the CPU, and the remark says so.
    """
    device = pick_device(options.device)
    if device.kind == "cpu":
        return device, None
    if options.device == "auto" and not options.verify:
        return device, None  # nothing to compute there: see `packer`
    from . import cuda

    try:
        cuda.torch_device(device)
    except DeviceError as error:
        if options.device != "auto":
            raise
        return CPU, f"{device} ({device.name}) is not used: {error.message}"
    return device, None


#: Repacks a block: qweight [K/8, N] → the given B [K/16, 2N].
Packer: TypeAlias = "Callable[[npt.NDArray[np.int32], npt.NDArray[np.int32]], object]"


def packer(device: Device, options: Options) -> Packer:
    """What repacks: the CPU, which keeps up with any disk, unless a GPU was asked for by name."""
    if device.kind == "cpu" or options.device == "auto":
        return lambda qweight, B: ops.pack(qweight, out=B)
    import torch

    from . import cuda

    target = cuda.torch_device(device)

    def pack(qweight: npt.NDArray[np.int32], B: npt.NDArray[np.int32]) -> None:
        torch.from_numpy(B).copy_(cuda.repack(torch.from_numpy(qweight).to(target)))

    return pack


def write_tensors(checkpoint: Checkpoint, plan: Plan, shards: Shards, progress: Progress, pack: Packer) -> None:
    """Stream every tensor: read, repack, check, write; blocks of several layers at a time, in bounded memory."""
    progress.stage("converting", plan.bytes_out, len(plan.layers))
    buffers = Buffers()
    blocks_left = {layer.name: sum(1 for _ in row_blocks(layer.K, layer.N)) for layer in plan.layers}
    counting = threading.Lock()

    def tasks() -> Iterator[Callable[[], None]]:
        for layer in plan.layers:
            yield partial(write_scales, layer)
            for k0, rows in row_blocks(layer.K, layer.N):
                yield partial(write_block, layer, k0, rows)
        for tensor in plan.copies:
            for start, length in byte_blocks(tensor.nbytes):
                yield partial(copy_block, tensor, start, length)

    def write_block(layer: Layer, k0: int, rows: int) -> None:
        qweight = buffers.array("qweight", (rows // PACK_FACTOR, layer.N), np.int32)
        position = k0 * layer.N * 4 // PACK_FACTOR  # the same in qweight and in B: both take N/2 bytes for a row of K
        checkpoint.read_into(layer.qweight, qweight, position)
        B = buffers.array("B", (rows // TILE_K, 2 * layer.N), np.int32)
        pack(qweight, B)
        unpacked = ops.unpack(B, out=buffers.array("unpacked", qweight.shape, np.int32))
        problem = code_difference(unpacked, qweight, k0)
        if problem:
            raise MarlinConvertError(
                f"{layer.name}: repacking went wrong ({problem}); this is a bug or faulty memory, nothing was kept."
            )
        shards.write(layer.B.name, B, position)
        with counting:
            blocks_left[layer.name] -= 1
            done = blocks_left[layer.name] == 0
        progress.advance(B.nbytes, layer.name, done=done)

    def write_scales(layer: Layer) -> None:
        scales = to_fp16(checkpoint.read(layer.scales), layer.scales.dtype).scales
        s = permute_scales(scales)
        if not np.array_equal(unpermute_scales(s).view(np.uint16), scales.view(np.uint16)):
            raise MarlinConvertError(
                f"{layer.name}: permuting the scales went wrong; this is a bug or faulty memory, nothing was kept."
            )
        shards.write(layer.s.name, s)
        progress.advance(s.nbytes, layer.name)

    def copy_block(tensor: Tensor, start: int, length: int) -> None:
        block = buffers.array("copy", (length,), np.uint8)
        checkpoint.read_into(tensor, block, start)
        shards.write(tensor.name, block, start)
        progress.advance(length, tensor.name)

    run_all(tasks())
    progress.end()


def write_configs(checkpoint: Checkpoint, plan: Plan, folder: Path, quant_method: str) -> None:
    """config.json and quantize_config.json, with the same Marlin settings in both."""
    settings = marlin_settings(
        plan.settings, group_size=plan.group_size, lm_head=plan.lm_head, quant_method=quant_method
    )
    if "config.json" in checkpoint.configs:
        write_json(folder / "config.json", marlin_model_config(checkpoint.configs["config.json"], settings))
    write_json(folder / "quantize_config.json", settings)


def copy_extra_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, generation config, chat template, licence, code: whatever lies beside the weights, as it is.

    The source's card is a part of the result's: see `card`.
    """
    for name in checkpoint.extra_files:
        if name in (REPORT_FILE, VERIFY_FILE, CARD_FILE):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, target)


def _made(report: Report, options: Options) -> Made:
    """What the model card tells, beside the plan. Only options that shape the result are named in it."""
    named = []
    if options.max_shard_size != DEFAULT_SHARD_SIZE:
        named += ["--max-shard-size", str(options.max_shard_size)]
    if options.quant_method != Options.quant_method:
        named += ["--quant-method", options.quant_method]
    if options.verify:
        named += ["--verify"]
    return Made(
        report.source, options.quant_method, len(report.files), report.scale_rounding, tuple(named),
        repo_id=options.target.repo_id if options.target else None, verification=report.verification,
    )  # fmt: skip


def _bytes_needed(checkpoint: Checkpoint, plan: Plan) -> int:
    small = 0
    for path in (checkpoint.folder / name for name in checkpoint.extra_files):
        if not path.is_file() or not os.access(path, os.R_OK):
            raise SourceError(
                f"{path}: it cannot be read (a broken link, a pipe, or no permission); remove or mend it."
            )
        small += path.stat().st_size
    return plan.bytes_out + small + (16 << 20)  # headers, index, reports, and the file system's own needs


def keep_apart(source: Path, out: Path) -> None:
    """The source is never touched: the output is neither the source, nor inside it, nor around it."""
    a, b = source.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise OutputError(f"{out}: it overlaps the source {source}; choose a folder outside it.")
