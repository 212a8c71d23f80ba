"""The CUDA library through ctypes, and slow, obvious twins of what it computes."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

PATH = Path(os.environ.get("MARLIN_CUDA_LIBRARY", Path(__file__).parents[2] / "marlin_convert" / "_cuda.so"))
GROUP_SIZE = 128
COUNTER_BYTES = 8192  # MARLIN_CUDA_COUNTER_BYTES
DTYPES = {torch.float16: 0, torch.bfloat16: 1}

# The configurations and splits of kernels/cuda/gemm.cu, for `variant`.
GENERIC = range(1, 6)
HOPPER = range(6, 15)
CLUSTERS = range(1, 9)
RANGES = 9
WHOLE = 10


def variant(config: int = 0, stages: int = 0, split: int = 0) -> int:
    return config | stages << 8 | split << 12


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
        lib.marlin_cuda_gemm.argtypes = [p] * 6 + [size] + [i64] * 5 + [i32, i32, p, i32]
        lib.marlin_cuda_gemm_workspace_bytes.argtypes = [i64, i64, i64, i32]
        lib.marlin_cuda_gemm_workspace_bytes.restype = size
        lib.marlin_cuda_choose.argtypes = [i64, i64, i64, i32]
        lib.marlin_cuda_repack.argtypes = lib.marlin_cuda_unpack.argtypes = [p, p, i64, i64, i32, p]
        lib.marlin_cuda_dequantize.argtypes = [p, p, p, i64, i64, i64, i32, i32, p]
        self.lib, self.device = lib, device
        self.workspace = self.new_workspace()

    def new_workspace(self) -> torch.Tensor:
        size = self.lib.marlin_cuda_gemm_workspace_bytes(1, 64, 64, self.device)
        return torch.zeros(size, dtype=torch.uint8, device=f"cuda:{self.device}")

    def check(self, code: int) -> None:
        if code:
            raise CudaError(code, self.lib.marlin_cuda_error_string(code).decode())

    def stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream

    def gemm(self, a, b, s, out, bias=None, variant=0, workspace=None):
        """out [M, N] = a [M, K] @ W + bias."""
        workspace = self.workspace if workspace is None else workspace
        (m, k), n = a.shape, out.shape[1]
        self.check(
            self.lib.marlin_cuda_gemm(
                a.data_ptr(), b.data_ptr(), s.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
                workspace.data_ptr(), workspace.numel(), m, n, k, s.shape[0], a.stride(0), DTYPES[a.dtype],
                self.device, self.stream(), variant,
            )
        )  # fmt: skip
        return out

    def repack(self, qweight):
        k, n = qweight.shape[0] * 8, qweight.shape[1]
        out = torch.full((k // 16, n * 2), 0x5A5A5A5A, dtype=torch.int32, device=qweight.device)
        self.check(self.lib.marlin_cuda_repack(qweight.data_ptr(), out.data_ptr(), k, n, self.device, self.stream()))
        return out

    def unpack(self, b):
        k, n = b.shape[0] * 16, b.shape[1] // 2
        out = torch.full((k // 8, n), 0x5A5A5A5A, dtype=torch.int32, device=b.device)
        self.check(self.lib.marlin_cuda_unpack(b.data_ptr(), out.data_ptr(), k, n, self.device, self.stream()))
        return out

    def dequantize(self, b, s, dtype):
        k, n = b.shape[0] * 16, b.shape[1] // 2
        out = torch.full((k, n), float("nan"), dtype=dtype, device=b.device)
        self.check(
            self.lib.marlin_cuda_dequantize(
                b.data_ptr(), s.data_ptr(), out.data_ptr(), k, n, s.shape[0], DTYPES[dtype], self.device, self.stream()
            )
        )
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
    """A random quantized layer: codes, scales and both packings, on the GPU."""

    def __init__(self, k: int, n: int, groups: int, scales: torch.Tensor | None = None):
        self.k, self.n, self.groups = k, n, groups
        self.code = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
        if scales is None:
            scales = (torch.rand(groups, n) * 0.02 + 0.001).half()
        self.scales = scales.cuda()
        self.b, self.s = pack_marlin(self.code), permute_scales(self.scales)

    def weight(self, dtype=torch.float64) -> torch.Tensor:
        """W [K, N] = (code - 8) * scale; exact in fp32 and fp64."""
        scales = self.scales.to(dtype).repeat_interleave(self.k // self.groups, dim=0)
        return (self.code.to(dtype) - 8) * scales


def assert_close(out: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias=None) -> None:
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
    limit = 5e-4 if out.dtype == torch.float16 else 3e-3
    assert error.norm() <= limit * reference.norm() + 2.0**-25 * error.numel() ** 0.5  # half of fp16's smallest step
