"""The only door to the bundled CUDA kernels (`_cuda.so`, sources in `kernels/cuda`): torch tensors in and out.

    gemm(a, B, s, bias)      a [M, in_features] · W + bias → [M, out_features], fp16 or bf16, accumulated in fp32
    matmul(a, B, s, bias)    gemm, or dequantize and torch.matmul where that is faster: what a model calls
    dequantize(B, s, dtype)  W [in_features, out_features], rounded once
    repack(qweight)          GPTQ → Marlin, bit for bit; unpack(B) is its inverse

A layer is given by its stored tensors, of either format (docs/concepts/format.md): `B` and `s`, or marlin_qweight,
marlin_scales, marlin_qzeros (`zeros`) and marlin_perm (`perm`); `bits`, and in_features and out_features where these
are less than the stored, padded sizes.

batch_invariant=True fixes the bits of a row: how K is split and the order of every sum depend on the layer and the GPU
alone, one way for all numbers of rows, without dequantizing for cuBLAS. MARLIN_BATCH_INVARIANT=1 in the environment
makes that the default.

early=True lets a product begin while the work before it on the stream still runs (programmatic dependent launch, on
Hopper): its weights are copied meanwhile, activations are waited for. The bits are the same. It says that nothing on
the stream that has not ended writes this layer's B, s or zeros. A layer's first product never begins early, so that
weights may just have been loaded or repacked; who writes into them again, or puts another layer of the same sizes where
they lay (a layer is told by its addresses), must wait for the device before the next product. MARLIN_EARLY=1 in the
environment makes that the default.

All but `matmul` are also torch operators (`torch.ops.marlin_convert.…`) with fake implementations, so that
torch.compile and CUDA graphs take them; on eager paths the Python functions are quicker. Arguments are checked here,
a layer's tensors only when they are new; messages name the argument, what it is and what it should be.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import TypeAlias

import torch
from torch import library as torch_library

from ..formats.layout import TILE_K, pack_factor
from ._cuda_checks import check_activations, check_memory, dtype_name, layer_sizes, stored_size
from .cuda_library import (
    ABI_VERSION,
    BATCH_INVARIANT,
    COUNTER_BYTES,
    DTYPES,
    GROUP_SIZE,
    K_MULTIPLE,
    PRODUCT,
    USE_DEQUANTIZE,
    USE_GEMM,
    Weights,
    available,
    device_info,
    error_text,
    load_library,
    run,
    torch_device,
)

__all__ = [
    "ABI_VERSION", "K_MULTIPLE", "available", "dequantize", "dequantizing_pays", "device_info", "gemm", "load_library",
    "matmul", "repack", "torch_device", "unpack",
]  # fmt: skip

T: TypeAlias = torch.Tensor

#: Whether products are batch-invariant by default.
INVARIANT = os.environ.get("MARLIN_BATCH_INVARIANT", "") not in ("", "0")
#: Whether products begin early by default.
EARLY = os.environ.get("MARLIN_EARLY", "") not in ("", "0")


class _Layer:
    """A layer's tensors, checked: what the kernels take, and what follows from the sizes."""

    def __init__(
        self, B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
    ) -> None:
        K, N, G, rows, columns = layer_sizes(B, s, zeros, perm, bits, in_features, out_features)
        check_memory(B.device, B=B, s=s, zeros=zeros, perm=perm)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (B, s, zeros, perm)]
        self.weights = Weights(*pointers, K, N, G, rows, columns, bits, DTYPES[s.dtype])
        self.device, self.index = B.device, B.device.index
        self.K, self.N, self.in_features, self.out_features = K, N, rows, columns
        self.perm = pointers[3]
        self.gathers = perm is not None or rows % 8 != 0
        # The product on activations that marlin_cuda_gather has reordered.
        self.gathered = Weights(*pointers, K, N, G, K, columns, bits, DTYPES[s.dtype])
        self.kernels = _ready(self.index)
        self.dequantizing_pays: dict[int, bool] = {}  # by M
        self.multiplied = False  # its tensors have been there for a product: the next may begin early


_layers: dict[tuple[object, ...], _Layer] = {}
_MOST_LAYERS = 1 << 14


def _layer(
    B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
) -> _Layer:
    """Return the layer of these tensors: looked up by all that its checks and it depend on, made if they are new."""
    key: tuple[object, ...] = (
        B.data_ptr(), B.shape, B.dtype, B.is_contiguous(), B.get_device(),
        s.data_ptr(), s.shape, s.dtype, s.is_contiguous(), s.get_device(),
        bits, in_features, out_features,
    )  # fmt: skip
    for tensor in (zeros, perm):
        if tensor is not None:
            key += (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.get_device())
        elif zeros is not perm:
            key += (None,)
    layer = _layers.get(key)
    if layer is None:
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        layer = _layers[key] = _Layer(B, s, zeros, perm, bits, in_features, out_features)
    return layer


# ---- The functions ----

# Scratch memory: the tensor, its address, its size in bytes.
Workspace: TypeAlias = tuple[T, int, int]
_workspaces: dict[tuple[int, int], Workspace] = {}
_captured: dict[tuple[int, int], tuple[int, Workspace]] = {}  # the same, with the id of the graph capture it belongs to


def _workspace(index: int, stream: int) -> Workspace:
    """Return scratch memory for products, its counters zero: one for each device and stream.

    While a CUDA graph is captured, memory must come from the graph's own pool and be zeroed by the graph: once for
    all products that it captures on a stream, since each leaves the counters at zero.
    """
    key = (index, stream)
    if torch.cuda.is_current_stream_capturing():
        capture, known = _capture_id(stream), _captured.get(key)
        if known is None or known[0] != capture:
            memory = torch.empty(_workspace_bytes(index), dtype=torch.uint8, device=torch.device("cuda", index))
            memory[:COUNTER_BYTES].zero_()
            known = _captured[key] = (capture, (memory, memory.data_ptr(), memory.numel()))
        return known[1]
    workspace = _workspaces.get(key)
    if workspace is None:
        memory = torch.zeros(_workspace_bytes(index), dtype=torch.uint8, device=torch.device("cuda", index))
        workspace = _workspaces[key] = (memory, memory.data_ptr(), memory.numel())
    return workspace


def _capture_id(stream: int) -> int:
    """Return the driver's number for the capture that `stream` takes part in; unique in the process."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    function = _driver().cuStreamGetCaptureInfo_v2
    code = function(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    if code:
        raise RuntimeError(f"cuStreamGetCaptureInfo: error {code} of the NVIDIA driver")
    return number.value


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def gemm(
    a: T, B: T, s: T, bias: T | None = None, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None, variant: int = 0,
    batch_invariant: bool | None = None, early: bool | None = None,
) -> T:  # fmt: skip
    """Compute a [..., in_features] · W + bias as [..., out_features], in a's dtype (float16 or bfloat16), accumulated
    in fp32.

    `a`'s rows may be a strided view (a slice of columns) as long as their stride is a multiple of 8 elements; other
    layouts are copied first, as are the activations of a layer with act-order, in another order of columns. With many
    rows, on Hopper from 65 on, weights are rounded to a's dtype once, as `dequantize` does, unless they have one group
    of scales; with few rows they are not rounded, but on other GPUs 8 bits and small groups may be. The same inputs
    give the same bits on every run.

    `batch_invariant` (default: whether MARLIN_BATCH_INVARIANT=1): a row has the bits that it has alone, whatever rows
    are beside it; docs/kernels/results.md has what that costs. On Hopper no weights are rounded then, elsewhere all
    are, with any number of rows. `variant`, for tests and tuning, asks for a kernel, and comes before it.

    `early` (default: whether MARLIN_EARLY=1): the product may begin before the work before it has ended, see above.

    Raises TypeError and ValueError for arguments that do not fit, DeviceError when the kernels cannot run.
    """
    layer = _layer(B, s, zeros, perm, bits, in_features, out_features)
    return _product(layer, a, bias, variant or _fixed(batch_invariant), early)


def matmul(
    a: T, B: T, s: T, bias: T | None = None, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
    batch_invariant: bool | None = None, early: bool | None = None,
) -> T:  # fmt: skip
    """Compute by the faster of `gemm` and dequantize + torch.matmul, chosen by shape; `batch_invariant`: `gemm`.

    `early` is for `gemm`.
    """
    layer = _layer(B, s, zeros, perm, bits, in_features, out_features)
    fixed = _fixed(batch_invariant)
    if fixed:
        return _product(layer, a, bias, fixed, early)
    M = a.numel() // layer.in_features
    pays = layer.dequantizing_pays.get(M)
    if pays is None:
        pays = layer.dequantizing_pays[M] = M > 0 and _choose(layer.kernels, layer.weights, M, layer.index)
    if not pays:
        return _product(layer, a, bias, 0, early)
    check_activations(a, bias, layer.in_features, layer.out_features)
    if a.get_device() != layer.index:
        raise ValueError(f"a is on {a.device}; it should be on {layer.device}, like B")
    check_memory(layer.device, bias=bias)
    W = _dequantize(layer, a.dtype)
    if bias is None:
        return torch.matmul(a, W)
    return torch.addmm(bias, a.reshape(-1, layer.in_features), W).view(*a.shape[:-1], layer.out_features)


def _fixed(batch_invariant: bool | None) -> int:
    """Return the variant of a product: batch-invariant, or whatever is fastest."""
    return BATCH_INVARIANT if (INVARIANT if batch_invariant is None else batch_invariant) else 0


def _product(layer: _Layer, a: T, bias: T | None, variant: int, early: bool | None) -> T:
    index, in_features, shape, dtype = layer.index, layer.in_features, a.shape, DTYPES.get(a.dtype)
    if dtype is None or not shape or shape[-1] != in_features or bias is not None:
        check_activations(a, bias, in_features, layer.out_features)
    if a.get_device() != index:
        raise ValueError(f"a is on {a.device}; it should be on {layer.device}, like B")
    if bias is not None:
        check_memory(layer.device, bias=bias)
    rows = a if len(shape) == 2 else a.reshape(-1, in_features)
    M = rows.shape[0]
    out = a.new_empty((*shape[:-1], layer.out_features))
    if M == 0:
        return out
    stream, weights = torch._C._cuda_getCurrentRawStream(index), layer.weights
    lda, step = rows.stride()
    if M == 1:
        lda = layer.K
    address = rows.data_ptr()
    if layer.gathers or step != 1 or lda % 8 or lda < in_features or address % 16:
        if step != 1:
            rows = rows.contiguous()
        gathered = a.new_empty((M, layer.K))
        run(
            layer.kernels, "marlin_cuda_gather",
            rows.data_ptr(), layer.perm, gathered.data_ptr(), M, rows.stride(0), in_features, layer.K, index, stream,
        )  # fmt: skip
        address, lda, weights = gathered.data_ptr(), layer.K, layer.gathered
    _, workspace, nbytes = _workspace(index, stream)
    begins_early = layer.multiplied and (EARLY if early is None else early)
    layer.multiplied = True
    status = layer.kernels.marlin_cuda_gemm(
        weights,
        PRODUCT.pack(
            address, 0 if bias is None else bias.data_ptr(), out.data_ptr(), workspace, nbytes, stream, M, lda, dtype,
            index, variant, begins_early,
        ),
    )  # fmt: skip
    if status:
        where = f"M = {M}, N = {layer.N}, K = {layer.K}"
        raise RuntimeError(f"gemm of {where}: {error_text(layer.kernels, status)} ({status})")
    return out


@cache
def _ready(index: int) -> ctypes.CDLL:
    device_info(index)
    return load_library()


@cache
def _workspace_bytes(index: int) -> int:
    return int(load_library().marlin_cuda_workspace_bytes(index))


@cache
def dequantizing_pays(
    M: int, N: int, K: int, index: int, *, bits: int = 4, group_size: int = GROUP_SIZE, zeros: bool = False
) -> bool:
    """Tell whether dequantizing and cuBLAS are expected to be faster than the kernel for this shape on GPU `index`."""
    G = K // group_size if group_size > 0 and K % group_size == 0 else 1
    return _choose(_ready(index), Weights(None, None, zeros or None, None, K, N, G, K, N, bits, 0), M, index)


def _choose(lib: ctypes.CDLL, weights: Weights, M: int, index: int) -> bool:
    answer = lib.marlin_cuda_choose(weights, M, index)
    if answer not in (USE_GEMM, USE_DEQUANTIZE):
        raise RuntimeError(f"marlin_cuda_choose: {error_text(lib, answer)} ({answer})")
    return bool(answer == USE_DEQUANTIZE)


def repack(qweight: T, *, bits: int = 4) -> T:
    """Turn GPTQ's `qweight` [K bits/32, N] into Marlin's `B` [K/16, N bits/2], both int32 on the GPU."""
    K, N = stored_size("qweight", qweight, bits, gptq=True)
    check_memory(qweight.device, qweight=qweight)
    B = torch.empty((K // TILE_K, N * TILE_K // pack_factor(bits)), dtype=torch.int32, device=qweight.device)
    _launch("marlin_cuda_repack", qweight, B, K, N, bits)
    return B


def unpack(B: T, *, bits: int = 4) -> T:
    """Turn Marlin's `B` [K/16, N bits/2] into GPTQ's `qweight` [K bits/32, N]: the inverse of `repack`."""
    K, N = stored_size("B", B, bits)
    check_memory(B.device, B=B)
    qweight = torch.empty((K // pack_factor(bits), N), dtype=torch.int32, device=B.device)
    _launch("marlin_cuda_unpack", B, qweight, K, N, bits)
    return qweight


def _launch(function: str, source: T, target: T, K: int, N: int, bits: int) -> None:
    index = source.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    run(_ready(index), function, source.data_ptr(), target.data_ptr(), K, N, bits, index, stream)


def dequantize(
    B: T, s: T, dtype: torch.dtype = torch.float16, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
) -> T:  # fmt: skip
    """Return W [in_features, out_features] = (code - zero) · scale in `dtype` (float16 or bfloat16), rounded once to
    nearest even; rows in the source's order."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype_name(dtype)}; it should be float16 or bfloat16")
    return _dequantize(_layer(B, s, zeros, perm, bits, in_features, out_features), dtype)


def _dequantize(layer: _Layer, dtype: torch.dtype) -> T:
    W = torch.empty((layer.in_features, layer.out_features), dtype=dtype, device=layer.device)
    stream = torch._C._cuda_getCurrentRawStream(layer.index)
    run(
        layer.kernels, "marlin_cuda_dequantize", layer.weights, W.data_ptr(), DTYPES[dtype], layer.index, stream
    )  # fmt: skip
    return W


# ---- Operators ----

_operators = torch_library.Library("marlin_convert", "DEF")  # type: ignore[no-untyped-call]
_LAYER = "Tensor? zeros=None, Tensor? perm=None, *, int bits=4, int? in_features=None, int? out_features=None"
_FIXED = "bool? batch_invariant=None, bool? early=None"
for _signature in (
    f"gemm(Tensor a, Tensor B, Tensor s, Tensor? bias=None, {_LAYER}, int variant=0, {_FIXED}) -> Tensor",
    "repack(Tensor qweight, *, int bits=4) -> Tensor",
    "unpack(Tensor B, *, int bits=4) -> Tensor",
    f"dequantize(Tensor B, Tensor s, ScalarType dtype, {_LAYER}) -> Tensor",
):
    _operators.define(_signature)  # type: ignore[no-untyped-call]
_operators.impl("gemm", gemm, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("repack", repack, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("unpack", unpack, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("dequantize", dequantize, "CUDA")  # type: ignore[no-untyped-call]


@torch_library.register_fake("marlin_convert::gemm", lib=_operators)  # type: ignore[untyped-decorator]
def _(
    a: T, B: T, s: T, bias: T | None = None, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None, variant: int = 0,
    batch_invariant: bool | None = None, early: bool | None = None,
) -> T:  # fmt: skip
    _, _, _, rows, columns = layer_sizes(B, s, zeros, perm, bits, in_features, out_features)
    check_activations(a, bias, rows, columns)
    return a.new_empty((*a.shape[:-1], columns))


@torch_library.register_fake("marlin_convert::repack", lib=_operators)  # type: ignore[untyped-decorator]
def _(qweight: T, *, bits: int = 4) -> T:
    K, N = stored_size("qweight", qweight, bits, gptq=True)
    return qweight.new_empty((K // TILE_K, N * TILE_K // pack_factor(bits)))


@torch_library.register_fake("marlin_convert::unpack", lib=_operators)  # type: ignore[untyped-decorator]
def _(B: T, *, bits: int = 4) -> T:
    K, N = stored_size("B", B, bits)
    return B.new_empty((K // pack_factor(bits), N))


@torch_library.register_fake("marlin_convert::dequantize", lib=_operators)  # type: ignore[untyped-decorator]
def _(
    B: T, s: T, dtype: torch.dtype, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
) -> T:  # fmt: skip
    _, _, _, rows, columns = layer_sizes(B, s, zeros, perm, bits, in_features, out_features)
    return B.new_empty((rows, columns), dtype=dtype)
