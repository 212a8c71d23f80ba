"""Rows in the order in which they are stored, and act-order in one pass, against the definition."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from marlin_convert.native import cpu, reference
from tests.support.native_cpu import every_isa, random_words, twin


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("K", "N", "padded_K", "padded_N"), [(64, 64, 80, 64), (40, 30, 128, 64), (200, 700, 256, 704)]
)
@pytest.mark.parametrize("order", [False, True])
def test_arrange(isa: str, threads: int, bits: int, K: int, N: int, padded_K: int, padded_N: int, order: bool) -> None:
    rng = np.random.default_rng(K)
    codes, fill = rng.integers(0, 2**bits, (K, N)), rng.integers(0, 2**bits, padded_N, dtype=np.uint8)
    perm = rng.permutation(K).astype(np.int32) if order else None
    stored = np.tile(fill.astype(np.int64), (padded_K, 1))
    stored[:K, :N] = codes if perm is None else codes[perm]
    qweight, expected = (np.asarray(reference.pack_gptq(torch.from_numpy(c), bits).numpy()) for c in (codes, stored))
    options: dict[str, Any] = {"bits": bits, "fill": fill, "perm": perm, "threads": threads, "isa": isa}
    np.testing.assert_array_equal(cpu.arrange(qweight, rows=padded_K, **options), expected)
    factor = 32 // bits
    for k0, rows in [(0, 16), (K // factor * factor - factor, 2 * factor), (padded_K - 16, 16)]:
        block = cpu.arrange(qweight, k0=k0, rows=rows, **options)
        np.testing.assert_array_equal(block, expected[k0 // factor : (k0 + rows) // factor])


# Act-order in one pass: K, N of the source, and of B. K = 72 ends within a tile; 30 and 700 columns within one, too.
SORTED_SIZES = [(64, 64, 128, 64), (72, 30, 128, 64), (200, 700, 256, 704), (2048, 192, 2048, 192), (48, 320, 48, 320)]
shuffled_or_not = pytest.mark.parametrize("shuffled", [True, False])


def sorted_layer(
    K: int, N: int, rows: int, columns: int, bits: int, shuffled: bool = True
) -> tuple[NDArray[np.int32], dict[str, Any], Any]:
    """qweight, the arguments for `pack_sorted` beside it, and the codes [rows, columns] as they must be stored."""
    rng = np.random.default_rng(K + N + bits)
    codes, fill = rng.integers(0, 2**bits, (K, N)), rng.integers(0, 2**bits, columns, dtype=np.uint8)
    perm = (rng.permutation(K) if shuffled else np.arange(K)).astype(np.int32)
    stored = np.tile(fill.astype(np.int64), (rows, 1))
    stored[:K, :N] = codes[perm]
    qweight = np.asarray(reference.pack_gptq(torch.from_numpy(codes), bits).numpy())
    return qweight, {"bits": bits, "perm": perm, "fill": fill}, stored


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "N", "rows", "columns"), SORTED_SIZES)
@shuffled_or_not
def test_pack_sorted(
    isa: str, threads: int, bits: int, K: int, N: int, rows: int, columns: int, shuffled: bool
) -> None:
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits, shuffled)
    expected = twin(partial(reference.pack_marlin, bits=bits), stored)
    B = cpu.pack_sorted(qweight, rows=rows, threads=threads, isa=isa, **order)
    np.testing.assert_array_equal(B, expected)
    assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) is None


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "N", "rows", "columns"), [*SORTED_SIZES[1:3], SORTED_SIZES[4]])
@shuffled_or_not
def test_sorted_difference_finds_every_wrong_code(
    isa: str, threads: int, bits: int, K: int, N: int, rows: int, columns: int, shuffled: bool
) -> None:
    """In the layer and in the padding; where several codes are wrong, the first in the order of B's rows."""
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits, shuffled)
    rng = np.random.default_rng(1)
    places = [(int(rng.integers(rows)), int(rng.integers(columns))) for _ in range(40)]
    places += [(0, 0), (rows - 1, columns - 1), (K - 1, N - 1), (K % rows, 0), (0, N % columns)]
    for row, column in places:
        wrong = stored.copy()
        wrong[row, column] ^= 1 << int(rng.integers(bits))
        B = twin(partial(reference.pack_marlin, bits=bits), wrong)
        assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) == (row, column)
    for row, column in set(places):
        stored[row, column] ^= 1
    B = twin(partial(reference.pack_marlin, bits=bits), stored)
    assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) == min(places)


@every_isa
@pytest.mark.parametrize("bits", [4, 8])
@shuffled_or_not
@pytest.mark.parametrize(("K", "N", "rows"), [(200, 700, 256), (208, 704, 208)])
def test_some_columns_of_wider_matrices(isa: str, bits: int, K: int, N: int, rows: int, shuffled: bool) -> None:
    """Nothing beside them is read or written."""
    columns = 704
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits, shuffled)
    expected = twin(partial(reference.pack_marlin, bits=bits), stored)
    B = np.full_like(expected, 0x55555555)
    for first, width in [(0, 64), (128, 192), (640, 64)]:
        some = order | {"fill": order["fill"][first : first + width]}
        words = qweight[:, first : first + width]
        part = B[:, first * bits // 2 : (first + width) * bits // 2]
        assert cpu.pack_sorted(words, part, rows=rows, isa=isa, **some) is part
        assert cpu.sorted_difference(part, words, isa=isa, **some) is None
    done = np.zeros(columns, bool)
    done[[*range(64), *range(128, 320), *range(640, 704)]] = True
    done = np.repeat(done, bits // 2)
    np.testing.assert_array_equal(B[:, done], expected[:, done])
    assert (B[:, ~done] == 0x55555555).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_sorted_by_the_twin(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    qweight, order, stored = sorted_layer(72, 30, 128, 64, bits)
    B = cpu.pack_sorted(qweight, rows=128, **order)
    np.testing.assert_array_equal(B, twin(partial(reference.pack_marlin, bits=bits), stored))
    assert cpu.sorted_difference(B, qweight, **order) is None
    for row, column in [(0, 0), (71, 29), (127, 63)]:
        wrong = stored.copy()
        wrong[row, column] ^= 1
        B = twin(partial(reference.pack_marlin, bits=bits), wrong)
        assert cpu.sorted_difference(B, qweight, **order) == (row, column)


def test_arrange_by_the_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    qweight, fill = random_words(8, 30), np.full(64, 9, np.uint8)
    perm = np.random.default_rng(0).permutation(64).astype(np.int32)
    out = cpu.arrange(qweight, bits=4, fill=fill, perm=perm, rows=128)
    codes = np.asarray(reference.unpack_gptq(torch.from_numpy(out)).numpy())
    source = np.asarray(reference.unpack_gptq(torch.from_numpy(qweight)).numpy())
    np.testing.assert_array_equal(codes[:64, :30], source[perm])
    assert (codes[64:] == 9).all()
    assert (codes[:, 30:] == 9).all()
