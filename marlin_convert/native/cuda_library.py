"""The CUDA library (`_cuda.so`) through ctypes: its structures and constants, loading it, its GPUs."""

from __future__ import annotations

import ctypes
import os
import struct
from functools import cache
from pathlib import Path

import torch

from ..device import MIN_CAPABILITY, Device, cuda_devices
from ..errors import INSTALL, DeviceError

#: The library's path; MARLIN_CUDA_LIBRARY names another build, for comparison.
LIBRARY = Path(os.environ.get("MARLIN_CUDA_LIBRARY") or Path(__file__).parents[1] / "_cuda.so")

# MARLIN_CUDA_* of kernels/marlin_cuda.h; a test compares them.
ABI_VERSION = 7
K_MULTIPLE = 64
N_MULTIPLE = 64
GROUP_SIZE = 128
COUNTER_BYTES = 8192
USE_GEMM, USE_DEQUANTIZE = 0, 1
MOST_CLUSTER, STREAM_K, DATA_PARALLEL = 8, 9, 10  # splits of `variant`
BATCH_INVARIANT = 1 << 20  # a variant
#: Numbers of the types that activations, results and scales may have.
DTYPES = {torch.float16: 0, torch.bfloat16: 1}
GROUP_SIZES = (16, 32, 64, GROUP_SIZE)

_NO_DRIVER, _NO_DEVICE = 35, 100  # cudaErrorInsufficientDriver, cudaErrorNoDevice


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
        *((name, ctypes.c_int32) for name in ("instance", "stages", "split", "blocks", "parts", "rows")),
        *((name, ctypes.c_double) for name in ("us", "gemm_us", "dense_us")),
    )


def instances(lib: ctypes.CDLL) -> dict[str, Instance]:
    """Return the instances of the kernels in a library, by name. Needs no GPU."""
    found = [Instance() for _ in range(lib.marlin_cuda_instance_count())]
    for index, instance in enumerate(found):
        run(lib, "marlin_cuda_instance", index, ctypes.byref(instance))
    return {instance.name.decode(): instance for instance in found}


def variant(instance: int = 0, stages: int = 0, split: int = 0) -> int:
    """Return MARLIN_CUDA_VARIANT, which asks for an instance by its id, for a depth of the pipeline and a split; 0:
    any."""
    return instance | stages << 12 | split << 16


#: marlin_cuda_product_t: A, bias, C, workspace, its bytes, stream, M, lda, dtype, device, variant, early. Packed, as
#: it is faster to fill than a ctypes.Structure.
PRODUCT = struct.Struct("@PPPPNPqqiiii")


@cache
def load_library() -> ctypes.CDLL:
    """Return `_cuda.so`, loaded and checked: built, of this version, with a driver that is new enough and a GPU that
    suits.

    Raises DeviceError that says which of these is missing and what to do.
    """
    if not LIBRARY.exists():
        raise DeviceError(
            "the CUDA kernels are not built (marlin_convert/_cuda.so is missing): where nvcc, of the CUDA toolkit, and "
            f"the GPU are, run `{INSTALL}` again (MARLIN_CUDA_ARCHS=all builds without a GPU); converting and "
            "verifying need no GPU (--device cpu)."
        )
    try:
        lib = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise DeviceError(f"the CUDA kernels cannot be loaded ({error}); run `{INSTALL}` again.") from None
    try:
        version = lib.marlin_cuda_abi_version()
    except AttributeError:
        version = None
    if version != ABI_VERSION:
        raise DeviceError(
            f"marlin_convert/_cuda.so is of another version ({version}, not {ABI_VERSION}); run `{INSTALL}` again."
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
            f"CUDA does not start: {error_text(lib, status)}; converting and verifying need no GPU (--device cpu)."
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
    lib.marlin_cuda_moe.argtypes = (pointer, integer, pointer)  # pointers to structures of `moe`
    lib.marlin_cuda_moe_layout.argtypes = (pointer, integer, pointer, pointer)


def error_text(lib: ctypes.CDLL, status: int) -> str:
    text: bytes = lib.marlin_cuda_error_string(status)
    return text.decode()


def run(lib: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(lib, function)(*arguments)
    if status:
        raise RuntimeError(f"{function}: {error_text(lib, status)} ({status})")


@cache
def device_info(index: int) -> DeviceInfo:
    """Return what the library knows of GPU `index`. Raises DeviceError if Marlin cannot run on it."""
    lib, info = load_library(), DeviceInfo()
    run(lib, "marlin_cuda_device_info", index, ctypes.byref(info))
    capability = (info.capability_major, info.capability_minor)
    if capability < MIN_CAPABILITY:
        needed = ".".join(map(str, MIN_CAPABILITY))
        raise DeviceError(
            f"cuda:{index} ({info.name.decode()}) has compute capability {'.'.join(map(str, capability))}; "
            f"Marlin needs {needed} or newer."
        )
    return info


def available() -> bool:
    """Tell whether the kernels can run here: library, driver and a GPU of compute capability 8.0 or newer are there."""
    try:
        load_library()
        return torch.cuda.is_available() and any(d.suits_marlin for d in cuda_devices())
    except DeviceError:
        return False


def torch_device(device: Device) -> torch.device:
    """Return the torch device of `device`, checked to be one that the kernels run on."""
    load_library()
    if not torch.cuda.is_available():
        raise DeviceError(
            f"this torch ({torch.__version__}) was built without CUDA or does not work with the driver; "
            "install a CUDA build of torch; converting and verifying need no GPU (--device cpu)."
        )
    device_info(device.index)
    return torch.device("cuda", device.index)
