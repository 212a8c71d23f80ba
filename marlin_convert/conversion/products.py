"""Random activations through a layer twice: its GPTQ and its Marlin tensors, on a CPU and on a GPU."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..device import Device
from ..formats.bf16 import widened
from ..formats.gptq import weights
from ..formats.layout import TILE_K, pack_factor, pack_zeros, zero_point
from ..native import cpu_weights
from .blocks import STRIP_ELEMENTS
from .layer import Layer
from .layer_reader import Groups

#: Rows of random activations for each layer on a CPU.
CPU_ROWS = 4

#: Rows in each of the products on a GPU: one token, a small batch, and one that takes another path of the kernel.
CUDA_ROWS = (1, 16, 128)

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


class Product(Protocol):
    """Computes one layer's outputs twice, from its GPTQ and its Marlin tensors, fed in blocks of rows."""

    def add_source(self, k0: int, qweight: I32) -> None:
        """Take the source's rows k0 … of the layer: `qweight` [kb bits/32, N]."""

    def add_stored(self, k0: int, B: I32) -> None:
        """Take the stored rows k0 … of the layer: `B` [kb/16, N' bits/2]."""

    def errors(self) -> tuple[float, float]:
        """Return (largest absolute error, relative error) of Marlin's product against the reference."""


@dataclass(frozen=True)
class LayerGroups:
    """Where a product gets a layer's scales and zero points from: some groups at a time, of which the first and the
    count are given, the source's as it has them, the stored ones as they are stored (`s`, and zero points unpacked)."""

    source: Callable[[int, int], Groups]
    stored: Callable[[int, int], Groups]


def product_for(device: Device, layer: Layer, groups: LayerGroups, g_idx: I32 | None, perm: I32 | None) -> Product:
    """Return a device's way of multiplying: the one place where it is chosen. `g_idx` is the GPTQ layer's, `perm` the
    stored one, both None without act-order."""
    kind = CPUProduct if device.kind == "cpu" else partial(CUDAProduct, device)
    return kind(layer, groups, g_idx, perm)


def product_device(device: Device) -> str:
    """Return where `product_for` computes, as the report names it."""
    return str(device) if device.kind == "cpu" else f"{device} ({device.name})"


class CPUProduct:
    """The CPU's product, accumulated block by block in fp32 over weights rounded to fp16 (bf16 where the scales are),
    as the definition says."""

    #: Groups x columns of a layer with act-order whose scales and zero points are kept, not read again for each block.
    KEPT = 1 << 23

    def __init__(self, layer: Layer, groups: LayerGroups, g_idx: I32 | None, perm: I32 | None) -> None:
        self.layer, self.groups, self.g_idx = layer, groups, g_idx
        self.x = activations(layer, CPU_ROWS)
        self.reference = np.zeros((CPU_ROWS, layer.N), np.float32)
        self.result = np.zeros((CPU_ROWS, layer.stored_N), np.float32)
        self.sorted_x = np.zeros((CPU_ROWS, layer.stored_K), np.float32)
        self.sorted_x[:, : layer.K] = self.x if perm is None else self.x[:, perm]
        #: Whether the source's rows, too, come in whole tiles and groups, which the native code multiplies.
        self.regular = not layer.act_order and (layer.stored_K, layer.stored_N) == (layer.K, layer.N)
        self.regular = self.regular and layer.group_rows * layer.G == layer.K and layer.group_rows % TILE_K == 0
        self.kept = None if g_idx is None or layer.G * layer.N > self.KEPT else groups.source(0, layer.G)

    def add_source(self, k0: int, qweight: I32) -> None:
        layer = self.layer
        rows = len(qweight) * pack_factor(layer.bits)
        if self.regular:
            size = layer.group_rows
            first, last = k0 // size, (k0 + rows - 1) // size
            source = self.groups.source(first, last - first + 1)
            cpu_weights.matmul_gptq(
                np.ascontiguousarray(self.x[:, first * size : (last + 1) * size]), qweight, source.scales,
                self.reference, bits=layer.bits, zeros=source.zeros, k0=k0 - first * size, rows_per_group=size,
            )  # fmt: skip
            return
        words = max(1, STRIP_ELEMENTS // (layer.N * pack_factor(layer.bits)))  # rows of words at a time
        for at in range(0, len(qweight), words):
            part, begin = qweight[at : at + words], k0 + at * pack_factor(layer.bits)
            end = begin + len(part) * pack_factor(layer.bits)
            source, groups = self._source_groups(begin, end)
            weight = widened(weights(part, source.scales, source.zeros, groups, layer.bits))
            self.reference += self.x[:, begin:end] @ weight

    def _source_groups(self, begin: int, end: int) -> tuple[Groups, npt.NDArray[np.intp]]:
        """Return groups that hold the groups of the source's rows `begin` to `end`, and which of them each row has."""
        if self.g_idx is None:
            groups = np.arange(begin, end) // self.layer.group_rows
            first = int(groups[0])
            return self.groups.source(first, int(groups[-1]) - first + 1), groups - first
        present, groups = np.unique(self.g_idx[begin:end], return_inverse=True)
        if self.kept is not None:
            zeros = None if self.kept.zeros is None else self.kept.zeros[present]
            return Groups(self.kept.scales[present], zeros), groups
        rows = [self.groups.source(int(group), 1) for group in present]
        all_zeros = [row.zeros for row in rows if row.zeros is not None]
        scales = np.concatenate([row.scales for row in rows])
        return Groups(scales, np.concatenate(all_zeros) if all_zeros else None), groups

    def add_stored(self, k0: int, B: I32) -> None:
        layer, size = self.layer, self.layer.rows_per_group
        first, last = k0 // size, (k0 + B.shape[0] * TILE_K - 1) // size
        if first == last and layer.stored_G > 1:  # a single group would be taken for the layer's only one
            first, last = (first, last + 1) if first == 0 else (first - 1, last)
        stored = self.groups.stored(first, last - first + 1)
        cpu_weights.matmul_marlin(
            np.ascontiguousarray(self.sorted_x[:, first * size : (last + 1) * size]), B, stored.scales, self.result,
            bits=layer.bits, zeros=stored.zeros, k0=k0 - first * size, rows_per_group=size,
        )  # fmt: skip

    def errors(self) -> tuple[float, float]:
        return compare(self.result[:, : self.layer.N], self.reference)


class CUDAProduct:
    """The bundled kernel's product on a GPU, in fp16 (bf16 where the scales are), against the definition in float64.

    The reference is computed from the GPTQ words by plain torch operations, and never sees `B` or the kernels.
    """

    def __init__(self, device: Device, layer: Layer, groups: LayerGroups, g_idx: I32 | None, perm: I32 | None) -> None:
        import torch

        from ..native import cuda

        self.layer, self.device = layer, cuda.torch_device(device)
        source, stored = groups.source(0, layer.G), groups.stored(0, layer.stored_G)
        bf16 = source.scales.dtype == np.uint16
        self.dtype = torch.bfloat16 if bf16 else torch.float16
        qzeros = None if stored.zeros is None else pack_zeros(stored.zeros, layer.bits)
        self.s = self._tensor(stored.scales, bf16)
        self.qzeros, self.perm = (None if x is None else self._tensor(x) for x in (qzeros, perm))
        self.scales = self._tensor(source.scales, bf16)
        self.zeros = None if source.zeros is None else self._tensor(source.zeros).to(self.dtype)
        rows = np.arange(layer.K) // layer.group_rows if g_idx is None else g_idx
        self.groups = self._tensor(rows.astype(np.int64))
        x = torch.from_numpy(activations(layer, sum(CUDA_ROWS))).to(self.device)
        self.x = x.to(self.dtype)
        self.B = torch.empty(layer.B.shape, dtype=torch.int32, device=self.device)
        self.reference = torch.zeros((sum(CUDA_ROWS), layer.N), dtype=torch.float64, device=self.device)

    def _tensor(self, array: npt.NDArray[Any], bf16: bool = False) -> Any:
        import torch

        if bf16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self.device)
        return torch.from_numpy(array).to(self.device)

    def add_source(self, k0: int, qweight: I32) -> None:
        import torch

        from ..native import reference

        codes = reference.unpack_gptq(torch.from_numpy(qweight).to(self.device), self.layer.bits)
        groups = self.groups[k0 : k0 + codes.shape[0]]
        zeros = zero_point(self.layer.bits) if self.zeros is None else self.zeros[groups]
        weight = (codes.to(self.dtype) - zeros) * self.scales[groups]  # rounded once: the difference is exact
        self.reference += self.x[:, k0 : k0 + codes.shape[0]].double() @ weight.double()

    def add_stored(self, k0: int, B: I32) -> None:
        import torch

        self.B[k0 // TILE_K : k0 // TILE_K + B.shape[0]] = torch.from_numpy(B)

    def errors(self) -> tuple[float, float]:
        from ..native import cuda

        worst, first = (0.0, 0.0), 0
        extended: dict[str, Any] = {}
        if self.layer.extended:
            extended = {
                "zeros": self.qzeros, "perm": self.perm, "bits": self.layer.bits,
                "in_features": self.layer.K, "out_features": self.layer.N,
            }  # fmt: skip
        for rows in CUDA_ROWS:
            result = cuda.gemm(self.x[first : first + rows], self.B, self.s, **extended)
            found = compare(result.float().cpu().numpy(), self.reference[first : first + rows].cpu().numpy())
            worst, first = (float(np.max([worst[0], found[0]])), float(np.max([worst[1], found[1]]))), first + rows
        return worst


def activations(layer: Layer, rows: int) -> F32:
    """Return random normal activations [rows, K], representable in fp16; the same for the same layer on every run."""
    generator = np.random.default_rng(zlib.crc32(layer.name.encode()))
    return generator.standard_normal((rows, layer.K), np.float32).astype(np.float16).astype(np.float32)


def compare(result: npt.NDArray[Any], reference: npt.NDArray[Any]) -> tuple[float, float]:
    """Return (max |result - reference|, ‖result - reference‖ / ‖reference‖), in float64; a zero reference counts as
    norm 1."""
    wide = reference.astype(np.float64)
    difference = result.astype(np.float64) - wide
    # Not np.linalg.norm: it wakes BLAS's own threads, which then spin beside ours.
    norm, distance = (float(np.sqrt(np.square(v).sum())) for v in (wide, difference))
    return float(np.abs(difference).max()), distance / (norm or 1.0)
