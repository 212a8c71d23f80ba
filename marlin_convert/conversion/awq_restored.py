"""A Marlin layer that becomes one of AWQ again, in the layout that it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..checkpoint.writer import OutTensor, Shards
from ..formats import awq
from ..formats.layout import TILE_K, TILE_N, permute_scales
from ..native import cpu
from .blocks import Buffers
from .restored import NUMPY, RestoredGroups, RestoredLayer
from .source_layer import Words


@dataclass(frozen=True)
class RestoredAWQ(RestoredLayer):
    """A Marlin layer that becomes one of AWQ's; `width` is that of gemv's `qzeros`."""

    width: int

    def fits(self) -> bool:
        """Tell whether the layout can hold the layer."""
        return self.N % awq.PER_WORD == 0 and self.K % awq.PER_WORD == 0

    @property
    def out(self) -> dict[str, OutTensor]:
        return {
            "qweight": self.tensor("qweight", "I32", self.K, self.N // awq.PER_WORD),
            "qzeros": self.tensor("qzeros", "I32", self.G, self.N // awq.PER_WORD),
            "scales": self.tensor("scales", self.scales_dtype, self.G, self.N),
        }

    def write_rows(self, shards: Shards, k0: int, words: Words, buffers: Buffers) -> int:
        shape = (len(words) * awq.PER_WORD, self.N // awq.PER_WORD)
        packed = cpu.gptq_to_awq(words, buffers.array("awq", shape, np.int32))
        shards.write(f"{self.name}.qweight", packed, k0 * packed.shape[1] * 4)
        return packed.nbytes

    def write_columns(self, shards: Shards, n0: int, words: Words, buffers: Buffers) -> int:
        raise NotImplementedError("its rows are written")

    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        written = 0
        for strip in groups:
            for part, array in (("scales", strip.scales), ("qzeros", awq.words(strip.zeros))):
                shards.write(f"{self.name}.{part}", array, strip.first * array.shape[1] * array.itemsize)
                written += array.nbytes
        return written

    def write_order(self, shards: Shards, g_idx: npt.NDArray[np.int32]) -> int:
        return 0


class RestoredGEMV(RestoredAWQ):
    """One of the layout gemv."""

    by_columns = True

    def fits(self) -> bool:
        return self.K % awq.PER_WORD == 0 and self.width * awq.PER_WORD >= self.G

    @property
    def out(self) -> dict[str, OutTensor]:
        return {
            "qweight": self.tensor("qweight", "I32", self.N, self.K // awq.PER_WORD),
            "qzeros": self.tensor("qzeros", "I32", self.N, self.width),
            "scales": self.tensor("scales", self.scales_dtype, self.N, self.width * awq.PER_WORD),
        }

    def write_columns(self, shards: Shards, n0: int, words: Words, buffers: Buffers) -> int:
        packed: Words = buffers.array("awq", (words.shape[1], len(words)), np.int32)
        shards.write(f"{self.name}.qweight", cpu.transpose(words, packed), n0 * packed.shape[1] * 4)
        return packed.nbytes

    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        scales = np.zeros((self.N, self.width * awq.PER_WORD), NUMPY[self.scales_dtype])
        zeros = np.zeros((self.G, self.N), np.uint8)
        for strip in groups:
            scales[:, strip.first : strip.first + len(strip.scales)] = strip.scales.T
            zeros[strip.first : strip.first + len(strip.zeros)] = strip.zeros
        qzeros = awq.gemv_zero_words(zeros, self.width)
        shards.write(f"{self.name}.scales", scales)
        shards.write(f"{self.name}.qzeros", qzeros)
        return scales.nbytes + qzeros.nbytes


class RestoredTiles(RestoredAWQ):
    """One of AutoAWQ's layout marlin."""

    def fits(self) -> bool:
        return self.K % TILE_K == 0 and self.N % TILE_N == 0 and self.stored.zeros is None

    @property
    def out(self) -> dict[str, OutTensor]:
        return {
            "qweight": self.tensor("qweight", "I32", self.K // TILE_K, self.N * 2),
            "scales": self.tensor("scales", self.scales_dtype, self.G, self.N),
        }

    def write_rows(self, shards: Shards, k0: int, words: Words, buffers: Buffers) -> int:
        B = cpu.pack(words)
        shards.write(f"{self.name}.qweight", B, k0 * self.N // 2)
        return B.nbytes

    def write_groups(self, shards: Shards, groups: Iterator[RestoredGroups]) -> int:
        written = 0
        for strip in groups:
            s = permute_scales(strip.scales, self.G)
            shards.write(f"{self.name}.scales", s, strip.first * self.N * s.itemsize)
            written += s.nbytes
        return written


#: What a layer becomes, by its layout.
RESTORED: dict[str, type[RestoredAWQ]] = {"gemm": RestoredAWQ, "gemv": RestoredGEMV, "marlin": RestoredTiles}
