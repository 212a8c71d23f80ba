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
    Float32Array,
    Int32Array,
    ScaleArray,
    check_array,
    check_fill,
    check_groups,
    check_perm,
    check_product,
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
from ._cpu_library import ISA_TITLES, LayerArguments, Native, choose, current
from ._cpu_library import NO_NATIVE as NO_NATIVE

if TYPE_CHECKING:
    from torch import Tensor


# ---- What there is ----


def native_available() -> bool:
    """Whether the native library does the work, and not the torch twin."""
    return isinstance(current(), Native)


def describe() -> str:
    """One line for the user: what does the work, and if it is the twin, why and what to do about it."""
    backend = current()
    if isinstance(backend, Native):
        return f"native CPU library ({ISA_TITLES[backend.isas[-1]]})"
    return f"torch twin: {backend.reason}"


def available_isas() -> tuple[str, ...]:
    """The values of `isa` that work here, slowest first; () if the twin does the work."""
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
    """GPTQ `qweight` int32 [K bits/32, N] -> Marlin `B` int32 [K/16, N bits/2].

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
    """Marlin `B` int32 [K/16, N bits/2] -> GPTQ `qweight` int32 [K bits/32, N]: the inverse of `pack`."""
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
    """Rows k0 .. k0 + rows of a layer in the order in which they are stored, as GPTQ words [rows bits/32, N'].

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
    """AWQ's words int32 [K, N/8], of eight columns each, -> GPTQ's int32 [K/8, N], of eight rows: into `out`."""
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
    """GPTQ's words int32 [K/8, N], of eight rows each, -> AWQ's int32 [K, N/8]: the inverse of `awq_to_gptq`."""
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
    """A layer with act-order as it is stored: `pack(arrange(qweight, …))` in one pass, `B` int32 [rows/16, N' bits/2].

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
    """(row, column) of the first code of `B` that is not what `pack_sorted` should have made; None if there is none.

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
    """Codes [rows, N'] as stored, by the twin."""
    from . import reference

    return reference.arrange(
        reference.unpack_gptq(to_torch(qweight), bits), (rows, fill.size), to_torch(fill), to_torch(perm)
    )


def first_difference(a: Int32Array, b: Int32Array) -> int | None:
    """Flat index of the first element in which two int32 arrays of one shape differ; None if they are equal."""
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
    K, N = gptq_size(qweight, bits)
    G = check_groups(scales, "scales", zeros, K, N)
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
    K, N = marlin_size(B, bits)
    G = check_groups(s, "s", zeros, K, N)
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
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        out = np.empty((K, N), scales.dtype)
        layer = _layer(weights, scales, zeros, bits, 0, K, K // G)
        backend.call(function, ctypes.byref(layer), pointer(out), threads, isa_code)
        return out
    from . import reference

    codes, natural = _decoded(function.endswith("gptq"), weights, scales, bits)
    W = reference.dequantize(codes, natural, None if zeros is None else to_torch(zeros), bits=bits)
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
    kb, N = gptq_size(qweight, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    check_product(x, scales, "scales", zeros, y, k0, kb, N, rows_per_group)
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
    kb, N = marlin_size(B, bits)
    k0, rows_per_group = operator.index(k0), operator.index(rows_per_group)
    check_product(x, s, "s", zeros, y, k0, kb, N, rows_per_group)
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
    backend, isa_code = choose(threads, isa)
    if isinstance(backend, Native):
        layer = _layer(weights, scales, zeros, bits, k0, kb, rows_per_group)
        backend.call(function, pointer(x), M, K, ctypes.byref(layer), pointer(y), threads, isa_code)
        return
    from . import reference

    codes, natural = _decoded(function.endswith("gptq"), weights, scales, bits)
    # A block may begin or end within a group: give each of its rows the scales that are its own.
    own, own_zeros = (
        None if t is None else t.repeat_interleave(rows_per_group, dim=0)[k0 : k0 + kb]
        for t in (natural, None if zeros is None else to_torch(zeros))
    )
    assert own is not None
    y += to_numpy(
        reference.matmul(to_torch(x)[:, k0 : k0 + kb], reference.dequantize(codes, own, own_zeros, bits=bits))
    )


def _layer(
    weights: Int32Array,
    scales: ScaleArray,
    zeros: NDArray[np.uint8] | None,
    bits: int,
    k0: int,
    k: int,
    rows_per_group: int,
) -> LayerArguments:
    G, N = scales.shape
    return LayerArguments(
        pointer(weights), pointer(scales), None if zeros is None else pointer(zeros), k0, k, N, G, rows_per_group,
        bits, scales.dtype == np.uint16,
    )  # fmt: skip


def _decoded(gptq: bool, weights: Int32Array, scales: ScaleArray, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales as the twin has them: in the order of rows and columns."""
    import torch

    from . import reference

    natural = to_torch(scales.view(np.int16)).view(torch.bfloat16 if scales.dtype == np.uint16 else torch.float16)
    if gptq:
        return reference.unpack_gptq(to_torch(weights), bits), natural
    return reference.unpack_marlin(to_torch(weights), bits), reference.unpermute_scales(natural)


def _plain(W: Tensor, scales: ScaleArray) -> ScaleArray:
    import torch

    plain: ScaleArray = to_numpy(W.view(torch.int16)).view(scales.dtype)
    return plain
