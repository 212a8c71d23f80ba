"""The only door to compiled code: packing, unpacking, comparing and multiplying, on numpy arrays.

The work is done by the native CPU library `_cpu.so` (`kernels/cpu`), loaded on first use. Where it is missing, the same
functions run through the torch twin in `repack.py`: slow, but correct. `describe()` says which of the two it is. Set
MARLIN_CONVERT_NO_NATIVE=1 in the environment to force the twin.

Arrays are numpy arrays, C-contiguous; they need not be aligned, so that views into a mapped file will do, and inputs
may be read-only. K and N are read off the shapes; the names are those of `layout.py`. A block of a layer's rows that
starts and ends at a multiple of 16 rows is as good as a layer. Everything here is thread-safe and releases the GIL.

TypeError is raised for a wrong type or dtype, ValueError for a wrong shape or value; both name the argument.
"""

from __future__ import annotations

import ctypes
import operator
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import layout

if TYPE_CHECKING:
    from torch import Tensor

Int32Array = NDArray[np.int32]
Float16Array = NDArray[np.float16]
Float32Array = NDArray[np.float32]
_Prototype = tuple[Any, list[Any]]

ABI_VERSION = 1  # MARLIN_CPU_ABI_VERSION of kernels/marlin.h
NO_NATIVE = "MARLIN_CONVERT_NO_NATIVE"
MAX_THREADS = 1024
LIBRARY = Path(__file__).with_name("_cpu.so")

# MARLIN_ISA_* of kernels/marlin.h, lowest first.
_ISAS = {"plain": 1, "avx2": 2, "avx512": 3}
_ISA_TITLES = {"plain": "plain C++", "avx2": "AVX2", "avx512": "AVX-512"}
_ISA_AUTO = 0

# MARLIN_ERROR_* of kernels/marlin.h.
_ERRORS = {1: "a null pointer", 2: "sizes that do not fit", 3: "an instruction set that this CPU lacks"}

# The prototypes of kernels/marlin.h: (result, arguments).
_pointer_t, _size_t, _int_t = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_REPACKING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_size_t] * 2, *[_int_t] * 2])
_DEQUANTIZING: _Prototype = (_int_t, [*[_pointer_t] * 3, *[_size_t] * 3, *[_int_t] * 2])
_PRODUCT: _Prototype = (
    _int_t,
    [_pointer_t, *[_size_t] * 2, *[_pointer_t] * 3, *[_size_t] * 5, *[_int_t] * 2],
)
_PROTOTYPES: dict[str, _Prototype] = {
    "marlin_cpu_best_isa": (_int_t, []),
    "marlin_cpu_pack": _REPACKING,
    "marlin_cpu_unpack": _REPACKING,
    "marlin_cpu_first_difference": (_size_t, [*[_pointer_t] * 2, _size_t]),
    "marlin_cpu_dequantize_gptq": _DEQUANTIZING,
    "marlin_cpu_dequantize_marlin": _DEQUANTIZING,
    "marlin_cpu_matmul_gptq": _PRODUCT,
    "marlin_cpu_matmul_marlin": _PRODUCT,
}


# ---- What there is ----


def native_available() -> bool:
    """Whether the native library does the work, and not the torch twin."""
    return isinstance(_backend(), _Native)


def describe() -> str:
    """One line for the user: what does the work, and if it is the twin, why and what to do about it."""
    backend = _backend()
    if isinstance(backend, _Native):
        return f"native CPU library ({_ISA_TITLES[backend.isas[-1]]})"
    return f"torch twin: {backend.reason}"


def available_isas() -> tuple[str, ...]:
    """The values of `isa` that work here, slowest first; () if the twin does the work."""
    backend = _backend()
    return backend.isas if isinstance(backend, _Native) else ()


# ---- Packing ----


def pack(qweight: Int32Array, out: Int32Array | None = None, *, threads: int = 1, isa: str | None = None) -> Int32Array:
    """GPTQ `qweight` int32 [K/8, N] -> Marlin `B` int32 [K/16, 2N].

    `out`, if given, receives the result and is returned. `threads` is the most to use; `isa` is "plain", "avx2" or
    "avx512" (see `available_isas`), by default the fastest that this CPU has.
    """
    K, N = _gptq_size(qweight)
    out = _output(out, layout.b_shape(K, N), qweight)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call("marlin_cpu_pack", _pointer(qweight), _pointer(out), K, N, threads, isa_code)
    else:
        from . import repack

        out[...] = _array(repack.gptq_to_marlin(_tensor(qweight)))
    return out


def unpack(B: Int32Array, out: Int32Array | None = None, *, threads: int = 1, isa: str | None = None) -> Int32Array:
    """Marlin `B` int32 [K/16, 2N] -> GPTQ `qweight` int32 [K/8, N]: the inverse of `pack`."""
    K, N = _marlin_size(B)
    out = _output(out, layout.qweight_shape(K, N), B)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call("marlin_cpu_unpack", _pointer(B), _pointer(out), K, N, threads, isa_code)
    else:
        from . import repack

        out[...] = _array(repack.marlin_to_gptq(_tensor(B)))
    return out


def first_difference(a: Int32Array, b: Int32Array) -> int | None:
    """Flat index of the first element in which two int32 arrays of one shape differ; None if they are equal."""
    _check_array(a, "a", np.int32)
    _check_array(b, "b", np.int32)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; they should be equal")
    backend = _backend()
    if isinstance(backend, _Native):
        index = backend.first_difference(_pointer(a), _pointer(b), a.size)
        return None if index < 0 else index
    different = np.flatnonzero(a.reshape(-1) != b.reshape(-1))
    return int(different[0]) if different.size else None


# ---- Weights as numbers ----


def dequantize_gptq(
    qweight: Int32Array, scales: Float16Array, *, threads: int = 1, isa: str | None = None
) -> Float16Array:
    """W float16 [K, N] = (code - 8) * scale, rounded once; `scales` float16 [G, N]."""
    K, N = _gptq_size(qweight)
    G = _check_groups(scales, "scales", K, N)
    out = np.empty((K, N), np.float16)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call(
            "marlin_cpu_dequantize_gptq", _pointer(qweight), _pointer(scales), _pointer(out), K, N, G, threads, isa_code
        )
        return out
    from . import repack

    return _array(repack.dequantize_gptq(_tensor(qweight), _tensor(scales)))


def dequantize_marlin(B: Int32Array, s: Float16Array, *, threads: int = 1, isa: str | None = None) -> Float16Array:
    """W float16 [K, N] of a Marlin layer; `s` float16 [G, N] in Marlin's order of columns."""
    K, N = _marlin_size(B)
    G = _check_groups(s, "s", K, N)
    out = np.empty((K, N), np.float16)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call(
            "marlin_cpu_dequantize_marlin", _pointer(B), _pointer(s), _pointer(out), K, N, G, threads, isa_code
        )
        return out
    from . import repack

    return _array(repack.dequantize_marlin(_tensor(B), _tensor(s)))


def matmul_gptq(
    x: Float32Array,
    qweight: Int32Array,
    scales: Float16Array,
    y: Float32Array,
    *,
    k0: int = 0,
    rows_per_group: int,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """y += x[:, k0 : k0 + kb] @ W_block: the share of a block of rows in a layer's product, in place.

    `qweight` int32 [kb/8, N] holds rows k0 .. k0 + kb of the layer; x float32 [M, K] and `scales` float16
    [G, N] are the whole layer's, with G * rows_per_group == K; y is float32 [M, N]. The weights are rounded to fp16 as
    by `dequantize_gptq`, products and sums are fp32. The result does not depend on `threads`.
    """
    kb, N = _gptq_size(qweight)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    _check_product(x, scales, "scales", y, k0, kb, N, rows_per_group)
    _matmul("marlin_cpu_matmul_gptq", x, qweight, scales, y, k0, kb, rows_per_group, threads, isa)


def matmul_marlin(
    x: Float32Array,
    B: Int32Array,
    s: Float16Array,
    y: Float32Array,
    *,
    k0: int = 0,
    rows_per_group: int,
    threads: int = 1,
    isa: str | None = None,
) -> None:
    """As `matmul_gptq`, of a block `B` int32 [kb/16, 2N] with the layer's `s` float16 [G, N] in Marlin's order.

    The native code decodes `B` on its own, and not by way of `unpack`.
    """
    kb, N = _marlin_size(B)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    _check_product(x, s, "s", y, k0, kb, N, rows_per_group)
    _matmul("marlin_cpu_matmul_marlin", x, B, s, y, k0, kb, rows_per_group, threads, isa)


def _matmul(
    function: str,
    x: Float32Array,
    weights: Int32Array,
    scales: Float16Array,
    y: Float32Array,
    k0: int,
    kb: int,
    rows_per_group: int,
    threads: int,
    isa: str | None,
) -> None:
    (M, K), N, G = x.shape, y.shape[1], scales.shape[0]
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        operands = (_pointer(x), M, K, _pointer(weights), _pointer(scales), _pointer(y))
        backend.call(function, *operands, k0, kb, N, G, rows_per_group, threads, isa_code)
        return
    from . import repack

    if function == "marlin_cpu_matmul_gptq":
        codes, natural = repack.unpack_gptq(_tensor(weights)), _tensor(scales)
    else:
        codes, natural = repack.unpack_marlin(_tensor(weights)), repack.unpermute_scales(_tensor(scales))
    # A block may begin or end within a group: give each of its rows the scales that are its own.
    own = natural.repeat_interleave(rows_per_group, dim=0)[k0 : k0 + kb]
    y += _array(repack.matmul(_tensor(x)[:, k0 : k0 + kb], repack.dequantize(codes, own)))


# ---- The library ----


@dataclass(frozen=True)
class _Native:
    """The loaded library."""

    library: ctypes.CDLL
    isas: tuple[str, ...]

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:  # the arguments were checked, so this is a bug in this file
            raise RuntimeError(f"{function} failed with code {code}: {_ERRORS.get(code, 'unknown')}")

    def first_difference(self, a: ctypes.c_void_p, b: ctypes.c_void_p, count: int) -> int:
        return int(self.library.marlin_cpu_first_difference(a, b, count))


@dataclass(frozen=True)
class _Twin:
    """No library, and why."""

    reason: str


_loaded: _Native | _Twin | None = None
_loading = threading.Lock()


def _backend() -> _Native | _Twin:
    """What does the work. The library is loaded once; the environment variable is heeded at each call."""
    global _loaded
    if os.environ.get(NO_NATIVE, "") not in ("", "0"):
        return _Twin(f"{NO_NATIVE} is set")
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load(LIBRARY)
    return _loaded


def _load(path: Path) -> _Native | _Twin:
    name = f"{path.parent.name}/{path.name}"
    if not path.exists():
        return _Twin(f"{name} is not built: run pip install -e .")
    try:
        library = ctypes.CDLL(str(path))
        version = library.marlin_cpu_abi_version()
    except (OSError, AttributeError) as error:
        return _Twin(f"{name} cannot be loaded ({error}): rebuild it with pip install -e .")
    if version != ABI_VERSION:
        return _Twin(f"{name} has ABI version {version}, this package wants {ABI_VERSION}: run pip install -e . again")
    _declare(library)
    best = library.marlin_cpu_best_isa()
    return _Native(library, tuple(isa for isa, code in _ISAS.items() if code <= best))


def _declare(library: ctypes.CDLL) -> None:
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments


def _choose(threads: int, isa: str | None) -> tuple[_Native | _Twin, int]:
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads is {threads!r}; it should be an int")
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads is {threads}; it should be 1..{MAX_THREADS}")
    backend = _backend()
    if isa is None:
        return backend, _ISA_AUTO
    if isa not in _ISAS:
        raise ValueError(f"isa is {isa!r}; it should be one of {', '.join(_ISAS)}")
    if isinstance(backend, _Twin):
        raise ValueError(f"isa is {isa!r}, but the native library is not in use ({backend.reason})")
    if isa not in backend.isas:
        raise ValueError(f"isa is {isa!r}; this CPU has {', '.join(backend.isas)}")
    return backend, _ISAS[isa]


# ---- Arguments ----


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _tensor(array: NDArray[Any]) -> Tensor:
    import torch

    # torch wants aligned, writable memory; the twin is slow anyway.
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.contiguous().numpy())


def _check_array(array: Any, name: str, dtype: Any, ndim: int | None = None) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it should be a numpy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it should be {np.dtype(dtype)}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it should have {ndim} dimensions")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; it should be C-contiguous")


def _gptq_size(qweight: Int32Array) -> tuple[int, int]:
    """(K, N) of `qweight` int32 [K/8, N]."""
    _check_array(qweight, "qweight", np.int32, 2)
    return _whole_tiles(qweight, "qweight", qweight.shape[0] * layout.PACK_FACTOR, qweight.shape[1])


def _marlin_size(B: Int32Array) -> tuple[int, int]:
    """(K, N) of `B` int32 [K/16, 2N]."""
    _check_array(B, "B", np.int32, 2)
    if B.shape[1] % 2:
        raise ValueError(f"B has shape {B.shape}; it should be [K/16, 2N]")
    return _whole_tiles(B, "B", B.shape[0] * layout.TILE_K, B.shape[1] // 2)


def _whole_tiles(array: NDArray[Any], name: str, K: int, N: int) -> tuple[int, int]:
    try:
        layout.check_tiles(K, N)
    except ValueError as error:
        raise ValueError(f"{name} has shape {array.shape}: {error}") from None
    return K, N


def _output(out: Int32Array | None, shape: tuple[int, int], source: Int32Array) -> Int32Array:
    if out is None:
        return np.empty(shape, np.int32)
    _check_array(out, "out", np.int32)
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; it should be {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; it should be writable")
    if np.may_share_memory(out, source):
        raise ValueError("out overlaps the input; it should be memory of its own")
    return out


def _check_scales(scales: Float16Array, name: str, N: int) -> int:
    _check_array(scales, name, np.float16, 2)
    if scales.shape[1] != N or scales.shape[0] == 0:
        raise ValueError(f"{name} has shape {scales.shape}; it should be [G, N] with N = {N}")
    return int(scales.shape[0])


def _check_groups(scales: Float16Array, name: str, K: int, N: int) -> int:
    G = _check_scales(scales, name, N)
    if K % G or (K // G) % layout.TILE_K:
        raise ValueError(
            f"{name} has shape {scales.shape}: G = {G}; K / G should be a multiple of {layout.TILE_K}, with K = {K}"
        )
    return G


def _check_product(
    x: Float32Array,
    scales: Float16Array,
    scales_name: str,
    y: Float32Array,
    k0: int,
    kb: int,
    N: int,
    rows_per_group: int,
) -> None:
    _check_array(x, "x", np.float32, 2)
    _check_array(y, "y", np.float32, 2)
    (M, K), G = x.shape, _check_scales(scales, scales_name, N)
    if rows_per_group <= 0 or rows_per_group % layout.TILE_K:
        raise ValueError(f"rows_per_group is {rows_per_group}; it should be a positive multiple of {layout.TILE_K}")
    if M == 0 or G * rows_per_group != K:
        raise ValueError(
            f"x has shape {x.shape}; it should be [M, K] with K = G * rows_per_group = {G * rows_per_group}"
        )
    if k0 < 0 or k0 % layout.TILE_K or k0 + kb > K:
        raise ValueError(
            f"k0 is {k0}; it should be a multiple of {layout.TILE_K} and leave room for {kb} rows in K = {K}"
        )
    if y.shape != (M, N):
        raise ValueError(f"y has shape {y.shape}; it should be {(M, N)}")
    if not y.flags.writeable:
        raise ValueError("y is read-only; it should be writable")
    if np.may_share_memory(x, y):
        raise ValueError("y overlaps x; it should be memory of its own")
