"""Scales in fp16: what may round, rounds to the nearest; what would be lost, is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_convert.formats.scales import to_extended, to_fp16

TORCH = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
EVERY = pytest.mark.parametrize("dtype", TORCH)
WIDE = pytest.mark.parametrize("dtype", ["BF16", "F32"])


def raw_scales(values: Any, dtype: str) -> np.ndarray[Any, Any]:
    """Values as a safetensors file of `dtype` gives them: BF16 as the words themselves. [G, N]"""
    tensor = torch.as_tensor(values, dtype=torch.float64).reshape(1, -1).to(TORCH[dtype])
    return tensor.view(torch.int16).numpy().view(np.uint16) if dtype == "BF16" else tensor.numpy()


@EVERY
def test_numbers_that_fp16_has_stay_as_they_are(dtype: str) -> None:
    values = [0.0, -0.0, 1.0, -1.0, 0.5, -0.0078125, 2.0**-14, 2.0**-24, -(2.0**-24), 32768.0, -61440.0]
    fit = to_fp16(raw_scales(values, dtype), dtype)
    assert (fit.problem, fit.rounding) == (None, 0.0)
    assert fit.scales.dtype == np.float16
    assert fit.scales.shape == (1, len(values))
    np.testing.assert_array_equal(fit.scales.view(np.uint16)[0], np.array(values, np.float16).view(np.uint16))


def test_fp16_keeps_every_finite_bit_pattern() -> None:
    words = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    finite = words[np.isfinite(words.view(np.float16))].reshape(1, -1)
    fit = to_fp16(finite.view(np.float16), "F16")
    assert (fit.problem, fit.rounding) == (None, 0.0)
    np.testing.assert_array_equal(fit.scales.view(np.uint16), finite)


@EVERY
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_inf_and_nan(dtype: str, value: float) -> None:
    assert to_fp16(raw_scales([0.01, value, 0.01], dtype), dtype).problem == "scales contain inf or NaN"


@EVERY
def test_nan_of_every_payload(dtype: str) -> None:
    """A NaN may have only its lowest bit set, or the sign."""
    word: Any = {"F16": (0x7C01, np.uint16), "BF16": (0x7F81, np.uint16), "F32": (0x7F800001, np.uint32)}[dtype]
    for bits in (word[0], word[0] | (1 << (word[1](0).nbytes * 8 - 1))):
        array = np.array([[bits]], word[1])
        raw = array if dtype == "BF16" else array.view(np.float16 if dtype == "F16" else np.float32)
        assert to_fp16(raw, dtype).problem == "scales contain inf or NaN"


@pytest.mark.parametrize(
    ("value", "fits"),
    [(65504.0, 65504.0), (65519.0, 65504.0), (-65519.0, -65504.0), (65520.0, None), (-65520.0, None), (1e30, None)],
)
def test_largest(value: float, fits: float | None) -> None:
    """65504 is fp16's largest; from 65520, halfway to the next, numbers round to inf."""
    fit = to_fp16(raw_scales([0.01, value], "F32"), "F32")
    if fits is None:
        assert fit.problem
        assert fit.problem.startswith("F32 scales beyond what fp16 can hold")
    else:
        assert fit.problem is None
        assert fit.scales[0, 1] == fits


@pytest.mark.parametrize(
    ("value", "fits"),
    [(2.0**-24, 2.0**-24), (2.0**-25 * 1.001, 2.0**-24), (-(2.0**-25) * 1.001, -(2.0**-24)), (2.0**-25, None),
     (-(2.0**-25), None), (1e-30, None), (1e-45, None)],
)  # fmt: skip
def test_smallest(value: float, fits: float | None) -> None:
    """2^-24 is fp16's smallest; half of it, and less, would become 0."""
    fit = to_fp16(raw_scales([0.01, value], "F32"), "F32")
    if fits is None:
        assert fit.problem
        assert fit.problem.startswith("F32 scales so small that they would be 0")
    else:
        assert fit.problem is None
        assert fit.scales[0, 1] == fits


@WIDE
def test_limits_of_bf16_too(dtype: str) -> None:
    assert "beyond" in str(to_fp16(raw_scales([1e5], dtype), dtype).problem)
    assert "would be 0" in str(to_fp16(raw_scales([1e-9], dtype), dtype).problem)


@EVERY
def test_zero_is_no_loss(dtype: str) -> None:
    fit = to_fp16(raw_scales([0.0, -0.0, 0.0], dtype), dtype)
    assert (fit.problem, fit.rounding) == (None, 0.0)
    assert not fit.scales.any()


@WIDE
def test_sign_is_kept(dtype: str) -> None:
    """AutoRound writes about half of the scales negative."""
    values = np.linspace(-0.02, 0.02, 64)
    fit = to_fp16(raw_scales(values, dtype), dtype)
    np.testing.assert_array_equal(np.signbit(fit.scales[0]), values < 0)


@pytest.mark.parametrize(
    ("values", "rounding"),
    [
        ([1.0, 1 + 2**-12], 2**-12 / (1 + 2**-12)),  # rounds down to 1
        ([1 + 3 * 2**-12], 2**-12 / (1 + 3 * 2**-12)),  # rounds up to 1 + 2^-10
        ([-1 - 2**-12, 0.0], 2**-12 / (1 + 2**-12)),
        ([1.5 * 2**-24 * 1.5, 1.0], 0.25 / 2.25),  # 2.25 units of the smallest → 2
        ([65519.0], 15 / 65519),
    ],
)
def test_rounding_is_the_largest_relative_error(values: list[float], rounding: float) -> None:
    fit = to_fp16(raw_scales(values, "F32"), "F32")
    assert fit.problem is None
    assert fit.rounding == pytest.approx(rounding, rel=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=8),
    st.sampled_from(["BF16", "F32"]),
)
def test_agrees_with_torch(values: list[float], dtype: str) -> None:
    raw = raw_scales(values, dtype)
    wide = torch.tensor(values, dtype=torch.float64).to(TORCH[dtype])
    half = wide.to(torch.float16)
    fit = to_fp16(raw, dtype)
    if not torch.isfinite(half).all() or ((half == 0) & (wide != 0)).any():
        assert fit.problem
        return
    assert fit.problem is None
    np.testing.assert_array_equal(fit.scales[0].view(np.int16), half.view(torch.int16).numpy())
    exact = wide.double()
    errors = ((half.double() - exact).abs() / exact.abs())[exact != 0]
    assert fit.rounding == pytest.approx(float(errors.max()) if errors.numel() else 0.0, rel=1e-6)


@EVERY
def test_shape_is_kept(dtype: str) -> None:
    raw = np.tile(raw_scales([0.25, 0.5, 1.0], dtype), (5, 1))
    assert to_fp16(raw, dtype).scales.shape == (5, 3)
    before = raw.copy()
    to_fp16(raw, dtype)
    np.testing.assert_array_equal(raw, before)


# ---- The extended format: fp16 where it holds the scales, else bf16 ----


def bf16(values: list[float]) -> np.ndarray:
    return (np.array([values], np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("raw", "dtype", "stored", "kind"),
    [
        (np.array([[1.5, -65504, 2**-24]], np.float16), "F16", [1.5, -65504, 2**-24], "F16"),
        (bf16([0.5, -3, 0]), "BF16", [0.5, -3, 0], "F16"),
        (bf16([0.5, 131072]), "BF16", [0.5, 131072], "BF16"),  # beyond 65504
        (bf16([0.5, 2**-30]), "BF16", [0.5, 2**-30], "BF16"),  # 0 in fp16
        (bf16([1.0078125 * 2**-20]), "BF16", [1.0078125 * 2**-20], "BF16"),  # a subnormal fp16 would round it
        (np.array([[0.1, 2]], np.float32), "F32", [float(np.float16(0.1)), 2], "F16"),
        (np.array([[1 + 2**-9, 1e9]], np.float32), "F32", [1, 998244352], "BF16"),
        (np.array([[1 + 3 * 2**-8, 1e9]], np.float32), "F32", [1 + 2 * 2**-7, 998244352], "BF16"),  # a tie, to even
    ],
)
def test_extended_scales(raw: np.ndarray, dtype: str, stored: list[float], kind: str) -> None:
    fit = to_extended(raw, dtype)
    assert fit.problem is None
    assert fit.dtype == kind
    wide = (fit.scales.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else fit.scales
    assert wide.astype(np.float64).tolist() == [stored]


def test_extended_rounding_is_told() -> None:
    fit = to_extended(np.array([[1e9]], np.float32), "F32")
    assert fit.rounding == pytest.approx((1e9 - 998244352) / 1e9)


@pytest.mark.parametrize(
    ("raw", "dtype", "problem"),
    [
        (np.array([[np.inf]], np.float16), "F16", "inf or NaN"),
        (bf16([np.inf]), "BF16", "inf or NaN"),
        (bf16([np.nan, 1e30]), "BF16", "inf or NaN"),
        (np.array([[np.nan, 1e30]], np.float32), "F32", "inf or NaN"),
        (np.array([[3.4e38]], np.float32), "F32", "beyond what bf16 can hold"),
        (np.array([[1e-45, 1]], np.float32), "F32", "0 in bf16"),
    ],
)
def test_extended_scales_that_do_not_fit(raw: np.ndarray, dtype: str, problem: str) -> None:
    found = to_extended(raw, dtype).problem
    assert found is not None
    assert problem in found
