"""A source's layer made from a Marlin one, bit for bit: what `restore` writes, and the port for each format's part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, Shards
from ..errors import SourceError
from ..formats import bf16
from ..formats.layout import TILE_K, unpack_zeros, unpermute_scales, zero_point
from ..formats.stored import StoredLayer
from ..native import cpu
from .blocks import Buffers, column_panels, group_strips, stored_blocks
from .pipeline import Piece, TensorStream, went_wrong

NUMPY: dict[str, Any] = {
    "F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64, "I8": np.int8
}  # fmt: skip

Words: TypeAlias = "npt.NDArray[np.int32]"


@dataclass(frozen=True)
class RestoredGroups:
    """Groups `first` … of a source: scales [count, N] in its own dtype, zero points uint8 [count, N]."""

    first: int
    scales: npt.NDArray[Any]
    zeros: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RestoredLayer(ABC):
    """One quantized linear of a Marlin checkpoint, and what it becomes in a source's format."""

    stored: StoredLayer[Tensor]
    scales_dtype: str  # of the source

    #: Whether the source has a column's codes, not a row's, together: then columns are written, and not rows.
    by_columns: ClassVar[bool] = False

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

    def tensor(self, part: str, dtype: str, *shape: int) -> OutTensor:
        """Return a tensor of this layer."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(NUMPY[dtype]).itemsize
        return OutTensor(f"{self.name}.{part}", dtype, shape, nbytes)

    @property
    @abstractmethod
    def out(self) -> dict[str, OutTensor]:
        """The tensors that the layer becomes, by the endings of their names."""

    @abstractmethod
    def write_rows(self, shards: Shards, k0: int, words: Words, buffers: Buffers) -> int:
        """Write the source's rows k0 …, as GPTQ words [rows bits/32, N]; the bytes written."""

    @abstractmethod
    def write_columns(self, shards: Shards, n0: int, words: Words, buffers: Buffers) -> int:
        """Write the source's columns n0 …, as GPTQ words [K bits/32, columns]; the bytes written."""

    @abstractmethod
    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        """Write scales and zero points, of which all groups come in order; the bytes written."""

    @abstractmethod
    def write_order(self, shards: Shards, g_idx: npt.NDArray[np.int32]) -> int:
        """Write what tells each row's group, and whatever else there is; the bytes written."""


class RestoringWriter(TensorStream):
    """Writes a source's layers from Marlin ones; each block is packed again and compared before it is written."""

    def pieces(self, layer: RestoredLayer) -> list[Piece]:
        """Return all of the work on a layer."""
        stored = layer.stored
        order = None if stored.perm is None else _Order.read(self.checkpoint, stored)
        groups: list[Piece] = [partial(self._write_groups, layer, order)]
        if order is None and layer.by_columns:
            order = _Order.unchanged(stored)
        if order is not None:
            return groups + [partial(self._write_columns, layer, order, *panel) for panel in column_panels(stored, 3)]
        return groups + [partial(self._write_rows, layer, *block) for block in stored_blocks(stored)]

    def _write_rows(self, layer: RestoredLayer, k0: int, rows: int) -> int:
        """Write stored rows k0 … of a layer."""
        stored, bits, array = layer.stored, layer.bits, self.buffers.array
        B = array("B", (rows // TILE_K, stored.weight.shape[1]), np.int32)
        self.checkpoint.read_into(stored.weight, B, k0 * stored.stored_N * bits // 8)
        words = cpu.unpack(B, out=array("words", (rows * bits // 32, stored.stored_N), np.int32), bits=bits)
        again = cpu.pack(words, out=array("again", B.shape, np.int32), bits=bits)
        if cpu.first_difference(B, again) is not None:
            raise went_wrong(layer.name, "unpacking went wrong")
        word_rows = max(0, min(rows, layer.K - k0)) * bits // 32
        if not word_rows:
            return 0
        return layer.write_rows(self.shards, k0, np.ascontiguousarray(words[:word_rows, : layer.N]), self.buffers)

    def _write_columns(self, layer: RestoredLayer, order: _Order, n0: int, columns: int) -> int:
        """Write columns n0 … , all rows of them: with act-order, any row may come from anywhere."""
        stored, bits, array = layer.stored, layer.bits, self.buffers.array
        B = array("B columns", (stored.stored_K // TILE_K, columns * bits // 2), np.int32)
        self.checkpoint.read_columns(stored.weight, B, n0 * bits // 2)
        words = cpu.unpack(B, out=array("sorted", (stored.stored_K * bits // 32, columns), np.int32), bits=bits)
        natural = array("natural", (layer.K * bits // 32, columns), np.int32)
        fill = np.zeros(columns, np.uint8)
        cpu.arrange(words, natural, bits=bits, fill=fill, rows=layer.K, perm=order.inverse)
        # Of padding only the last tile of the layer's own rows is looked at, and taken to be as it is.
        if stored.stored_K > layer.K:
            last = words[layer.K * bits // 32].view(np.uint32) >> layer.K * bits % 32
            fill = (last & np.uint32(2**bits - 1)).astype(np.uint8)
        tiles = B[: -(-layer.K // TILE_K)]
        if cpu.sorted_difference(tiles, natural, bits=bits, perm=order.perm, fill=fill) is not None:
            raise went_wrong(layer.name, "unpacking went wrong")
        columns_kept = np.ascontiguousarray(natural[:, : layer.N - n0])
        return layer.write_columns(self.shards, n0, columns_kept, self.buffers) if columns_kept.size else 0

    def _write_groups(self, layer: RestoredLayer, order: _Order | None) -> int:
        """Write scales and zero points, strip by strip, and the order of rows."""
        strips = group_strips(layer.G, layer.N)
        written = layer.write_groups(
            self.shards, (restored_groups(self.checkpoint, layer, first, count) for first, count in strips)
        )
        groups = np.arange(layer.K, dtype=np.int32) // np.int32(layer.group_size)
        return written + layer.write_order(self.shards, groups if order is None else groups[order.inverse[: layer.K]])


@dataclass(frozen=True)
class _Order:
    """The order of the stored rows of a layer with act-order: `perm` [K] as stored, and its inverse [K'], which leaves
    padding where it is."""

    perm: Words
    inverse: Words

    @staticmethod
    def unchanged(stored: StoredLayer[Tensor]) -> _Order:
        """Return the order of a layer whose rows are stored as they are."""
        rows = np.arange(stored.stored_K, dtype=np.int32)
        return _Order(rows[: stored.K], rows)

    @staticmethod
    def read(checkpoint: Checkpoint, stored: StoredLayer[Tensor]) -> _Order:
        assert stored.perm is not None
        perm = checkpoint.read(stored.perm)
        inverse = np.arange(stored.stored_K, dtype=np.int32)
        if not np.array_equal(np.sort(perm), np.arange(stored.K)):
            raise SourceError(f"{stored.name}: marlin_perm is not an order of the {stored.K} rows.")
        inverse[perm] = np.arange(stored.K, dtype=np.int32)
        return _Order(perm, inverse)


def restored_groups(checkpoint: Checkpoint, layer: RestoredLayer, first: int, count: int) -> RestoredGroups:
    """Return the source's groups `first` … of a Marlin layer."""
    stored = layer.stored
    step = 1 if stored.G == 1 else max(1, layer.group_size // stored.group_size)
    used = -(-layer.K // stored.group_size) if stored.G > 1 else 1
    at, rows = first * step, min((first + count) * step, used) - first * step

    def unpadded(values: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
        """Return one row for each group of stored ones, which repeat the source's where groups were cut; without
        padding."""
        values = values[:, : layer.N]
        found = np.ascontiguousarray(values[::step])
        if not np.array_equal(np.repeat(found, step, axis=0)[:rows], values):
            raise SourceError(f"{layer.name}: {what} differ within a group of {layer.group_size} rows.")
        return found

    s = checkpoint.read_rows(stored.scales, at, rows)
    scales = unpadded(unpermute_scales(s, stored.G), "scales")
    if stored.zeros is None:
        zeros = np.full(scales.shape, zero_point(layer.bits), np.uint8)
    else:
        zeros = unpadded(unpack_zeros(checkpoint.read_rows(stored.zeros, at, rows), layer.bits), "zero points")
    return RestoredGroups(first, _as_dtype(scales, layer), zeros)


def _as_dtype(scales: npt.NDArray[Any], layer: RestoredLayer) -> npt.NDArray[Any]:
    """Return scales [G, N] as stored (fp16, or bf16 as uint16) in the source's dtype."""
    if layer.stored.scales.dtype == layer.scales_dtype:
        return scales
    wide = bf16.widened(scales)
    return bf16.rounded(wide) if layer.scales_dtype == "BF16" else wide.astype(NUMPY[layer.scales_dtype])
