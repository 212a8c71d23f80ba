"""What AWQ's tensors mean, in the layouts that its writers call gemm and gemv.

A weight is (code - zero) * scale, with codes and zero points of 4 bits, stored as they are. `gemm`: `qweight` int32
[K, N/8] and `qzeros` int32 [G, N/8] have eight neighbours along N in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from
the lowest bits up; `scales` [G, N]. `gemv`: `qweight` int32 [N, K/8] is GPTQ's, rows and columns exchanged, `qzeros`
int32 [N, Z] has the groups of an output in their order, `scales` [N, 8 Z]; what lies beyond G groups is 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import gptq_zeros, pack_gptq_zeros

Words = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint8]

BITS = 4
PER_WORD = 32 // BITS
#: The column, of eight, whose number stands in the i-th place of a word.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(ORDER.index(column) for column in range(PER_WORD))


def numbers(words: Words) -> Codes:
    """Turn words of `gemm` [rows, N/8] into the numbers in them [rows, N], in the order of the columns."""
    stored = gptq_zeros(words, BITS, words.shape[1] * PER_WORD)
    return _reordered(stored, _PLACE)


def words(numbers: Codes) -> Words:
    """Turn numbers [rows, N] into words of `gemm` [rows, N/8]: the inverse of `numbers`."""
    return pack_gptq_zeros(_reordered(numbers, ORDER), BITS)


def _reordered(rows: Codes, order: tuple[int, ...]) -> Codes:
    return np.take(rows.reshape(len(rows), -1, PER_WORD), order, axis=2).reshape(rows.shape)


def gemv_zeros(stored: Words, G: int) -> Codes:
    """Turn `qzeros` of `gemv` [N, Z] into zero points [G, N]. Raises ValueError where padding is not 0."""
    all_groups = gptq_zeros(stored, BITS, stored.shape[1] * PER_WORD)
    if all_groups[:, G:].any():
        raise ValueError(f"qzeros has numbers beyond its {G} groups that are not 0")
    return np.ascontiguousarray(all_groups[:, :G].T)


def gemv_zero_words(zeros: Codes, width: int) -> Words:
    """Turn zero points [G, N] into `qzeros` of `gemv` [N, width]: the inverse of `gemv_zeros`."""
    padded = np.zeros((zeros.shape[1], width * PER_WORD), np.uint8)
    padded[:, : len(zeros)] = zeros.T
    return pack_gptq_zeros(padded, BITS)


def gemv_scales(stored: npt.NDArray[Any], G: int) -> npt.NDArray[Any]:
    """Turn `scales` of `gemv` [N, 8 Z] into scales [G, N]. Raises ValueError where padding is not 0."""
    if stored[:, G:].any():
        raise ValueError(f"scales has numbers beyond its {G} groups that are not 0")
    return np.ascontiguousarray(stored[:, :G].T)
