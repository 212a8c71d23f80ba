"""The only door to compiled code: packing, unpacking, comparing and multiplying, on numpy arrays.

The work is done by the native CPU library `_cpu.so` (`kernels/cpu`), loaded on first use. Where it is missing, the same
functions run through the torch twin in `repack.py`: slow, but correct. `describe()` says which of the two it is. In the
environment, MARLIN_CONVERT_NO_NATIVE=1 forces the twin, and MARLIN_CONVERT_ISA=plain or avx2 keeps the library from
instructions beyond that set.

Codes have 4 bits unless `bits` says 8. Scales are float16, or bf16 as uint16, numpy having no bf16; the weights are
rounded to the type of their scales, and come as the same. Zero points are uint8 [G, N], the columns in their own order;
without them the quantization is symmetric. Rows are as stored: with act-order, `arrange` sorts them, and x's columns
must be in the same order.

Arrays are numpy arrays, C-contiguous; they need not be aligned, so that views into a mapped file will do, and inputs
may be read-only. K and N are read off the shapes; the names are those of `layout.py`. A block of a layer's rows that
starts and ends at a multiple of 16 rows is as good as a layer. Everything here is thread-safe and releases the GIL.

TypeError is raised for a wrong type or dtype, ValueError for a wrong shape or value; both name the argument.
"""

from __future__ import annotations

import ctypes
import importlib.util
import operator
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, MissingPackageError
from ..formats import layout

if TYPE_CHECKING:
    from torch import Tensor

Int32Array = NDArray[np.int32]
Float16Array = NDArray[np.float16]
Float32Array = NDArray[np.float32]
#: fp16, or bf16 as uint16
ScaleArray = NDArray[Any]
_Prototype = tuple[Any, list[Any]]

ABI_VERSION = 3  # MARLIN_CPU_ABI_VERSION of kernels/marlin.h
NO_NATIVE = "MARLIN_CONVERT_NO_NATIVE"
HIGHEST_ISA = "MARLIN_CONVERT_ISA"
MAX_THREADS = 1024
LIBRARY = Path(__file__).parents[1] / "_cpu.so"

# MARLIN_ISA_* of kernels/marlin.h, lowest first.
_ISAS = {"plain": 1, "avx2": 2, "avx512": 3}
_ISA_TITLES = {"plain": "plain C++", "avx2": "AVX2", "avx512": "AVX-512"}
_ISA_AUTO = 0

# MARLIN_ERROR_* of kernels/marlin.h.
_ERRORS = {
    1: "a null pointer",
    2: "sizes that do not fit",
    3: "an instruction set that this CPU lacks",
    4: "neither 4 nor 8 bits",
}


class _Layer(ctypes.Structure):
    """marlin_cpu_layer_t."""

    _fields_ = (
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("k0", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("rows_per_group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
    )


# The prototypes of kernels/marlin.h: (result, arguments).
_pointer_t, _size_t, _int_t = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_REPACKING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_size_t] * 2, *[_int_t] * 3])
_ARRANGING: _Prototype = (_int_t, [*[_pointer_t] * 4, *[_size_t] * 5, *[_int_t] * 3])
_SORTED = [_pointer_t, _size_t, *[_pointer_t] * 3, *[_size_t] * 5, *[_int_t] * 3]
_DEQUANTIZING: _Prototype = (_int_t, [*[_pointer_t] * 2, *[_int_t] * 2])
_PRODUCT: _Prototype = (_int_t, [_pointer_t, *[_size_t] * 2, *[_pointer_t] * 2, *[_int_t] * 2])
_PROTOTYPES: dict[str, _Prototype] = {
    "marlin_cpu_best_isa": (_int_t, []),
    "marlin_cpu_pack": _REPACKING,
    "marlin_cpu_unpack": _REPACKING,
    "marlin_cpu_arrange": _ARRANGING,
    "marlin_cpu_pack_sorted": (_int_t, _SORTED),
    "marlin_cpu_compare_sorted": (_int_t, [*_SORTED, _pointer_t]),
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


def pack(
    qweight: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int = layout.BITS,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """GPTQ `qweight` int32 [K bits/32, N] -> Marlin `B` int32 [K/16, N bits/2].

    `out`, if given, receives the result and is returned. `threads` is the most to use; `isa` is "plain", "avx2" or
    "avx512" (see `available_isas`), by default the fastest that this CPU has.
    """
    K, N = _gptq_size(qweight, bits)
    out = _output(out, layout.b_shape(K, N, bits), qweight)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call("marlin_cpu_pack", _pointer(qweight), _pointer(out), K, N, bits, threads, isa_code)
    else:
        from . import repack

        out[...] = _array(repack.gptq_to_marlin(_tensor(qweight), bits))
    return out


def unpack(
    B: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int = layout.BITS,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """Marlin `B` int32 [K/16, N bits/2] -> GPTQ `qweight` int32 [K bits/32, N]: the inverse of `pack`."""
    K, N = _marlin_size(B, bits)
    out = _output(out, layout.qweight_shape(K, N, bits), B)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call("marlin_cpu_unpack", _pointer(B), _pointer(out), K, N, bits, threads, isa_code)
    else:
        from . import repack

        out[...] = _array(repack.marlin_to_gptq(_tensor(B), bits))
    return out


def arrange(
    qweight: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int,
    fill: NDArray[np.uint8],
    rows: int,
    k0: int = 0,
    perm: Int32Array | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """Rows k0 .. k0 + rows of a layer in the order in which they are stored, as GPTQ words [rows bits/32, N'].

    `qweight` int32 [K bits/32, N] is the whole layer's, K and N of any size. Row k0 + i is its row perm[k0 + i] (`perm`
    int32 [K]), or k0 + i. Rows from K and columns from N on are padding: the code `fill` uint8 [N'] of their column.
    `rows` and k0 are multiples of the codes in a word, 32 / bits. With perm, one call for many rows is quicker than
    many calls for few.
    """
    factor = layout.pack_factor(bits)
    _check_array(qweight, "qweight", np.int32, 2)
    K, N = qweight.shape[0] * factor, qweight.shape[1]
    rows, k0 = operator.index(rows), operator.index(k0)
    _check_fill(fill, K, N, bits)
    if rows <= 0 or rows % factor or k0 < 0 or k0 % factor:
        raise ValueError(f"rows is {rows} and k0 {k0}; both should be multiples of {factor}, rows positive")
    if perm is not None:
        _check_perm(perm, K)
    out = _output(out, (rows // factor, fill.size), qweight)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        where = None if perm is None else _pointer(perm)
        backend.call(
            "marlin_cpu_arrange", _pointer(qweight), where, _pointer(fill), _pointer(out),
            K, N, k0, rows, fill.size, bits, threads, isa_code,
        )  # fmt: skip
        return out
    from . import repack

    padded = (max(K, k0 + rows), fill.size)
    codes = repack.arrange(
        repack.unpack_gptq(_tensor(qweight), bits), padded, _tensor(fill), None if perm is None else _tensor(perm)
    )
    out[...] = _array(repack.pack_gptq(codes[k0 : k0 + rows], bits))
    return out


def pack_sorted(
    qweight: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int,
    perm: Int32Array,
    fill: NDArray[np.uint8],
    rows: int,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """A layer with act-order as it is stored: `pack(arrange(qweight, …))` in one pass, `B` int32 [rows/16, N' bits/2].

    `qweight` int32 [K bits/32, N] holds all rows of some of the layer's columns, and `out` the same columns of B; both
    may be views into wider arrays. `perm` int32 [K], `fill` uint8 [N'] and `rows` are as in `arrange`; rows and N' are
    whole tiles.
    """
    K, N = _sorted_size(qweight, bits, perm, fill, rows)
    shape = layout.b_shape(rows, fill.size, bits)
    out = _output(out, shape, qweight, rows_apart=True)
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        backend.call(
            "marlin_cpu_pack_sorted", _pointer(qweight), _stride(qweight), _pointer(perm), _pointer(fill),
            _pointer(out), _stride(out), K, N, rows, fill.size, bits, threads, isa_code,
        )  # fmt: skip
    else:
        from . import repack

        out[...] = _array(repack.pack_marlin(_arranged(qweight, bits, perm, fill, rows), bits))
    return out


def sorted_difference(
    B: Int32Array,
    qweight: Int32Array,
    *,
    bits: int,
    perm: Int32Array,
    fill: NDArray[np.uint8],
    threads: int = 1,
    isa: str | None = None,
) -> tuple[int, int] | None:
    """(row, column) of the first code of `B` that is not what `pack_sorted` should have made; None if there is none.

    The arguments are those of `pack_sorted`. The native code unpacks B and looks up every code of the source in it.
    """
    words = layout.TILE_K // layout.pack_factor(bits)  # of B, for a column
    _check_rows(B, "B", np.int32)
    rows = B.shape[0] * layout.TILE_K
    K, N = _sorted_size(qweight, bits, perm, fill, rows)
    if B.shape[1] != fill.size * words:
        raise ValueError(
            f"B has shape {B.shape}; it should be [rows/16, {fill.size * words}], as fill has N' = {fill.size}"
        )
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        place = ctypes.c_int64()
        backend.call(
            "marlin_cpu_compare_sorted", _pointer(qweight), _stride(qweight), _pointer(perm), _pointer(fill),
            _pointer(B), _stride(B), K, N, rows, fill.size, bits, threads, isa_code, ctypes.byref(place),
        )  # fmt: skip
        return None if place.value < 0 else divmod(place.value, fill.size)
    from . import repack

    different = repack.unpack_marlin(_tensor(B), bits) != _arranged(qweight, bits, perm, fill, rows)
    first = different.nonzero()[:1].tolist()
    return (first[0][0], first[0][1]) if first else None


def _arranged(qweight: Int32Array, bits: int, perm: Int32Array, fill: NDArray[np.uint8], rows: int) -> Tensor:
    """Codes [rows, N'] as stored, by the twin."""
    from . import repack

    return repack.arrange(repack.unpack_gptq(_tensor(qweight), bits), (rows, fill.size), _tensor(fill), _tensor(perm))


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
    qweight: Int32Array,
    scales: ScaleArray,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> ScaleArray:
    """W [K, N] = (code - zero) * scale, rounded once to the type of `scales` [G, N]; G divides K."""
    K, N = _gptq_size(qweight, bits)
    G = _check_groups(scales, "scales", zeros, K, N)
    return _dequantize("marlin_cpu_dequantize_gptq", qweight, scales, zeros, bits, (K, N, G), threads, isa)


def dequantize_marlin(
    B: Int32Array,
    s: ScaleArray,
    *,
    bits: int = layout.BITS,
    zeros: NDArray[np.uint8] | None = None,
    threads: int = 1,
    isa: str | None = None,
) -> ScaleArray:
    """W [K, N] of a Marlin layer; `s` [G, N] in Marlin's order of columns, `zeros` in their own."""
    K, N = _marlin_size(B, bits)
    G = _check_groups(s, "s", zeros, K, N)
    return _dequantize("marlin_cpu_dequantize_marlin", B, s, zeros, bits, (K, N, G), threads, isa)


def _dequantize(
    function: str,
    weights: Int32Array,
    scales: ScaleArray,
    zeros: NDArray[np.uint8] | None,
    bits: int,
    size: tuple[int, int, int],
    threads: int,
    isa: str | None,
) -> ScaleArray:
    K, N, G = size
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        out = np.empty((K, N), scales.dtype)
        layer = _layer(weights, scales, zeros, bits, 0, K, K // G)
        backend.call(function, ctypes.byref(layer), _pointer(out), threads, isa_code)
        return out
    from . import repack

    codes, natural = _decoded(function.endswith("gptq"), weights, scales, bits)
    W = repack.dequantize(codes, natural, None if zeros is None else _tensor(zeros), bits=bits)
    return _plain(W, scales)


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
    """y += x[:, k0 : k0 + kb] @ W_block: the share of a block of rows in a layer's product, in place.

    `qweight` int32 [kb bits/32, N] holds rows k0 .. k0 + kb of the layer; x float32 [M, K], `scales` and `zeros`
    [G, N] are the whole layer's, with G * rows_per_group == K; y is float32 [M, N]. The weights are rounded as by
    `dequantize_gptq`, products and sums are fp32. The result does not depend on `threads`.
    """
    kb, N = _gptq_size(qweight, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    _check_product(x, scales, "scales", zeros, y, k0, kb, N, rows_per_group)
    _matmul("marlin_cpu_matmul_gptq", x, qweight, scales, zeros, y, bits, k0, kb, rows_per_group, threads, isa)


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
    """As `matmul_gptq`, of a block `B` int32 [kb/16, N bits/2] with the layer's `s` [G, N] in Marlin's order.

    The native code decodes `B` on its own, and not by way of `unpack`.
    """
    kb, N = _marlin_size(B, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    _check_product(x, s, "s", zeros, y, k0, kb, N, rows_per_group)
    _matmul("marlin_cpu_matmul_marlin", x, B, s, zeros, y, bits, k0, kb, rows_per_group, threads, isa)


def _matmul(
    function: str,
    x: Float32Array,
    weights: Int32Array,
    scales: ScaleArray,
    zeros: NDArray[np.uint8] | None,
    y: Float32Array,
    bits: int,
    k0: int,
    kb: int,
    rows_per_group: int,
    threads: int,
    isa: str | None,
) -> None:
    M, K = x.shape
    backend, isa_code = _choose(threads, isa)
    if isinstance(backend, _Native):
        layer = _layer(weights, scales, zeros, bits, k0, kb, rows_per_group)
        backend.call(function, _pointer(x), M, K, ctypes.byref(layer), _pointer(y), threads, isa_code)
        return
    from . import repack

    codes, natural = _decoded(function.endswith("gptq"), weights, scales, bits)
    # A block may begin or end within a group: give each of its rows the scales that are its own.
    own, own_zeros = (
        None if t is None else t.repeat_interleave(rows_per_group, dim=0)[k0 : k0 + kb]
        for t in (natural, None if zeros is None else _tensor(zeros))
    )
    assert own is not None
    y += _array(repack.matmul(_tensor(x)[:, k0 : k0 + kb], repack.dequantize(codes, own, own_zeros, bits=bits)))


def _layer(
    weights: Int32Array,
    scales: ScaleArray,
    zeros: NDArray[np.uint8] | None,
    bits: int,
    k0: int,
    k: int,
    rows_per_group: int,
) -> _Layer:
    G, N = scales.shape
    return _Layer(
        _pointer(weights), _pointer(scales), None if zeros is None else _pointer(zeros), k0, k, N, G, rows_per_group,
        bits, scales.dtype == np.uint16,
    )  # fmt: skip


def _decoded(gptq: bool, weights: Int32Array, scales: ScaleArray, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as the twin has them: in the order of rows and columns."""
    import torch

    from . import repack

    natural = _tensor(scales.view(np.int16)).view(torch.bfloat16 if scales.dtype == np.uint16 else torch.float16)
    if gptq:
        return repack.unpack_gptq(_tensor(weights), bits), natural
    return repack.unpack_marlin(_tensor(weights), bits), repack.unpermute_scales(natural)


def _plain(W: Tensor, scales: ScaleArray) -> ScaleArray:
    import torch

    plain: ScaleArray = _array(W.view(torch.int16)).view(scales.dtype)
    return plain


# ---- The library ----


@dataclass(frozen=True)
class _Native:
    """The loaded library."""

    native: ctypes.CDLL
    isas: tuple[str, ...]

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.native, function)(*arguments)
        if code:  # the arguments were checked, so this is a bug in this file
            raise RuntimeError(f"{function} failed with code {code}: {_ERRORS.get(code, 'unknown')}")

    def first_difference(self, a: ctypes.c_void_p, b: ctypes.c_void_p, count: int) -> int:
        return int(self.native.marlin_cpu_first_difference(a, b, count))


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
        return _twin(f"{NO_NATIVE} is set")
    if _loaded is None:
        with _loading:
            if _loaded is None:
                _loaded = _load(LIBRARY)
    return _loaded


def _twin(reason: str) -> _Twin:
    if importlib.util.find_spec("torch") is None:
        raise MissingPackageError(
            f'{reason}; what takes the native library\'s place needs torch: pip install "marlin-convert[run]".'
        )
    return _Twin(reason)


def _load(path: Path) -> _Native | _Twin:
    name = f"{path.parent.name}/{path.name}"
    if not path.exists():
        return _twin(f"{name} is not built: run pip install -e .")
    try:
        library = ctypes.CDLL(str(path))
        version = library.marlin_cpu_abi_version()
    except (OSError, AttributeError) as error:
        return _twin(f"{name} cannot be loaded ({error}): rebuild it with pip install -e .")
    if version != ABI_VERSION:
        return _twin(f"{name} has ABI version {version}, this package wants {ABI_VERSION}: run pip install -e . again")
    _declare(library)
    best = min(library.marlin_cpu_best_isa(), _highest_wanted())
    return _Native(library, tuple(isa for isa, code in _ISAS.items() if code <= best))


def _highest_wanted() -> int:
    wanted = os.environ.get(HIGHEST_ISA) or max(_ISAS, key=_ISAS.__getitem__)
    if wanted not in _ISAS:
        raise DeviceError(f"{HIGHEST_ISA} is {wanted!r}; it should be one of {', '.join(_ISAS)}.")
    return _ISAS[wanted]


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
        return backend, _ISAS[backend.isas[-1]] if isinstance(backend, _Native) else _ISA_AUTO
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


def _check_array(array: Any, name: str, dtype: Any, ndim: int | None = None, *, rows_apart: bool = False) -> None:
    """`rows_apart`: some columns of a matrix will do, each row C-contiguous."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; it should be a numpy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; it should be {np.dtype(dtype)}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} has shape {array.shape}; it should have {ndim} dimensions")
    if rows_apart and array.ndim == 2 and array.size and array[0].flags.c_contiguous and array.strides[0] > 0:
        return
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} has strides {array.strides}; it should be C-contiguous")


def _gptq_size(qweight: Int32Array, bits: int) -> tuple[int, int]:
    """(K, N) of `qweight` int32 [K bits/32, N]."""
    factor = layout.pack_factor(bits)
    _check_array(qweight, "qweight", np.int32, 2)
    return _whole_tiles(qweight, "qweight", qweight.shape[0] * factor, qweight.shape[1])


def _marlin_size(B: Int32Array, bits: int) -> tuple[int, int]:
    """(K, N) of `B` int32 [K/16, N bits/2]."""
    words = layout.TILE_K // layout.pack_factor(bits)  # for a column
    _check_array(B, "B", np.int32, 2)
    if B.shape[1] % words:
        raise ValueError(f"B has shape {B.shape}; it should be [K/16, {words}N]")
    return _whole_tiles(B, "B", B.shape[0] * layout.TILE_K, B.shape[1] // words)


def _whole_tiles(array: NDArray[Any], name: str, K: int, N: int) -> tuple[int, int]:
    try:
        layout.check_tiles(K, N)
    except ValueError as error:
        raise ValueError(f"{name} has shape {array.shape}: {error}") from None
    return K, N


def _check_rows(array: Any, name: str, dtype: Any) -> None:
    """A matrix, or some columns of one: each row C-contiguous."""
    _check_array(array, name, dtype, 2, rows_apart=True)


def _stride(matrix: NDArray[Any]) -> int:
    """Elements from a row to the next."""
    return max(
        int(matrix.strides[0]) // matrix.itemsize, int(matrix.shape[1])
    )  # numpy: any stride, where there is one row


def _check_fill(fill: NDArray[np.uint8], K: int, N: int, bits: int) -> None:
    _check_array(fill, "fill", np.uint8, 1)
    if not K or not N or fill.size < N:
        raise ValueError(f"fill has shape {fill.shape}; it should be [N'] with N' at least N = {N}")
    if int(fill.max()) >> bits:
        raise ValueError(f"fill has {fill.max()}; a code has {bits} bits")


def _check_perm(perm: Int32Array, K: int) -> None:
    _check_array(perm, "perm", np.int32, 1)
    if perm.size != K or int(perm.min()) < 0 or int(perm.max()) >= K:
        raise ValueError(f"perm has shape {perm.shape}; it should be the numbers 0 .. {K - 1} in some order")


def _sorted_size(
    qweight: Int32Array, bits: int, perm: Int32Array, fill: NDArray[np.uint8], rows: int
) -> tuple[int, int]:
    """(K, N) of `qweight` int32 [K bits/32, N], the other arguments checked."""
    _check_rows(qweight, "qweight", np.int32)
    K, N = qweight.shape[0] * layout.pack_factor(bits), qweight.shape[1]
    _check_fill(fill, K, N, bits)
    _check_perm(perm, K)
    if np.bincount(perm, minlength=K).max() > 1:
        raise ValueError(f"perm has a number twice; it should be the numbers 0 .. {K - 1} in some order")
    if operator.index(rows) < K:
        raise ValueError(f"rows is {rows}; it should be at least K = {K}")
    layout.check_tiles(rows, fill.size)
    return K, N


def _output(
    out: Int32Array | None, shape: tuple[int, int], source: Int32Array, *, rows_apart: bool = False
) -> Int32Array:
    if out is None:
        return np.empty(shape, np.int32)
    _check_array(out, "out", np.int32, rows_apart=rows_apart)
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; it should be {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; it should be writable")
    if np.may_share_memory(out, source):
        raise ValueError("out overlaps the input; it should be memory of its own")
    return out


def _check_scales(scales: ScaleArray, name: str, zeros: NDArray[np.uint8] | None, N: int) -> int:
    if isinstance(scales, np.ndarray) and scales.dtype == np.uint16:
        _check_array(scales, name, np.uint16, 2)
    else:
        _check_array(scales, name, np.float16, 2)
    if scales.shape[1] != N or scales.shape[0] == 0:
        raise ValueError(f"{name} has shape {scales.shape}; it should be [G, N] with N = {N}")
    if zeros is not None:
        _check_array(zeros, "zeros", np.uint8)
        if zeros.shape != scales.shape:
            raise ValueError(f"zeros has shape {zeros.shape}; it should be {scales.shape}, as {name}")
    return int(scales.shape[0])


def _check_groups(scales: ScaleArray, name: str, zeros: NDArray[np.uint8] | None, K: int, N: int) -> int:
    G = _check_scales(scales, name, zeros, N)
    if K % G or (K // G) % layout.TILE_K:
        raise ValueError(
            f"{name} has shape {scales.shape}: G = {G}; K / G should be a multiple of {layout.TILE_K}, with K = {K}"
        )
    return G


def _check_product(
    x: Float32Array,
    scales: ScaleArray,
    scales_name: str,
    zeros: NDArray[np.uint8] | None,
    y: Float32Array,
    k0: int,
    kb: int,
    N: int,
    rows_per_group: int,
) -> None:
    _check_array(x, "x", np.float32, 2)
    _check_array(y, "y", np.float32, 2)
    (M, K), G = x.shape, _check_scales(scales, scales_name, zeros, N)
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
