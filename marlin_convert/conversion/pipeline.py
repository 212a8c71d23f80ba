"""Streaming tensors into new files: read, repack, check, write; in blocks, several at a time, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from ..checkpoint.reader import Checkpoint, Tensor
from ..checkpoint.writer import Shards
from ..errors import MarlinConvertError
from ..formats.layout import TILE_K, pack_zeros, permute_scales, unpack_zeros, unpermute_scales
from ..native.choose import Packer
from ..progress import Progress
from .blocks import Buffers, byte_blocks, column_panels, group_strips, stored_blocks, strips
from .layer import Layer
from .layer_reader import LayerReader, code_difference, order_difference

#: Does a part of the work on a layer or a tensor; returns how many bytes it has written.
Piece: TypeAlias = "Callable[[], int]"


def went_wrong(layer: str, what: str) -> MarlinConvertError:
    """Return the error for a check that failed: it never should."""
    return MarlinConvertError(f"{layer}: {what}; this is a bug or faulty memory, nothing was kept.")


class TensorStream:
    """What both ways of converting have in common: tensors that are copied, and counting.

    Tensors of `checkpoint` go into `shards`; `progress` hears of every piece. Pieces may run on any thread, in any
    order.
    """

    def __init__(self, checkpoint: Checkpoint, shards: Shards, progress: Progress) -> None:
        self.checkpoint, self.shards, self.progress = checkpoint, shards, progress
        self.buffers = Buffers()

    def copying(self, tensor: Tensor) -> list[Piece]:
        """Return the pieces of a tensor that is copied as it is."""
        return [partial(self._copy, tensor, start, length) for start, length in byte_blocks(tensor.nbytes)]

    def _copy(self, tensor: Tensor, start: int, length: int) -> int:
        block = self.buffers.array("copy", (length,), np.uint8)
        self.checkpoint.read_into(tensor, block, start)
        self.shards.write(tensor.name, block, start)
        return length

    def counted(
        self, name: str, pieces: Sequence[Piece], *, layer: bool, finished: Callable[[], None] = lambda: None
    ) -> Iterator[Callable[[], None]]:
        """Return `pieces` of layer or tensor `name` as tasks; the last to end says that a layer is done, and calls
        `finished`."""
        left, lock = len(pieces), threading.Lock()

        def run(piece: Piece) -> None:
            nonlocal left
            nbytes = piece()
            with lock:
                left -= 1
                last = not left
            self.progress.advance(nbytes, name, done=layer and last)
            if last:
                finished()

        for piece in pieces:
            yield partial(run, piece)
        if not pieces:
            finished()


class MarlinWriter(TensorStream):
    """Writes Marlin layers from GPTQ ones; each block is unpacked again and compared before it is written."""

    def __init__(self, checkpoint: Checkpoint, shards: Shards, progress: Progress, packer: Packer) -> None:
        super().__init__(checkpoint, shards, progress)
        self.packer = packer

    def pieces(self, item: Layer | Tensor) -> list[Piece]:
        """Return all of the work on a layer, or on a tensor that is copied."""
        if isinstance(item, Tensor):
            return self.copying(item)
        reader = LayerReader(self.checkpoint, item)
        groups: list[Piece] = [partial(self._write_groups, reader)]
        if item.by_columns:
            return groups + [partial(self._write_columns, reader, *panel) for panel in column_panels(item)]
        return groups + [partial(self._write_rows, reader, *block) for block in stored_blocks(item)]

    def _write_rows(self, reader: LayerReader, k0: int, rows: int) -> int:
        """Write rows k0 … of a layer as they are stored."""
        layer = reader.layer
        words = reader.rows(k0, rows, self.buffers)
        B = self.buffers.array("B", (rows // TILE_K, layer.B.shape[1]), np.int32)
        self.packer.pack(words, B, layer.bits)
        self._require_none(layer, code_difference(B, words, k0, layer.bits))
        self.shards.write(layer.B.name, B, k0 // TILE_K * layer.B.shape[1] * 4)
        return B.nbytes

    def _write_columns(self, reader: LayerReader, n0: int, columns: int) -> int:
        """Write columns n0 …, all rows of them: with act-order, any row may come from anywhere.

        A strip of them is read at a time where the source has a column's codes together, else all at once.
        """
        layer, bits = reader.layer, reader.layer.bits
        order = reader.order.columns(n0, columns)
        panel = None if layer.source.by_columns else reader.columns(n0, columns, self.buffers)
        B = self.buffers.array("B columns", (layer.stored_K // TILE_K, columns * bits // 2), np.int32)
        filled = order.rows // TILE_K
        for n, width in strips(layer, columns):
            words = reader.columns(n0 + n, width, self.buffers) if panel is None else panel[:, n : n + width]
            part = B[:, n * bits // 2 :][:, : width * bits // 2]
            strip = order.columns(n, width)
            self.packer.pack_sorted(words, part[:filled], bits, perm=strip.perm, fill=strip.fill, rows=strip.rows)
            part[filled:] = 0
            self._require_none(layer, order_difference(part, words, strip, bits, n0 + n))
        self.shards.write_columns(layer.B.name, B, n0 * bits // 2)
        return B.nbytes

    def _write_groups(self, reader: LayerReader) -> int:
        """Write scales and zero points, strip by strip, and the order of rows."""
        layer, written, equal = reader.layer, 0, True
        for first, count in group_strips(layer.stored_G, layer.stored_N):
            groups = reader.stored_groups(first, count)
            s = permute_scales(groups.scales, layer.stored_G)
            again = unpermute_scales(s, layer.stored_G)
            equal = equal and np.array_equal(again.view(np.uint16), groups.scales.view(np.uint16))
            self.shards.write(layer.s.name, s, first * layer.stored_N * s.itemsize)
            written += s.nbytes
            if layer.marlin_qzeros is not None and groups.zeros is not None:
                qzeros = pack_zeros(groups.zeros, layer.bits)
                equal = equal and np.array_equal(unpack_zeros(qzeros, layer.bits), groups.zeros)
                self.shards.write(layer.marlin_qzeros.name, qzeros, first * qzeros.shape[1] * 4)
                written += qzeros.nbytes
        if layer.marlin_perm is not None and reader.perm is not None:
            self.shards.write(layer.marlin_perm.name, reader.perm)
            written += reader.perm.nbytes
        if not equal:
            raise went_wrong(layer.name, "permuting the scales went wrong")
        return written

    @staticmethod
    def _require_none(layer: Layer, problem: str | None) -> None:
        if problem:
            raise went_wrong(layer.name, f"repacking went wrong ({problem})")
