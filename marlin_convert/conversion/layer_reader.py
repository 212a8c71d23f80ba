"""A layer as its files have it, as GPTQ words, brought into the order and the size in which it is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint
from ..errors import UnsupportedError
from ..formats.gptq import every_code, weights
from ..formats.layout import TILE_K, TILE_N, pack_factor, tile_words, zero_point
from ..formats.scales import as_stored
from ..native import cpu, cpu_weights
from .blocks import Buffers
from .layer import Layer
from .source_layer import Kept

Words: TypeAlias = "npt.NDArray[np.int32]"


@dataclass(frozen=True)
class Groups:
    """What a layer, or some of its groups, have: scales [G, N] (fp16, or bf16 as uint16), and zero points uint8 [G, N]
    unless it is symmetric. Columns in their own order."""

    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.uint8] | None


@dataclass(frozen=True)
class Order:
    """How the columns of a layer are stored: the source's row of each stored row, `perm` int32 [K], and
    the code of padding in each column, `fill` uint8 [columns]. Rows of B from `rows` on have code 0."""

    perm: Words
    fill: npt.NDArray[np.uint8]
    rows: int

    def columns(self, first: int, columns: int) -> Order:
        return replace(self, fill=self.fill[first : first + columns])


class LayerReader:
    """Reads one layer of a source: weights in blocks or panels, scales and zero points some groups at a time.

    With `defined`, weights are read by the definition of the source's format, as slowly as that goes. The order of rows
    and the code of padding are read once, when they are first needed. Thread-safe; each thread brings its own buffers.
    """

    def __init__(self, checkpoint: Checkpoint, layer: Layer, *, defined: bool = False) -> None:
        self.checkpoint, self.layer, self.defined = checkpoint, layer, defined
        self._kept: Kept = {}

    # ---- Groups

    def source_groups(self, first: int = 0, count: int | None = None) -> Groups:
        """Return groups `first` … as the source has them; scales in the type in which they are stored.

        Raises UnsupportedError where that type cannot hold them.
        """
        layer = self.layer
        count = layer.G - first if count is None else count
        raw = layer.source.raw_scales(self.checkpoint, first, count, self._kept)
        found = as_stored(raw, layer.source.scales.dtype, layer.stored_scales)
        if found.problem:  # known before, but for fp16 scales that have only just come from the Hub
            raise UnsupportedError(f"{layer.name}: {found.problem}; nothing was converted.")
        return Groups(found.scales, self._zeros(first, count))

    def _zeros(self, first: int, count: int) -> npt.NDArray[np.uint8] | None:
        """Return zero points [count, N] of groups `first` …, unless the layer is symmetric."""
        return None if self.layer.sym else self.layer.source.zeros(self.checkpoint, first, count, self._kept)

    def stored_groups(self, first: int, count: int) -> Groups:
        """Return groups `first` … as they are stored: cut groups repeated, padding zero."""
        layer = self.layer
        step = 1 if layer.G == 1 else layer.group_rows // layer.stored_group_size
        used = 1 if layer.G == 1 else -(-layer.K // layer.stored_group_size)
        filled = max(0, min(count, used - first))
        if filled == count and step == 1 and layer.stored_N == layer.N:
            return self.source_groups(first, count)
        kind = np.uint16 if layer.stored_scales == "BF16" else np.float16
        scales: npt.NDArray[Any] = np.zeros((count, layer.stored_N), kind)
        zeros = None if layer.sym else np.zeros((count, layer.stored_N), np.uint8)
        if filled:
            rows = np.arange(first, first + filled) // step
            source = self.source_groups(int(rows[0]), int(rows[-1] - rows[0]) + 1)
            scales[:filled, : layer.N] = source.scales[rows - rows[0]]
            if zeros is not None and source.zeros is not None:
                zeros[:filled, : layer.N] = source.zeros[rows - rows[0]]
        return Groups(scales, zeros)

    # ---- The order of rows

    @cached_property
    def g_idx(self) -> Words | None:
        """The group of each of the source's rows, int32 [K], with act-order; None where rows are in order."""
        return self.layer.source.read_order(self.checkpoint) if self.layer.act_order else None

    @cached_property
    def perm(self) -> Words | None:
        """With act-order, the source's rows sorted by group, those of a group in their own order; int32 [K]."""
        return None if self.g_idx is None else np.argsort(self.g_idx, kind="stable").astype(np.int32)

    @cached_property
    def fill(self) -> npt.NDArray[np.uint8]:
        """The code of padding in each column [N']: the zero point of the last group, so that the weight is 0."""
        layer = self.layer
        if layer.sym:
            return np.full(layer.stored_N, zero_point(layer.bits), np.uint8)
        fill = np.zeros(layer.stored_N, np.uint8)
        zeros = self._zeros(layer.G - 1, 1)
        assert zeros is not None
        fill[: layer.N] = zeros[0]
        return fill

    @property
    def filled_rows(self) -> int:
        """Stored rows whose padding has the code `fill`. The others are in groups of padding alone, whose zero point is
        0 where zero points are stored, and hence their code."""
        layer = self.layer
        if layer.sym or layer.stored_G == 1:
            return layer.stored_K
        return -(-layer.K // layer.stored_group_size) * layer.stored_group_size

    @property
    def order(self) -> Order:
        """The order of the layer's rows, for all its columns."""
        perm = np.arange(self.layer.K, dtype=np.int32) if self.perm is None else self.perm
        return Order(perm, self.fill, self.filled_rows)

    # ---- Weights

    def rows(self, k0: int, rows: int, buffers: Buffers) -> Words:
        """Return stored rows k0 … of a layer without act-order, as GPTQ words [rows bits/32, N']."""
        layer, bits = self.layer, self.layer.bits
        filled = max(0, min(rows, layer.K - k0))
        words: Words = buffers.array("words", (rows * bits // 32, layer.stored_N), np.int32)
        if filled == rows and layer.stored_N == layer.N:
            return self.source_rows(k0, words, buffers)
        if filled:
            read = self.source_rows(k0, buffers.array("qweight", (filled * bits // 32, layer.N), np.int32), buffers)
            cpu.arrange(read, words, bits=bits, fill=self.fill, rows=rows)
        else:
            padding = self.fill.astype(np.uint32)[None] * every_code(bits)
            words[...] = np.repeat(padding, len(words), axis=0).view(np.int32)
        words[max(0, self.filled_rows - k0) * bits // 32 :] = 0
        return words

    def source_rows(self, k0: int, words: Words, buffers: Buffers) -> Words:
        """Fill `words` [rows bits/32, N] with the source's rows k0 …, and return them."""
        source = self.layer.source
        (source.defined_rows if self.defined else source.rows)(self.checkpoint, k0, words, buffers)
        return words

    def columns(self, first: int, columns: int, buffers: Buffers) -> Words:
        """Return stored columns `first` …: all rows in the source's order, as GPTQ words [K bits/32, columns], without
        padding."""
        layer, width = self.layer, min(columns, self.layer.N - first)
        words: Words = buffers.array("qweight columns", (layer.K * layer.bits // 32, width), np.int32)
        source = layer.source
        (source.defined_columns if self.defined else source.columns)(self.checkpoint, first, words, buffers)
        return words

    def weight(self) -> npt.NDArray[Any]:
        """Return W [K, N], its rows as in the source, rounded to the type of its scales (fp16, bf16 as uint16)."""
        layer, groups, buffers = self.layer, self.source_groups(), Buffers()
        qweight = self.columns(0, layer.stored_N, buffers)
        regular = not layer.act_order and layer.group_rows * layer.G == layer.K and layer.group_rows % TILE_K == 0
        if regular and layer.K % TILE_K == 0 and layer.N % TILE_N == 0:
            return cpu_weights.dequantize_gptq(
                qweight, groups.scales, bits=layer.bits, zeros=groups.zeros, threads=os.cpu_count() or 1
            )
        rows = np.arange(layer.K) // layer.group_rows if self.g_idx is None else self.g_idx
        return weights(qweight, groups.scales, groups.zeros, rows, layer.bits)


# ---- Comparing ----


def code_difference(B: Words, words: Words, k0: int, bits: int) -> str | None:
    """Return where rows k0 … of a layer as stored, `B` [rows/16, N bits/2], first differ from GPTQ words [rows bits/32,
    N] in their own order: the row and column of the weight and both codes; None if nowhere."""
    rows = len(B) * TILE_K
    order = Order(np.arange(rows, dtype=np.int32), np.zeros(words.shape[1], np.uint8), rows)
    return order_difference(B, words, order, bits, k0=k0)


def order_difference(B: Words, qweight: Words, order: Order, bits: int, n0: int = 0, k0: int = 0) -> str | None:
    """Return where columns n0 … of a layer as stored, `B` [K'/16, columns bits/2], first differ from the source's rows
    `qweight` [K bits/32, columns] in that order; None if nowhere. Messages count rows from `k0` on."""
    tile_rows = order.rows // TILE_K
    place = cpu.sorted_difference(B[:tile_rows], qweight, bits=bits, perm=order.perm, fill=order.fill)
    if place is None:
        return f"rows from {order.rows} on are not all 0" if B[tile_rows:].any() else None
    (row, column), factor = place, pack_factor(bits)
    tile = B[row // TILE_K, column // TILE_N * tile_words(bits) :][None, : tile_words(bits)]
    word = cpu.unpack(np.ascontiguousarray(tile), bits=bits).view(np.uint32)[row % TILE_K // factor, column % TILE_N]
    expected = int(order.fill[column])
    if row < order.perm.size and column < qweight.shape[1]:
        at = int(order.perm[row])
        expected = int(qweight.view(np.uint32)[at // factor, column]) >> at % factor * bits & 2**bits - 1
    code = int(word) >> row % factor * bits & 2**bits - 1
    return f"the code of row {k0 + row}, column {n0 + column} is {code}, not {expected}"
