"""Weights as numbers and products from the native code, against float64."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from marlin_convert.formats import layout
from marlin_convert.native import cpu, cpu_weights, reference
from tests.support.native_cpu import ISAS, both_backends, every_isa, needs, random_scales, random_words, twin


def exact_weights(codes: NDArray[Any], scales: NDArray[np.float16]) -> NDArray[np.float16]:
    """The formula in float64, in which the product is exact, rounded once by numpy."""
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.repeat(scales.astype(np.float64), len(codes) // len(scales), axis=0)
        return ((codes - 8.0) * scale).astype(np.float16)


def assert_same_fp16(actual: NDArray[np.float16], expected: NDArray[np.float16]) -> None:
    """Bit for bit, except that any NaN equals any other."""
    assert actual.dtype == np.float16
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(np.where(nan, 0, actual.view(np.uint16)), np.where(nan, 0, expected.view(np.uint16)))


@every_isa
def test_every_code_times_every_fp16_scale(isa: str) -> None:
    """All 16 * 65536 products: normal, subnormal, zero, infinite and NaN."""
    codes = np.repeat(np.arange(16)[:, None], 65536, axis=1)
    scales = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(1, 65536)
    expected = exact_weights(codes, scales)
    qweight = twin(reference.pack_gptq, codes)
    assert_same_fp16(cpu_weights.dequantize_gptq(qweight, scales, isa=isa), expected)
    B = twin(reference.pack_marlin, codes)
    assert_same_fp16(cpu_weights.dequantize_marlin(B, layout.permute_scales(scales), isa=isa), expected)


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("K", "N", "G"), [(16, 64, 1), (48, 192, 3), (48, 192, 1), (256, 320, 2), (256, 1984, 16)])
def test_dequantization(isa: str, threads: int, K: int, N: int, G: int) -> None:
    qweight, scales = random_words(K // 8, N), random_scales(G, N)
    expected = exact_weights(twin(reference.unpack_gptq, qweight), scales)
    assert_same_fp16(cpu_weights.dequantize_gptq(qweight, scales, threads=threads, isa=isa), expected)
    B, s = twin(reference.gptq_to_marlin, qweight), layout.permute_scales(scales)
    assert_same_fp16(cpu_weights.dequantize_marlin(B, s, threads=threads, isa=isa), expected)


class Product:
    """x @ W of a random layer in both formats, and in float64."""

    def __init__(self, M: int, K: int, N: int, G: int) -> None:
        self.shape, self.rows_per_group = (M, N), K // G
        self.x = np.random.default_rng(1).standard_normal((M, K)).astype(np.float32)
        self.qweight, self.scales = random_words(K // 8, N), random_scales(G, N)
        self.B, self.s = twin(reference.gptq_to_marlin, self.qweight), layout.permute_scales(self.scales)
        W = exact_weights(twin(reference.unpack_gptq, self.qweight), self.scales).astype(np.float64)
        self.exact = self.x.astype(np.float64) @ W
        # Each of K additions and products may err by half a unit in the last place of a partial sum.
        self.tolerance = K * 2.0**-23 * (np.abs(self.x.astype(np.float64)) @ np.abs(W))

    def run(self, format_: str, blocks: list[tuple[int, int]], **options: Any) -> NDArray[np.float32]:
        y = np.zeros(self.shape, np.float32)
        for k0, k1 in blocks:
            if format_ == "gptq":
                weights = np.ascontiguousarray(self.qweight[k0 // 8 : k1 // 8])
                cpu_weights.matmul_gptq(
                    self.x, weights, self.scales, y, k0=k0, rows_per_group=self.rows_per_group, **options
                )
            else:
                weights = np.ascontiguousarray(self.B[k0 // 16 : k1 // 16])
                cpu_weights.matmul_marlin(
                    self.x, weights, self.s, y, k0=k0, rows_per_group=self.rows_per_group, **options
                )
        return y

    def check(self, y: NDArray[np.float32]) -> None:
        assert (np.abs(y - self.exact) <= self.tolerance).all(), np.abs(y - self.exact).max()


PRODUCTS = [(1, 128, 64, 1), (3, 256, 320, 2), (4, 96, 192, 6), (9, 384, 128, 3), (2, 640, 1216, 5)]


@every_isa
@pytest.mark.parametrize("format_", ["gptq", "marlin"])
@pytest.mark.parametrize(("M", "K", "N", "G"), PRODUCTS)
def test_products(isa: str, format_: str, M: int, K: int, N: int, G: int) -> None:
    product = Product(M, K, N, G)
    whole = product.run(format_, [(0, K)], isa=isa)
    product.check(whole)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(product.run(format_, [(0, K)], threads=threads, isa=isa), whole)
    # Blocks that end within a group, too; the additions come in the same order, hence equality.
    blocks = [(0, 16), (16, 80), (80, K)]
    np.testing.assert_array_equal(product.run(format_, blocks, isa=isa), whole)


@pytest.mark.parametrize("format_", ["gptq", "marlin"])
@pytest.mark.parametrize("G", [1, 3])
def test_products_by_the_twin(format_: str, G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    product = Product(3, 192, 128, G)
    product.check(product.run(format_, [(0, 192)]))
    product.check(product.run(format_, [(0, 48), (48, 192)]))


@both_backends
@pytest.mark.usefixtures("backend_set")
def test_products_add_to_what_is_there() -> None:
    product = Product(2, 128, 64, 1)
    y = np.full((2, 64), 1000, np.float32)
    cpu_weights.matmul_gptq(product.x, product.qweight, product.scales, y, rows_per_group=128)
    np.testing.assert_allclose(y, product.exact + 1000, atol=1e-3)


def test_a_wrong_nibble_shows_in_the_product() -> None:
    product = Product(4, 128, 128, 1)
    product.B[3, 77] ^= 1 << 13
    y = product.run("marlin", [(0, 128)])
    wrong = np.abs(y - product.exact) > product.tolerance
    assert wrong.any(axis=0).sum() == 1


def as_bf16(values: NDArray[Any]) -> NDArray[np.uint16]:
    return np.asarray(torch.from_numpy(values.astype(np.float32)).bfloat16().view(torch.int16).numpy()).view(np.uint16)


def bf16_value(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


EXTENDED = [(128, 64, 1), (128, 192, 8), (256, 320, 4), (384, 128, 12)]


@pytest.mark.parametrize("isa", [*[needs(isa) for isa in ISAS], "twin"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "N", "G"), EXTENDED)
def test_weights_and_products(
    isa: str, bf16: bool, asymmetric: bool, bits: int, K: int, N: int, G: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"isa": isa}
    if isa == "twin":
        monkeypatch.setenv(cpu.NO_NATIVE, "1")
        options = {}
    rng = np.random.default_rng(K + bits)
    codes = rng.integers(0, 2**bits, (K, N))
    zeros = rng.integers(0, 2**bits, (G, N), dtype=np.uint8) if asymmetric else None
    exact_scales = rng.standard_normal((G, N)) * (1e30 if bf16 else 0.01)
    scales: Any = as_bf16(exact_scales) if bf16 else exact_scales.astype(np.float16)
    wide = bf16_value(scales) if bf16 else scales.astype(np.float64)
    zero = 2.0 ** (bits - 1) if zeros is None else np.repeat(zeros.astype(np.float64), K // G, axis=0)
    W = (codes - zero) * np.repeat(wide, K // G, axis=0)
    expected: Any = as_bf16(W) if bf16 else W.astype(np.float16)  # float32 holds the products exactly
    rounded = bf16_value(expected) if bf16 else expected.astype(np.float64)
    qweight = np.asarray(reference.pack_gptq(torch.from_numpy(codes), bits).numpy())
    B = np.asarray(reference.pack_marlin(torch.from_numpy(codes), bits).numpy())
    s = layout.permute_scales(scales)
    kinds = {"bits": bits, "zeros": zeros, **options}
    for W_found in (
        cpu_weights.dequantize_gptq(qweight, scales, **kinds),
        cpu_weights.dequantize_marlin(B, s, **kinds),
    ):
        assert W_found.dtype == scales.dtype
        np.testing.assert_array_equal(W_found.view(np.uint16) & 0x7FFF, expected.view(np.uint16) & 0x7FFF)
        np.testing.assert_array_equal(np.sign(bf16_value(W_found) if bf16 else W_found), np.sign(rounded))
    x = rng.standard_normal((5, K)).astype(np.float32)
    tolerance = K * 2.0**-23 * (np.abs(x.astype(np.float64)) @ np.abs(rounded))
    for multiply, weights, own in ((cpu_weights.matmul_gptq, qweight, scales), (cpu_weights.matmul_marlin, B, s)):
        y = np.zeros((5, N), np.float32)
        half = len(weights) * 64 // K  # a block that ends within a group
        for part, k0 in ((weights[:half], 0), (weights[half:], 64)):
            multiply(x, np.ascontiguousarray(part), own, y, k0=k0, rows_per_group=K // G, **kinds)
        assert (np.abs(y - x.astype(np.float64) @ rounded) <= tolerance).all()
