"""The torch twin: a golden tile, the formula nibble by nibble, and exact arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_convert.formats import layout

# One tile of codes (k*n + 3*k + n//5) % 16, k = 0..15, n = 0..63. Worked out apart from the formula: from the registers
from marlin_convert.native import reference
from tests.support import format_reader

# One tile of codes (k*n + 3*k + n//5) % 16, k = 0..15, n = 0..63. Worked out apart from the formula: from the registers
# that the mma.m16n8k16 instruction assigns to a lane (b0, b1 = rows 2t, 2t+1 and b2, b3 = rows 2t+8, 2t+9 of column g),
# for two blocks of 8 columns, the eight values stored as 0 2 4 6 1 3 5 7 from the lowest nibble.
GOLDEN_B = (
    *(0x4CB39180, 0x7FE6C4B3, 0xB31908E6, 0xE64C3B19, 0xA219F7E6, 0xD54C2A19, 0x197F6E4C, 0x4CA2917F),
    *(0x087F5D4C, 0x3BA2807F, 0x7FD5C4A2, 0xA208F7D5, 0x6ED5B3A2, 0x9108E6D5, 0xD53B2A08, 0x086E5D3B),
    *(0xDD441100, 0x11775533, 0x44AA8866, 0x77DDBB99, 0x55CC9988, 0x99FFDDBB, 0xCC2200EE, 0xFF553311),
    *(0xDD441100, 0x11775533, 0x44AA8866, 0x77DDBB99, 0x55CC9988, 0x99FFDDBB, 0xCC2200EE, 0xFF553311),
    *(0x7FD5A280, 0xA208D5B3, 0xD53B08E6, 0x087F3B2A, 0x197F4C2A, 0x4CA27F5D, 0x7FD5A280, 0xA219D5C4),
    *(0xB319E6C4, 0xE64C19F7, 0x197F4C2A, 0x4CB37F6E, 0x5DB3806E, 0x80E6B391, 0xB319E6C4, 0xE65D1908),
    *(0x00662200, 0x33995533, 0x66DD8877, 0x9900BBAA, 0xCC22EECC, 0xFF5511FF, 0x22994433, 0x55CC7766),
    *(0x88EEAA88, 0xBB11DDBB, 0xEE5500FF, 0x11883322, 0x44AA6644, 0x77DD9977, 0xAA11CCBB, 0xDD44FFEE),
    *(0x91F7A280, 0xC43BD5C4, 0xF76E08F7, 0x3B914C2A, 0x7FD5806E, 0xA219B3A2, 0xD54CE6D5, 0x197F2A08),
    *(0x5DB36E4C, 0x80F79180, 0xB32AC4B3, 0xF75D08E6, 0x3B914C2A, 0x6ED57F6E, 0x9108A291, 0xD53BE6C4),
    *(0x22992211, 0x55CC5544, 0x99FF9977, 0xCC22CCAA, 0x22992211, 0x55CC5544, 0x99FF9977, 0xCC22CCAA),
    *(0x22992211, 0x55CC5544, 0x99FF9977, 0xCC22CCAA, 0x22992211, 0x55CC5544, 0x99FF9977, 0xCC22CCAA),
    *(0xB32AA291, 0xF75DE6C4, 0x2A8019F7, 0x5DB34C2A, 0xD54CC4B3, 0x197F08E6, 0x4CA23B19, 0x7FD56E4C),
    *(0xF76EE6D5, 0x3B912A08, 0x6EC45D3B, 0x91F7806E, 0x198008F7, 0x5DB34C2A, 0x80E67F5D, 0xB319A280),
    *(0x55BB3311, 0x88EE6644, 0xBB119977, 0xEE55CCBB, 0x99FF7755, 0xCC22AA88, 0xFF55DDBB, 0x229900FF),
    *(0xDD33BB99, 0x0066EECC, 0x339911FF, 0x66DD4433, 0x1177FFDD, 0x44AA2200, 0x77DD5533, 0xAA118877),
)
# Words of the same codes in `qweight`: {(row, column): word}.
GOLDEN_QWEIGHT = {
    (0, 0): 0x52FC9630,
    (0, 1): 0xC840C840,
    (0, 17): 0xFB73FB73,
    (0, 63): 0xA86420EC,
    (1, 0): 0xDA741EB8,
    (1, 1): 0xC840C840,
    (1, 17): 0xFB73FB73,
    (1, 63): 0xA86420EC,
}


def golden_codes() -> torch.Tensor:
    return torch.tensor([[(k * n + 3 * k + n // 5) % 16 for n in range(64)] for k in range(16)])


def random_codes(K: int, N: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 16, (K, N), generator=torch.Generator().manual_seed(seed))


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.flatten().tolist()]


shapes = st.tuples(st.integers(1, 6).map(lambda i: 16 * i), st.integers(1, 5).map(lambda i: 64 * i))


# ---- Packing ----


def test_golden_tile() -> None:
    codes = golden_codes()
    B = reference.pack_marlin(codes)
    assert B.dtype == torch.int32
    assert B.shape == (1, 128)
    assert unsigned(B) == list(GOLDEN_B)
    assert torch.equal(reference.unpack_marlin(B), codes)

    qweight = reference.pack_gptq(codes)
    assert qweight.dtype == torch.int32
    assert qweight.shape == (2, 64)
    assert {at: int(qweight[at]) & 0xFFFFFFFF for at in GOLDEN_QWEIGHT} == GOLDEN_QWEIGHT
    assert torch.equal(reference.unpack_gptq(qweight), codes)
    assert torch.equal(reference.gptq_to_marlin(qweight), B)
    assert torch.equal(reference.marlin_to_gptq(B), qweight)


def test_every_nibble_is_where_the_formula_says() -> None:
    K, N = 48, 192
    codes = random_codes(K, N)
    B = reference.pack_marlin(codes)
    np.testing.assert_array_equal(format_reader.codes(B, 4, N), codes.numpy())


def test_gptq_words_hold_neighbours_along_k_lowest_first() -> None:
    codes = random_codes(32, 64)
    words = np.array(unsigned(reference.pack_gptq(codes))).reshape(4, 64)
    for k in range(32):
        np.testing.assert_array_equal(words[k // 8] >> (4 * (k % 8)) & 15, codes[k].numpy())


@settings(deadline=None, max_examples=25)
@given(shape=shapes, seed=st.integers(0, 2**31))
def test_round_trips(shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(*shape, seed)
    qweight = reference.pack_gptq(codes)
    B = reference.gptq_to_marlin(qweight)
    assert torch.equal(reference.unpack_gptq(qweight), codes)
    assert torch.equal(reference.unpack_marlin(B), codes)
    assert torch.equal(reference.marlin_to_gptq(B), qweight)
    assert reference.marlin_size(B) == shape


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="K is 8; it should be a positive multiple of 16"):
        reference.gptq_to_marlin(torch.zeros((1, 64), dtype=torch.int32))
    with pytest.raises(ValueError, match="N is 32; it should be a positive multiple of 64"):
        reference.marlin_to_gptq(torch.zeros((1, 64), dtype=torch.int32))
    with pytest.raises(ValueError, match="codes has K = 12 rows"):
        reference.pack_gptq(random_codes(12, 64))
    with pytest.raises(ValueError, match=r"qweight has shape \(64,\)"):
        reference.unpack_gptq(torch.zeros(64, dtype=torch.int32))


# ---- Weights ----


@pytest.mark.parametrize("G", [1, 2, 6])
def test_scales_permute_as_in_layout(G: int) -> None:
    scales = torch.randn((G, 128)).to(torch.float16)
    s = reference.permute_scales(scales)
    np.testing.assert_array_equal(s.numpy(), layout.permute_scales(scales.numpy()))
    assert torch.equal(reference.unpermute_scales(s), scales)


@pytest.mark.parametrize("G", [1, 3])
def test_dequantization_rounds_the_exact_product_once(G: int) -> None:
    codes = random_codes(48, 128)
    # Among 2**-26 .. 2**17 are subnormal products and, with code 0, overflows.
    exponents = torch.arange(128) % 36 - 22
    scales = (torch.ones((G, 128)) * 2.0**exponents * torch.linspace(1, 1.99, 128) * (-1) ** torch.arange(128)).half()
    exact = (codes.numpy() - 8.0) * scales.double().repeat_interleave(48 // G, dim=0).numpy()
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float16)
    assert np.isinf(expected).any()
    assert ((np.abs(expected) < 2.0**-14) & (expected != 0)).any()

    W = reference.dequantize_gptq(reference.pack_gptq(codes), scales)
    assert W.dtype == torch.float16
    np.testing.assert_array_equal(W.numpy(), expected)
    W = reference.dequantize_marlin(reference.pack_marlin(codes), reference.permute_scales(scales))
    np.testing.assert_array_equal(W.numpy(), expected)


@pytest.mark.parametrize("G", [1, 3])
def test_products_of_both_formats(G: int) -> None:
    codes, x = random_codes(96, 128), torch.randn((5, 96))
    scales = (torch.rand((G, 128)) / 50).half()
    weights = ((codes - 8) * scales.float().repeat_interleave(96 // G, dim=0)).half()
    expected = x.double() @ weights.double()
    for y in (
        reference.matmul_gptq(x, reference.pack_gptq(codes), scales),
        reference.matmul_marlin(x, reference.pack_marlin(codes), reference.permute_scales(scales)),
    ):
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_scales_are_checked() -> None:
    codes = random_codes(48, 64)
    with pytest.raises(TypeError, match=r"scales has dtype torch.float32; it should be torch.float16"):
        reference.dequantize(codes, torch.ones((1, 64)))
    for shape in [(1, 128), (5, 64), (0, 64)]:
        with pytest.raises(ValueError, match=r"it should be \[G, 64\] with G dividing K = 48"):
            reference.dequantize(codes, torch.ones(shape, dtype=torch.float16))
    with pytest.raises(ValueError, match="scales has N = 96 columns"):
        reference.permute_scales(torch.ones((2, 96)))


@pytest.mark.cuda
def test_the_twin_works_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    codes, scales = random_codes(128, 256), (torch.rand((1, 256)) / 50).half()
    qweight = reference.pack_gptq(codes)
    B = reference.gptq_to_marlin(qweight.cuda())
    assert torch.equal(B.cpu(), reference.gptq_to_marlin(qweight))
    assert torch.equal(reference.marlin_to_gptq(B).cpu(), qweight)
    W = reference.dequantize_marlin(B, reference.permute_scales(scales.cuda()))
    assert torch.equal(W.cpu(), reference.dequantize_gptq(qweight, scales))


# ---- The extended format ----


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("K", "N", "group"), [(256, 64, 64), (200, 90, 32), (128, 128, -1), (72, 65, 16)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_the_extended_format(
    bits: int, asymmetric: bool, order: bool, K: int, N: int, group: int, dtype: torch.dtype
) -> None:
    """From the definition, in float64: W[perm[k], n] = (code[k, n] - zero[g, n]) * scale[g, n], g = k // group."""
    generator = torch.Generator().manual_seed(K + bits)
    padded_K, padded_N = -(-K // 128) * 128, -(-N // 64) * 64
    G = 1 if group == -1 else padded_K // group
    codes = torch.randint(0, 2**bits, (padded_K, padded_N), generator=generator)
    scales = torch.randn(G, padded_N, generator=generator).to(dtype)
    zeros = torch.randint(0, 2**bits, (G, padded_N), generator=generator) if asymmetric else None
    perm = torch.randperm(K, generator=generator).int() if order else None
    expected = torch.zeros(K, N, dtype=torch.float64)
    for k in range(K):
        g = 0 if group == -1 else k // group
        zero = 2 ** (bits - 1) if zeros is None else zeros[g, :N]
        expected[k if perm is None else perm[k]] = (codes[k, :N] - zero) * scales[g, :N].double()
    stored: Any = (
        reference.pack_marlin(codes, bits),
        reference.permute_scales(scales),
        None if zeros is None else reference.pack_zeros(zeros, bits),
        perm,
    )
    sizes: dict[str, Any] = {"bits": bits, "in_features": K, "out_features": N}
    assert torch.equal(reference.dequantize_layer(*stored, **sizes, dtype=torch.float32).double(), expected)
    for target in (torch.float16, torch.bfloat16):
        assert torch.equal(reference.dequantize_layer(*stored, **sizes, dtype=target), expected.to(target))
    assert reference.dequantize_layer(*stored, **sizes).dtype == dtype


@pytest.mark.parametrize("bits", [4, 8])
def test_the_twins_of_zero_points_agree(bits: int) -> None:
    zeros = np.random.default_rng(bits).integers(0, 2**bits, (3, 128), dtype=np.uint8)
    words = reference.pack_zeros(torch.from_numpy(zeros), bits)
    np.testing.assert_array_equal(words.numpy(), layout.pack_zeros(zeros, bits))
    np.testing.assert_array_equal(reference.unpack_zeros(words, bits).numpy(), zeros)


def test_a_permutation_of_the_wrong_length() -> None:
    B, s = torch.zeros((8, 128), dtype=torch.int32), torch.ones((1, 64), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"perm has shape \(3,\); it should be \[128\]"):
        reference.dequantize_layer(B, s, perm=torch.zeros(3, dtype=torch.int32))
