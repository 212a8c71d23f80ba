"""SGLang's linear layers from Marlin layers of a checkpoint, computed by our kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import Tensor

from .. import engine_support
from ..engine_support import LayerFacts
from .serving_linear import ServedLinear
from .sglang_config import CheckpointConfig, batch_invariant, check_kernels


class MarlinCheckpointMethod(ServedLinear, LinearMethodBase):  # type: ignore[misc]
    """One linear layer of SGLang, whose columns come from layers of the checkpoint."""

    ENGINE = "SGLang"

    def __init__(self, config: CheckpointConfig, prefix: str, names: Iterable[str] = ()) -> None:
        """Take `names`, the layers of the checkpoint that are known to belong to it. Raises ValueError for those that
        SGLang takes apart after loading, and where our kernels cannot run."""
        super().__init__(config, prefix)
        check_kernels(prefix)
        self._invariant = batch_invariant()
        for name in (prefix, *names):
            for fault in engine_support.sglang_refuses([LayerFacts(name, 4, -1)]):
                raise ValueError(f"{name}: this plugin does not run {fault}")

    def rank(self, layer: Any) -> int:
        return int(get_group_rank_size(layer.tp_group)[0])

    def invariant(self) -> bool:
        return self._invariant

    def _cut(self, layer: Any, marks: Tensor, given: Tensor | None = None) -> None:
        """Cut as for any engine; what looks for a plain weight from here on finds none, and not marks."""
        super()._cut(layer, marks, given)
        layer._parameters.pop("weight", None)

    def finish(self, layer: Any) -> None:
        if not self.pieces:
            self._cut(layer, layer.weight.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Turn x [..., K] of this rank into [..., N of this rank]. A bias not the layer's is added behind it."""
        if bias is None or bias is getattr(layer, "bias", None):
            return super().apply(layer, x, bias)
        return super().apply(layer, x) + bias
