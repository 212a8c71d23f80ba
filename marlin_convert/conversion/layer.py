"""One quantized linear: what its tensors say about it, where they lie, and what it becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..checkpoint.reader import Tensor
from ..checkpoint.writer import OutTensor
from ..formats.layout import GROUP_SIZES, b_shape, pack_factor, padded_size, stored_group_size, stored_groups
from ..formats.marlin_config import LayerSettings
from .source_layer import SourceLayer

#: The one group size, besides "all of K", that the original format can hold.
GROUP_SIZE = max(GROUP_SIZES)


@dataclass(frozen=True)
class Layer:
    """One quantized linear: what its tensors (`source`) say about it, and what it becomes.

    `group_rows` are the rows that share a scale (K if all do), whatever the config says; the last group may have fewer.
    `extended` tells the format of the result, `stored_scales` the dtype of its scales.
    """

    source: SourceLayer
    bias: Tensor | None
    group_rows: int
    sym: bool = True
    act_order: bool = False
    extended: bool = False
    stored_scales: str = "F16"

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def K(self) -> int:
        return self.source.K

    @property
    def N(self) -> int:
        return self.source.N

    @property
    def G(self) -> int:
        return self.source.G

    @property
    def bits(self) -> int:
        return self.source.bits

    @property
    def by_columns(self) -> bool:
        """Whether it is converted column by column: the source has them together, or any row may come from anywhere."""
        return self.act_order or self.source.by_columns

    @property
    def rows_per_group(self) -> int:
        """Rows of the result that share a scale."""
        return self.stored_K // self.stored_G

    @property
    def group_size(self) -> int:
        """The source's, as a config would say it: -1 for one group over all of K."""
        return -1 if self.G == 1 else self.group_rows

    @property
    def stored_K(self) -> int:
        return padded_size(self.K, self.N)[0] if self.extended else self.K

    @property
    def stored_N(self) -> int:
        return padded_size(self.K, self.N)[1] if self.extended else self.N

    @property
    def stored_group_size(self) -> int:
        """As the result's config says it."""
        return (stored_group_size(self.group_size) or self.group_size) if self.extended else self.group_size

    @property
    def stored_G(self) -> int:
        return stored_groups(self.K, self.stored_group_size) if self.extended else self.G

    @property
    def kind(self) -> str:
        """What distinguishes it beside its size and bits, in words."""
        words = {
            "asymmetric": not self.sym,
            "act-order": self.act_order,
            f"padded to {self.stored_K} x {self.stored_N}": (self.stored_K, self.stored_N) != (self.K, self.N),
        }
        return ", ".join(word for word, applies in words.items() if applies)

    @property
    def settings(self) -> LayerSettings:
        """As the extended format describes it."""
        return LayerSettings(
            bits=self.bits,
            group_size=self.stored_group_size,
            sym=self.sym,
            desc_act=self.act_order,
            in_features=self.K if self.stored_K != self.K else None,
            out_features=self.N if self.stored_N != self.N else None,
            source_group_size=self.group_size if self.stored_group_size != self.group_size else None,
        )

    @property
    def B(self) -> OutTensor:
        shape = b_shape(self.stored_K, self.stored_N, self.bits)
        return OutTensor(self._name("B", "marlin_qweight"), "I32", shape, math.prod(shape) * 4)

    @property
    def s(self) -> OutTensor:
        shape = (self.stored_G, self.stored_N)
        return OutTensor(self._name("s", "marlin_scales"), self.stored_scales, shape, math.prod(shape) * 2)

    @property
    def marlin_qzeros(self) -> OutTensor | None:
        if self.sym:
            return None
        shape = (self.stored_G, self.stored_N // pack_factor(self.bits))
        return OutTensor(f"{self.name}.marlin_qzeros", "I32", shape, math.prod(shape) * 4)

    @property
    def marlin_perm(self) -> OutTensor | None:
        return OutTensor(f"{self.name}.marlin_perm", "I32", (self.K,), self.K * 4) if self.act_order else None

    @property
    def out(self) -> list[OutTensor]:
        """Every tensor that the layer becomes."""
        return [t for t in (self.B, self.s, self.marlin_qzeros, self.marlin_perm) if t is not None]

    def _name(self, original: str, extended: str) -> str:
        return f"{self.name}.{extended if self.extended else original}"
