"""A GPTQ layer made from a Marlin one, bit for bit: what `restore` writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import OutTensor, Shards
from ..errors import SourceError
from ..formats import bf16
from ..formats.gptq import ZeroPointEncoding, encode_zeros
from ..formats.layout import (
    TILE_K,
    unpack_zeros,
    unpermute_scales,
    zero_point,
)
from ..formats.stored import StoredLayer
from ..native import cpu
from ..progress import Progress
from .blocks import column_panels, group_strips, stored_blocks
from .pipeline import Piece, TensorStream, went_wrong

_NUMPY: dict[str, Any] = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I32": np.int32, "I64": np.int64}

Words: TypeAlias = "npt.NDArray[np.int32]"


@dataclass(frozen=True)
class MarlinLayer:
    """One quantized linear of a Marlin checkpoint, and what only its source's files told."""

    stored: StoredLayer[Tensor]
    scales_dtype: str  # of the source
    g_idx: str | None  # the dtype of the source's, if it had one
    qzeros: bool = True  # whether the source had them
    stored_zero: int | None = None  # in qzeros of a symmetric layer, where its checkpoint_format stores another number

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
        if not self.qzeros:
            del found["qzeros"]
        if self.g_idx:
            width = np.dtype(_NUMPY[self.g_idx]).itemsize
            found["g_idx"] = OutTensor(f"{self.name}.g_idx", self.g_idx, (self.K,), self.K * width)
        return found


class GPTQWriter(TensorStream):
    """Writes GPTQ layers from Marlin ones; each block is packed again and compared before it is written."""

    def __init__(self, checkpoint: Checkpoint, shards: Shards, progress: Progress, encoding: ZeroPointEncoding) -> None:
        super().__init__(checkpoint, shards, progress)
        self.encoding = encoding

    def pieces(self, layer: MarlinLayer) -> list[Piece]:
        """All of the work on a layer."""
        stored = layer.stored
        order = None if stored.perm is None else _Order.read(self.checkpoint, stored)
        groups: list[Piece] = [partial(self._write_groups, layer, order)]
        if order is not None:
            return groups + [partial(self._write_columns, layer, order, *panel) for panel in column_panels(stored, 3)]
        return groups + [partial(self._write_rows, layer, *block) for block in stored_blocks(stored)]

    def _write_rows(self, layer: MarlinLayer, k0: int, rows: int) -> int:
        """Stored rows k0 … of a layer."""
        stored, bits, array = layer.stored, layer.bits, self.buffers.array
        B = array("B", (rows // TILE_K, stored.weight.shape[1]), np.int32)
        self.checkpoint.read_into(stored.weight, B, k0 * stored.stored_N * bits // 8)
        words = cpu.unpack(B, out=array("words", (rows * bits // 32, stored.stored_N), np.int32), bits=bits)
        again = cpu.pack(words, out=array("again", B.shape, np.int32), bits=bits)
        if cpu.first_difference(B, again) is not None:
            raise went_wrong(layer.name, "unpacking went wrong")
        own = max(0, min(rows, layer.K - k0)) * bits // 32
        if own:
            qweight = np.ascontiguousarray(words[:own, : layer.N])
            self.shards.write(f"{layer.name}.qweight", qweight, k0 * bits // 32 * layer.N * 4)
        return own * layer.N * 4

    def _write_columns(self, layer: MarlinLayer, order: _Order, n0: int, columns: int) -> int:
        """Columns n0 … of a layer with act-order: any row may come from anywhere, so that all of them are needed."""
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
        own = np.ascontiguousarray(natural[:, : layer.N - n0])
        self.shards.write_columns(f"{layer.name}.qweight", own, n0)
        return own.nbytes

    def _write_groups(self, layer: MarlinLayer, order: _Order | None) -> int:
        """Scales and zero points, strip by strip, and g_idx."""
        written = 0
        for first, count in group_strips(layer.G, layer.N):
            for part, array in _restored_groups(self.checkpoint, layer, self.encoding, first, count).items():
                self.shards.write(f"{layer.name}.{part}", array, first * array.shape[1] * array.itemsize)
                written += array.nbytes
        if layer.g_idx:
            groups = np.arange(layer.K, dtype=np.int32) // np.int32(layer.group_size)
            g_idx = (groups if order is None else groups[order.inverse[: layer.K]]).astype(_NUMPY[layer.g_idx])
            self.shards.write(f"{layer.name}.g_idx", g_idx)
            written += g_idx.nbytes
        return written


@dataclass(frozen=True)
class _Order:
    """The order of the stored rows of a layer with act-order: `perm` [K] as stored, and its inverse [K'], which leaves
    padding where it is."""

    perm: Words
    inverse: Words

    @staticmethod
    def read(checkpoint: Checkpoint, stored: StoredLayer[Tensor]) -> _Order:
        assert stored.perm is not None
        perm = checkpoint.read(stored.perm)
        inverse = np.arange(stored.stored_K, dtype=np.int32)
        if not np.array_equal(np.sort(perm), np.arange(stored.K)):
            raise SourceError(f"{stored.name}: marlin_perm is not an order of the {stored.K} rows.")
        inverse[perm] = np.arange(stored.K, dtype=np.int32)
        return _Order(perm, inverse)


def _restored_groups(
    checkpoint: Checkpoint, layer: MarlinLayer, encoding: ZeroPointEncoding, first: int, count: int
) -> dict[str, npt.NDArray[Any]]:
    """Scales and qzeros of the source's groups `first` …."""
    stored = layer.stored
    step = 1 if stored.G == 1 else max(1, layer.group_size // stored.group_size)
    used = -(-layer.K // stored.group_size) if stored.G > 1 else 1
    at, rows = first * step, min((first + count) * step, used) - first * step

    def own(values: npt.NDArray[Any], what: str) -> npt.NDArray[Any]:
        """Of stored rows, which repeat the source's where groups were cut, one for each group; without padding."""
        values = values[:, : layer.N]
        found = np.ascontiguousarray(values[::step])
        if not np.array_equal(np.repeat(found, step, axis=0)[:rows], values):
            raise SourceError(f"{layer.name}: {what} differ within a group of {layer.group_size} rows.")
        return found

    s = checkpoint.read_rows(stored.scales, at, rows)
    scales = own(unpermute_scales(s, stored.G), "scales")
    if stored.zeros is None:
        zeros = np.full(scales.shape, zero_point(layer.bits), np.uint8)
    else:
        zeros = own(unpack_zeros(checkpoint.read_rows(stored.zeros, at, rows), layer.bits), "zero points")
    found = {"scales": _as_dtype(scales, layer)}
    if not layer.qzeros:
        return found
    if layer.stored_zero is not None:
        zeros, encoding = np.full(scales.shape, layer.stored_zero, np.uint8), ZeroPointEncoding.V2
    return {**found, "qzeros": encode_zeros(zeros, layer.bits, encoding)}


def _as_dtype(scales: npt.NDArray[Any], layer: MarlinLayer) -> npt.NDArray[Any]:
    """Scales [G, N] as stored (fp16, or bf16 as uint16) in the source's dtype."""
    if layer.stored.scales.dtype == layer.scales_dtype:
        return scales
    wide = bf16.widened(scales)
    return bf16.rounded(wide) if layer.scales_dtype == "BF16" else wide.astype(_NUMPY[layer.scales_dtype])
