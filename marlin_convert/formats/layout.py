"""The Marlin weight layout: names, the tile, the scale permutations, the shape rules.

This is the one place that explains the format. The native code (`kernels/`) and the torch twin
(`native/reference.py`) both implement what stands here, and the tests compare them with it.

Names
-----
    K, N          in_features and out_features: the weight W is K x N
    M             rows of activations (batch x sequence)
    group_size    rows of K that share one scale; -1 means all K
    G             number of groups: K / group_size, or 1 when one scale serves a whole column ("per-channel")
    qweight       GPTQ weights, int32 [K/8, N]: eight neighbours along K in a word, the lowest k in the lowest nibble
    scales        GPTQ scales [G, N], one per group and column; fp16, bf16 or fp32 in checkpoints
    qzeros        GPTQ zero points, int32 [G, N/8], packed along N; `gptq` stores z - 1, `gptq_v2` stores z
    g_idx         GPTQ group of each row, int32 [K], optional; anything but k // group_size means act-order
    B             Marlin weights, int32 [K/16, 2N], in tile order
    s             Marlin scales, fp16 [G, N], columns permuted
    bias          [N]; never permuted in a checkpoint

A code is an unsigned 4-bit number; the weight it stands for is

    W[k, n] = (code[k, n] - 8) * scale[k // group_size, n]

One tile
--------
W is cut into tiles of 16 rows (K) by 64 columns (N), stored one after the other, row-major over (K/16, N/64). A tile
is four 16 x 16 sub-tiles j = 0..3 side by side, and takes 128 words of 32 bits. Word w belongs to

    lane = w // 4 of a warp        sub-tile j = w % 4

and with g = lane // 4 (0..7) and t = lane % 4 (0..3), nibble p of the word (p = 0 is the lowest) holds

    row = 2t + 8*(p & 1) + (p >> 2)        column = 16j + g + 8*((p >> 1) & 1)

    nibble      7      6      5      4      3      2      1      0
    row       2t+9   2t+1   2t+9   2t+1   2t+8    2t    2t+8    2t
    column     g+8    g+8     g      g     g+8    g+8     g      g      (+ 16j)

    a sub-tile, 16 x 16             columns
                               0 ..  g .. 7   8 ..  g+8 .. 15
                    2t              p=0             p=2
             rows   2t+1            p=4             p=6
                    2t+8            p=1             p=3
                    2t+9            p=5             p=7

Why so: a warp of 32 lanes computes with the tensor-core instruction mma.m16n8k16, whose fragment for W wants in each
lane the rows 2t, 2t+1 (one register) and 2t+8, 2t+9 (another) of one column. With this order

  * each lane loads its four words, one per sub-tile, as one 16-byte load, and the warp's loads are contiguous;
  * `q & 0x000f000f` takes nibbles 0 and 4 = rows 2t and 2t+1 of column g, exactly one register of the fragment;
    `q & 0x00f000f0` takes nibbles 1 and 5 = rows 2t+8 and 2t+9; and `q >> 8` gives the same for column g+8.

So nothing moves between lanes, and the conversion to fp16 needs no shuffles.

A tile row (16 rows of K) reads two rows of `qweight` (8N bytes) and writes one row of `B` (8N bytes). So any run of
rows that starts and ends at a multiple of 16 converts on its own: a block of a layer is converted without the rest.

Scales
------
A lane of the kernel needs the scales of the columns it handles next to each other; hence two permutations of the
columns, one for grouped scales (applied while W is in registers) and one for a single scale per column (applied to
the result). Which of the two applies depends on G, the number of groups there are, and not on the configured
group_size: a layer with group_size == K has G == 1.

The extended format
-------------------
docs/concepts/format.md specifies it. Beside the above:

  * 8 bits: a tile is 256 words; word w belongs to lane w // 8, sub-tile j = w % 8 // 2 and half h = w % 2, and byte p
    of it holds row = 2t + 8*(p & 1) + (p >> 1) of column = 16j + g + 8h: one column's four rows, in the order in which
    the 4-bit word has them.
  * Zero points [G, N] are permuted as grouped scales are, always; then interleaved within runs of 8 (4 bits) or 4
    (8 bits) columns, as the codes in a word are, and packed along N.
  * K is padded to a multiple of 128, N to one of 64. Groups are stored as 16, 32, 64, 128 or all of K.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BITS = 4  # of the original format
PACK_FACTOR = 32 // BITS  # codes in an int32
ZERO_POINT = 8  # the code of weight 0: the quantization is symmetric

TILE_K = 16
TILE_N = 64
SUBTILE_N = 16
TILE_WORDS = TILE_K * TILE_N // PACK_FACTOR  # 128 int32
WARP_LANES = 32

# What the original format's kernel accepts: K a multiple of MIN_K, N a multiple of MIN_N, and these groups.
MIN_K = 128
MIN_N = 256
GROUP_SIZES = (128, -1)

# What the extended format stores: K padded to a multiple of EXT_K, N to one of EXT_N, and these groups.
EXT_BITS = (4, 8)
EXT_K = 128
EXT_N = 64
EXT_GROUP_SIZES = (128, 64, 32, 16)  # and -1

# Tensors of a quantized layer in each format, by what they are.
ORIGINAL_NAMES = {"weight": "B", "scales": "s"}
EXTENDED_NAMES = {
    "weight": "marlin_qweight", "scales": "marlin_scales", "zeros": "marlin_qzeros", "perm": "marlin_perm",
}  # fmt: skip

# new[r*len + i] = old[r*len + permutation[i]] for each run r of len(permutation) columns.
# G > 1, runs of 64: new[8i + j] = old[i + 8j].
SCALE_PERMUTATION = (
    *(0, 8, 16, 24, 32, 40, 48, 56),
    *(1, 9, 17, 25, 33, 41, 49, 57),
    *(2, 10, 18, 26, 34, 42, 50, 58),
    *(3, 11, 19, 27, 35, 43, 51, 59),
    *(4, 12, 20, 28, 36, 44, 52, 60),
    *(5, 13, 21, 29, 37, 45, 53, 61),
    *(6, 14, 22, 30, 38, 46, 54, 62),
    *(7, 15, 23, 31, 39, 47, 55, 63),
)
# Then, for zero points, by bits: packed[i] = permuted[interleave[i]] in each run of len(interleave) columns.
ZERO_INTERLEAVE = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
# G == 1, runs of 32: new[8i + j] = old[2i + (0, 1, 8, 9, 16, 17, 24, 25)[j]].
SCALE_PERMUTATION_SINGLE = (
    *(0, 1, 8, 9, 16, 17, 24, 25),
    *(2, 3, 10, 11, 18, 19, 26, 27),
    *(4, 5, 12, 13, 20, 21, 28, 29),
    *(6, 7, 14, 15, 22, 23, 30, 31),
)


def pack_factor(bits: int) -> int:
    """Return codes in an int32. Raises ValueError unless `bits` is 4 or 8."""
    if bits not in EXT_BITS:
        raise ValueError(f"bits is {bits!r}; it should be 4 or 8")
    return 32 // bits


def zero_point(bits: int) -> int:
    """Return the code of weight 0 in symmetric quantization: 8 or 128."""
    return int(1 << (bits - 1))


def tile_words(bits: int = BITS) -> int:
    """Return int32 words in a tile: 128 or 256."""
    return TILE_K * TILE_N // pack_factor(bits)


def tile_position(word: int, code: int, bits: int = BITS) -> tuple[int, int]:
    """Return (row, column) within the 16 x 64 tile of a code (0 = lowest nibble or byte) of one of the tile's words."""
    if not 0 <= word < tile_words(bits):
        raise ValueError(f"word is {word}; a tile has words 0..{tile_words(bits) - 1}")
    if not 0 <= code < pack_factor(bits):
        raise ValueError(f"code is {code}; a word has codes 0..{pack_factor(bits) - 1}")
    if bits == 8:
        lane, rest = divmod(word, 8)
        (g, t), (j, h) = divmod(lane, 4), divmod(rest, 2)
        return 2 * t + 8 * (code & 1) + (code >> 1), SUBTILE_N * j + g + 8 * h
    lane, j = divmod(word, 4)
    g, t = divmod(lane, 4)
    row = 2 * t + 8 * (code & 1) + (code >> 2)
    column = SUBTILE_N * j + g + 8 * ((code >> 1) & 1)
    return row, column


def tile_codes(B: NDArray[np.int32], bits: int = BITS) -> NDArray[np.uint8]:
    """Turn Marlin's `B` int32 [K/16, N bits/2] into codes uint8 [K, N], by the definition: each by its place."""
    tiles = np.ascontiguousarray(B).view(np.uint32).reshape(len(B), -1, tile_words(bits))
    codes = np.empty((len(B), TILE_K, tiles.shape[1], TILE_N), np.uint8)
    for word in range(tile_words(bits)):
        for code in range(pack_factor(bits)):
            row, column = tile_position(word, code, bits)
            codes[:, row, :, column] = tiles[:, :, word] >> np.uint32(bits * code) & np.uint32(2**bits - 1)
    return codes.reshape(len(B) * TILE_K, -1)


def check_tiles(K: int, N: int) -> None:
    """Raise ValueError unless W [K, N] is cut into whole tiles. Blocks of a layer must satisfy this too."""
    if K <= 0 or K % TILE_K:
        raise ValueError(f"K is {K}; it should be a positive multiple of {TILE_K}")
    if N <= 0 or N % TILE_N:
        raise ValueError(f"N is {N}; it should be a positive multiple of {TILE_N}")


def group_count(K: int, group_size: int) -> int:
    """Return G. Raises ValueError if `group_size` (rows; -1 means all K) does not divide K."""
    if group_size == -1:
        return 1
    if group_size <= 0 or K % group_size:
        raise ValueError(f"group_size is {group_size}; it should be -1 or divide K = {K}")
    return K // group_size


def qweight_shape(K: int, N: int, bits: int = BITS) -> tuple[int, int]:
    """Return shape of GPTQ's `qweight` (int32)."""
    check_tiles(K, N)
    return K // pack_factor(bits), N


def b_shape(K: int, N: int, bits: int = BITS) -> tuple[int, int]:
    """Return shape of Marlin's `B` (int32), and of `marlin_qweight` for padded K and N."""
    check_tiles(K, N)
    return K // TILE_K, N * TILE_K // pack_factor(bits)


def s_shape(K: int, N: int, group_size: int) -> tuple[int, int]:
    """Return shape of Marlin's `s` (fp16), which is that of GPTQ's `scales`: [G, N]."""
    check_tiles(K, N)
    return group_count(K, group_size), N


def scale_permutation(G: int) -> tuple[int, ...]:
    """Return the permutation that applies to a layer with G groups (see SCALE_PERMUTATION)."""
    if G <= 0:
        raise ValueError(f"G is {G}; a layer has at least one group")
    return SCALE_PERMUTATION_SINGLE if G == 1 else SCALE_PERMUTATION


def permute_scales(scales: NDArray[Any], G: int | None = None) -> NDArray[Any]:
    """Turn GPTQ's `scales` [G, N] into Marlin's `s` [G, N]; a new array of the same dtype.

    `G` is the number of groups of the whole layer; give it when `scales` holds only some of the layer's rows.
    """
    return _permute_columns(scales, scale_permutation(_groups(scales, "scales", G)), "scales")


def unpermute_scales(s: NDArray[Any], G: int | None = None) -> NDArray[Any]:
    """Turn Marlin's `s` [G, N] into GPTQ's `scales` [G, N]: the inverse of `permute_scales`."""
    return _permute_columns(s, _inverse(scale_permutation(_groups(s, "s", G))), "s")


# ---- The extended format ----


def padded_size(K: int, N: int) -> tuple[int, int]:
    """Return (K', N'): what a layer of K x N takes in the extended format."""
    return -(-K // EXT_K) * EXT_K, -(-N // EXT_N) * EXT_N


def stored_group_size(group_size: int) -> int | None:
    """Return the group size that the extended format stores for a source's (-1 is all of K): the largest of
    EXT_GROUP_SIZES that divides it; None if none does."""
    if group_size == -1:
        return -1
    return next((size for size in EXT_GROUP_SIZES if group_size > 0 and group_size % size == 0), None)


def stored_groups(K: int, group_size: int) -> int:
    """Return G of a layer of K rows with stored groups of `group_size`."""
    return 1 if group_size == -1 else -(-K // EXT_K) * EXT_K // group_size


def pack_zeros(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Turn zero points uint8 [G, N'] in their own order of columns into `marlin_qzeros` int32 [G, N' bits/32]."""
    return pack_gptq_zeros(_permute_columns(zeros, _zero_permutation(bits), "zeros"), bits)


def unpack_zeros(qzeros: NDArray[np.int32], bits: int) -> NDArray[np.uint8]:
    """Turn `marlin_qzeros` int32 [G, N' bits/32] into zero points uint8 [G, N']: the inverse of `pack_zeros`."""
    packed = gptq_zeros(qzeros, bits, qzeros.shape[1] * pack_factor(bits))
    return _permute_columns(packed, _inverse(_zero_permutation(bits)), "qzeros")


def gptq_zeros(qzeros: NDArray[np.int32], bits: int, N: int) -> NDArray[np.uint8]:
    """Turn GPTQ's `qzeros` int32 [G, ceil(N bits/32)] into the stored numbers uint8 [G, N], the first in the lowest
    bits."""
    G, words = qzeros.shape
    factor = pack_factor(bits)
    if words != -(-N // factor):
        raise ValueError(f"qzeros has shape {qzeros.shape}; it should have {-(-N // factor)} words for N = {N}")
    stored = np.ascontiguousarray(qzeros).view(np.uint8)
    if bits == 4:  # two in a byte
        pairs = np.empty((G, words * 4, 2), np.uint8)
        np.bitwise_and(stored, 15, out=pairs[:, :, 0])
        np.right_shift(stored, 4, out=pairs[:, :, 1])
        stored = pairs.reshape(G, words * factor)
    return stored[:, :N]


def pack_gptq_zeros(stored: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Turn numbers uint8 [G, N] into GPTQ's `qzeros` int32 [G, ceil(N bits/32)]; zeros behind the last column."""
    G, N = stored.shape
    factor = pack_factor(bits)
    if stored.size and int(stored.max()) >> bits:
        raise ValueError(f"zeros has {stored.max()}; a zero point has {bits} bits")
    whole = np.zeros((G, -(-N // factor) * factor), np.uint8)
    whole[:, :N] = stored
    if bits == 4:  # two in a byte
        whole = whole[:, 0::2] | whole[:, 1::2] << np.uint8(4)
    return whole.view(np.int32)


def pack_gptq_rows(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Turn codes uint8 [K, N] into GPTQ's `qweight` int32 [K bits/32, N]; K is a multiple of the codes in a word."""
    K, N = codes.shape
    factor = pack_factor(bits)
    if K % factor:
        raise ValueError(f"codes has K = {K} rows; K should be a multiple of {factor}")
    words = np.zeros((K // factor, N), np.uint32)
    for code in range(factor):
        words |= codes[code::factor].astype(np.uint32) << np.uint32(bits * code)
    return words.view(np.int32)


def _zero_permutation(bits: int) -> tuple[int, ...]:
    """Return the permutation of zero points in runs of 64 columns: that of scales, then the interleave."""
    pack_factor(bits)
    interleave = ZERO_INTERLEAVE[bits]
    runs = range(0, len(SCALE_PERMUTATION), len(interleave))
    return tuple(SCALE_PERMUTATION[run + i] for run in runs for i in interleave)


def _inverse(permutation: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(permutation.index(i) for i in range(len(permutation)))


def _groups(scales: NDArray[Any], name: str, G: int | None) -> int:
    if scales.ndim != 2:
        raise ValueError(f"{name} has shape {scales.shape}; it should be [G, N]")
    return int(scales.shape[0]) if G is None else G


def _permute_columns(scales: NDArray[Any], permutation: tuple[int, ...], name: str) -> NDArray[Any]:
    rows, N = scales.shape
    run = len(permutation)
    if N == 0 or N % run:
        raise ValueError(f"{name} has N = {N} columns; N should be a positive multiple of {run}")
    runs = scales.reshape(rows, N // run, run)
    return np.take(runs, permutation, axis=2).reshape(rows, N)  # five times faster than indexing with a list
