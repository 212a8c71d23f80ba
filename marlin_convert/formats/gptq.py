"""What the tensors of a GPTQ layer mean: how zero points are stored, both ways, and the weights they stand for.

A zero point is a code of `bits` bits for each group and column. `qzeros` int32 [G, ceil(N bits/32)] stores it packed
along N, in one of four ways; what checkpoint_format gptq ("v1") subtracts, gptq_v2 does not.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from . import bf16
from .layout import gptq_zeros, pack_gptq_zeros, zero_point

Words = npt.NDArray[np.int32]
ZeroPoints = npt.NDArray[np.uint8]


class ZeroPointEncoding(Enum):
    """How `qzeros` stores zero points."""

    SYMMETRIC = "all at the middle, 8 or 128"
    V1_NIBBLE = "each number less one by itself: 0 is stored as the highest number"
    V1_WORD = "each 32-bit word less one in every number: 0 borrows from its neighbour"
    V2 = "as they are"


def every_code(bits: int) -> np.uint32:
    """Return a word that has 1 in each of its codes."""
    return np.uint32(sum(1 << i for i in range(0, 32, bits)))


def decode_zeros(qzeros: Words, bits: int, N: int, encoding: ZeroPointEncoding) -> ZeroPoints:
    """Read `qzeros` int32 [G, ceil(N bits/32)] → zero points uint8 [G, N]."""
    if encoding is ZeroPointEncoding.V1_WORD:
        qzeros = (qzeros.view(np.uint32) + every_code(bits)).view(np.int32)
    stored = gptq_zeros(qzeros, bits, N)
    if encoding is ZeroPointEncoding.V1_NIBBLE:
        return (stored + np.uint8(1)) & np.uint8(2**bits - 1)
    return stored


def encode_zeros(zeros: ZeroPoints, bits: int, encoding: ZeroPointEncoding) -> Words:
    """Write zero points uint8 [G, N] → `qzeros` int32 [G, ceil(N bits/32)]: the inverse of `decode_zeros`."""
    if encoding is ZeroPointEncoding.V1_NIBBLE:
        zeros = (zeros - np.uint8(1)) & np.uint8(2**bits - 1)
    words = pack_gptq_zeros(zeros, bits)
    if encoding is ZeroPointEncoding.V1_WORD:
        return (words.view(np.uint32) - every_code(bits)).view(np.int32)
    return words


def weights(
    qweight: Words, scales: npt.NDArray[Any], zeros: ZeroPoints | None, rows: npt.NDArray[Any], bits: int
) -> npt.NDArray[Any]:
    """Return (code - zero) * scale of GPTQ words `qweight` [K bits/32, N], by the definition.

    `scales` [G, N] are fp16, or bf16 as uint16, and so is the result [K, N], rounded once. `zeros` [G, N] is None where
    the quantization is symmetric; `rows` [K] names each row's group.
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    codes = (qweight.view(np.uint32)[:, None, :] >> shifts) & np.uint32(2**bits - 1)
    steps = codes.reshape(-1, qweight.shape[1]).astype(np.float32)
    steps -= np.float32(zero_point(bits)) if zeros is None else zeros[rows].astype(np.float32)
    product = steps * bf16.widened(scales)[rows]
    if scales.dtype == np.uint16:
        return bf16.rounded(product)
    with np.errstate(over="ignore"):
        half: npt.NDArray[Any] = product.astype(np.float16)
    return half
