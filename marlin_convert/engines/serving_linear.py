"""Linear layers of an engine that serves Marlin checkpoints: their columns as marks say them, as one or more products.

What its methods have in common. Our operator computes them as stored: nothing is repacked, scales keep their dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import linear as _linear  # noqa: F401 - it defines the operator that computes on our kernels
from . import tensor_parallel as shards
from .column_marks import NOTHING, Arriving, Marks
from .serving_config import ServedCheckpoint
from .tensor_parallel import Piece

#: Some engines load from several threads at once; what waits in `Arriving` is everybody's.
LOADING = RLock()


class Product(NamedTuple):
    """One call of a kernel: the number in its tensors' names, and what the call needs beside them."""

    number: int
    bits: int
    K: int  # of the activations
    stored_K: int
    N: int
    stored_N: int
    sorted: bool  # act-order
    spread: bool  # rows of zeros between others, see `tensor_parallel.rows`
    ours: bool = True  # and not the engine's own kernel's
    type: Any = None  # the engine's name of the codes


class ServedLinear:
    """One linear layer of the engine, whose columns come from layers of the checkpoint."""

    ENGINE: ClassVar[str]  # as messages call it

    def __init__(self, config: ServedCheckpoint, prefix: str) -> None:
        self.config, self.prefix = config, prefix
        self.pieces: list[Piece] = []
        self.products: tuple[Product, ...] = ()
        self.sources: set[str] = set()  # the layers of the checkpoint whose columns it has

    def rank(self, layer: Any) -> int:
        """Return this process's rank in the layer's tensor parallelism."""
        raise NotImplementedError

    def invariant(self) -> bool:
        """Return whether the engine promises results that do not depend on the number of rows."""
        raise NotImplementedError

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
        """Register a list of columns, for the engine's loader to fill with marks as if it were the weight."""
        self.rank_K, self.all_K, self.dtype = input_size_per_partition, input_size, params_dtype
        self.device = torch.get_default_device()
        marks = torch.full((sum(output_partition_sizes), 1), NOTHING, dtype=torch.int64, device="cpu")
        parameter: Any = nn.Parameter(marks, requires_grad=False)
        loader: Callable[..., Any] = weight_loader or layer.weight_loader
        given: list[Tensor] = []

        def load(param: Any, loaded_weight: Tensor, *args: Any, **kwargs: Any) -> None:
            if not isinstance(loaded_weight, Marks):
                raise ValueError(
                    f"{self.prefix}: {self.ENGINE} computes it as one layer, and a part of it is not quantized"
                )
            with LOADING:
                self._arriving.asked(loaded_weight)
                given.append(loaded_weight)
                loader(param, loaded_weight, *args, **kwargs)
                if bool((param.data >= 0).all()):
                    self._cut(layer, param.data, given[-1])

        parameter.output_dim, parameter.weight_loader = 0, load
        layer.register_parameter("weight", parameter)

    @property
    def _arriving(self) -> Arriving:
        if self.config.arriving is None:
            raise ValueError(
                f"{self.prefix}: its weights can be loaded once only; start {self.ENGINE} again to load others"
            )
        return self.config.arriving

    def _cut(self, layer: Any, marks: Tensor, given: Tensor | None = None) -> None:
        """Take this rank's columns and rows."""
        pieces = self._arriving.pieces(self.prefix, marks, self.device, given)
        self.sources = self._arriving.sources(marks)
        first = self.rank(layer) * self.rank_K if self.rank_K != self.all_K else 0
        self.pieces = []
        for piece in pieces:
            if self.all_K != piece.K:
                raise ValueError(f"{self.prefix}: it has {piece.K} rows, the model {self.all_K}")
            self.pieces.append(self.rank_piece(piece, first))

    def rank_piece(self, piece: Piece, first: int) -> Piece:
        """Return this rank's rows, from `first` on, as a kernel takes them."""
        return piece if self.rank_K == self.all_K else shards.rows(piece, first, self.rank_K)

    def finish(self, layer: Any) -> None:
        """Cut what a loader of the model's own has filled. Raises ValueError for columns that have not come."""
        if not self.pieces:
            self._cut(layer, layer.weight.data)
        del layer.weight

    def product(self, number: int, piece: Piece) -> Product:
        """Return how the piece is computed."""
        sort = piece.perm is not None
        spread = piece.perm is not None and piece.perm.numel() != piece.K
        return Product(number, piece.bits, piece.K, piece.stored_K, piece.N, piece.stored_N, sort, spread)

    def tensors(self, product: Product, piece: Piece, bias: Tensor | None) -> dict[str, Tensor | None]:
        """Return what is registered for a product, by the ends of the names."""
        return {
            "weight": piece.weight, "scales": piece.scales, "zeros": piece.zeros, "perm": piece.perm, "bias": bias,
        }  # fmt: skip

    def process_weights_after_loading(self, layer: Any) -> None:
        """Join what one call of a kernel can do; nothing is repacked."""
        if not self.pieces:
            raise ValueError(f"{self.prefix}: its weights have not been loaded")
        pieces, self.pieces = self.pieces, []
        bias, products, column = getattr(layer, "bias", None), [], 0
        for number, piece in enumerate(shards.join(pieces)):
            product = self.product(number, piece)
            piece_bias = None if bias is None else bias.data[column : column + piece.N].clone()
            for what, tensor in self.tensors(product, piece, piece_bias).items():
                value = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                layer.register_parameter(f"marlin{number}_{what}", value)
            products.append(product)
            column += piece.N
        self.products = tuple(products)

    def compute(self, layer: Any, x: Tensor, product: Product, add_bias: bool) -> Tensor:
        """Turn x [..., K] of this rank into [..., N] of one product."""
        return self.our_product(layer, x, product, add_bias)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Turn x [..., K] of this rank into [..., N of this rank]."""
        results = [self.compute(layer, x, product, bias is not None) for product in self.products]
        return results[0] if len(results) == 1 else torch.cat(results, -1)

    def our_product(self, layer: Any, x: Tensor, product: Product, add_bias: bool) -> Tensor:
        """Compute by our operator: it takes a layer as stored, and chooses its way by the rows that come when it
        runs."""
        tensors = [getattr(layer, f"marlin{product.number}_{w}") for w in ("weight", "scales", "bias", "zeros", "perm")]
        weight, scales, bias, zeros, perm = tensors
        K = product.K
        if product.spread:
            x, perm, K = x.index_select(-1, perm), None, product.stored_K
        y: Tensor = torch.ops.marlin_convert.linear(
            x, weight, scales, bias if add_bias else None, zeros, perm, product.bits, K, product.N,
            self.invariant() or None,
        )  # fmt: skip
        return y
