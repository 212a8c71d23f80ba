"""vLLM's linear layers from Marlin layers of a checkpoint: computed by our kernel, or by vLLM's own.

For vLLM's kernel, fp16 scales are cast to the activations' dtype, as vLLM does for GPTQ; ours takes them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from . import tensor_parallel as shards
from . import vllm_calls as calls
from . import vllm_choice as choice
from .serving_linear import Product, ServedLinear
from .tensor_parallel import Piece
from .vllm_config import CheckpointConfig


class MarlinCheckpointMethod(ServedLinear, LinearMethodBase):  # type: ignore[misc]
    """One linear layer of vLLM, whose columns come from layers of the checkpoint."""

    ENGINE = "vLLM"

    def __init__(self, config: CheckpointConfig, prefix: str, names: Iterable[str] = ()) -> None:
        """Take `names`, the layers of the checkpoint that are known to belong to it. Raises ValueError for those that
        no kernel computes."""
        super().__init__(config, prefix)
        choice.say()
        choice.check_invariance(prefix, choice.kernel().ours)
        for name in names:
            settings = config.layer(name)
            choice.is_ours(name, settings.bits, not settings.sym, settings.group_size)

    def rank(self, layer: Any) -> int:
        return calls.rank(layer)

    def invariant(self) -> bool:
        return choice.batch_invariant()

    def rank_piece(self, piece: Piece, first: int) -> Piece:
        cut = self.rank_K != self.all_K
        if cut and choice.not_ours() and piece.G > 1 and not shards.cuts_whole_groups(piece, first, self.rank_K):
            why = "it has act-order" if piece.perm is not None else f"they cut through its {piece.G} groups"
            raise ValueError(
                f"{self.prefix}: rows {first} to {first + self.rank_K} of {piece.K}, of this rank, become groups of 16 "
                f"({why}), which vLLM's Marlin kernel does not have; marlin-convert's are not used: {choice.not_ours()}"
            )
        own_rows = super().rank_piece(piece, first)
        return (
            own_rows if choice.piece_is_ours(self.prefix, own_rows) else choice.cast(self.prefix, own_rows, self.dtype)
        )

    def product(self, number: int, piece: Piece) -> Product:
        kind = calls.TYPES.get((piece.bits, piece.zeros is not None))
        return super().product(number, piece)._replace(ours=choice.piece_is_ours(self.prefix, piece), type=kind)

    def tensors(self, product: Product, piece: Piece, bias: Tensor | None) -> dict[str, Tensor | None]:
        found = super().tensors(product, piece, bias)
        if not product.ours:
            if bias is not None:
                found["bias"] = calls.kernel_bias(bias, piece.stored_N)
            if piece.zeros is None:
                found["zeros"] = torch.empty(0, dtype=torch.int32, device=piece.weight.device)
        return found

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        layer.qweight = layer.marlin0_weight  # vLLM looks here for the device of the layer's weights
        if not all(product.ours for product in self.products):
            device = layer.marlin0_weight.device
            self.workspace = calls.make_workspace(device)
            self.nothing = torch.empty(0, dtype=torch.int32, device=device)

    def compute(self, layer: Any, x: Tensor, product: Product, add_bias: bool) -> Tensor:
        return (self.our_product if product.ours else self._product)(layer, x, product, add_bias)

    def _product(self, layer: Any, x: Tensor, product: Product, add_bias: bool) -> Tensor:
        """Compute by vLLM's Marlin kernel: sizes as stored, act-order and padding around it."""
        rows = x.index_select(-1, getattr(layer, f"marlin{product.number}_perm")) if product.sorted else x
        if product.stored_K != product.K:
            rows = nn.functional.pad(rows, (0, product.stored_K - product.K))
        y: Tensor = calls.multiply(
            input=rows,
            weight=getattr(layer, f"marlin{product.number}_weight"),
            weight_scale=getattr(layer, f"marlin{product.number}_scales"),
            weight_zp=getattr(layer, f"marlin{product.number}_zeros"),
            workspace=self.workspace,
            wtype=product.type,
            output_size_per_partition=product.stored_N,
            input_size_per_partition=product.stored_K,
            bias=getattr(layer, f"marlin{product.number}_bias") if add_bias else None,
            **calls.without_order(self.nothing),
        )
        return y[..., : product.N] if product.stored_N != product.N else y
