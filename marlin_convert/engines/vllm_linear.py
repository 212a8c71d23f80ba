"""vLLM's linear layers from Marlin layers of a checkpoint: columns as marks say them, one or more products.

For vLLM's kernel, fp16 scales are cast to the activations' dtype, as vLLM does for GPTQ; ours takes them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from . import linear as _linear  # noqa: F401 - it defines the operator that computes on our kernels
from . import tensor_parallel as shards
from . import vllm_calls as calls
from . import vllm_choice as choice
from .column_marks import NOTHING, Arriving, Marks
from .tensor_parallel import Piece
from .vllm_config import CheckpointConfig


class _Product(NamedTuple):
    """One call of a kernel: the number in its tensors' names, and what the call needs beside them."""

    number: int
    ours: bool
    bits: int
    type: Any  # vLLM's scalar type of the codes
    K: int  # of the activations
    stored_K: int
    N: int
    stored_N: int
    sorted: bool  # act-order
    spread: bool  # rows of zeros between others, see `tensor_parallel.rows`


class MarlinCheckpointMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer of vLLM, whose columns come from layers of the checkpoint."""

    def __init__(self, config: CheckpointConfig, prefix: str, names: Iterable[str] = ()) -> None:
        """Take `names`, the layers of the checkpoint that are known to belong to it. Raises ValueError for those that
        no kernel computes."""
        self.config, self.prefix = config, prefix
        self.pieces: list[Piece] = []
        choice.say()
        choice.check_invariance(prefix, choice.kernel().ours)
        for name in names:
            settings = config.layer(name)
            choice.is_ours(name, settings.bits, not settings.sym, settings.group_size)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., Any] | None = None,
        **_: Any,
    ) -> None:
        """Register a list of columns, for vLLM's loader to fill with marks as if it were the weight."""
        self.own_K, self.all_K, self.dtype = input_size_per_partition, input_size, params_dtype
        self.device = torch.get_default_device()
        marks = torch.full((sum(output_partition_sizes), 1), NOTHING, dtype=torch.int64, device="cpu")
        parameter: Any = nn.Parameter(marks, requires_grad=False)
        way: Callable[..., Any] = weight_loader or layer.weight_loader
        given: list[Tensor] = []

        def load(param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
            if not isinstance(loaded_weight, Marks):
                raise ValueError(f"{self.prefix}: vLLM computes it as one layer, and a part of it is not quantized")
            self._arriving.asked(loaded_weight)
            given.append(loaded_weight)
            way(param, loaded_weight, *args, **kwargs)
            if bool((param.data >= 0).all()):
                self._cut(layer, param.data, given[-1])

        parameter.output_dim, parameter.weight_loader = 0, load
        layer.register_parameter("weight", parameter)

    @property
    def _arriving(self) -> Arriving:
        if self.config.arriving is None:
            raise ValueError(f"{self.prefix}: its weights can be loaded once only; start vLLM again to load others")
        return self.config.arriving

    def _cut(self, layer: Any, marks: Tensor, given: Tensor | None = None) -> None:
        """Take this rank's columns and rows."""
        pieces = self._arriving.pieces(self.prefix, marks, self.device, given)
        first = calls.rank(layer) * self.own_K if self.own_K != self.all_K else 0
        self.pieces = []
        for piece in pieces:
            if self.all_K != piece.K:
                raise ValueError(f"{self.prefix}: it has {piece.K} rows, the model {self.all_K}")
            own = piece if self.own_K == self.all_K else self._rows(piece, first)
            self.pieces.append(
                own if choice.piece_is_ours(self.prefix, own) else choice.cast(self.prefix, own, self.dtype)
            )

    def _rows(self, piece: Piece, first: int) -> Piece:
        if choice.not_ours() and piece.G > 1 and not shards.cuts_whole_groups(piece, first, self.own_K):
            why = "it has act-order" if piece.perm is not None else f"they cut through its {piece.G} groups"
            raise ValueError(
                f"{self.prefix}: rows {first} to {first + self.own_K} of {piece.K}, of this rank, become groups of 16 "
                f"({why}), which vLLM's Marlin kernel does not have; marlin-convert's are not used: {choice.not_ours()}"
            )
        return shards.rows(piece, first, self.own_K)

    def finish(self, layer: Any) -> None:
        """Cut what a loader of the model's own has filled. Raises ValueError for columns that have not come."""
        if not self.pieces:
            self._cut(layer, layer.weight.data)
        del layer.weight

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what one call of a kernel can do; nothing is repacked."""
        if not self.pieces:
            raise ValueError(f"{self.prefix}: its weights have not been loaded")
        pieces, self.pieces = self.pieces, []
        bias, products, column = getattr(layer, "bias", None), [], 0
        for number, piece in enumerate(shards.join(pieces)):
            device, ours = piece.weight.device, choice.piece_is_ours(self.prefix, piece)
            own = None if bias is None else bias.data[column : column + piece.N].clone()
            if own is not None and not ours:
                own = calls.kernel_bias(own, piece.stored_N)
            zeros = piece.zeros
            if zeros is None and not ours:
                zeros = torch.empty(0, dtype=torch.int32, device=device)
            tensors = {"weight": piece.weight, "scales": piece.scales, "zeros": zeros, "perm": piece.perm, "bias": own}
            for what, tensor in tensors.items():
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"marlin{number}_{what}", value)
            kind = calls.TYPES.get((piece.bits, piece.zeros is not None))
            sizes = (piece.K, piece.stored_K, piece.N, piece.stored_N)
            sort = piece.perm is not None
            spread = piece.perm is not None and piece.perm.numel() != piece.K
            products.append(_Product(number, ours, piece.bits, kind, *sizes, sort, spread))
            column += piece.N
        self.products = tuple(products)
        layer.qweight = layer.marlin0_weight  # vLLM looks here for the device of the layer's weights
        if not all(product.ours for product in products):
            self.workspace = calls.make_workspace(pieces[0].weight.device)
            self.nothing = torch.empty(0, dtype=torch.int32, device=pieces[0].weight.device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Turn x [..., K] of this rank into [..., N of this rank]."""
        results = [
            (self._our_product if product.ours else self._product)(layer, x, product, bias is not None)
            for product in self.products
        ]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def _our_product(self, layer: Any, x: Tensor, product: _Product, add_bias: bool) -> Tensor:
        """Compute by our operator: it takes a layer as stored, and chooses its way by the rows that come when it
        runs."""
        tensors = [getattr(layer, f"marlin{product.number}_{w}") for w in ("weight", "scales", "bias", "zeros", "perm")]
        weight, scales, bias, zeros, perm = tensors
        K = product.K
        if product.spread:
            x, perm, K = x.index_select(-1, perm), None, product.stored_K
        y: Tensor = torch.ops.marlin_convert.linear(
            x, weight, scales, bias if add_bias else None, zeros, perm, product.bits, K, product.N,
            choice.batch_invariant() or None,
        )  # fmt: skip
        return y

    def _product(self, layer: Any, x: Tensor, product: _Product, add_bias: bool) -> Tensor:
        """Compute by vLLM's Marlin kernel: sizes as stored, act-order and padding around it."""
        own = x.index_select(-1, getattr(layer, f"marlin{product.number}_perm")) if product.sorted else x
        if product.stored_K != product.K:
            own = nn.functional.pad(own, (0, product.stored_K - product.K))
        y: Tensor = calls.multiply(
            input=own,
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
