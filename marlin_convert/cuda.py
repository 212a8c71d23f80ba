"""The only door to the bundled CUDA kernels (`_cuda.so`, sources in `kernels/cuda`): torch tensors in and out.

    gemm(a, B, s, bias)      C [M, N] = a [M, K] · W + bias, fp16 or bf16, accumulated in fp32
    repack(qweight)          GPTQ → Marlin, bit for bit; unpack(B) is its inverse
    dequantize(B, s, dtype)  W [K, N], rounded once
    matmul(a, B, s, bias)    gemm, or dequantize and torch.matmul where that is faster: what a model calls

All but `matmul` are also torch operators (`torch.ops.marlin_convert.…`) with fake implementations, so that
torch.compile and CUDA graphs take them; on eager paths the Python functions are quicker. Arguments are checked here,
once; messages name the argument, what it is and what it should be. Names and shapes are those of `layout`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TypeAlias

import torch

from .device import MIN_CAPABILITY, Device, cuda_devices
from .errors import DeviceError
from .layout import PACK_FACTOR, TILE_K

#: Where the library is; MARLIN_CUDA_LIBRARY names another one, to compare builds.
LIBRARY = Path(os.environ.get("MARLIN_CUDA_LIBRARY") or Path(__file__).with_name("_cuda.so"))

# MARLIN_CUDA_* of kernels/marlin_cuda.h; a test compares them.
ABI_VERSION = 1
K_MULTIPLE = 64
N_MULTIPLE = 64
GROUP_SIZE = 128
COUNTER_BYTES = 8192
USE_GEMM, USE_DEQUANTIZE = 0, 1
_DTYPES = {torch.float16: 0, torch.bfloat16: 1}

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


# ---- The library ----


@cache
def library() -> ctypes.CDLL:
    """`_cuda.so`, loaded and checked: built, of this version, with a driver that is new enough and a GPU that suits.

    Raises DeviceError that says which of these is missing and what to do.
    """
    if not LIBRARY.exists():
        raise DeviceError(
            "the CUDA kernels are not built (marlin_convert/_cuda.so is missing): install the CUDA toolkit (nvcc) and "
            "run `pip install .` again, or use --device cpu."
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
            "(13 needs driver R580 or newer): update it, build with an older toolkit, or use --device cpu."
        )
    if status == _NO_DEVICE or (status == 0 and count.value == 0):
        raise DeviceError("there is no NVIDIA GPU; use --device cpu.")
    if status:
        raise DeviceError(f"CUDA does not start: {_text(lib, status)}; use --device cpu.")
    return lib


def _declare(lib: ctypes.CDLL) -> None:
    pointer, i64, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int
    lib.marlin_cuda_error_string.restype = ctypes.c_char_p
    lib.marlin_cuda_gemm_workspace_bytes.restype = size
    lib.marlin_cuda_gemm_workspace_bytes.argtypes = (i64, i64, i64, integer)
    lib.marlin_cuda_choose.argtypes = (i64, i64, i64, integer)
    lib.marlin_cuda_device_info.argtypes = (integer, ctypes.POINTER(DeviceInfo))
    lib.marlin_cuda_gemm.argtypes = (
        *(pointer,) * 6, size, *(i64,) * 5, integer, integer, pointer, integer
    )  # fmt: skip
    lib.marlin_cuda_repack.argtypes = lib.marlin_cuda_unpack.argtypes = (pointer, pointer, i64, i64, integer, pointer)
    lib.marlin_cuda_dequantize.argtypes = (pointer, pointer, pointer, i64, i64, i64, integer, integer, pointer)
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
    lib, info = library(), DeviceInfo()
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
        library()
        return torch.cuda.is_available() and any(d.suits_marlin for d in cuda_devices())
    except DeviceError:
        return False


def torch_device(device: Device) -> torch.device:
    """The torch device of `device`, checked to be one that the kernels run on."""
    library()
    if not torch.cuda.is_available():
        raise DeviceError(
            f"this torch ({torch.__version__}) was built without CUDA or does not work with the driver; "
            "install a CUDA build of torch, or use --device cpu."
        )
    device_info(device.index)
    return torch.device("cuda", device.index)


# ---- Arguments ----


def _check(name: str, tensor: T, dtypes: tuple[torch.dtype, ...], dims: int = 2) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it should be {wanted}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it should have {dims} dimensions")


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


def _marlin_size(B: T, s: T) -> tuple[int, int, int]:
    """(K, N, G) of a layer, its shapes checked."""
    _check("B", B, (torch.int32,))
    _check("s", s, (torch.float16,))
    K, N, G = B.shape[0] * TILE_K, B.shape[1] * PACK_FACTOR // TILE_K, s.shape[0]
    if K == 0 or K % K_MULTIPLE or N == 0 or N % N_MULTIPLE or B.shape[1] * PACK_FACTOR % TILE_K:
        raise ValueError(f"B has shape {tuple(B.shape)}, so K = {K} and N = {N}; both should be multiples of 64")
    if s.shape[1] != N or G not in (1, K // GROUP_SIZE) or (G > 1 and K % GROUP_SIZE):
        raise ValueError(f"s has shape {tuple(s.shape)}; it should be [1, {N}] or [{K // GROUP_SIZE}, {N}]")
    return K, N, G


def _check_gemm(a: T, B: T, s: T, bias: T | None) -> tuple[int, int, int]:
    K, N, G = _marlin_size(B, s)
    if a.dtype not in _DTYPES:
        raise TypeError(f"a is {str(a.dtype).removeprefix('torch.')}; it should be float16 or bfloat16")
    if a.dim() == 0 or a.shape[-1] != K:
        raise ValueError(f"a has shape {tuple(a.shape)}; its last dimension should be K = {K}")
    if bias is not None:
        if bias.dtype != a.dtype:
            raise TypeError(f"bias is {str(bias.dtype).removeprefix('torch.')}; it should be of a's dtype")
        if tuple(bias.shape) != (N,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it should be [{N}]")
    return K, N, G


# ---- The functions ----

_workspaces: dict[tuple[int, int], T] = {}
_captured: dict[tuple[int, int], tuple[int, T]] = {}  # the same, with the id of the capture that they belong to


def _workspace(device: torch.device, stream: int, nbytes: int) -> T:
    """Scratch memory for a product, its counters zero: one for each device and stream, grown when needed.

    While a CUDA graph is captured, memory must come from the graph's own pool and be zeroed by the graph: once for
    all products that it captures on a stream, since each leaves the counters at zero.
    """
    key = (device.index, stream)
    if torch.cuda.is_current_stream_capturing():
        capture, (known, captured) = _capture_id(stream), _captured.get(key, (None, None))
        if captured is None or known != capture or captured.numel() < nbytes:
            captured = torch.empty(nbytes, dtype=torch.uint8, device=device)
            captured[:COUNTER_BYTES].zero_()
            _captured[key] = (capture, captured)
        return captured
    workspace = _workspaces.get(key)
    if workspace is None or workspace.numel() < nbytes:
        workspace = _workspaces[key] = torch.zeros(nbytes, dtype=torch.uint8, device=device)
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


def gemm(a: T, B: T, s: T, bias: T | None = None, *, variant: int = 0) -> T:
    """a [..., K] · W + bias → [..., N], in a's dtype (float16 or bfloat16), accumulated in fp32.

    `a`'s rows may be a strided view (a slice of columns) as long as their stride is a multiple of 8 elements; other
    layouts are copied first. The same inputs give the same bits on every run. Raises TypeError and ValueError for
    arguments that do not fit, DeviceError when the kernels cannot run.
    """
    K, N, G = _check_gemm(a, B, s, bias)
    device = a.device
    if device.type != "cuda":
        raise ValueError(f"a is on {device}; it should be on a CUDA device")
    _check_memory(device, B=B, s=s, bias=bias)
    rows = a if a.dim() == 2 else a.reshape(-1, K)
    if rows.stride(-1) != 1 or rows.stride(0) % 8 or rows.stride(0) < K or rows.data_ptr() % 16:
        rows = rows.contiguous()
        if rows.data_ptr() % 16:
            rows = rows.clone()
    M, index = rows.shape[0], device.index
    out = torch.empty((*a.shape[:-1], N), dtype=a.dtype, device=device)
    if M == 0:
        return out
    lib, stream = _ready(index), torch._C._cuda_getCurrentRawStream(index)
    nbytes = _workspace_bytes(M, N, K, index)
    workspace = _workspace(device, stream, nbytes)
    status = lib.marlin_cuda_gemm(
        rows.data_ptr(), B.data_ptr(), s.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        workspace.data_ptr(), workspace.numel(), M, N, K, G, max(rows.stride(0), K), _DTYPES[a.dtype], index, stream,
        variant,
    )  # fmt: skip
    if status:
        raise RuntimeError(f"gemm of M = {M}, N = {N}, K = {K}: {_text(lib, status)} ({status})")
    return out


@cache
def _ready(index: int) -> ctypes.CDLL:
    device_info(index)
    return library()


@cache
def _workspace_bytes(M: int, N: int, K: int, index: int) -> int:
    return max(COUNTER_BYTES, int(library().marlin_cuda_gemm_workspace_bytes(M, N, K, index)))


@cache
def dequantizing_pays(M: int, N: int, K: int, index: int) -> bool:
    """Whether dequantizing and cuBLAS are expected to be faster than the kernel for this shape on GPU `index`."""
    return bool(_ready(index).marlin_cuda_choose(M, N, K, index) == USE_DEQUANTIZE)


def matmul(a: T, B: T, s: T, bias: T | None = None) -> T:
    """The faster of `gemm` and dequantize + torch.matmul, chosen by shape: a [..., K] · W + bias → [..., N]."""
    K, N, _ = _check_gemm(a, B, s, bias)
    M = a.numel() // K
    if M and a.device.type == "cuda" and dequantizing_pays(M, N, K, a.device.index):
        W = dequantize(B, s, a.dtype)
        return torch.matmul(a, W) if bias is None else torch.addmm(bias, a.reshape(-1, K), W).view(*a.shape[:-1], N)
    return gemm(a, B, s, bias)


def _packed(name: str, tensor: T, shape_for: str) -> tuple[int, int]:
    _check(name, tensor, (torch.int32,))
    _check_memory(tensor.device, **{name: tensor})
    rows, columns = tensor.shape
    K, N = (rows * PACK_FACTOR, columns) if shape_for == "gptq" else (rows * TILE_K, columns * PACK_FACTOR // TILE_K)
    if K == 0 or K % K_MULTIPLE or N == 0 or N % N_MULTIPLE:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, so K = {K} and N = {N}; both should be multiples of 64"
        )
    return K, N


def repack(qweight: T) -> T:
    """GPTQ's `qweight` [K/8, N] → Marlin's `B` [K/16, 2N], both int32 on the GPU."""
    K, N = _packed("qweight", qweight, "gptq")
    B = torch.empty((K // TILE_K, N * TILE_K // PACK_FACTOR), dtype=torch.int32, device=qweight.device)
    _launch("marlin_cuda_repack", qweight, B, K, N)
    return B


def unpack(B: T) -> T:
    """Marlin's `B` [K/16, 2N] → GPTQ's `qweight` [K/8, N]: the inverse of `repack`."""
    K, N = _packed("B", B, "marlin")
    qweight = torch.empty((K // PACK_FACTOR, N), dtype=torch.int32, device=B.device)
    _launch("marlin_cuda_unpack", B, qweight, K, N)
    return qweight


def _launch(function: str, source: T, target: T, K: int, N: int) -> None:
    index = source.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    _run(_ready(index), function, source.data_ptr(), target.data_ptr(), K, N, index, stream)


def dequantize(B: T, s: T, dtype: torch.dtype = torch.float16) -> T:
    """W [K, N] = (code - 8) · scale in `dtype` (float16 or bfloat16), rounded once to nearest even."""
    K, N, G = _marlin_size(B, s)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {str(dtype).removeprefix('torch.')}; it should be float16 or bfloat16")
    _check_memory(B.device, B=B, s=s)
    index = B.device.index
    W = torch.empty((K, N), dtype=dtype, device=B.device)
    stream = torch._C._cuda_getCurrentRawStream(index)
    _run(
        _ready(index), "marlin_cuda_dequantize",
        B.data_ptr(), s.data_ptr(), W.data_ptr(), K, N, G, _DTYPES[dtype], index, stream,
    )  # fmt: skip
    return W


# ---- Operators ----

_operators = torch.library.Library("marlin_convert", "DEF")  # type: ignore[no-untyped-call]
_operators.define("gemm(Tensor a, Tensor B, Tensor s, Tensor? bias=None) -> Tensor")  # type: ignore[no-untyped-call]
_operators.define("repack(Tensor qweight) -> Tensor")  # type: ignore[no-untyped-call]
_operators.define("unpack(Tensor B) -> Tensor")  # type: ignore[no-untyped-call]
_operators.define("dequantize(Tensor B, Tensor s, ScalarType dtype) -> Tensor")  # type: ignore[no-untyped-call]
_operators.impl("gemm", gemm, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("repack", repack, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("unpack", unpack, "CUDA")  # type: ignore[no-untyped-call]
_operators.impl("dequantize", dequantize, "CUDA")  # type: ignore[no-untyped-call]


@torch.library.register_fake("marlin_convert::gemm", lib=_operators)  # type: ignore[untyped-decorator]
def _(a: T, B: T, s: T, bias: T | None = None) -> T:
    _, N, _ = _check_gemm(a, B, s, bias)
    return a.new_empty((*a.shape[:-1], N))


@torch.library.register_fake("marlin_convert::repack", lib=_operators)  # type: ignore[untyped-decorator]
def _(qweight: T) -> T:
    rows, N = qweight.shape
    return qweight.new_empty((rows * PACK_FACTOR // TILE_K, N * TILE_K // PACK_FACTOR))


@torch.library.register_fake("marlin_convert::unpack", lib=_operators)  # type: ignore[untyped-decorator]
def _(B: T) -> T:
    rows, words = B.shape
    return B.new_empty((rows * TILE_K // PACK_FACTOR, words * PACK_FACTOR // TILE_K))


@torch.library.register_fake("marlin_convert::dequantize", lib=_operators)  # type: ignore[untyped-decorator]
def _(B: T, s: T, dtype: torch.dtype) -> T:
    K, N, _ = _marlin_size(B, s)
    return B.new_empty((K, N), dtype=dtype)
