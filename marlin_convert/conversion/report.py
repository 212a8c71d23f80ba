"""What a conversion has done, for its report, its model card and `--json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..checkpoint.reader import Checkpoint
from ..device import Device
from ..formats.gptq_config import find_configs
from ..formats.marlin_config import ties
from ..hub.open import Source
from ..options import DEFAULT_SHARD_SIZE, Options
from ..progress import Progress
from .card import CardFacts
from .digests import digests, files_below, known_digests
from .plan import Plan
from .verify import Verification


@dataclass
class Report:
    """What was done. Written to the output without the times, so that the same source gives the same bytes."""

    source: Source
    out: Path
    device: Device
    plan: Plan
    backend: str
    options: Options
    device_note: str | None = None  # about the device, if there is something to say
    source_quantization: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
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
            "why_extended": [{"reason": reason, "layers": names} for reason, names in plan.why_extended.items()]
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
        """Return everything, for `--json`."""
        return {
            "ok": True,
            **self.as_file(),
            "out": str(self.out),
            "device": str(self.device),
            "device_note": self.device_note,
            "backend": self.backend,
            "seconds": round(self.seconds, 3),
            "gigabytes_per_second": round(self.gigabytes_per_second, 3),
            "verification": self.verification.as_dict() if self.verification else None,
            "pushed": self.pushed,
        }


def source_quantization(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Return what only the source's files tell, for `to-gptq`: its settings, and the types of what was converted."""
    main = checkpoint.configs.get("config.json", {})
    return {
        "source_format": plan.source_format.name,
        "configs": find_configs(checkpoint.configs),
        "dtypes": {key: main.get(key) for key in ("torch_dtype", "dtype")},
        "ties": ties(main) if plan.lm_head else {},
        **plan.source_format.noted([layer.source for layer in plan.layers]),
    }


def card_facts(report: Report, options: Options) -> CardFacts:
    """Return what the model card tells, beside the plan. Only options that shape the result are named in it."""
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
    return CardFacts(
        report.source, options.quant_method, len(report.files), report.plan.scale_rounding, tuple(named),
        repo_id=options.target.repo_id if options.target else None, verification=report.verification,
    )  # fmt: skip


def shaping(options: Options) -> dict[str, Any]:
    """Return the options that shape a result, for its report: with them, the source and this version, it can be made
    again."""
    return {
        "format": options.format.value,
        "zero_points": None if options.zero_points is None else options.zero_points.value,
        "max_shard_size": options.max_shard_size,
        "quant_method": options.quant_method.value,
        "verify": options.verify,
        "published_as": None if options.target is None else options.target.repo_id,
    }


def note_digests(report: Report, checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    """Note the SHA-256 of what was read and of what was written. Of weights, what the Hub says; hashing them here takes
    longer than converting them, and is done for a statement only."""
    origin, large = report.source, report.options.attest is not None
    paths = {name: checkpoint.path(name) for name in checkpoint.names}
    report.source_files = digests(
        paths, known_digests(origin), large=large and origin.hub is None, transfer=progress.transfer
    )
    report.result_files = digests(files_below(folder), {}, large=large, transfer=progress.transfer)
