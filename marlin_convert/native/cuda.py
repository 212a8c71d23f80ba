"""The only door to the bundled CUDA kernels (`_cuda.so`, sources in `kernels/cuda`): torch tensors in and out.

    gemm(a, B, s, bias)      a [M, in_features] · W + bias → [M, out_features], fp16 or bf16, accumulated in fp32
    matmul(a, B, s, bias)    gemm, or dequantize and torch.matmul where that is faster: what a model calls
    dequantize(B, s, dtype)  W [in_features, out_features], rounded once
    repack(qweight)          GPTQ → Marlin, bit for bit; unpack(B) is its inverse

A layer is given by its stored tensors, of either format (docs/concepts/format.md): `B` and `s`, or marlin_qweight,
marlin_scales, marlin_qzeros (`zeros`) and marlin_perm (`perm`); `bits`, and in_features and out_features where these
are less than the stored, padded sizes.

All but `matmul` are also torch operators (`torch.ops.marlin_convert.…`) with fake implementations, so that
torch.compile and CUDA graphs take them; on eager paths the Python functions are quicker. Arguments are checked here,
a layer's tensors only when they are new; messages name the argument, what it is and what it should be.
"""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch
from torch import library as torch_library

from ..device import MIN_CAPABILITY, Device, cuda_devices
from ..errors import DeviceError
from ..formats.layout import EXT_BITS, TILE_K, pack_factor

#: Where the library is; MARLIN_CUDA_LIBRARY names another one, to compare builds.
LIBRARY = Path(os.environ.get("MARLIN_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda.so")

# MARLIN_CUDA_* of kernels/marlin_cuda.h; a test compares them.
ABI_VERSION = 4
K_MULTIPLE = 64
N_MULTIPLE = 64
GROUP_SIZE = 128
COUNTER_BYTES = 8192
USE_GEMM, USE_DEQUANTIZE = 0, 1
MOST_CLUSTER, STREAM_K, DATA_PARALLEL = 8, 9, 10  # splits of `variant`
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}
_GROUP_SIZES = (16, 32, 64, GROUP_SIZE)

_NO_DRIVER, _NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice

T: TypeAlias = torch.Tensor


class DeviceInfo(ctypes.Structure):
    """marlin_cuda_device_info_t: one GPU. Versions are 1000 · major + 10 · minor."""

    _fields_ = (
        ("capability_major", ctypes.c_int32),
        ("capability_minor", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes_per_block", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int64),
        ("memory_bytes", ctypes.c_int64),
        ("driver_version", ctypes.c_int32),
        ("runtime_version", ctypes.c_int32),
        ("name", ctypes.c_char * 256),
    )


class Weights(ctypes.Structure):
    """marlin_cuda_weights_t: a layer as stored."""

    _fields_ = (
        ("B", ctypes.c_void_p),
        ("s", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("perm", ctypes.c_void_p),
        ("K", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("G", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
    )


class Instance(ctypes.Structure):
    """marlin_cuda_instance_t: an instance of the kernels."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("id", "capability", "bits", "group_size", "zero_points")),
        *((name, ctypes.c_int32) for name in ("block_m", "block_n", "block_k", "clusters", "rounds_weights")),
        ("name", ctypes.c_char * 64),
    )


class Plan(ctypes.Structure):
    """marlin_cuda_plan_t: what `gemm` would launch; times in microseconds, predicted."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("instance", "stages", "split", "blocks")),
        *((name, ctypes.c_double) for name in ("us", "gemm_us", "dense_us")),
    )


def instances(lib: ctypes.CDLL) -> dict[str, Instance]:
    """The instances of the kernels in a library, by name. Needs no GPU."""
    found = [Instance() for _ in range(lib.marlin_cuda_instance_count())]
    for index, instance in enumerate(found):
        _run(lib, "marlin_cuda_instance", index, ctypes.byref(instance))
    return {instance.name.decode(): instance for instance in found}


def variant(instance: int = 0, stages: int = 0, split: int = 0) -> int:
    """MARLIN_CUDA_VARIANT: asks for an instance by its id, for a depth of the pipeline and a split; 0: any."""
    return instance | stages << 12 | split << 16


#: marlin_cuda_product_t: A, bias, C, workspace, its bytes, stream, M, lda, dtype, device, variant, unused. Packed, as
#: that is quicker than a ctypes.Structure.
PRODUCT = struct.Struct("@PPPPNPqqiiii")


# ---- The library ----


@cache
def load_library() -> ctypes.CDLL:
    """`_cuda.so`, loaded and checked: built, of this version, with a driver that is new enough and a GPU that suits.

    Raises DeviceError that says which of these is missing and what to do.
    """
    if not LIBRARY.exists():
        raise DeviceError(
            "the CUDA kernels are not built (marlin_convert/_cuda.so is missing): where nvcc, of the CUDA toolkit, and "
            "the GPU are, run `pip install .` again (MARLIN_CUDA_ARCHS=all builds without a GPU); converting and "
            "verifying need no GPU (--device cpu)."
        )
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise DeviceError(f"the CUDA kernels cannot be loaded ({error}); run `pip install .` again.") from None
    try:
        version = lib.marlin_cuda_abi_version()
    except AttributeError:
        version = None
    if version != ABI_VERSION:
        raise DeviceError(
            f"marlin_convert/_cuda.so is of another version ({version}, not {ABI_VERSION}); run `pip install .` again."
        )
    _declare(lib)
    count = ctypes.c_int()
    status = lib.marlin_cuda_device_count(ctypes.byref(count))
    if status == _NO_DRIVER:
        raise DeviceError(
            "the NVIDIA driver is missing, or older than the CUDA version that the kernels were built with "
            "(13 needs driver R580 or newer): update it, or build with an older toolkit; "
            "converting and verifying need no GPU (--device cpu)."
        )
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        raise DeviceError("there is no NVIDIA GPU; converting and verifying need no GPU (--device cpu).")
    if status:
        raise DeviceError(
            f"CUDA does not start: {_text(lib, status)}; converting and verifying need no GPU (--device cpu)."
        )
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    pointer, i64, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
    lib.marlin_cuda_error_string.restype = ctypes.c_char_p
    weights = ctypes.POINTER(Weights)
    lib.marlin_cuda_workspace_bytes.restype = size
    lib.marlin_cuda_workspace_bytes.argtypes = (integer,)
    lib.marlin_cuda_choose.argtypes = (weights, i64, integer)
    lib.marlin_cuda_instance.argtypes = (integer, ctypes.POINTER(Instance))
    lib.marlin_cuda_plan.argtypes = (weights, i64, integer, integer, ctypes.POINTER(Plan))
    lib.marlin_cuda_device_info.argtypes = (integer, ctypes.POINTER(DeviceInfo))
    lib.marlin_cuda_gemm.argtypes = (weights, ctypes.c_char_p)
    lib.marlin_cuda_gather.argtypes = (pointer, pointer, pointer, i64, i64, i64, i64, integer, pointer)
    lib.marlin_cuda_repack.argtypes = (pointer, pointer, i64, i64, integer, integer, pointer)
    lib.marlin_cuda_unpack.argtypes = lib.marlin_cuda_repack.argtypes
    lib.marlin_cuda_dequantize.argtypes = (weights, pointer, integer, integer, pointer)
    lib.marlin_cuda_stream_read.argtypes = (pointer, i64, pointer, integer, pointer)


def _text(lib: ctypes.CDLL, status: int) -> str:
    text: bytes = lib.marlin_cuda_error_string(status)
    return text.decode()


def _run(lib: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(lib, function)(*arguments)
    if status:
        raise RuntimeError(f"{function}: {_text(lib, status)} ({status})")


@cache
def device_info(index: int) -> DeviceInfo:
    """What the library knows of GPU `index`. Raises DeviceError if Marlin cannot run on it."""
    lib, info = load_library(), DeviceInfo()
    _run(lib, "marlin_cuda_device_info", index, ctypes.byref(info))
    capability = (info.capability_major, info.capability_minor)
    if capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        raise DeviceError(
            f"cuda:{index} ({info.name.decode()}) has compute capability {'.'.join(map(str, capability))}; "
            f"Marlin needs {needed} or newer."
        )
    return info


def available() -> bool:
    """Whether the kernels can run here: library, driver and a GPU of compute capability 8.0 or newer are there."""
    try:
        load_library()
        return torch.cuda.is_available() and any(d.suits_marlin for d in cuda_devices())
    except DeviceError:
        return False


def torch_device(device: Device) -> torch.device:
    """The torch device of `device`, checked to be one that the kernels run on."""
    load_library()
    if not torch.cuda.is_available():
        raise DeviceError(
            f"this torch ({torch.__version__}) was built without CUDA or does not work with the driver; "
            "install a CUDA build of torch; converting and verifying need no GPU (--device cpu)."
        )
    device_info(device.index)
    return torch.device("cuda", device.index)


# ---- Arguments ----


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str, tensor: T, dtypes: tuple[torch.dtype, ...], dims: int = 2) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(map(_name, dtypes))
        raise TypeError(f"{name} is {_name(tensor.dtype)}; it should be {wanted}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should have {dims} dimensions")


def _check_shape(name: str, tensor: T, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should be {list(shape)}")


def _check_memory(device: torch.device, **tensors: T | None) -> None:
    """All on `device`, a GPU; all contiguous and aligned to 16 bytes, as the kernels load them."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device or device.type != "cuda":
            where = f"{device}, like the first argument" if device.type == "cuda" else "a CUDA device"
            raise ValueError(f"{name} is on {tensor.device}; it should be on {where}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it should be contiguous")
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name} starts at an address that is not a multiple of 16; it should be")


def _check_bits(bits: int) -> None:
    if bits not in EXT_BITS:
        raise ValueError(f"bits is {bits}; it should be 4 or 8")


def _stored_size(name: str, tensor: T, bits: int, gptq: bool = False) -> tuple[int, int]:
    """(K, N) of codes in tile order, or as GPTQ has them."""
    _check_bits(bits)
    _check(name, tensor, (torch.int32,))
    rows, columns = tensor.shape
    factor = pack_factor(bits)
    K, N = (rows * factor, columns) if gptq else (rows * TILE_K, columns * factor // TILE_K)
    if K == 0 or K % K_MULTIPLE or N == 0 or N % N_MULTIPLE or (not gptq and columns * factor % TILE_K):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, so K = {K} and N = {N}; both should be multiples of 64"
        )
    return K, N


def _unpadded(name: str, value: int | None, stored: int) -> int:
    if value is None:
        return stored
    if not 0 < value <= stored:
        raise ValueError(f"{name} is {value}; it should be from 1 to {stored}, the stored size")
    return int(value)


def _sizes(
    B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
) -> tuple[int, int, int, int, int]:
    """(K, N, G, in_features, out_features) of a layer, its shapes and types checked."""
    K, N = _stored_size("B", B, bits)
    _check("s", s, (torch.float16, torch.bfloat16))
    G = s.shape[0]
    if s.shape[1] != N or (G != 1 and (G == 0 or K % G or K // G not in _GROUP_SIZES)):
        counts = ", ".join(str(K // size) for size in reversed(_GROUP_SIZES) if K % size == 0 and size < K)
        raise ValueError(
            f"s has shape {tuple(s.shape)}; it should be [G, {N}] with G = 1{' or one of ' if counts else ''}{counts}"
        )
    rows, columns = _unpadded("in_features", in_features, K), _unpadded("out_features", out_features, N)
    if zeros is not None:
        _check("zeros", zeros, (torch.int32,))
        _check_shape("zeros", zeros, (G, N // pack_factor(bits)))
    if perm is not None:
        _check("perm", perm, (torch.int32,), 1)
        _check_shape("perm", perm, (rows,))
    return K, N, G, rows, columns


def _check_activations(a: T, bias: T | None, in_features: int, out_features: int) -> None:
    if a.dtype not in _DTYPES:
        raise TypeError(f"a is {_name(a.dtype)}; it should be float16 or bfloat16")
    if a.dim() == 0 or a.shape[-1] != in_features:
        raise ValueError(f"a has shape {tuple(a.shape)}; its last dimension should be in_features = {in_features}")
    if bias is not None:
        if bias.dtype != a.dtype:
            raise TypeError(f"bias is {_name(bias.dtype)}; it should be of a's dtype")
        _check_shape("bias", bias, (out_features,))


class _Layer:
    """A layer's tensors, checked: what the kernels take, and what follows from the sizes."""

    def __init__(
        self, B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
    ) -> None:
        K, N, G, rows, columns = _sizes(B, s, zeros, perm, bits, in_features, out_features)
        _check_memory(B.device, B=B, s=s, zeros=zeros, perm=perm)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (B, s, zeros, perm)]
        self.weights = Weights(*pointers, K, N, G, rows, columns, bits, _DTYPES[s.dtype])
        self.device, self.index = B.device, B.device.index
        self.K, self.N, self.in_features, self.out_features = K, N, rows, columns
        self.perm = pointers[3]
        self.gathers = perm is not None or rows % 8 != 0
        # The product of activations that marlin_cuda_gather made.
        self.gathered = Weights(*pointers, K, N, G, K, columns, bits, _DTYPES[s.dtype])
        self.kernels = _ready(self.index)
        self.dequantizing_pays: dict[int, bool] = {}  # by M


_layers: dict[tuple[object, ...], _Layer] = {}
_MOST_LAYERS = 1 << 14


def _layer(
    B: T, s: T, zeros: T | None, perm: T | None, bits: int, in_features: int | None, out_features: int | None
) -> _Layer:
    """The layer of these tensors: looked up by all that its checks and it depend on, made if they are new."""
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

# Scratch memory, its address and its bytes.
Workspace: TypeAlias = tuple[T, int, int]
_workspaces: dict[tuple[int, int], Workspace] = {}
_captured: dict[tuple[int, int], tuple[int, Workspace]] = {}  # the same, with the id of the capture that they belong to


def _workspace(index: int, stream: int) -> Workspace:
    """Scratch memory for products, its counters zero: one for each device and stream.

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
    """The driver's number for the capture that `stream` takes part in; unique in the process."""
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
) -> T:  # fmt: skip
    """a [..., in_features] · W + bias → [..., out_features], in a's dtype (float16 or bfloat16), accumulated in fp32.

    `a`'s rows may be a strided view (a slice of columns) as long as their stride is a multiple of 8 elements; other
    layouts are copied first, as are the activations of a layer with act-order, in another order of columns. With many
    rows, on Hopper from 65 on, weights are rounded to a's dtype once, as `dequantize` does, unless they have one group
    of scales; with few rows they are not rounded. The same inputs give the same bits on every run. Raises TypeError and
    ValueError for arguments that do not fit, DeviceError when the kernels cannot run.
    """
    return _product(_layer(B, s, zeros, perm, bits, in_features, out_features), a, bias, variant)


def matmul(
    a: T, B: T, s: T, bias: T | None = None, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
) -> T:  # fmt: skip
    """The faster of `gemm` and dequantize + torch.matmul, chosen by shape."""
    layer = _layer(B, s, zeros, perm, bits, in_features, out_features)
    M = a.numel() // layer.in_features
    pays = layer.dequantizing_pays.get(M)
    if pays is None:
        pays = layer.dequantizing_pays[M] = M > 0 and _choose(layer.kernels, layer.weights, M, layer.index)
    if not pays:
        return _product(layer, a, bias, 0)
    _check_activations(a, bias, layer.in_features, layer.out_features)
    if a.get_device() != layer.index:
        raise ValueError(f"a is on {a.device}; it should be on {layer.device}, like B")
    _check_memory(layer.device, bias=bias)
    W = _dequantize(layer, a.dtype)
    if bias is None:
        return torch.matmul(a, W)
    return torch.addmm(bias, a.reshape(-1, layer.in_features), W).view(*a.shape[:-1], layer.out_features)


def _product(layer: _Layer, a: T, bias: T | None, variant: int) -> T:
    index, in_features, shape, dtype = layer.index, layer.in_features, a.shape, _DTYPES.get(a.dtype)
    if dtype is None or not shape or shape[-1] != in_features or bias is not None:
        _check_activations(a, bias, in_features, layer.out_features)
    if a.get_device() != index:
        raise ValueError(f"a is on {a.device}; it should be on {layer.device}, like B")
    if bias is not None:
        _check_memory(layer.device, bias=bias)
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
        _run(
            layer.kernels, "marlin_cuda_gather",
            rows.data_ptr(), layer.perm, gathered.data_ptr(), M, rows.stride(0), in_features, layer.K, index, stream,
        )  # fmt: skip
        address, lda, weights = gathered.data_ptr(), layer.K, layer.gathered
    _, workspace, nbytes = _workspace(index, stream)
    status = layer.kernels.marlin_cuda_gemm(
        weights,
        PRODUCT.pack(
            address, 0 if bias is None else bias.data_ptr(), out.data_ptr(), workspace, nbytes, stream, M, lda, dtype,
            index, variant, 0,
        ),
    )  # fmt: skip
    if status:
        where = f"M = {M}, N = {layer.N}, K = {layer.K}"
        raise RuntimeError(f"gemm of {where}: {_text(layer.kernels, status)} ({status})")
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
    """Whether dequantizing and cuBLAS are expected to be faster than the kernel for this shape on GPU `index`."""
    G = K // group_size if group_size > 0 and K % group_size == 0 else 1
    return _choose(_ready(index), Weights(None, None, zeros or None, None, K, N, G, K, N, bits, 0), M, index)


def _choose(lib: ctypes.CDLL, weights: Weights, M: int, index: int) -> bool:
    answer = lib.marlin_cuda_choose(weights, M, index)
    if answer not in (USE_GEMM, USE_DEQUANTIZE):
        raise RuntimeError(f"marlin_cuda_choose: {_text(lib, answer)} ({answer})")
    return bool(answer == USE_DEQUANTIZE)


def repack(qweight: T, *, bits: int = 4) -> T:
    """GPTQ's `qweight` [K bits/32, N] → Marlin's `B` [K/16, N bits/2], both int32 on the GPU."""
    K, N = _stored_size("qweight", qweight, bits, gptq=True)
    _check_memory(qweight.device, qweight=qweight)
    B = torch.empty((K // TILE_K, N * TILE_K // pack_factor(bits)), dtype=torch.int32, device=qweight.device)
    _launch("marlin_cuda_repack", qweight, B, K, N, bits)
    return B


def unpack(B: T, *, bits: int = 4) -> T:
    """Marlin's `B` [K/16, N bits/2] → GPTQ's `qweight` [K bits/32, N]: the inverse of `repack`."""
    K, N = _stored_size("B", B, bits)
    _check_memory(B.device, B=B)
    qweight = torch.empty((K // pack_factor(bits), N), dtype=torch.int32, device=B.device)
    _launch("marlin_cuda_unpack", B, qweight, K, N, bits)
    return qweight


def _launch(function: str, source: T, target: T, K: int, N: int, bits: int) -> None:
    index = source.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    _run(_ready(index), function, source.data_ptr(), target.data_ptr(), K, N, bits, index, stream)


def dequantize(
    B: T, s: T, dtype: torch.dtype = torch.float16, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
) -> T:  # fmt: skip
    """W [in_features, out_features] = (code - zero) · scale in `dtype` (float16 or bfloat16), rounded once to nearest
    even; rows in the source's order."""
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {_name(dtype)}; it should be float16 or bfloat16")
    return _dequantize(_layer(B, s, zeros, perm, bits, in_features, out_features), dtype)


def _dequantize(layer: _Layer, dtype: torch.dtype) -> T:
    W = torch.empty((layer.in_features, layer.out_features), dtype=dtype, device=layer.device)
    stream = torch._C._cuda_getCurrentRawStream(layer.index)
    _run(
        layer.kernels, "marlin_cuda_dequantize", layer.weights, W.data_ptr(), _DTYPES[dtype], layer.index, stream
    )  # fmt: skip
    return W


# ---- Operators ----

_operators = torch_library.Library("marlin_convert", "DEF")  # type: ignore[no-untyped-call]
_LAYER = "Tensor? zeros=None, Tensor? perm=None, *, int bits=4, int? in_features=None, int? out_features=None"
for _signature in (
    f"gemm(Tensor a, Tensor B, Tensor s, Tensor? bias=None, {_LAYER}, int variant=0) -> Tensor",
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
) -> T:  # fmt: skip
    _, _, _, rows, columns = _sizes(B, s, zeros, perm, bits, in_features, out_features)
    _check_activations(a, bias, rows, columns)
    return a.new_empty((*a.shape[:-1], columns))


@torch_library.register_fake("marlin_convert::repack", lib=_operators)  # type: ignore[untyped-decorator]
def _(qweight: T, *, bits: int = 4) -> T:
    K, N = _stored_size("qweight", qweight, bits, gptq=True)
    return qweight.new_empty((K // TILE_K, N * TILE_K // pack_factor(bits)))


@torch_library.register_fake("marlin_convert::unpack", lib=_operators)  # type: ignore[untyped-decorator]
def _(B: T, *, bits: int = 4) -> T:
    K, N = _stored_size("B", B, bits)
    return B.new_empty((K // pack_factor(bits), N))


@torch_library.register_fake("marlin_convert::dequantize", lib=_operators)  # type: ignore[untyped-decorator]
def _(
    B: T, s: T, dtype: torch.dtype, zeros: T | None = None, perm: T | None = None, *,
    bits: int = 4, in_features: int | None = None, out_features: int | None = None,
) -> T:  # fmt: skip
    _, _, _, rows, columns = _sizes(B, s, zeros, perm, bits, in_features, out_features)
    return B.new_empty((rows, columns), dtype=dtype)
