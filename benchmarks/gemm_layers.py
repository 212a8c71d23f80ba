"""Random stored layers on the GPU and the CUDA library on them, for benchmarks/gemm.py."""

from __future__ import annotations

import argparse
import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from marlin_convert.native.cuda_library import (
    PRODUCT,
    Plan,
    Weights,
    instances,
)


@dataclass(frozen=True)
class Kind:
    """How the weights of a layer are stored."""

    bits: int
    group_size: int
    zeros: bool = False
    act_order: bool = False

    @classmethod
    def parse(cls, text: str) -> Kind:
        match = re.fullmatch(r"([48]):(16|32|64|128|-1)(z?)(a?)", text)
        if not match:
            raise argparse.ArgumentTypeError(f"{text} is not BITS:GROUP_SIZE with z, a or both, such as 8:32z")
        return cls(int(match[1]), int(match[2]), bool(match[3]), bool(match[4]))

    def __str__(self) -> str:
        return f"{self.bits}:{self.group_size}{'z' * self.zeros}{'a' * self.act_order}"

    @property
    def words(self) -> str:
        groups = "one group" if self.group_size < 0 else f"groups of {self.group_size}"
        return f"{self.bits} bits, {groups}{', zero points' * self.zeros}{', act-order' * self.act_order}"

    def groups(self, k: int) -> int:
        return 1 if self.group_size < 0 else k // self.group_size

    def bytes(self, k: int, n: int) -> int:
        return k * n * self.bits // 8


@dataclass(frozen=True)
class Layer:
    """Random stored weights on the GPU: B [K / 16, N bits / 2], s [G, N] fp16; zeros [G, N bits / 32], perm [K]."""

    kind: Kind
    B: torch.Tensor
    s: torch.Tensor
    zeros: torch.Tensor | None
    perm: torch.Tensor | None
    fields: Weights

    @classmethod
    def random(cls, kind: Kind, k: int, n: int) -> Layer:
        """Weights as if normal ones, of variance 1 / k, had been quantized: how much power a product takes depends on
        its numbers."""
        top, words_of = 1 << kind.bits, 32 // kind.bits

        def words(rows: int, columns: int, spread: float) -> torch.Tensor:
            packed = torch.zeros(rows, columns, dtype=torch.int64, device="cuda")
            for i in range(words_of):
                codes = torch.randn(rows, columns, device="cuda").mul_(spread).add_(top / 2).round_().clamp_(0, top - 1)
                packed |= codes.long() << (kind.bits * i)
            return torch.where(packed < 1 << 31, packed, packed - (1 << 32)).int()

        groups, spread = kind.groups(k), top / 6
        b = words(k // 16, n * kind.bits // 2, spread)
        s = ((0.9 + 0.2 * torch.rand(groups, n, device="cuda")) / (spread * k**0.5)).half()
        zeros = words(groups, n * kind.bits // 32, spread / 8) if kind.zeros else None
        perm = torch.randperm(k, device="cuda").int() if kind.act_order else None
        pointers = [None if x is None else x.data_ptr() for x in (b, s, zeros, perm)]
        return cls(kind, b, s, zeros, perm, Weights(*pointers, k, n, groups, k, n, kind.bits, 0))


class Library:
    """marlin_cuda.h on torch tensors, fp16, device 0, torch's current stream."""

    def __init__(self) -> None:
        path = os.environ.get("MARLIN_CUDA_LIBRARY") or Path(__file__).parents[1] / "marlin_convert" / "_cuda.so"
        i64, i32, p, size = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
        weights = ctypes.POINTER(Weights)
        self.lib = lib = ctypes.CDLL(str(path))
        lib.marlin_cuda_gemm.argtypes = [weights, ctypes.c_char_p]
        lib.marlin_cuda_workspace_bytes.argtypes = [i32]
        lib.marlin_cuda_workspace_bytes.restype = size
        lib.marlin_cuda_choose.argtypes = [weights, i64, i32]
        lib.marlin_cuda_gather.argtypes = [p, p, p, i64, i64, i64, i64, i32, p]
        lib.marlin_cuda_dequantize.argtypes = [weights, p, i32, i32, p]
        lib.marlin_cuda_stream_read.argtypes = [p, i64, p, i32, p]
        lib.marlin_cuda_plan.argtypes = [weights, i64, i32, i32, ctypes.POINTER(Plan)]
        lib.marlin_cuda_error_string.restype = ctypes.c_char_p
        self.instances = instances(lib)
        size = lib.marlin_cuda_workspace_bytes(0)
        self.workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.ordered = torch.empty(
            64 << 20, dtype=torch.half, device="cuda"
        )  # gathered activations: 2048 rows of 32768

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"{code}: {self.lib.marlin_cuda_error_string(code).decode()}")

    def gather(self, x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
        m, k = x.shape
        ordered = self.ordered[: m * k].view(m, k)
        pointers = x.data_ptr(), perm.data_ptr(), ordered.data_ptr()
        self.check(self.lib.marlin_cuda_gather(*pointers, m, x.stride(0), k, k, 0, stream()))
        return ordered

    def gemm(self, x: torch.Tensor, layer: Layer, y: torch.Tensor, variant: int, early: bool = False) -> None:
        if layer.perm is not None:
            x = self.gather(x, layer.perm)
        numbers = self.workspace.numel(), stream(), x.shape[0], x.stride(0), 0, 0, variant, early
        product = PRODUCT.pack(x.data_ptr(), 0, y.data_ptr(), self.workspace.data_ptr(), *numbers)
        self.check(self.lib.marlin_cuda_gemm(layer.fields, product))

    def plan(self, m: int, layer: Layer) -> str:
        """The chosen instance and split, as --choices names them."""
        plan = Plan()
        self.check(self.lib.marlin_cuda_plan(layer.fields, m, 0, 0, ctypes.byref(plan)))
        return f"{next(name for name, i in self.instances.items() if i.id == plan.instance)}/{plan.split}"

    def dequantize(self, layer: Layer, w: torch.Tensor) -> None:
        self.check(self.lib.marlin_cuda_dequantize(layer.fields, w.data_ptr(), 0, 0, stream()))

    def read(self, b: torch.Tensor, sink: torch.Tensor) -> None:
        self.check(self.lib.marlin_cuda_stream_read(b.data_ptr(), b.numel() * 4, sink.data_ptr(), 0, stream()))

    def choose(self, m: int, layer: Layer) -> int:
        return int(self.lib.marlin_cuda_choose(layer.fields, m, 0))


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
