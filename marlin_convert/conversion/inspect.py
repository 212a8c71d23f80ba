"""Comparing one layer's tensors with what the configuration claims of it; where they differ, the tensors count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..checkpoint.reader import Checkpoint, Tensor
from ..errors import SourceError, UnsupportedError
from ..formats.gptq import ZeroPointEncoding
from ..formats.gptq_config import GPTQSettings
from ..formats.layout import (
    EXT_BITS,
    MIN_K,
    MIN_N,
    TILE_K,
    gptq_zeros,
    pack_factor,
    stored_group_size,
    zero_point,
)
from ..options import ZeroPointReading
from .blocks import group_strips
from .layer import GROUP_SIZE, Layer

_SCALE_DTYPES = ("F16", "BF16", "F32")
#: `--zero-points`: how to read a v1 checkpoint in which a zero point is 0, where its writer is not known.
READINGS = {
    ZeroPointReading.NIBBLE: ZeroPointEncoding.V1_NIBBLE, ZeroPointReading.WORD: ZeroPointEncoding.V1_WORD
}  # fmt: skip


class LayerInspection:
    """One layer under examination: its `layer` (None when not even its shape is known) and what there is to say.

    `refusals` hold for both formats, `misfits` for the original one, `extended_refusals` and `extended_notes` for the
    extended one.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, settings: GPTQSettings, reading: ZeroPointReading | None
    ) -> None:
        self.checkpoint, self.name, self.settings = checkpoint, name, settings
        self.reading = reading
        self.refusals: list[str] = []
        self.misfits: list[str] = []
        self.notes: list[str] = []
        self.extended_refusals: list[str] = []
        self.extended_notes: list[str] = []
        self.stored_zero: int | None = None
        self.layer = self._measure()
        if self.layer is not None:
            self.layer = self._sized_by_g_idx(self.layer)
            self._note_group_size(self.layer)
            self._check_format(self.layer)
            act_order = self._check_g_idx(self.layer)
            zeros = self._check_zero_points(self.layer)
            stored = self.stored_zero if zeros is ZeroPointEncoding.SYMMETRIC else None
            self.layer = replace(self.layer, act_order=act_order, zeros=zeros, stored_zero=stored)

    def _part(self, part: str) -> Tensor | None:
        return self.checkpoint.tensors.get(f"{self.name}.{part}")

    def _measure(self) -> Layer | None:
        """K, N, G and bits from the shapes of the tensors; the config only where shapes cannot tell."""
        qweight, scales = self._part("qweight"), self._part("scales")
        qzeros, g_idx, bias = self._part("qzeros"), self._part("g_idx"), self._part("bias")
        assert qweight is not None  # the layer was found by it
        if scales is None:
            raise SourceError(f"{self.name}: it has a qweight and no scales; the checkpoint is incomplete.")
        if len(qweight.shape) != 2 or len(scales.shape) != 2:
            self.refusals.append(
                f"qweight is {len(qweight.shape)}-D, scales are {len(scales.shape)}-D; only 2-D linears are repacked"
            )
            return None
        if qweight.dtype != "I32":
            self.refusals.append(f"qweight is {qweight.dtype}; only weights packed in int32 words can be repacked")
            return None
        if scales.dtype not in _SCALE_DTYPES:
            self.refusals.append(f"scales are {scales.dtype}; F16, BF16 or F32 was expected")
            return None
        (rows, N), (G, scale_columns) = qweight.shape, scales.shape
        if scale_columns != N:
            if scale_columns == 8 * N:
                raise UnsupportedError(
                    f"{self.name}: its qweight is packed along N, as AWQ does it, whatever the config says; "
                    "only GPTQ checkpoints can be repacked to Marlin."
                )
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)} and scales {list(scales.shape)} differ in N."
            )
        if not rows or not N or not G:
            raise SourceError(
                f"{self.name}: qweight {list(qweight.shape)}, scales {list(scales.shape)}: an empty layer."
            )
        bits = self._bits(rows, N, G, qzeros, g_idx)
        if bits is None:
            return None
        K = rows * 32 // bits
        if self.settings.bits not in (None, bits):
            self.notes.append(
                f"the config says {self.settings.bits} bits, the tensors are {bits}-bit; the tensors count"
            )
        if bias is not None and bias.shape != (N,):
            raise SourceError(f"{self.name}: bias {list(bias.shape)} does not match N = {N}.")
        group_rows = _rows_per_group(K, G, self.settings) or 0
        return Layer(self.name, K, N, G, bits, qweight, scales, qzeros, g_idx, bias, group_rows)

    def _bits(self, rows: int, N: int, G: int, qzeros: Tensor | None, g_idx: Tensor | None) -> int | None:
        fitting = [bits for bits in (2, 3, 4, 8) if rows * 32 % bits == 0]
        if qzeros is not None:
            if qzeros.dtype != "I32":
                self.refusals.append(
                    f"qzeros are {qzeros.dtype}; only zero points packed in int32 words can be repacked"
                )
                return None
            if len(qzeros.shape) != 2 or qzeros.shape[0] != G:
                raise SourceError(f"{self.name}: qzeros {list(qzeros.shape)} does not match scales with {G} groups.")
            fitting = [bits for bits in fitting if -(-N * bits // 32) == qzeros.shape[1]]
        if g_idx is not None:
            if g_idx.dtype not in ("I32", "I64") or len(g_idx.shape) != 1:
                raise SourceError(
                    f"{self.name}: g_idx {g_idx.dtype} {list(g_idx.shape)}: one int32 for each row was expected."
                )
            fitting = [bits for bits in fitting if rows * 32 // bits == g_idx.shape[0]]
        if not fitting:
            raise SourceError(
                f"{self.name}: no bit width explains its shapes: qweight has {rows} rows and N = {N}, "
                f"qzeros {list(qzeros.shape) if qzeros else 'none'}, g_idx {list(g_idx.shape) if g_idx else 'none'}."
            )
        if len(fitting) > 1:  # neither qzeros nor g_idx is there to tell
            if self.settings.bits not in fitting:
                self.refusals.append("neither qzeros, nor g_idx, nor the config tells the number of bits")
                return None
            return self.settings.bits
        return fitting[0]

    def _check_format(self, layer: Layer) -> None:
        """What the formats can hold, by shape."""
        if layer.bits in (2, 3):
            self.refusals.append(f"{layer.bits}-bit weights; Marlin has 4 and 8 bits")
        elif layer.bits != 4:
            self.misfits.append(f"{layer.bits}-bit weights; the original format has 4 bits only")
        groups = _group_text(layer)
        if layer.G > 1 and (layer.group_rows != GROUP_SIZE or layer.K % GROUP_SIZE):
            if not layer.group_rows:
                self.refusals.append(groups)
            elif stored_group_size(layer.group_rows) is None:
                self.extended_refusals.append(f"{groups}; Marlin's kernels take groups of a multiple of {TILE_K} rows")
            if layer.group_rows:
                self.misfits.append(f"{groups}; the original format has groups of 128 or one per column")
        if layer.K % MIN_K:
            self.misfits.append(f"K = {layer.K} is not a multiple of {MIN_K}")
        if layer.N % MIN_N:
            self.misfits.append(f"N = {layer.N} is not a multiple of {MIN_N}")

    def _sized_by_g_idx(self, layer: Layer) -> Layer:
        """Where there is a g_idx, it tells the size of the groups: all but the last have as many rows as the first."""
        if layer.g_idx is None or layer.G == 1:
            return layer
        g_idx = self.checkpoint.read(layer.g_idx)
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            return layer
        sizes = np.bincount(g_idx, minlength=layer.G)
        regular = (sizes[:-1] == sizes[0]).all() and 0 < sizes[-1] <= sizes[0]
        return replace(layer, group_rows=int(sizes[0])) if regular else layer

    def _note_group_size(self, layer: Layer) -> None:
        said = self.settings.group_size
        if said is None or (said == layer.group_rows if layer.G > 1 else not 0 < said < layer.K):
            return
        found = (
            f"{layer.group_rows or layer.K / layer.G:g} rows in a group" if layer.G > 1 else "one group over all rows"
        )
        self.notes.append(f"the config says group_size {said}, the tensors have {found}; the tensors count")

    def _check_g_idx(self, layer: Layer) -> bool:
        """Whether the layer has act-order."""
        claimed = self.settings.desc_act
        if layer.g_idx is None:
            if claimed and layer.G > 1:
                self.refusals.append("the config says act-order (desc_act) and the g_idx that it needs is missing")
            elif "desc_act" in self.settings.conflicts and layer.G > 1:
                self.refusals.append(
                    f"no g_idx, and the configs disagree on desc_act ({self.settings.conflicts['desc_act']})"
                )
            return False
        g_idx = self.checkpoint.read(layer.g_idx)
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            raise SourceError(
                f"{self.name}: g_idx names group {g_idx.max() if g_idx.max() >= layer.G else g_idx.min()} of {layer.G}."
            )
        rows = layer.group_rows
        if rows and np.array_equal(g_idx, np.arange(layer.K) // rows):
            if claimed and layer.G > 1:
                self.notes.append("desc_act in name only: g_idx is sequential, converted as plain")
            return False
        if (g_idx == g_idx[0]).all():
            self.refusals.append(f"g_idx puts every row into group {g_idx[0]} of {layer.G}")
            return False
        if claimed is False:
            self.misfits.append("act-order (g_idx is shuffled, although the config says desc_act false)")
            self.extended_notes.append("the config says desc_act false and g_idx is shuffled; converted with act-order")
        else:
            self.misfits.append("act-order (g_idx is shuffled)")
        if rows:
            sizes = np.bincount(g_idx, minlength=layer.G)
            expected = np.full(layer.G, rows)
            expected[-1] = layer.K - rows * (layer.G - 1)
            wrong = np.flatnonzero(sizes != expected)
            if wrong.size:
                group = int(wrong[0])
                self.extended_refusals.append(
                    f"act-order with groups of unequal size (group {group} has {sizes[group]} rows, not "
                    f"{expected[group]})"
                )
        return True

    def _check_zero_points(self, layer: Layer) -> ZeroPointEncoding:
        """How zero points are stored. Symmetric means that every one is the middle, 8 or 128: stored one less by
        checkpoint_format gptq, as it is by gptq_v2."""
        sym, version = self.settings.sym, self.settings.checkpoint_format
        if layer.qzeros is None:
            if "sym" in self.settings.conflicts:
                self.refusals.append(f"no qzeros, and the configs disagree on sym ({self.settings.conflicts['sym']})")
            elif sym is not True:
                said = "the config says sym false" if sym is False else "no config says whether it is symmetric"
                self.refusals.append(f"no qzeros, and {said}")
            return ZeroPointEncoding.SYMMETRIC
        if layer.bits not in EXT_BITS:
            return ZeroPointEncoding.SYMMETRIC
        numbers, middle = self._stored_numbers(layer, layer.qzeros), zero_point(layer.bits)
        stored = next((z for z in (middle - 1, middle) if numbers == {z}), None)
        layout, expected = ("gptq_v2", middle) if version == "gptq_v2" else ("gptq", middle - 1)
        if stored is None:
            claim = ", although the config says sym" if sym else ""
            self.misfits.append(f"asymmetric (zero points are not all {middle}{claim})")
            if sym:
                self.extended_notes.append("the config says sym and zero points differ; converted as asymmetric")
            return self._asymmetric(layer, numbers)
        doubtful = sym is False or "sym" in self.settings.conflicts
        if doubtful and "checkpoint_format" in self.settings.conflicts:
            self.refusals.append(
                f"every zero point is stored as {stored}, no config says sym for certain, and they disagree on "
                f"checkpoint_format ({self.settings.conflicts['checkpoint_format']})"
            )
        elif stored == expected:
            if sym is False:
                self.notes.append(
                    f"the config says sym false, and every zero point is {middle}; converted as symmetric"
                )
        elif doubtful:
            # No sym to lean on: the label decides what the stored number means, and it does not mean the middle.
            meant = stored + middle - expected
            self.misfits.append(
                f"asymmetric (every zero point is stored as {stored}, which is {meant} in checkpoint_format {layout})"
            )
            return self._asymmetric(layer, numbers)
        else:
            self.stored_zero = stored
            self.notes.append(
                f"checkpoint_format {layout} stores zero point {middle} as {expected}, here it is {stored}; "
                "read as symmetric"
            )
        return ZeroPointEncoding.SYMMETRIC

    def _stored_numbers(self, layer: Layer, qzeros: Tensor) -> set[int]:
        """Every number that stands in `qzeros`."""
        present, factor = np.zeros(2**layer.bits, np.bool_), pack_factor(layer.bits)
        for first, count in group_strips(layer.G, layer.N):
            words, columns = self.checkpoint.read_rows(qzeros, first, count), layer.N
            if layer.N % factor == 0 and (words == words[0, 0]).all():  # as they mostly are: one word tells all
                words, columns = words[:1, :1], factor
            present[gptq_zeros(words, layer.bits, columns)] = True
        return set(np.flatnonzero(present).tolist())

    def _asymmetric(self, layer: Layer, numbers: set[int]) -> ZeroPointEncoding:
        """How the zero points of an asymmetric layer are stored, in which `numbers` stand."""
        if "checkpoint_format" in self.settings.conflicts:
            self.extended_refusals.append(
                "asymmetric, and the configs disagree on checkpoint_format "
                f"({self.settings.conflicts['checkpoint_format']}), which tells how zero points are stored"
            )
            return ZeroPointEncoding.V2
        if self.settings.checkpoint_format == "gptq_v2":
            return ZeroPointEncoding.V2
        if self.reading is not None:
            return READINGS[self.reading]
        highest = 2**layer.bits - 1
        if highest not in numbers:  # every reading agrees
            return ZeroPointEncoding.V1_NIBBLE
        writer = self.settings.writer
        if writer == "gptqmodel":
            return ZeroPointEncoding.V1_WORD
        if writer == "autoround":
            return ZeroPointEncoding.V1_NIBBLE
        lost = (
            "AutoGPTQ, which wrote it, loses the numbers beside it"
            if writer == "autogptq"
            else "its writers differ in what they mean by that, and no config names this one"
        )
        self.extended_refusals.append(
            f"asymmetric with a zero point stored as {highest}: {lost}; give --zero-points word (GPTQModel) or nibble "
            "(others) if you know"
        )
        return ZeroPointEncoding.V1_NIBBLE


def _rows_per_group(K: int, G: int, settings: GPTQSettings) -> int | None:
    """Rows that share a scale: K / G, or the config's size where a short last group explains G."""
    if G == 1:
        return K
    if G * GROUP_SIZE == K:
        return GROUP_SIZE
    said = settings.group_size
    if said and said > 0 and -(-K // said) == G:
        return said
    return K // G if K % G == 0 else None


def _group_text(layer: Layer) -> str:
    rows = layer.group_rows
    if not rows:
        return f"{layer.G} groups that do not divide K = {layer.K}"
    return f"groups of {rows}" + (f" with a short last one (K = {layer.K})" if layer.K % rows else "")
