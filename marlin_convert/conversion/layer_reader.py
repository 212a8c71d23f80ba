"""A GPTQ layer as its files have it, brought into the order and the size in which it is stored."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint
from ..errors import UnsupportedError
from ..formats.gptq import every_code, weights
from ..formats.layout import TILE_K, TILE_N, pack_factor, tile_words, zero_point
from ..formats.scales import to_extended, to_fp16
from ..native import cpu
from .blocks import Buffers
from .plan import Layer

Words: TypeAlias = "npt.NDArray[np.int32]"


@dataclass(frozen=True)
class Groups:
    """What a layer has for its groups: scales [G, N] (fp16, or bf16 as uint16), zero points uint8 [G, N] unless it is
    symmetric, and with act-order the source's row of each stored row, int32 [K]. Columns in their own order."""

    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.uint8] | None
    perm: Words | None


def source_groups(checkpoint: Checkpoint, layer: Layer) -> Groups:
    """As the source has them; scales in the type in which they are stored. Raises UnsupportedError where it cannot
    hold them."""
    fit = to_extended if layer.extended else to_fp16
    found = fit(checkpoint.read(layer.scales), layer.scales.dtype)
    if found.problem:  # known before, but for fp16 scales that have only just come from the Hub
        raise UnsupportedError(f"{layer.name}: {found.problem}; nothing was converted.")
    return Groups(found.scales, source_zeros(checkpoint, layer), source_perm(checkpoint, layer))


def source_zeros(checkpoint: Checkpoint, layer: Layer) -> npt.NDArray[np.uint8] | None:
    """Zero points [G, N], unless the layer is symmetric."""
    return None if layer.sym or layer.qzeros is None else layer.zero_points(checkpoint.read(layer.qzeros))


def source_perm(checkpoint: Checkpoint, layer: Layer) -> Words | None:
    """With act-order, the source's rows sorted by group, those of a group in their own order; int32 [K]."""
    if not layer.act_order or layer.g_idx is None:
        return None
    return np.argsort(checkpoint.read(layer.g_idx), kind="stable").astype(np.int32)


def stored_groups(checkpoint: Checkpoint, layer: Layer) -> Groups:
    """As they are stored: cut groups repeated, padding zero."""
    source = source_groups(checkpoint, layer)
    return Groups(
        _stored(source.scales, layer), None if source.zeros is None else _stored(source.zeros, layer), source.perm
    )


def _stored(values: npt.NDArray[Any], layer: Layer) -> npt.NDArray[Any]:
    if values.shape == (layer.stored_G, layer.stored_N):
        return values
    stored = np.zeros((layer.stored_G, layer.stored_N), values.dtype)
    step = 1 if layer.G == 1 else layer.group_rows // layer.stored_group_size
    used = 1 if layer.G == 1 else -(-layer.K // layer.stored_group_size)
    stored[:used, : layer.N] = np.repeat(values, step, axis=0)[:used]
    return stored


def source_rows(checkpoint: Checkpoint, layer: Layer, k0: int, rows: int, buffers: Buffers) -> Words:
    """Stored rows k0 … of a layer without act-order, as GPTQ words [rows bits/32, stored_N]."""
    bits, per_row = layer.bits, layer.N * layer.bits // 8  # bytes
    own = max(0, min(rows, layer.K - k0))
    words: Words = buffers.array("words", (rows * bits // 32, layer.stored_N), np.int32)
    if own == rows and layer.stored_N == layer.N:
        checkpoint.read_into(layer.qweight, words, k0 * per_row)
        return words
    fill = _fill(checkpoint, layer)
    if own:
        read = buffers.array("qweight", (own * bits // 32, layer.N), np.int32)
        checkpoint.read_into(layer.qweight, read, k0 * per_row)
        cpu.arrange(read, words, bits=bits, fill=fill, rows=rows)
    else:
        words[...] = np.repeat(fill.astype(np.uint32)[None] * every_code(bits), len(words), axis=0).view(np.int32)
    _clear_padding(words, layer, k0)
    return words


@dataclass(frozen=True)
class Order:
    """How the columns of a layer with act-order are stored: the source's row of each stored row, `perm` int32 [K], and
    the code of padding in each column, `fill` uint8 [columns]. Rows of B from `rows` on have code 0."""

    perm: Words
    fill: npt.NDArray[np.uint8]
    rows: int

    def columns(self, first: int, columns: int) -> Order:
        return replace(self, fill=self.fill[first : first + columns])


def stored_order(checkpoint: Checkpoint, layer: Layer) -> Order:
    """The order of a layer with act-order, for all its columns."""
    perm = source_perm(checkpoint, layer)
    assert perm is not None
    return Order(perm, _fill(checkpoint, layer), _filled_rows(layer))


def source_columns(checkpoint: Checkpoint, layer: Layer, first: int, columns: int, buffers: Buffers) -> Words:
    """Stored columns `first` … of a layer with act-order: all rows in the source's order, as GPTQ words
    [K bits/32, columns], without padding."""
    own = min(columns, layer.N - first)
    words: Words = buffers.array("qweight columns", (layer.qweight.shape[0], own), np.int32)
    checkpoint.read_columns(layer.qweight, words, first)
    return words


def order_difference(B: Words, qweight: Words, order: Order, bits: int, n0: int = 0) -> str | None:
    """Where columns n0 … of a layer as stored, `B` [K'/16, columns bits/2], first differ from the source's rows
    `qweight` [K bits/32, columns] in that order; None if nowhere."""
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
    return f"the code of row {row}, column {n0 + column} is {code}, not {expected}"


def source_weight(checkpoint: Checkpoint, layer: Layer) -> npt.NDArray[Any]:
    """W [K, N] of a GPTQ layer, its rows as in the source, rounded to the type of its scales (fp16, bf16 as uint16)."""
    groups, qweight = source_groups(checkpoint, layer), checkpoint.read(layer.qweight)
    regular = not layer.act_order and layer.group_rows * layer.G == layer.K and layer.group_rows % TILE_K == 0
    if regular and layer.K % TILE_K == 0 and layer.N % TILE_N == 0:
        return cpu.dequantize_gptq(
            qweight, groups.scales, bits=layer.bits, zeros=groups.zeros, threads=os.cpu_count() or 1
        )
    rows = np.arange(layer.K) // layer.group_rows
    if layer.act_order and layer.g_idx is not None:
        rows = checkpoint.read(layer.g_idx)
    return weights(qweight, groups.scales, groups.zeros, rows, layer.bits)


def _fill(checkpoint: Checkpoint, layer: Layer) -> npt.NDArray[np.uint8]:
    """The code of padding in each column: the zero point of the last group, so that the weight is 0."""
    if layer.sym:
        return np.full(layer.stored_N, zero_point(layer.bits), np.uint8)
    fill = np.zeros(layer.stored_N, np.uint8)
    zeros = source_zeros(checkpoint, layer)
    assert zeros is not None
    fill[: layer.N] = zeros[-1]
    return fill


def _filled_rows(layer: Layer) -> int:
    """Stored rows whose padding has the code `_fill`. The others are in groups of padding alone, whose zero point is 0
    where zero points are stored, and hence their code."""
    if layer.sym or layer.stored_G == 1:
        return layer.stored_K
    return -(-layer.K // layer.stored_group_size) * layer.stored_group_size


def _clear_padding(words: Words, layer: Layer, k0: int) -> None:
    """Code 0 in stored rows k0 … that are groups of padding alone."""
    words[max(0, _filled_rows(layer) - k0) * layer.bits // 32 :] = 0
