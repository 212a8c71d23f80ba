"""Comparing one layer's tensors with what the configuration claims of it; where they differ, the tensors count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np

from ..checkpoint.reader import Checkpoint, Tensor
from ..errors import SourceError
from ..formats.gptq_config import GPTQSettings
from ..formats.layout import EXT_BITS, MIN_K, MIN_N, TILE_K, stored_group_size, zero_point
from .layer import GROUP_SIZE, Layer

SCALE_DTYPES = ("F16", "BF16", "F32")


class LayerInspection(ABC):
    """One layer under examination: its `layer` (None when not even its shape is known) and what there is to say.

    `refusals` hold for both formats, `why_extended` says why the original one cannot hold it, `extended_refusals` and
    `extended_notes` hold for the extended one. A source format tells how its layers are measured, and how their zero
    points are stored.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, settings: GPTQSettings) -> None:
        self.checkpoint, self.name, self.settings = checkpoint, name, settings
        self.refusals: list[str] = []
        self.why_extended: list[str] = []
        self.notes: list[str] = []
        self.extended_refusals: list[str] = []
        self.extended_notes: list[str] = []
        self.layer = self.measured()
        if self.layer is not None:
            self.layer = self._sized_by_order(self.layer)
            self._note_group_size(self.layer)
            self._check_format(self.layer)
            self.layer = replace(self.layer, act_order=self._check_order(self.layer))
            self.layer = self.with_zero_points(self.layer)

    @abstractmethod
    def measured(self) -> Layer | None:
        """Return K, N, G and bits from the shapes of the tensors; the config only where shapes cannot tell."""

    @abstractmethod
    def with_zero_points(self, layer: Layer) -> Layer:
        """Return the layer, knowing whether it is symmetric, and where its zero points are."""

    def part(self, part: str) -> Tensor | None:
        return self.checkpoint.tensors.get(f"{self.name}.{part}")

    def asymmetric(self, layer: Layer) -> Layer:
        """Return the layer as one with zero points of its own, whatever the config says."""
        claim = ", although the config says symmetric" if self.settings.sym else ""
        self.why_extended.append(f"asymmetric (zero points are not all {zero_point(layer.bits)}{claim})")
        if self.settings.sym:
            self.extended_notes.append("the config says symmetric and zero points differ; converted as asymmetric")
        return replace(layer, sym=False)

    def _check_format(self, layer: Layer) -> None:
        """Check what the formats can hold, by shape."""
        if layer.bits not in EXT_BITS:
            self.refusals.append(
                f"{layer.bits}-bit weights; Marlin has 4 and 8 bits, with which the model has to be quantized"
            )
        elif layer.bits != 4:
            self.why_extended.append(f"{layer.bits}-bit weights; the original format has 4 bits only")
        groups = _group_text(layer)
        if layer.G > 1 and (layer.group_rows != GROUP_SIZE or layer.K % GROUP_SIZE):
            if not layer.group_rows:
                self.refusals.append(groups)
            elif stored_group_size(layer.group_rows) is None:
                self.extended_refusals.append(f"{groups}; Marlin's kernels take groups of a multiple of {TILE_K} rows")
            if layer.group_rows:
                self.why_extended.append(f"{groups}; the original format has groups of 128 or one per column")
        if layer.K % MIN_K:
            self.why_extended.append(f"K = {layer.K} is not a multiple of {MIN_K}")
        if layer.N % MIN_N:
            self.why_extended.append(f"N = {layer.N} is not a multiple of {MIN_N}")

    def _sized_by_order(self, layer: Layer) -> Layer:
        """Return the layer with the size of groups that its g_idx tells, if there is one: all but the last have as many
        rows as the first."""
        g_idx = None if layer.G == 1 else layer.source.read_order(self.checkpoint)
        if g_idx is None:
            return layer
        if g_idx.min() < 0 or g_idx.max() >= layer.G:
            return layer
        sizes = np.bincount(g_idx, minlength=layer.G)
        regular = (sizes[:-1] == sizes[0]).all() and 0 < sizes[-1] <= sizes[0]
        return replace(layer, group_rows=int(sizes[0])) if regular else layer

    def _note_group_size(self, layer: Layer) -> None:
        claimed = self.settings.group_size
        if claimed is None or (claimed == layer.group_rows if layer.G > 1 else not 0 < claimed < layer.K):
            return
        found = (
            f"{layer.group_rows or layer.K / layer.G:g} rows in a group" if layer.G > 1 else "one group over all rows"
        )
        self.notes.append(f"the config says group_size {claimed}, the tensors have {found}; the tensors count")

    def _check_order(self, layer: Layer) -> bool:
        """Tell whether the layer has act-order."""
        claimed = self.settings.desc_act
        g_idx = layer.source.read_order(self.checkpoint)
        if g_idx is None:
            if claimed and layer.G > 1:
                self.refusals.append("the config says act-order (desc_act) and the g_idx that it needs is missing")
            elif "desc_act" in self.settings.conflicts and layer.G > 1:
                self.refusals.append(
                    f"no g_idx, and the configs disagree on desc_act ({self.settings.conflicts['desc_act']})"
                )
            return False
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
            self.why_extended.append("act-order (g_idx is shuffled, although the config says desc_act false)")
            self.extended_notes.append("the config says desc_act false and g_idx is shuffled; converted with act-order")
        else:
            self.why_extended.append("act-order (g_idx is shuffled)")
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


def rows_per_group(K: int, G: int, settings: GPTQSettings) -> int | None:
    """Return rows that share a scale: K / G, or the config's size where a short last group explains G."""
    if G == 1:
        return K
    if G * GROUP_SIZE == K:
        return GROUP_SIZE
    claimed = settings.group_size
    if claimed and claimed > 0 and -(-K // claimed) == G:
        return claimed
    return K // G if K % G == 0 else None


def _group_text(layer: Layer) -> str:
    rows = layer.group_rows
    if not rows:
        return f"{layer.G} groups that do not divide K = {layer.K}"
    return f"groups of {rows}" + (f" with a short last one (K = {layer.K})" if layer.K % rows else "")
