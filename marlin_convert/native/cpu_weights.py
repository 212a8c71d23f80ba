"""Weights as numbers, on the CPU: decoded and multiplied, from GPTQ's words or Marlin's tiles, on numpy arrays.

What `cpu` says of types, shapes, errors and of the two that may do the work holds here as well.
"""

from __future__ import annotations

import ctypes
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..formats import layout
from ._checks import (
    Float32Array,
    Int32Array,
    ScaleArray,
    check_groups,
    check_product,
    gptq_size,
    marlin_size,
    pointer,
    to_numpy,
    to_torch,
)
from ._cpu_library import LayerArguments, Native, choose

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Block:
    """Rows k0 .. k0 + k of a layer, packed as GPTQ's words or Marlin's tiles; scales and zero points [G, N] are the
    whole layer's."""

    packing: str  # "gptq" or "marlin", as in the library's names of functions
    weights: Int32Array
    scales: ScaleArray
    zeros: NDArray[np.uint8] | None
    bits: int
    k0: int
    k: int
    rows_per_group: int

    def arguments(self) -> LayerArguments:
        G, N = self.scales.shape
        return LayerArguments(
            pointer(self.weights), pointer(self.scales), None if self.zeros is None else pointer(self.zeros),
            self.k0, self.k, N, G, self.rows_per_group, self.bits, self.scales.dtype == np.uint16,
        )  # fmt: skip

    def dequantized(self) -> Tensor:
        """Return W [k, N] by the twin, in the type of the scales."""
        import torch

        from . import reference

        bf16 = self.scales.dtype == np.uint16
        scales = to_torch(self.scales.view(np.int16)).view(torch.bfloat16 if bf16 else torch.float16)
        if self.packing == "gptq":
            codes = reference.unpack_gptq(to_torch(self.weights), self.bits)
        else:
            codes = reference.unpack_marlin(to_torch(self.weights), self.bits)
            scales = reference.unpermute_scales(scales)
        zeros = None if self.zeros is None else self._of_each_row(to_torch(self.zeros))
        return reference.dequantize(codes, self._of_each_row(scales), zeros, bits=self.bits)

    def _of_each_row(self, values: Tensor) -> Tensor:
        """Turn [G, N] into [k, N]: a block may begin or end within a group."""
        return values.repeat_interleave(self.rows_per_group, dim=0)[self.k0 : self.k0 + self.k]


def dequantize_gptq(
    qweight: Int32Array,
    scales: ScaleArray,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> ScaleArray:
    """Return W [K, N] = (code - zero) * scale, rounded once to the type of `scales` [G, N]; G divides K."""
    K, N = gptq_size(qweight, bits)
    G = check_groups(scales, "scales", zeros, K, N)
    return _dequantize(_Block("gptq", qweight, scales, zeros, bits, 0, K, K // G), threads, isa)


def dequantize_marlin(
    B: Int32Array,
    s: ScaleArray,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> ScaleArray:
    """Return W [K, N] of a Marlin layer; `s` [G, N] in Marlin's order of columns, `zeros` in their own."""
    K, N = marlin_size(B, bits)
    G = check_groups(s, "s", zeros, K, N)
    return _dequantize(_Block("marlin", B, s, zeros, bits, 0, K, K // G), threads, isa)


def _dequantize(layer: _Block, threads: int, isa: str | None) -> ScaleArray:
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        out = np.empty((layer.k, layer.scales.shape[1]), layer.scales.dtype)
        function = f"marlin_cpu_dequantize_{layer.packing}"
        backend.call(function, ctypes.byref(layer.arguments()), pointer(out), threads, isa_code)
        return out
    import torch

    W: ScaleArray = to_numpy(layer.dequantized().view(torch.int16)).view(layer.scales.dtype)
    return W


def matmul_gptq(
    x: Float32Array,
    qweight: Int32Array,
    scales: ScaleArray,
    y: Float32Array,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    k0: int = 0,
    rows_per_group: int,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Compute y += x[:, k0 : k0 + kb] @ W_block: the share of a block of rows in a layer's product, in place.

    `qweight` int32 [kb bits/32, N] holds rows k0 .. k0 + kb of the layer; x float32 [M, K], `scales` and `zeros`
    [G, N] are the whole layer's, with G * rows_per_group == K; y is float32 [M, N]. The weights are rounded as by
    `dequantize_gptq`, products and sums are fp32. The result does not depend on `threads`.
    """
    kb, N = gptq_size(qweight, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    check_product(x, scales, "scales", zeros, y, k0, kb, N, rows_per_group)
    _matmul(x, _Block("gptq", qweight, scales, zeros, bits, k0, kb, rows_per_group), y, threads, isa)


def matmul_marlin(
    x: Float32Array,
    B: Int32Array,
    s: ScaleArray,
    y: Float32Array,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    k0: int = 0,
    rows_per_group: int,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """Compute what `matmul_gptq` does, of a block `B` int32 [kb/16, N bits/2] with the layer's `s` [G, N] in Marlin's
    order.

    The native code decodes `B` on its own, and not by way of `unpack`.
    """
    kb, N = marlin_size(B, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    check_product(x, s, "s", zeros, y, k0, kb, N, rows_per_group)
    _matmul(x, _Block("marlin", B, s, zeros, bits, k0, kb, rows_per_group), y, threads, isa)


def _matmul(x: Float32Array, block: _Block, y: Float32Array, threads: int, isa: str | None) -> None:
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        function = f"marlin_cpu_matmul_{block.packing}"
        backend.call(function, pointer(x), *x.shape, ctypes.byref(block.arguments()), pointer(y), threads, isa_code)
        return
    from . import reference

    y += to_numpy(reference.matmul(to_torch(x)[:, block.k0 : block.k0 + block.k], block.dequantized()))
