"""The layout: literals worked out by hand, and properties of the formula."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin_convert.formats import layout
from marlin_convert.native import reference

HEADER = Path(__file__).parents[2] / "kernels" / "marlin.h"

# G > 1: position 8i + j of a run of 64 holds column i + 8j.
GROUPED = """
    0  8 16 24 32 40 48 56    1  9 17 25 33 41 49 57    2 10 18 26 34 42 50 58    3 11 19 27 35 43 51 59
    4 12 20 28 36 44 52 60    5 13 21 29 37 45 53 61    6 14 22 30 38 46 54 62    7 15 23 31 39 47 55 63
"""
# G == 1: position 8i + j of a run of 32 holds column 2i + (0, 1, 8, 9, 16, 17, 24, 25)[j].
SINGLE = """
    0  1  8  9 16 17 24 25    2  3 10 11 18 19 26 27    4  5 12 13 20 21 28 29    6  7 14 15 22 23 30 31
"""


def integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def word_of(values: list[int]) -> int:
    """Eight nibbles, lowest first, as a word."""
    return sum(value << (4 * p) for p, value in enumerate(values))


# ---- The tile ----

# A word's nibbles, read as a hexadecimal number, for matrices that hold each place's row or column.
ROWS_BY_T = (0x91918080, 0xB3B3A2A2, 0xD5D5C4C4, 0xF7F7E6E6)
COLUMNS_BY_G = (
    *(0x88008800, 0x99119911, 0xAA22AA22, 0xBB33BB33),
    *(0xCC44CC44, 0xDD55DD55, 0xEE66EE66, 0xFF77FF77),
)


def test_tile_rows_columns_and_subtiles_are_where_the_diagram_says() -> None:
    for word in range(128):
        lane, j = word // 4, word % 4
        positions = [layout.tile_position(word, p) for p in range(8)]
        assert word_of([row for row, _ in positions]) == ROWS_BY_T[lane % 4]
        assert word_of([column % 16 for _, column in positions]) == COLUMNS_BY_G[lane // 4]
        assert {column // 16 for _, column in positions} == {j}


def test_tile_is_a_bijection() -> None:
    positions = {layout.tile_position(word, p) for word in range(128) for p in range(8)}
    assert positions == {(row, column) for row in range(16) for column in range(64)}


def test_masks_of_the_kernel_take_two_rows_of_one_column() -> None:
    """`q & 0x000f000f` is the pair of rows of one register of the fragment; `q >> 8` gives column g + 8."""
    for word in range(128):
        (row, column), (next_row, same_column) = layout.tile_position(word, 0), layout.tile_position(word, 4)
        assert (next_row, same_column) == (row + 1, column)
        assert layout.tile_position(word, 1) == (row + 8, column)
        assert layout.tile_position(word, 2) == (row, column + 8)


@pytest.mark.parametrize(("word", "nibble"), [(-1, 0), (128, 0), (0, -1), (0, 8)])
def test_tile_position_refuses_what_is_outside(word: int, nibble: int) -> None:
    with pytest.raises(ValueError, match=r"a tile has words 0..127|a word has codes 0..7"):
        layout.tile_position(word, nibble)


# ---- Scales ----


def test_scale_permutations() -> None:
    assert integers(GROUPED) == layout.SCALE_PERMUTATION
    assert integers(SINGLE) == layout.SCALE_PERMUTATION_SINGLE


@pytest.mark.parametrize(("G", "literal"), [(1, SINGLE), (2, GROUPED), (7, GROUPED)])
def test_permutation_is_chosen_by_the_number_of_groups(G: int, literal: str) -> None:
    columns = np.arange(128, dtype=np.int16)
    run = len(integers(literal))
    expected = [start + c for start in range(0, 128, run) for c in integers(literal)]
    permuted = layout.permute_scales(np.tile(columns, (G, 1)))
    assert permuted.tolist() == [expected] * G
    assert permuted.flags.c_contiguous


def test_some_rows_of_a_grouped_layer_permute_as_the_layer_does() -> None:
    scales = np.random.default_rng(0).standard_normal((4, 192)).astype(np.float16)
    whole = layout.permute_scales(scales)
    np.testing.assert_array_equal(layout.permute_scales(scales[2:3], G=4), whole[2:3])
    np.testing.assert_array_equal(layout.unpermute_scales(whole[2:3], G=4), scales[2:3])


@given(G=st.integers(1, 5), runs=st.integers(1, 4), dtype=st.sampled_from([np.float16, np.float32, np.uint16]))
def test_scales_round_trip(G: int, runs: int, dtype: type) -> None:
    scales: Any = np.random.default_rng(G).integers(0, 1000, (G, 64 * runs)).astype(dtype)
    s = layout.permute_scales(scales)
    assert s.dtype == dtype
    np.testing.assert_array_equal(layout.unpermute_scales(s), scales)
    np.testing.assert_array_equal(layout.permute_scales(layout.unpermute_scales(scales)), scales)


def test_scales_refuse_odd_shapes() -> None:
    with pytest.raises(ValueError, match=r"scales has N = 96 columns; N should be a positive multiple of 64"):
        layout.permute_scales(np.ones((2, 96), np.float16))
    assert layout.permute_scales(np.ones((1, 96), np.float16)).shape == (1, 96)
    with pytest.raises(ValueError, match=r"s has N = 0 columns"):
        layout.unpermute_scales(np.ones((2, 0), np.float16))
    with pytest.raises(ValueError, match=r"scales has shape \(64,\); it should be \[G, N\]"):
        layout.permute_scales(np.ones(64, np.float16))
    with pytest.raises(ValueError, match="G is 0"):
        layout.permute_scales(np.ones((0, 64), np.float16))


# ---- Shapes ----


def test_shapes() -> None:
    assert layout.qweight_shape(4096, 14336) == (512, 14336)
    assert layout.b_shape(4096, 14336) == (256, 28672)
    assert layout.s_shape(4096, 14336, 128) == (32, 14336)
    assert layout.s_shape(4096, 14336, -1) == (1, 14336)
    assert layout.s_shape(4096, 14336, 4096) == (1, 14336)


@pytest.mark.parametrize(("K", "N", "name"), [(8, 64, "K"), (0, 64, "K"), (16, 32, "N"), (16, 0, "N"), (-16, 64, "K")])
def test_shapes_refuse_parts_of_tiles(K: int, N: int, name: str) -> None:
    for shape in (layout.qweight_shape, layout.b_shape):
        with pytest.raises(ValueError, match=rf"^{name} is -?\d+; it should be a positive multiple of"):
            shape(K, N)


@pytest.mark.parametrize("group_size", [0, -2, 96, 8192])
def test_groups_must_divide_k(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size is {group_size}; it should be -1 or divide K = 4096"):
        layout.group_count(4096, group_size)


# ---- The other language ----


def test_header_has_the_same_constants() -> None:
    defined = dict(re.findall(r"^#define MARLIN_(\w+) (\d+)\b", HEADER.read_text(), re.MULTILINE))
    names = ["BITS", "PACK_FACTOR", "ZERO_POINT", "TILE_K", "TILE_N", "SUBTILE_N", "TILE_WORDS", "WARP_LANES"]
    for name in [*names, "MIN_K", "MIN_N", "EXT_K", "EXT_N"]:
        assert int(defined.pop(name)) == getattr(layout, name), name
    # What is left are versions and codes, which test_cpu.py compares.
    assert all(name.startswith(("ISA_", "ERROR_", "OK", "CPU_ABI_VERSION")) for name in defined), defined


# ---- The extended format ----


def test_eight_bit_tile() -> None:
    """docs/concepts/format.md: word 0 holds rows 0, 8, 1, 9 of column 0; word 1 the same rows of column 8."""
    assert [layout.tile_position(0, p, 8) for p in range(4)] == [(0, 0), (8, 0), (1, 0), (9, 0)]
    assert [layout.tile_position(1, p, 8) for p in range(4)] == [(0, 8), (8, 8), (1, 8), (9, 8)]
    assert layout.tile_position(255, 3, 8) == (2 * 3 + 9, 48 + 7 + 8)  # lane 31: g = 7, t = 3; j = 3, h = 1
    places = {layout.tile_position(w, p, 8) for w in range(256) for p in range(4)}
    assert places == {(row, column) for row in range(16) for column in range(64)}
    with pytest.raises(ValueError, match=r"a tile has words 0..255"):
        layout.tile_position(256, 0, 8)
    with pytest.raises(ValueError, match="bits is 3; it should be 4 or 8"):
        layout.tile_position(0, 0, 3)


def test_zero_points_by_the_examples_of_the_specification() -> None:
    columns = np.arange(64, dtype=np.uint8)[None]
    four, eight = layout.pack_zeros(columns // 8, 4), layout.pack_zeros(columns, 8)
    assert (four.dtype, four.shape, eight.shape) == (np.int32, (1, 8), (1, 16))
    assert int(four[0, 0]) == 0x75316420
    assert int(eight[0, 0]) == 0x18081000


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("G", [1, 5])
def test_zero_points_round_trip(bits: int, G: int) -> None:
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (G, 192), dtype=np.uint8)
    words = layout.pack_zeros(zeros, bits)
    assert words.shape == (G, 192 * bits // 32)
    np.testing.assert_array_equal(layout.unpack_zeros(words, bits), zeros)
    # Column by column from the definition: permuted as grouped scales are, interleaved, packed.
    interleave = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}[bits]
    factor = 32 // bits
    for run in range(0, 192, 64):
        new = [run + (n // 8) + 8 * (n % 8) for n in range(64)]  # new[8i + j] = old[i + 8j]
        for i in range(64):
            column = new[i // factor * factor + interleave[i % factor]]
            word = int(words[-1, (run + i) // factor]) & 0xFFFFFFFF
            assert word >> bits * (i % factor) & (2**bits - 1) == zeros[-1, column]


@pytest.mark.parametrize(
    ("bits", "N", "words"), [(4, 8, [0x76543210]), (4, 10, [0x76543210, 0x98]), (8, 3, [0x020100])]
)
def test_gptq_zeros(bits: int, N: int, words: list[int]) -> None:
    stored = np.arange(N, dtype=np.uint8)[None]
    packed = layout.pack_gptq_zeros(stored, bits)
    assert packed.tolist() == [words]
    np.testing.assert_array_equal(layout.gptq_zeros(packed, bits, N), stored)
    with pytest.raises(ValueError, match="words for N = 99"):
        layout.gptq_zeros(packed, bits, 99)
    with pytest.raises(ValueError, match="zeros has 16; a zero point has 4 bits"):
        layout.pack_gptq_zeros(np.full((1, 8), 16, np.uint8), 4)


def test_stored_sizes() -> None:
    assert layout.padded_size(576, 576) == (640, 576)
    assert layout.padded_size(1, 65) == (128, 128)
    assert layout.padded_size(4096, 4096) == (4096, 4096)
    expected = {-1: -1, 16: 16, 32: 32, 64: 64, 128: 128, 256: 128, 1024: 128, 96: 32, 48: 16, 8: None, 100: None}
    assert {size: layout.stored_group_size(size) for size in expected} == expected
    assert [layout.stored_groups(576, size) for size in (-1, 16, 32, 64, 128)] == [1, 40, 20, 10, 5]


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_tiles(bits: int) -> None:
    """As the torch definition finds them; and two whose places are written down in the formats' description."""
    B = np.random.default_rng(bits).integers(-(2**31), 2**31, (3, 64 * bits), dtype=np.int64).astype(np.int32)
    codes = layout.tile_codes(B, bits)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, reference.unpack_marlin(torch.from_numpy(B), bits).numpy())
    one = np.zeros((1, 32 * bits), np.int32)
    one[0, 1] = 1 << 2 * bits  # word 1, code 2
    row, column = {4: (0, 24), 8: (1, 8)}[bits]
    expected = np.zeros((16, 64), np.uint8)
    expected[row, column] = 1
    np.testing.assert_array_equal(layout.tile_codes(one, bits), expected)
