"""The way back: from a Marlin checkpoint of either format, whoever made it, to the checkpoint that it came from, in its
own format; or to a GPTQ checkpoint, whatever it came from.

Codes, scales, zero points and g_idx are the source's, bit for bit; only scales that did not fit fp16 or bf16 exactly
(fp32 ones, and bf16 ones below fp16's normal range in the original format) stay as they were rounded. What Marlin's
tensors cannot tell, the settings that the source's files had, was noted in `marlin_convert.json`; without that, as for
checkpoints that other tools made, the settings are those that the tensors imply.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..checkpoint.bounded import read_json
from ..checkpoint.output_folder import check_free, check_space, new_folder, write_file, write_json
from ..checkpoint.reader import CONFIG_FILES, Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, Shards, shard_names
from ..errors import OptionError, SourceError, UnsupportedError
from ..formats.gptq_config import find_configs
from ..formats.marlin_config import TIED, read_marlin_settings
from ..formats.stored import MARLIN_PARTS, StoredLayer, is_marlin_part, layer_names, stored_layers
from ..hub.open import Source, opened_whole
from ..options import CARD_FILE, DEFAULT_SHARD_SIZE, REPORT_FILE, Format, HubAccess, shard_size
from ..progress import Progress
from ..text import shortened
from .blocks import run_all
from .card import source_card_in
from .files import copied_files, copy_files, keep_apart, needs_index, require_free_names
from .gptq_restored import GPTQWayBack
from .restored import RestoredLayer, RestoringWriter
from .source_format import Noted, SourceFormat
from .sources import GPTQ, named


@dataclass
class Restored:
    """What `to-gptq` did."""

    source: Source
    out: Path
    format: Format  # that of the Marlin checkpoint
    restored_format: str  # "gptq" (v1) or "gptq_v2", by how zero points are stored, or the name of another
    layers: list[RestoredLayer]
    copies: list[Tensor]
    settings_known: bool  # from marlin_convert.json
    bytes_out: int = 0
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_file(self) -> dict[str, Any]:
        return {
            "marlin_convert": __version__,
            "restored_from": self.source.label,
            "source_commit": self.source.commit,
            "format": self.restored_format,
            "marlin_format": self.format.value,
            "layers_restored": len(self.layers),
            "tensors_copied": len(self.copies),
            "settings_known": self.settings_known,
            "bytes_out": self.bytes_out,
            "weight_files": self.files,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for `--json`."""
        return {"ok": True, **self.as_file(), "out": str(self.out), "seconds": round(self.seconds, 3)}


def restore(
    marlin: str | Path,
    out: str | Path,
    progress: Progress | None = None,
    *,
    force: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    original: bool = False,
    v2: bool = False,
    access: HubAccess | None = None,
) -> Restored:
    """Write the GPTQ checkpoint that `marlin`, a folder or a Hub id, stands for to `out`; with `original`, the
    checkpoint that it was made from, in its own format.

    In GPTQ, zero points are stored as z - 1 (checkpoint_format gptq), or with `v2` as they are (gptq_v2). `out` appears
    complete or not at all. Raises one of `errors`' exceptions, each with a message for the user.
    """
    if original and v2:
        raise OptionError("v2 is for writing GPTQ; with original, zero points are stored as the source had them.")
    progress, started, max_shard_size = progress or Progress(), time.monotonic(), shard_size(max_shard_size)
    out = Path(out)
    check_free(out, force=force)
    with opened_whole(str(marlin), access or HubAccess(), progress.transfer, everything=True) as (origin, checkpoint):
        keep_apart(origin.folder, out)
        checkpoint.require_fit()
        checkpoint.require_readable()
        noted = Noted(_noted(checkpoint))
        source = _source_format(checkpoint, noted) if original else GPTQ
        way = source.way_back(noted) if original else GPTQWayBack(GPTQ, noted, v2=v2)
        layers = way.layers(checkpoint, list(marlin_layers(checkpoint).values()))
        owned = {tensor.name for layer in layers for tensor in layer.stored.parts.values()}
        owned |= _stray_g_idx(checkpoint, layers)
        copies = [t for t in checkpoint.tensors.values() if t.name not in owned]
        _require_one_format(checkpoint, way.format, layers, copies)
        tensors, format = _in_order(layers, copies), layers[0].stored.format
        report = Restored(origin, out, format, way.name, layers, copies, bool(noted.values))
        report.bytes_out = sum(t.nbytes for t in tensors)
        require_free_names(checkpoint, shard_names(tensors, max_shard_size))
        check_space(out.parent, report.bytes_out + sum(copied_files(checkpoint).values()) + (16 << 20))
        with new_folder(out, force=force) as folder:
            with Shards(folder, tensors, max_shard_size, index=needs_index(checkpoint)) as shards:
                writer = RestoringWriter(checkpoint, shards, progress)
                _write_tensors(writer, report, progress)
                report.files = shards.files
            _write_configs(
                checkpoint, folder, noted, way.configs(layers, next(iter(find_configs(checkpoint.configs).values())))
            )
            copy_files(checkpoint, folder)
            _restore_card(checkpoint, folder)
            write_json(folder / REPORT_FILE, report.as_file())
            checkpoint.require_unchanged()
    report.seconds = time.monotonic() - started
    return report


# ---------------------------------------------------------------------------------------------------------------
# What is there


def _noted(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the conversion noted about its source; {} for a checkpoint that another tool made."""
    if REPORT_FILE not in checkpoint.extra_files:
        return {}
    try:
        noted = read_json(checkpoint.path(REPORT_FILE)).get("source_quantization")
    except SourceError:
        return {}
    return {key: value for key, value in noted.items() if _is_noted(key, value)} if isinstance(noted, dict) else {}


def _is_noted(key: str, value: Any) -> bool:
    """Tell whether a value is of the kind that a conversion notes under `key`."""
    if key == "configs":
        return isinstance(value, dict) and all(isinstance(config, dict) for config in value.values())
    if key == "dtypes":
        return isinstance(value, dict) and value.keys() <= {"torch_dtype", "dtype"}
    kinds: dict[str, Any] = {"zero_points_stored": int, "ties": (bool, type(None))}
    if isinstance(value, dict):  # layer names
        return all(isinstance(entry, kinds.get(key, (str, type(None)))) for entry in value.values())
    if key in kinds:
        return False
    if key == "without_qzeros":
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    return not isinstance(value, (dict, list))


def _source_format(checkpoint: Checkpoint, noted: Noted) -> SourceFormat:
    """Return the format of the source. Raises UnsupportedError where nothing tells it."""
    if not noted.values:
        raise UnsupportedError(
            f"{checkpoint.label}: no {REPORT_FILE} of marlin-convert tells what it was made from; "
            "`marlin-convert to-gptq` makes a GPTQ checkpoint of it."
        )
    found = named(noted.format)
    if found is None:
        raise UnsupportedError(
            f"{checkpoint.label}: it was made from a checkpoint in the format {shortened(noted.format)}, which this "
            "version does not know; update marlin-convert."
        )
    return found


def marlin_layers(checkpoint: Checkpoint) -> dict[str, StoredLayer[Tensor]]:
    """Return the quantized layers of a Marlin checkpoint, by name; there is at least one.

    Raises UnsupportedError for another kind of checkpoint, SourceError where tensors and settings do not agree.
    """
    found = list(find_configs(checkpoint.configs).values())
    if not any(layer_names(checkpoint.tensors, format) for format in (Format.MARLIN, Format.MARLIN_EXT)):
        raise UnsupportedError(
            f"{checkpoint.label}: not a Marlin checkpoint (no tensor is named B or marlin_qweight); "
            "to-gptq restores what marlin-convert, AutoGPTQ or vLLM's readers called Marlin."
        )
    if not found:
        raise SourceError(f"{checkpoint.label}: no quantization settings in config.json or quantize_config.json.")
    return stored_layers(checkpoint.label, checkpoint.tensors, read_marlin_settings(found[0]))


def _stray_g_idx(checkpoint: Checkpoint, layers: list[RestoredLayer]) -> set[str]:
    """Return names of g_idx that AutoGPTQ left beside a layer's Marlin tensors, and that say what is so without
    them."""
    found = {layer: checkpoint.tensors.get(f"{layer.name}.g_idx") for layer in layers if layer.stored.perm is None}
    return {
        tensor.name
        for layer, tensor in found.items()
        if tensor is not None
        and tensor.dtype in ("I32", "I64")
        and np.array_equal(checkpoint.read(tensor), np.arange(layer.K) // layer.group_size)
    }


def _require_one_format(
    checkpoint: Checkpoint, target: SourceFormat, layers: list[RestoredLayer], copies: list[Tensor]
) -> None:
    """Raise SourceError for a tensor that is copied, and that a reader of the restored checkpoint would take for a part
    of a quantized layer; and for parts of a Marlin layer that is not there."""
    names = {layer.name for layer in layers}
    for tensor in copies:
        layer, _, part = tensor.name.rpartition(".")
        if layer in names and part in (*target.parts, *MARLIN_PARTS):
            raise SourceError(f"{checkpoint.label}: it holds {tensor.name} beside that layer's Marlin tensors.")
        if part in target.telling or is_marlin_part(checkpoint.tensors, tensor.name):
            raise SourceError(
                f"{checkpoint.label}: it holds {tensor.name}, of no layer in the format of the others; remove it, or "
                "convert the checkpoint again."
            )


def _in_order(layers: list[RestoredLayer], copies: list[Tensor]) -> list[OutTensor]:
    """Return every tensor of the result, in the order of the source's files."""
    entries: list[tuple[tuple[str, int, str], list[OutTensor]]] = []
    for layer in layers:
        at = layer.stored.weight
        entries.append(((at.file, at.offset, at.name), list(layer.out.values())))
    entries += [((t.file, t.offset, t.name), [OutTensor(t.name, t.dtype, t.shape, t.nbytes)]) for t in copies]
    return [tensor for _, tensors in sorted(entries, key=lambda e: e[0]) for tensor in tensors]


def _write_tensors(writer: RestoringWriter, report: Restored, progress: Progress) -> None:
    """Stream every tensor."""
    progress.stage("restoring", report.bytes_out, len(report.layers))
    layers = (t for x in report.layers for t in writer.counted(x.name, writer.pieces(x), layer=True))
    copies = (t for x in report.copies for t in writer.counted(x.name, writer.copying(x), layer=False))
    run_all(itertools.chain(layers, copies))
    progress.end()


# ---------------------------------------------------------------------------------------------------------------
# Files


def _write_configs(checkpoint: Checkpoint, folder: Path, noted: Noted, configs: Mapping[str, dict[str, Any]]) -> None:
    """Write the model's config and those of its quantization, `configs`, by where they stand."""
    main = copy.deepcopy(checkpoint.configs.get("config.json"))
    if main is not None:
        text = main.get("text_config")
        for where, holder in (("config.json", main), ("config.json text_config", text)):
            if isinstance(holder, dict):
                holder.pop("quantization_config", None)
                if where in configs:
                    holder["quantization_config"] = configs[where]
        for key, value in (noted.values.get("dtypes") or {}).items():
            if value is None:
                main.pop(key, None)
            else:
                main[key] = value
        _restore_ties(main, noted.values.get("ties") or {})
        write_json(folder / "config.json", main)
    for name in CONFIG_FILES[1:]:
        if name in configs:
            write_json(folder / name, configs[name])


def _restore_ties(main: dict[str, Any], ties: dict[str, Any]) -> None:
    """Say again what the source said on whether head and embedding are one; see `marlin_config.ties`."""
    for name, tied in ties.items():
        part = main.get(name) if name else main
        if not isinstance(part, dict):
            continue
        if tied is None:
            part.pop(TIED, None)
        else:
            part[TIED] = tied


def _restore_card(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the source's card: as it is, or out of the one that marlin-convert wrote, if that holds it."""
    if CARD_FILE not in checkpoint.extra_files:
        return
    content = checkpoint.path(CARD_FILE).read_bytes()
    if REPORT_FILE in checkpoint.extra_files:
        text = source_card_in(content.decode("utf-8", "replace"))
        if text is None:
            return
        content = text.encode()
    write_file(folder / CARD_FILE, content)
