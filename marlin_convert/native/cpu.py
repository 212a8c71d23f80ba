"""The only door to compiled code: packing, unpacking, comparing and multiplying, on numpy arrays.

The work is done by the native CPU library `_cpu.so` (`kernels/cpu`), loaded on first use. Where it is missing, the same
functions run through the torch twin in `reference.py`: slow, but correct. `describe()` says which of the two it is. In
the environment, MARLIN_CONVERT_NO_NATIVE=1 forces the twin, and MARLIN_CONVERT_ISA=plain or avx2 keeps the library from
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
import operator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..formats import awq, layout
from ._checks import (
    Int32Array,
    check_array,
    check_fill,
    check_perm,
    check_rows,
    gptq_size,
    marlin_size,
    output_array,
    pointer,
    sorted_size,
    stride,
    to_numpy,
    to_torch,
)
from ._cpu_library import ISA_TITLES, Native, choose, current
from ._cpu_library import NO_NATIVE as NO_NATIVE

if TYPE_CHECKING:
    from torch import Tensor


# ---- What there is ----


def native_available() -> bool:
    """Tell whether the native library does the work, and not the torch twin."""
    return isinstance(current(), Native)


def describe() -> str:
    """Return one line for the user: what does the work, and if it is the twin, why and what to do about it."""
    backend = current()
    if isinstance(backend, Native):
        return f"native CPU library ({ISA_TITLES[backend.isas[-1]]})"
    return f"torch twin: {backend.reason}"


def available_isas() -> tuple[str, ...]:
    """Return the values of `isa` that work here, slowest first; () if the twin does the work."""
    backend = current()
    return backend.isas if isinstance(backend, Native) else ()


# ---- Packing ----


def pack(
    qweight: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int = layout.BITS,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """Turn GPTQ `qweight` int32 [K bits/32, N] into Marlin `B` int32 [K/16, N bits/2].

    `out`, if given, receives the result and is returned. `threads` is the most to use; `isa` is "plain", "avx2" or
    "avx512" (see `available_isas`), by default the fastest that this CPU has.
    """
    K, N = gptq_size(qweight, bits)
    out = output_array(out, layout.b_shape(K, N, bits), qweight)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        backend.call("marlin_cpu_pack", pointer(qweight), pointer(out), K, N, bits, threads, isa_code)
    else:
        from . import reference

        out[...] = to_numpy(reference.gptq_to_marlin(to_torch(qweight), bits))
    return out


def unpack(
    B: Int32Array,
    out: Int32Array | None = None,
    *,
    bits: int = layout.BITS,
    threads: int = 1,
    isa: str | None = None,
) -> Int32Array:
    """Turn Marlin `B` int32 [K/16, N bits/2] into GPTQ `qweight` int32 [K bits/32, N]: the inverse of `pack`."""
    K, N = marlin_size(B, bits)
    out = output_array(out, layout.qweight_shape(K, N, bits), B)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        backend.call("marlin_cpu_unpack", pointer(B), pointer(out), K, N, bits, threads, isa_code)
    else:
        from . import reference

        out[...] = to_numpy(reference.marlin_to_gptq(to_torch(B), bits))
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
    """Return rows k0 .. k0 + rows of a layer in the order in which they are stored, as GPTQ words [rows bits/32, N'].

    `qweight` int32 [K bits/32, N] is the whole layer's, K and N of any size. Row k0 + i is its row perm[k0 + i] (`perm`
    int32 [K]), or k0 + i. Rows from K and columns from N on are padding: the code `fill` uint8 [N'] of their column.
    `rows` and k0 are multiples of the codes in a word, 32 / bits. With perm, one call for many rows is quicker than
    many calls for few.
    """
    factor = layout.pack_factor(bits)
    check_array(qweight, "qweight", np.int32, 2)
    K, N = qweight.shape[0] * factor, qweight.shape[1]
    rows, k0 = operator.index(rows), operator.index(k0)
    check_fill(fill, K, N, bits)
    if rows <= 0 or rows % factor or k0 < 0 or k0 % factor:
        raise ValueError(f"rows is {rows} and k0 {k0}; both should be multiples of {factor}, rows positive")
    if perm is not None:
        check_perm(perm, K)
    out = output_array(out, (rows // factor, fill.size), qweight)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        where = None if perm is None else pointer(perm)
        backend.call(
            "marlin_cpu_arrange", pointer(qweight), where, pointer(fill), pointer(out),
            K, N, k0, rows, fill.size, bits, threads, isa_code,
        )  # fmt: skip
        return out
    from . import reference

    padded = (max(K, k0 + rows), fill.size)
    codes = reference.arrange(
        reference.unpack_gptq(to_torch(qweight), bits), padded, to_torch(fill), None if perm is None else to_torch(perm)
    )
    out[...] = to_numpy(reference.pack_gptq(codes[k0 : k0 + rows], bits))
    return out


def transpose(a: Int32Array, out: Int32Array, *, threads: int = 1, isa: str | None = None) -> Int32Array:
    """Exchange the rows and columns of `a` int32 [rows, columns]: into `out` [columns, rows], which is returned."""
    check_array(a, "a", np.int32, 2)
    out = output_array(out, (a.shape[1], a.shape[0]), a)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native) and a.size:
        backend.call("marlin_cpu_transpose", pointer(a), pointer(out), *a.shape, threads, isa_code)
    else:
        out[...] = a.T
    return out


def awq_to_gptq(words: Int32Array, out: Int32Array, *, threads: int = 1, isa: str | None = None) -> Int32Array:
    """Turn AWQ's words int32 [K, N/8], of eight columns each, into GPTQ's int32 [K/8, N], of eight rows: into `out`."""
    check_array(words, "words", np.int32, 2)
    out = output_array(out, (words.shape[0] // 8, words.shape[1] * 8), words)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        K, N = words.shape[0], out.shape[1]
        backend.call("marlin_cpu_awq_to_gptq", pointer(words), pointer(out), K, N, threads, isa_code)
    else:
        out[...] = layout.pack_gptq_rows(awq.numbers(words), awq.BITS)
    return out


def gptq_to_awq(words: Int32Array, out: Int32Array, *, threads: int = 1, isa: str | None = None) -> Int32Array:
    """Turn GPTQ's words int32 [K/8, N], of eight rows each, into AWQ's int32 [K, N/8]: the inverse of `awq_to_gptq`."""
    check_array(words, "words", np.int32, 2)
    out = output_array(out, (words.shape[0] * 8, words.shape[1] // 8), words)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        K, N = out.shape[0], words.shape[1]
        backend.call("marlin_cpu_gptq_to_awq", pointer(words), pointer(out), K, N, threads, isa_code)
    else:
        shifts = np.arange(0, 32, awq.BITS, dtype=np.uint32)[:, None]
        codes = words.view(np.uint32)[:, None, :] >> shifts & np.uint32(15)
        out[...] = awq.words(codes.astype(np.uint8).reshape(-1, words.shape[1]))
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
    """Return a layer with act-order as it is stored: `pack(arrange(qweight, …))` in one pass, `B` int32 [rows/16, N'
    bits/2].

    `qweight` int32 [K bits/32, N] holds all rows of some of the layer's columns, and `out` the same columns of B; both
    may be views into wider arrays. `perm` int32 [K], `fill` uint8 [N'] and `rows` are as in `arrange`; rows and N' are
    whole tiles.
    """
    K, N = sorted_size(qweight, bits, perm, fill, rows)
    shape = layout.b_shape(rows, fill.size, bits)
    out = output_array(out, shape, qweight, rows_apart=True)
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        backend.call(
            "marlin_cpu_pack_sorted", pointer(qweight), stride(qweight), pointer(perm), pointer(fill),
            pointer(out), stride(out), K, N, rows, fill.size, bits, threads, isa_code,
        )  # fmt: skip
    else:
        from . import reference

        out[...] = to_numpy(reference.pack_marlin(_arranged(qweight, bits, perm, fill, rows), bits))
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
    """Return (row, column) of the first code of `B` that is not what `pack_sorted` should have made; None if there is
    none.

    The arguments are those of `pack_sorted`. The native code unpacks B and looks up every code of the source in it.
    """
    words = layout.TILE_K // layout.pack_factor(bits)  # of B, for a column
    check_rows(B, "B", np.int32)
    rows = B.shape[0] * layout.TILE_K
    K, N = sorted_size(qweight, bits, perm, fill, rows)
    if B.shape[1] != fill.size * words:
        raise ValueError(
            f"B has shape {B.shape}; it should be [rows/16, {fill.size * words}], as fill has N' = {fill.size}"
        )
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        place = ctypes.c_int64()
        backend.call(
            "marlin_cpu_compare_sorted", pointer(qweight), stride(qweight), pointer(perm), pointer(fill),
            pointer(B), stride(B), K, N, rows, fill.size, bits, threads, isa_code, ctypes.byref(place),
        )  # fmt: skip
        return None if place.value < 0 else divmod(place.value, fill.size)
    from . import reference

    different = reference.unpack_marlin(to_torch(B), bits) != _arranged(qweight, bits, perm, fill, rows)
    first = different.nonzero()[:1].tolist()
    return (first[0][0], first[0][1]) if first else None


def _arranged(qweight: Int32Array, bits: int, perm: Int32Array, fill: NDArray[np.uint8], rows: int) -> Tensor:
    """Return codes [rows, N'] as stored, by the twin."""
    from . import reference

    return reference.arrange(
        reference.unpack_gptq(to_torch(qweight), bits), (rows, fill.size), to_torch(fill), to_torch(perm)
    )


def first_difference(a: Int32Array, b: Int32Array) -> int | None:
    """Return flat index of the first element in which two int32 arrays of one shape differ; None if they are equal."""
    check_array(a, "a", np.int32)
    check_array(b, "b", np.int32)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; they should be equal")
    backend = current()
    if isinstance(backend, Native):
        index = backend.first_difference(pointer(a), pointer(b), a.size)
        return None if index < 0 else index
    different = np.flatnonzero(a.reshape(-1) != b.reshape(-1))
    return int(different[0]) if different.size else None
