"""The CUDA library through ctypes, and slow, obvious twins of what it computes."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import Any

import torch

PATH = Path(os.environ.get("MARLIN_CUDA_LIBRARY", Path(__file__).parents[2] / "marlin_convert" / "_cuda.so"))
GROUP_SIZE = 128
COUNTER_BYTES = 8192  # MARLIN_CUDA_COUNTER_BYTES
BATCH_INVARIANT = 1 << 20  # MARLIN_CUDA_BATCH_INVARIANT
CLUSTERS, STREAM_K, DATA_PARALLEL = range(1, 9), 9, 10  # MARLIN_CUDA_MOST_CLUSTER and so on
DTYPES = {torch.float16: 0, torch.bfloat16: 1}


class Weights(ctypes.Structure):
    """marlin_cuda_weights_t"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("B", "s", "zeros", "perm")),
        *((name, ctypes.c_int64) for name in ("K", "N", "G", "in_features", "out_features")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_dtype")),
    )


class Instance(ctypes.Structure):
    """marlin_cuda_instance_t"""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("id", "capability", "bits", "group_size", "zero_points")),
        *((name, ctypes.c_int32) for name in ("block_m", "block_n", "block_k", "clusters", "rounds_weights")),
        ("name", ctypes.c_char * 64),
    )

    def takes(self, bits: int, group_size: int, zeros: bool) -> bool:
        """Weights of these bits and groups (-1: one group), with zero points or without."""
        group = GROUP_SIZE if group_size < 0 else group_size
        return self.bits == bits and self.group_size in (0, group) and self.zero_points in ((1, 2) if zeros else (0, 1))


class Plan(ctypes.Structure):
    """marlin_cuda_plan_t"""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("instance", "stages", "split", "blocks", "parts", "rows")),
        *((name, ctypes.c_double) for name in ("us", "gemm_us", "dense_us")),
    )


def instances() -> dict[str, Instance]:
    """All of the library, by name; none without a library."""
    if not PATH.exists():
        return {}
    lib = ctypes.CDLL(str(PATH))
    found = [Instance() for _ in range(lib.marlin_cuda_instance_count())]
    for index, instance in enumerate(found):
        assert lib.marlin_cuda_instance(index, ctypes.byref(instance)) == 0
    return {instance.name.decode(): instance for instance in found}


INSTANCES = instances()


def variant(name: str = "", stages: int = 0, split: int = 0) -> int:
    """MARLIN_CUDA_VARIANT"""
    return (INSTANCES[name].id if name else 0) | stages << 12 | split << 16


def product(**fields: int | None) -> bytes:
    """marlin_cuda_product_t"""
    names = (
        "A",
        "bias",
        "C",
        "workspace",
        "workspace_bytes",
        "stream",
        "M",
        "lda",
        "dtype",
        "device",
        "variant",
        "early",
    )
    assert set(fields) == set(names)
    return struct.pack("@PPPPNPqqiiii", *(fields[name] or 0 for name in names))


class CudaError(Exception):
    def __init__(self, code: int, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code


class Library:
    """Functions of the library on torch tensors. `device` is a CUDA ordinal; work goes to torch's current stream."""

    def __init__(self, device: int = 0):
        i64, i32, p, size = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
        lib = ctypes.CDLL(str(PATH))
        lib.marlin_cuda_error_string.restype = ctypes.c_char_p
        weights = ctypes.POINTER(Weights)
        lib.marlin_cuda_gemm.argtypes = [weights, ctypes.c_char_p]
        lib.marlin_cuda_workspace_bytes.argtypes = [i32]
        lib.marlin_cuda_workspace_bytes.restype = size
        lib.marlin_cuda_choose.argtypes = [weights, i64, i32]
        lib.marlin_cuda_plan.argtypes = [weights, i64, i32, i32, ctypes.POINTER(Plan)]
        lib.marlin_cuda_gather.argtypes = [p, p, p, i64, i64, i64, i64, i32, p]
        lib.marlin_cuda_repack.argtypes = lib.marlin_cuda_unpack.argtypes = [p, p, i64, i64, i32, i32, p]
        lib.marlin_cuda_dequantize.argtypes = [weights, p, i32, i32, p]
        self.lib, self.device = lib, device
        self.workspace = self.new_workspace()

    def new_workspace(self) -> torch.Tensor:
        size = self.lib.marlin_cuda_workspace_bytes(self.device)
        return torch.zeros(size, dtype=torch.uint8, device=f"cuda:{self.device}")

    def check(self, code: int) -> None:
        if code:
            raise CudaError(code, self.lib.marlin_cuda_error_string(code).decode())

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    @staticmethod
    def weights(
        b: torch.Tensor,
        s: torch.Tensor,
        *,
        zeros: torch.Tensor | None = None,
        perm: torch.Tensor | None = None,
        bits: int = 4,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> Weights:
        k, n = b.shape[0] * 16, b.shape[1] * 2 // bits
        pointers = [None if x is None else x.data_ptr() for x in (b, s, zeros, perm)]
        return Weights(*pointers, k, n, s.shape[0], in_features or k, out_features or n, bits, DTYPES[s.dtype])

    def gemm(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        s: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
        variant: int = 0,
        workspace: Any = None,
        early: bool = False,
        **layer: Any,
    ) -> torch.Tensor:
        """out [M, out_features] = a [M, in_features] @ W + bias."""
        workspace = self.workspace if workspace is None else workspace
        x = product(
            A=a.data_ptr(), bias=None if bias is None else bias.data_ptr(), C=out.data_ptr(),
            workspace=workspace.data_ptr(), workspace_bytes=workspace.numel(), stream=self.stream(), M=a.shape[0],
            lda=a.stride(0), dtype=DTYPES[a.dtype], device=self.device, variant=variant, early=early,
        )  # fmt: skip
        self.check(self.lib.marlin_cuda_gemm(self.weights(b, s, **layer), x))
        return out

    def choose(self, m: int, n: int, k: int, groups: int = 1, **fields: Any) -> int:
        layer = Weights(K=k, N=n, G=groups, in_features=k, out_features=n, **{"bits": 4, **fields})
        return self.lib.marlin_cuda_choose(layer, m, self.device)

    def plan(self, m: int, n: int, k: int, groups: int = 1, variant: int = 0, **fields: Any) -> Plan:
        layer = Weights(K=k, N=n, G=groups, in_features=k, out_features=n, **{"bits": 4, **fields})
        plan = Plan()
        self.check(self.lib.marlin_cuda_plan(layer, m, self.device, variant, ctypes.byref(plan)))
        return plan

    def instance(self, layer: Layer, a: torch.Tensor, choice: int = 0) -> Instance:
        """The one that multiplies `a` with this layer."""
        zeros = None if layer.rest["zeros"] is None else 1
        plan = self.plan(a.shape[0], layer.n, layer.k, layer.groups, choice, bits=layer.bits, zeros=zeros)
        return next(x for x in INSTANCES.values() if x.id == plan.instance)

    def operand(self, layer: Layer, a: torch.Tensor, choice: int = 0) -> torch.Tensor:
        """The W [K, N] that gemm multiplies `a` with, in float64: exact, or rounded to the type of `a` once.

        It is rounded where the instance that runs does so; never with one group, whose scales enter after the sums.
        """
        if layer.groups > 1 and self.instance(layer, a, choice).rounds_weights:
            return layer.weight(torch.float32).to(a.dtype).double()
        return layer.weight()

    def gather(self, a: torch.Tensor, perm: torch.Tensor | None, k: int) -> torch.Tensor:
        out = torch.full((a.shape[0], k), float("nan"), dtype=a.dtype, device=a.device)
        order = None if perm is None else perm.data_ptr()
        self.check(
            self.lib.marlin_cuda_gather(
                a.data_ptr(), order, out.data_ptr(), *a.shape[:1], a.stride(0), a.shape[1], k, self.device,
                self.stream(),
            )
        )  # fmt: skip
        return out

    def repack(self, qweight: torch.Tensor, bits: int = 4) -> torch.Tensor:
        k, n = qweight.shape[0] * 32 // bits, qweight.shape[1]
        out = torch.full((k // 16, n * bits // 2), 0x5A5A5A5A, dtype=torch.int32, device=qweight.device)
        pointers = qweight.data_ptr(), out.data_ptr()
        self.check(self.lib.marlin_cuda_repack(*pointers, k, n, bits, self.device, self.stream()))
        return out

    def unpack(self, b: torch.Tensor, bits: int = 4) -> torch.Tensor:
        k, n = b.shape[0] * 16, b.shape[1] * 2 // bits
        out = torch.full((k * bits // 32, n), 0x5A5A5A5A, dtype=torch.int32, device=b.device)
        pointers = b.data_ptr(), out.data_ptr()
        self.check(self.lib.marlin_cuda_unpack(*pointers, k, n, bits, self.device, self.stream()))
        return out

    def dequantize(self, b: torch.Tensor, s: torch.Tensor, dtype: torch.dtype, **layer: Any) -> torch.Tensor:
        weights = self.weights(b, s, **layer)
        shape = weights.in_features, weights.out_features
        out = torch.full(shape, float("nan"), dtype=dtype, device=b.device)
        self.check(self.lib.marlin_cuda_dequantize(weights, out.data_ptr(), DTYPES[dtype], self.device, self.stream()))
        return out


# ---- Twins: the formulas of the layout, a nibble or a column at a time. ----------------------------------------------


def pack_marlin(code: torch.Tensor) -> torch.Tensor:
    """code [K, N] uint8 in 0..15 -> B [K / 16, 2 N]: nibble p of word j of lane 4 g + t, as the layout says."""
    k, n = code.shape
    tiles = code.view(k // 16, 16, n // 64, 64)
    words = torch.zeros((k // 16, n // 64, 128), dtype=torch.int32, device=code.device)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(4):
            for p in range(8):
                row, column = 2 * t + 8 * (p & 1) + (p >> 2), 16 * j + g + 8 * (p >> 1 & 1)
                words[:, :, 4 * lane + j] |= tiles[:, row, :, column].int() << (4 * p)
    return words.view(k // 16, 2 * n)


def pack_gptq(code: torch.Tensor) -> torch.Tensor:
    """code [K, N] -> qweight [K / 8, N]: eight neighbours along K in a word, lowest nibble first."""
    k, n = code.shape
    words = torch.zeros((k // 8, n), dtype=torch.int32, device=code.device)
    for i in range(8):
        words |= code[i::8].int() << (4 * i)
    return words


def pack_marlin8(code: torch.Tensor) -> torch.Tensor:
    """code [K, N] uint8 -> B [K / 16, 4 N]: byte p of word 2 j + h of lane 4 g + t."""
    k, n = code.shape
    tiles = code.view(k // 16, 16, n // 64, 64)
    words = torch.zeros((k // 16, n // 64, 256), dtype=torch.int32, device=code.device)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for j in range(4):
            for h in range(2):
                for p in range(4):
                    row, column = 2 * t + 8 * (p & 1) + (p >> 1), 16 * j + g + 8 * h
                    words[:, :, 8 * lane + 2 * j + h] |= tiles[:, row, :, column].int() << (8 * p)
    return words.view(k // 16, 4 * n)


def pack_gptq8(code: torch.Tensor) -> torch.Tensor:
    """code [K, N] -> qweight [K / 4, N]: four neighbours along K in a word."""
    words = torch.zeros((code.shape[0] // 4, code.shape[1]), dtype=torch.int32, device=code.device)
    for i in range(4):
        words |= code[i::4].int() << (8 * i)
    return words


def pack_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """zeros [G, N] uint8 -> marlin_qzeros [G, N bits / 32]: permuted as grouped scales, interleaved, packed along N."""
    new = torch.empty_like(zeros)
    for i in range(8):
        for j in range(8):
            new[:, 8 * i + j :: 64] = zeros[:, i + 8 * j :: 64]
    order = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    words = torch.zeros((zeros.shape[0], zeros.shape[1] * bits // 32), dtype=torch.int32, device=zeros.device)
    for i, place in enumerate(order):
        words |= new[:, place :: len(order)].int() << (bits * i)
    return words


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """scales [G, N] as GPTQ has them -> as Marlin stores them. The order depends on G."""
    out = torch.empty_like(scales)
    if scales.shape[0] > 1:
        for i in range(8):
            for j in range(8):
                out[:, 8 * i + j :: 64] = scales[:, i + 8 * j :: 64]
    else:
        offsets = [0, 1, 8, 9, 16, 17, 24, 25]
        for i in range(4):
            for j in range(8):
                out[:, 8 * i + j :: 32] = scales[:, 2 * i + offsets[j] :: 32]
    return out


class Layer:
    """A random quantized layer: codes, scales, zero points and the packing, on the GPU."""

    def __init__(
        self, k: int, n: int, groups: int, scales: torch.Tensor | None = None, *, bits: int = 4, zeros: bool = False,
        scale_dtype: torch.dtype = torch.float16,
    ):  # fmt: skip
        self.k, self.n, self.groups, self.bits = k, n, groups, bits
        self.code = torch.randint(0, 1 << bits, (k, n), dtype=torch.uint8, device="cuda")
        if scales is None:
            scales = (torch.rand(groups, n) * 0.02 + 0.001).to(scale_dtype)
        self.scales = scales.cuda()
        self.zeros = torch.randint(0, 1 << bits, (groups, n), dtype=torch.uint8, device="cuda") if zeros else None
        self.b = pack_marlin(self.code) if bits == 4 else pack_marlin8(self.code)
        self.s = permute_scales(self.scales)
        #: What Library's functions take beside b and s.
        self.rest: dict[str, Any] = {
            "bits": bits,
            "zeros": None if self.zeros is None else pack_zeros(self.zeros, bits),
        }

    def weight(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """W [K, N] = (code - zero) * scale; exact in fp32 and fp64."""
        rows = self.k // self.groups
        scales = self.scales.to(dtype).repeat_interleave(rows, dim=0)
        zero = 1 << (self.bits - 1) if self.zeros is None else self.zeros.to(dtype).repeat_interleave(rows, dim=0)
        return (self.code.to(dtype) - zero) * scales


def assert_close(out: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Every element of `out` against a float64 product, and the whole by its Frobenius norm.

    An element may be off by the rounding of the output and by 4e-6 of the sum of absolute products (fp32 sums).
    """
    a = a.double()
    reference = a @ weight
    if bias is not None:
        reference += bias.double()
    digits = 11 if out.dtype == torch.float16 else 8
    allowed = reference.abs() * 2.0**-digits * 1.01 + (a.abs() @ weight.abs()) * 4e-6 + 2.0**-25
    error = (out.double() - reference).abs()
    wrong = ~(error <= allowed)  # not (error > allowed): NaN is wrong
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the first at ({row}, {column}): "
            f"{out[row, column].item()} instead of {reference[row, column].item()}"
        )
    if error.numel() < 256:  # too few for roundings to even out
        return
    limit = 5e-4 if out.dtype == torch.float16 else 3e-3
    assert error.norm() <= limit * reference.norm() + 2.0**-25 * error.numel() ** 0.5  # half of fp16's smallest step
