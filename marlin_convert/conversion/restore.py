"""The way back: from a Marlin checkpoint of either format, whoever made it, to the GPTQ checkpoint that it came from.

Codes, scales, zero points and g_idx are the source's, bit for bit; only scales that did not fit fp16 or bf16 exactly
(fp32 ones, and bf16 ones below fp16's normal range in the original format) stay as they were rounded. What Marlin's
tensors cannot tell, the settings that the source's files had, was noted in `marlin_convert.json`; without that, as for
checkpoints that other tools made, the settings are those that the tensors imply.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .._version import __version__
from ..checkpoint.output_folder import check_free, check_space, new_folder, write_file, write_json
from ..checkpoint.reader import Checkpoint, Tensor, read_json
from ..checkpoint.writer import OutTensor, Shards, shard_names
from ..errors import MarlinConvertError, SourceError, UnsupportedError
from ..formats import bf16
from ..formats.gptq import ZeroPointEncoding, encode_zeros
from ..formats.gptq_config import find_configs
from ..formats.layout import (
    TILE_K,
    unpack_zeros,
    unpermute_scales,
    zero_point,
)
from ..formats.marlin_config import read_marlin_settings
from ..formats.stored import MARLIN_PARTS, StoredLayer, is_marlin_part, layer_names, stored_layers
from ..hub.open import Source
from ..native import cpu
from ..options import CARD_FILE, REPORT_FILE, Format, HubAccess, Options, ZeroPointReading
from ..progress import Progress
from .blocks import Buffers, byte_blocks, column_panels, row_blocks, run_all
from .convert import keep_apart, opened
from .files import copied_files, copy_files, needs_index, require_free_names, require_readable
from .plan import GPTQ_PARTS

_NUMPY: dict[str, Any] = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}

#: Parts of GPTQ layers that nothing else has; "scales" may be anybody's.
_GPTQ_ONLY = ("qweight", "qzeros", "g_idx")

Words: TypeAlias = "npt.NDArray[np.int32]"


@dataclass(frozen=True)
class MarlinLayer:
    """One quantized linear of a Marlin checkpoint, and what only its source's files told."""

    stored: StoredLayer[Tensor]
    scales_dtype: str  # of the source
    g_idx: bool  # whether the source had one

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def bits(self) -> int:
        return self.stored.bits

    @property
    def K(self) -> int:
        return self.stored.K

    @property
    def N(self) -> int:
        return self.stored.N

    @property
    def group_size(self) -> int:
        """The source's rows in a group; K where there is one group."""
        if self.stored.G == 1:
            return self.K
        return self.stored.settings.source_group_size or self.stored.group_size

    @property
    def G(self) -> int:
        return -(-self.K // self.group_size)

    @property
    def out(self) -> dict[str, OutTensor]:
        """The GPTQ tensors that the layer becomes."""
        rows, columns = self.K * self.bits // 32, -(-self.N * self.bits // 32)
        width = np.dtype(_NUMPY[self.scales_dtype]).itemsize
        found = {
            "qweight": OutTensor(f"{self.name}.qweight", "I32", (rows, self.N), rows * self.N * 4),
            "qzeros": OutTensor(f"{self.name}.qzeros", "I32", (self.G, columns), self.G * columns * 4),
            "scales": OutTensor(f"{self.name}.scales", self.scales_dtype, (self.G, self.N), self.G * self.N * width),
        }
        if self.g_idx:
            found["g_idx"] = OutTensor(f"{self.name}.g_idx", "I32", (self.K,), self.K * 4)
        return found


@dataclass
class Restored:
    """What `to-gptq` did."""

    source: Source
    out: Path
    format: Format  # that of the Marlin checkpoint
    zero_points: str  # "gptq" (v1) or "gptq_v2"
    layers: list[MarlinLayer]
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
            "format": self.zero_points,
            "marlin_format": self.format.value,
            "layers_restored": len(self.layers),
            "tensors_copied": len(self.copies),
            "settings_known": self.settings_known,
            "bytes_out": self.bytes_out,
            "weight_files": self.files,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {"ok": True, **self.as_file(), "out": str(self.out), "seconds": round(self.seconds, 3)}


def restore(
    marlin: str | Path,
    out: str | Path,
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    v2: bool = False,
    access: HubAccess | None = None,
) -> Restored:
    """Write the GPTQ checkpoint that `marlin`, a folder or a Hub id, was made from to `out`.

    Zero points are stored as z - 1 (checkpoint_format gptq), or with `v2` as they are (gptq_v2). `out` appears
    complete or not at all. Raises one of `errors`' exceptions, each with a message for the user.
    """
    options, progress, started = options or Options(), progress or Progress(), time.monotonic()
    out = Path(out)
    check_free(out, force=options.force)
    with opened(marlin, access or HubAccess(), progress, everything=True) as (origin, checkpoint):
        keep_apart(origin.folder, out)
        checkpoint.require_fit()
        noted = _noted(checkpoint)
        layers = [_layer(stored, noted) for stored in marlin_layers(checkpoint).values()]
        owned = {tensor.name for layer in layers for tensor in layer.stored.parts.values()}
        owned |= _stray_g_idx(checkpoint, layers)
        copies = [t for t in checkpoint.tensors.values() if t.name not in owned]
        _require_one_format(checkpoint, layers, copies)
        tensors, format = _in_order(layers, copies), layers[0].stored.format
        report = Restored(origin, out, format, "gptq_v2" if v2 else "gptq", layers, copies, bool(noted))
        report.bytes_out = sum(t.nbytes for t in tensors)
        require_free_names(checkpoint, shard_names(tensors, options.max_shard_size))
        require_readable(checkpoint)
        check_space(out.parent, report.bytes_out + sum(copied_files(checkpoint).values()) + (16 << 20))
        with new_folder(out, force=options.force) as folder:
            with Shards(folder, tensors, options.max_shard_size, index=needs_index(checkpoint)) as shards:
                _write_tensors(checkpoint, report, shards, progress, _encoding(noted, v2=v2))
                report.files = shards.files
            _write_configs(checkpoint, report, folder, noted)
            copy_files(checkpoint, folder)
            _restore_card(checkpoint, folder)
            write_json(folder / REPORT_FILE, report.as_file())
            checkpoint.require_unchanged()
    report.seconds = time.monotonic() - started
    return report


# ---------------------------------------------------------------------------------------------------------------
# What is there


def _noted(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the conversion noted about its source; {} for a checkpoint that another tool made."""
    path = checkpoint.folder / REPORT_FILE
    if not path.is_file():
        return {}
    try:
        noted = read_json(path).get("source_quantization")
    except SourceError:
        return {}
    return {key: value for key, value in noted.items() if _is_noted(key, value)} if isinstance(noted, dict) else {}


def _is_noted(key: str, value: Any) -> bool:
    """Whether a value is of the kind that a conversion notes under `key`."""
    if key == "configs":
        return isinstance(value, dict) and all(isinstance(config, dict) for config in value.values())
    if key == "dtypes":
        return isinstance(value, dict) and value.keys() <= {"torch_dtype", "dtype"}
    if key == "scales_dtypes":
        return isinstance(value, dict) and all(isinstance(dtype, str) for dtype in value.values())
    return not isinstance(value, (dict, list))


def _encoding(noted: dict[str, Any], *, v2: bool) -> ZeroPointEncoding:
    """How zero points are to be stored."""
    if v2:
        return ZeroPointEncoding.V2
    word = noted.get("zero_point_reading") == ZeroPointReading.WORD
    return ZeroPointEncoding.V1_WORD if word else ZeroPointEncoding.V1_NIBBLE


def marlin_layers(checkpoint: Checkpoint) -> dict[str, StoredLayer[Tensor]]:
    """The quantized layers of a Marlin checkpoint, by name; there is at least one.

    Raises UnsupportedError for another kind of checkpoint, SourceError where tensors and settings do not agree.
    """
    found = list(find_configs(checkpoint.configs).values())
    if not any(layer_names(checkpoint.tensors, format) for format in (Format.MARLIN, Format.MARLIN_EXT)):
        raise UnsupportedError(
            f"{checkpoint.folder}: not a Marlin checkpoint (no tensor is named B or marlin_qweight); "
            "to-gptq restores what marlin-convert, AutoGPTQ or vLLM's readers called Marlin."
        )
    if not found:
        raise SourceError(f"{checkpoint.folder}: no quantization settings in config.json or quantize_config.json.")
    return stored_layers(str(checkpoint.folder), checkpoint.tensors, read_marlin_settings(found[0]))


def _layer(stored: StoredLayer[Tensor], noted: dict[str, Any]) -> MarlinLayer:
    if stored.K * stored.bits % 32:
        raise SourceError(f"{stored.name}: K = {stored.K} does not fill whole words of {stored.bits}-bit codes.")
    dtypes, default = noted.get("scales_dtypes") or {}, noted.get("scales_dtype")
    dtype = dtypes.get(stored.name, default)
    return MarlinLayer(
        stored,
        dtype if dtype in _NUMPY else stored.scales.dtype,
        noted.get("g_idx", True) is not False or stored.perm is not None,
    )


def _stray_g_idx(checkpoint: Checkpoint, layers: list[MarlinLayer]) -> set[str]:
    """Names of g_idx that AutoGPTQ left beside a layer's Marlin tensors, and that say what is so without them."""
    found = {layer: checkpoint.tensors.get(f"{layer.name}.g_idx") for layer in layers if layer.stored.perm is None}
    return {
        tensor.name
        for layer, tensor in found.items()
        if tensor is not None
        and tensor.dtype in ("I32", "I64")
        and np.array_equal(checkpoint.read(tensor), np.arange(layer.K) // layer.group_size)
    }


def _require_one_format(checkpoint: Checkpoint, layers: list[MarlinLayer], copies: list[Tensor]) -> None:
    """Raise SourceError for a tensor that is copied, and that a reader of GPTQ checkpoints would take for a part of a
    quantized layer; and for parts of a Marlin layer that is not there."""
    names = {layer.name for layer in layers}
    for tensor in copies:
        layer, _, part = tensor.name.rpartition(".")
        if layer in names and part in (*GPTQ_PARTS, *MARLIN_PARTS):
            raise SourceError(f"{checkpoint.folder}: it holds {tensor.name} beside that layer's Marlin tensors.")
        if part in _GPTQ_ONLY or is_marlin_part(checkpoint.tensors, tensor.name):
            raise SourceError(
                f"{checkpoint.folder}: it holds {tensor.name}, of no layer in the format of the others; remove it, or "
                "convert the checkpoint again."
            )


def _in_order(layers: list[MarlinLayer], copies: list[Tensor]) -> list[OutTensor]:
    """Every tensor of the result, in the order of the source's files."""
    entries: list[tuple[tuple[str, int, str], list[OutTensor]]] = []
    for layer in layers:
        at = layer.stored.weight
        entries.append(((at.file, at.offset, at.name), list(layer.out.values())))
    entries += [((t.file, t.offset, t.name), [OutTensor(t.name, t.dtype, t.shape, t.nbytes)]) for t in copies]
    return [tensor for _, tensors in sorted(entries, key=lambda e: e[0]) for tensor in tensors]


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def _write_tensors(
    checkpoint: Checkpoint, report: Restored, shards: Shards, progress: Progress, encoding: ZeroPointEncoding
) -> None:
    """Stream every tensor: read, unpack, check, write."""
    progress.stage("restoring", report.bytes_out, len(report.layers))
    buffers, counting = Buffers(), threading.Lock()
    panels_left = {
        layer.name: sum(1 for _ in column_panels(layer.stored)) for layer in report.layers if layer.stored.perm
    }

    def tasks() -> Iterator[Callable[[], None]]:
        for layer in report.layers:
            yield partial(write_groups, layer)
            if layer.stored.perm is None:
                yield partial(write_weights, layer)
                continue
            for n0, columns in column_panels(layer.stored):
                yield partial(write_sorted, layer, n0, columns)
        for tensor in report.copies:
            for start, length in byte_blocks(tensor.nbytes):
                yield partial(copy_block, tensor, start, length)

    def unpacked(layer: MarlinLayer, k0: int, rows: int, words: Words) -> None:
        """Read stored rows k0 … of a layer into `words` [rows bits/32, stored_N], checked by packing them again."""
        B = buffers.array("B", (rows // TILE_K, layer.stored.weight.shape[1]), np.int32)
        checkpoint.read_into(layer.stored.weight, B, k0 * layer.stored.stored_N * layer.bits // 8)
        cpu.unpack(B, out=words, bits=layer.bits)
        again = cpu.pack(words, out=buffers.array("again", B.shape, np.int32), bits=layer.bits)
        if cpu.first_difference(B, again) is not None:
            raise _went_wrong(layer, "unpacking")

    def write_weights(layer: MarlinLayer) -> None:
        for k0, rows in row_blocks(layer.stored.stored_K, layer.stored.stored_N * layer.bits // 4):
            words = buffers.array("words", (rows * layer.bits // 32, layer.stored.stored_N), np.int32)
            unpacked(layer, k0, rows, words)
            own = max(0, min(rows, layer.K - k0)) * layer.bits // 32
            if own:
                shards.write(
                    f"{layer.name}.qweight", np.ascontiguousarray(words[:own, : layer.N]),
                    k0 * layer.bits // 32 * layer.N * 4,
                )  # fmt: skip
            progress.advance(own * layer.N * 4, layer.name)
        progress.advance(0, layer.name, done=True)

    def write_sorted(layer: MarlinLayer, n0: int, columns: int) -> None:
        """Columns n0 … of a layer with act-order: any row may come from anywhere, so that all of them are needed."""
        (perm, inverse), bits = _permutation(checkpoint, layer), layer.bits
        B = buffers.array("B columns", (layer.stored.stored_K // TILE_K, columns * bits // 2), np.int32)
        checkpoint.read_columns(layer.stored.weight, B, n0 * bits // 2)
        words = buffers.array("sorted", (layer.stored.stored_K * bits // 32, columns), np.int32)
        cpu.unpack(B, out=words, bits=bits)
        natural = buffers.array("natural", (layer.K * bits // 32, columns), np.int32)
        fill = np.zeros(columns, np.uint8)
        cpu.arrange(words, natural, bits=bits, fill=fill, rows=layer.K, perm=inverse)
        # Of padding only the last tile of the layer's own rows is looked at, and taken to be as it is.
        if layer.stored.stored_K > layer.K:
            last = words[layer.K * bits // 32].view(np.uint32) >> layer.K * bits % 32
            fill = (last & np.uint32(2**bits - 1)).astype(np.uint8)
        tiles = B[: -(-layer.K // TILE_K)]
        if cpu.sorted_difference(tiles, natural, bits=bits, perm=perm, fill=fill) is not None:
            raise _went_wrong(layer, "unpacking")
        own = np.ascontiguousarray(natural[:, : layer.N - n0])
        shards.write_columns(f"{layer.name}.qweight", own, n0)
        with counting:
            panels_left[layer.name] -= 1
            done = panels_left[layer.name] == 0
        progress.advance(own.nbytes, layer.name, done=done)

    def write_groups(layer: MarlinLayer) -> None:
        """Scales, zero points and g_idx: small."""
        groups = _restored_groups(checkpoint, layer, encoding)
        for part, array in groups.items():
            shards.write(f"{layer.name}.{part}", array)
        progress.advance(sum(array.nbytes for array in groups.values()), layer.name)

    def copy_block(tensor: Tensor, start: int, length: int) -> None:
        block = buffers.array("copy", (length,), np.uint8)
        checkpoint.read_into(tensor, block, start)
        shards.write(tensor.name, block, start)
        progress.advance(length, tensor.name)

    run_all(tasks())
    progress.end()


def _went_wrong(layer: MarlinLayer, what: str) -> MarlinConvertError:
    return MarlinConvertError(f"{layer.name}: {what} went wrong; this is a bug or faulty memory, nothing was kept.")


def _permutation(checkpoint: Checkpoint, layer: MarlinLayer) -> tuple[Words, Words]:
    """`perm` [K] as stored, and its inverse [stored_K], which leaves padding where it is."""
    assert layer.stored.perm is not None
    perm = checkpoint.read(layer.stored.perm)
    inverse = np.arange(layer.stored.stored_K, dtype=np.int32)
    if not np.array_equal(np.sort(perm), np.arange(layer.K)):
        raise SourceError(f"{layer.name}: marlin_perm is not an order of the {layer.K} rows.")
    inverse[perm] = np.arange(layer.K, dtype=np.int32)
    return perm, inverse


def _restored_groups(
    checkpoint: Checkpoint, layer: MarlinLayer, encoding: ZeroPointEncoding
) -> dict[str, npt.NDArray[Any]]:
    s = checkpoint.read(layer.stored.scales)
    scales = _source_rows(unpermute_scales(s, layer.stored.G), layer, "scales")
    found: dict[str, npt.NDArray[Any]] = {"scales": _as_dtype(scales, layer)}
    if layer.stored.zeros is None:
        zeros = np.full(scales.shape, zero_point(layer.bits), np.uint8)
    else:
        zeros = _source_rows(unpack_zeros(checkpoint.read(layer.stored.zeros), layer.bits), layer, "zero points")
    found["qzeros"] = encode_zeros(zeros, layer.bits, encoding)
    if layer.g_idx:
        groups = np.arange(layer.K, dtype=np.int32) // np.int32(layer.group_size)
        if layer.stored.perm is not None:
            groups = groups[_permutation(checkpoint, layer)[1][: layer.K]]
        found["g_idx"] = groups
    return found


def _source_rows(stored: npt.NDArray[Any], layer: MarlinLayer, what: str) -> npt.NDArray[Any]:
    """Rows of the source's groups out of the stored ones, which repeat them where groups were cut; without padding."""
    step = 1 if layer.stored.G == 1 else max(1, layer.group_size // layer.stored.group_size)
    rows = np.ascontiguousarray(stored[::step, : layer.N][: layer.G])
    used = -(-layer.K // layer.stored.group_size) if layer.stored.G > 1 else 1
    if not np.array_equal(np.repeat(rows, step, axis=0)[:used], stored[:used, : layer.N]):
        raise SourceError(f"{layer.name}: {what} differ within a group of {layer.group_size} rows.")
    return rows


def _as_dtype(scales: npt.NDArray[Any], layer: MarlinLayer) -> npt.NDArray[Any]:
    """Scales [G, N] as stored (fp16, or bf16 as uint16) in the source's dtype."""
    if layer.stored.scales.dtype == layer.scales_dtype:
        return scales
    wide = bf16.widened(scales)
    return bf16.rounded(wide) if layer.scales_dtype == "BF16" else wide.astype(_NUMPY[layer.scales_dtype])


# ---------------------------------------------------------------------------------------------------------------
# Files


def _write_configs(checkpoint: Checkpoint, report: Restored, folder: Path, noted: dict[str, Any]) -> None:
    configs = noted.get("configs") or {}
    settings = _implied_settings(report, next(iter(find_configs(checkpoint.configs).values())))
    main = copy.deepcopy(checkpoint.configs.get("config.json"))
    if main is not None:
        text = main.get("text_config")
        for where, holder in (("config.json", main), ("config.json text_config", text)):
            if isinstance(holder, dict):
                holder.pop("quantization_config", None)
                if where in configs:
                    holder["quantization_config"] = _with_format(configs[where], report.zero_points)
        if not configs:
            main["quantization_config"] = settings
        for key, value in (noted.get("dtypes") or {}).items():
            if value is None:
                main.pop(key, None)
            else:
                main[key] = value
        write_json(folder / "config.json", main)
    for name in Checkpoint.CONFIG_FILES[1:]:
        if name in configs:
            write_json(folder / name, _with_format(configs[name], report.zero_points))
        elif not configs and name == "quantize_config.json":
            write_json(folder / name, settings)


def _with_format(config: dict[str, Any], zero_points: str) -> dict[str, Any]:
    """A quantization config of the source, its checkpoint_format as the zero points are stored now.

    One that names no format is left so where that means the same.
    """
    said = config.get("checkpoint_format", config.get("format"))
    if said is None and zero_points == "gptq":
        return config
    key = "format" if "format" in config and "checkpoint_format" not in config else "checkpoint_format"
    return {**config, key: zero_points}


def _implied_settings(report: Restored, marlin: dict[str, Any]) -> dict[str, Any]:
    """GPTQ settings for a checkpoint whose source's are not known: what its layers are."""

    def of(layer: MarlinLayer) -> tuple[int, int, bool, bool]:
        group_size = -1 if layer.G == 1 else layer.group_size
        return layer.bits, group_size, layer.stored.settings.sym, layer.stored.settings.desc_act

    kinds = [of(layer) for layer in report.layers]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    keys = ("bits", "group_size", "sym", "desc_act")
    result: dict[str, Any] = {
        **dict(zip(keys, common, strict=True)),
        "static_groups": False,
        "true_sequential": marlin.get("true_sequential", True),
        "lm_head": any(layer.name.split(".")[-1] == "lm_head" for layer in report.layers),
        "quant_method": "gptq",
        "checkpoint_format": report.zero_points,
    }
    if marlin.get("damp_percent") is not None:
        result["damp_percent"] = marlin["damp_percent"]
    dynamic = {
        f"+:^{re.escape(layer.name)}$": {k: v for k, v, c in zip(keys, kind, common, strict=True) if v != c}
        for layer, kind in zip(report.layers, kinds, strict=True)
        if kind != common
    }
    return {**result, "dynamic": dynamic} if dynamic else result


def _restore_card(checkpoint: Checkpoint, folder: Path) -> None:
    """The source's card: as it is, or out of the one that marlin-convert wrote, if that holds it."""
    card = checkpoint.folder / CARD_FILE
    if not card.is_file():
        return
    content = card.read_bytes()
    if (checkpoint.folder / REPORT_FILE).is_file():
        _, marker, rest = content.decode("utf-8", "replace").partition("\n# Card of the source\n")
        _, _, text = rest.partition(":\n\n")
        if not (marker and text.strip()):
            return
        content = text.encode()
    write_file(folder / CARD_FILE, content)
