"""Arguments that do not fit are refused by name, the same by the library and by the twin."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from marlin_convert.native import cpu, cpu_weights
from tests.support.native_cpu import both_backends

WORDS: Any
HALVES: Any
FLOATS: Any
WORDS, HALVES, FLOATS = np.zeros((16, 64), np.int32), np.ones((1, 64), np.float16), np.ones((2, 128), np.float32)


@both_backends
@pytest.mark.usefixtures("backend_set")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cpu.pack(WORDS.tolist()), TypeError, "qweight is a list; it should be a numpy array"),
        (lambda: cpu.pack(WORDS.astype(np.int64)), TypeError, "qweight has dtype int64; it should be int32"),
        (lambda: cpu.pack(WORDS.astype(">i4")), TypeError, "qweight has dtype >i4; it should be int32"),
        (lambda: cpu.pack(WORDS[0]), ValueError, r"qweight has shape \(64,\); it should have 2 dimensions"),
        (lambda: cpu.pack(WORDS.T), ValueError, r"qweight has strides .*; it should be C-contiguous"),
        (lambda: cpu.pack(WORDS[:3]), ValueError, r"qweight has shape \(3, 64\): K is 24; .* multiple of 16"),
        (lambda: cpu.pack(WORDS[:0]), ValueError, r"qweight has shape \(0, 64\): K is 0"),
        (lambda: cpu.pack(WORDS.reshape(32, 32)), ValueError, r"qweight has shape \(32, 32\): N is 32"),
        (lambda: cpu.unpack(WORDS), ValueError, r"B has shape \(16, 64\): N is 32"),
        (lambda: cpu.unpack(np.zeros((1, 129), np.int32)), ValueError, r"B has shape \(1, 129\); .* \[K/16, 2N\]"),
        (lambda: cpu.pack(WORDS, WORDS), ValueError, r"out has shape \(16, 64\); it should be \(8, 128\)"),
        (lambda: cpu.pack(WORDS, WORDS.reshape(8, 128)), ValueError, "out overlaps the input"),
        (lambda: cpu.pack(WORDS, HALVES), TypeError, "out has dtype float16; it should be int32"),
        (lambda: cpu.pack(WORDS, read_only((8, 128))), ValueError, "out is read-only"),
        (lambda: cpu.pack(WORDS, threads=0), ValueError, r"threads is 0; it should be 1\.\."),
        (lambda: cpu.pack(WORDS, threads=10**12), ValueError, r"threads is 1000000000000; it should be 1\.\."),
        (lambda: cpu.pack(WORDS, threads=2.0), TypeError, r"threads is 2\.0; it should be an int"),  # type: ignore[arg-type]
        (lambda: cpu.unpack(WORDS.reshape(8, 128), isa="sse"), ValueError, "isa is 'sse'; it should be one of plain,"),
        (lambda: cpu.first_difference(WORDS, WORDS[:3]), ValueError, r"a has shape \(16, 64\) and b \(3, 64\)"),
        (lambda: cpu.first_difference(WORDS, FLOATS), TypeError, "b has dtype float32"),
        (
            lambda: cpu_weights.dequantize_gptq(WORDS, FLOATS),
            TypeError,
            "scales has dtype float32; it should be float16",
        ),
        (lambda: cpu_weights.dequantize_gptq(WORDS, HALVES[:, :32]), ValueError, "scales has strides|scales has shape"),
        (
            lambda: cpu_weights.dequantize_gptq(WORDS, halves(1, 128)),
            ValueError,
            r"scales has shape \(1, 128\); .* N = 64",
        ),
        (lambda: cpu_weights.dequantize_gptq(WORDS, halves(0, 64)), ValueError, r"scales has shape \(0, 64\)"),
        (lambda: cpu_weights.dequantize_gptq(WORDS, halves(3, 64)), ValueError, "K / G should be a multiple of 16"),
        (
            lambda: cpu_weights.dequantize_marlin(WORDS.reshape(8, 128), halves(16, 64)),
            ValueError,
            "s has shape .*: G = 16",
        ),
        (lambda: product(x=FLOATS.astype(np.float64)), TypeError, "x has dtype float64"),
        (lambda: product(x=FLOATS[:, :64].copy()), ValueError, r"x has shape \(2, 64\); .* rows_per_group = 128"),
        (lambda: product(x=FLOATS[:0]), ValueError, r"x has shape \(0, 128\)"),
        (lambda: product(y=floats(2, 128)), ValueError, r"y has shape \(2, 128\); it should be \(2, 64\)"),
        (lambda: product(y=FLOATS.reshape(-1)[:128].reshape(2, 64)), ValueError, "y overlaps x"),
        (lambda: product(y=read_only((2, 64), np.float32)), ValueError, "y is read-only"),
        (lambda: product(k0=8), ValueError, "k0 is 8; it should be a multiple of 16"),
        (lambda: product(k0=-16), ValueError, "k0 is -16"),
        (lambda: product(k0=16), ValueError, "k0 is 16; .* leave room for 128 rows in K = 128"),
        (lambda: product(k0=0.0), TypeError, "float"),
        (lambda: product(rows_per_group=0), ValueError, "rows_per_group is 0; it should be a positive multiple of 16"),
        (lambda: product(rows_per_group=64), ValueError, r"K = G \* rows_per_group = 64"),
    ],
)
def test_arguments_are_checked(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def read_only(shape: tuple[int, int], dtype: Any = np.int32) -> NDArray[Any]:
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


def halves(rows: int, columns: int) -> NDArray[np.float16]:
    return np.ones((rows, columns), np.float16)


def floats(rows: int, columns: int) -> NDArray[np.float32]:
    return np.ones((rows, columns), np.float32)


def product(**changed: Any) -> None:
    """Both products with one argument changed; the second one must complain in the same way."""
    arguments: dict[str, Any] = {"x": FLOATS, "y": floats(2, 64), "rows_per_group": 128, **changed}
    x, y = arguments.pop("x"), arguments.pop("y")
    with pytest.raises((TypeError, ValueError)) as first:
        cpu_weights.matmul_gptq(x, WORDS, HALVES, y, **arguments)
    with pytest.raises(first.type, match=re.escape(str(first.value))):
        cpu_weights.matmul_marlin(x, WORDS.reshape(8, 128), HALVES, y, **arguments)
    raise first.value


@both_backends
@pytest.mark.usefixtures("backend_set")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cpu.pack(WORDS, bits=2), "bits is 2; it should be 4 or 8"),
        (lambda: cpu.unpack(np.zeros((1, 130), np.int32), bits=8), r"B has shape \(1, 130\); .* \[K/16, 4N\]"),
        (lambda: arranged(fill=np.zeros(63, np.uint8)), "fill has shape .*at least N = 64"),
        (lambda: arranged(fill=np.full(64, 16, np.uint8)), "fill has 16; a code has 4 bits"),
        (lambda: arranged(rows=12), "rows is 12 and k0 0; both should be multiples of 8"),
        (lambda: arranged(k0=-8), "k0 -8"),
        (lambda: arranged(perm=np.arange(1, 129, dtype=np.int32)), r"perm has shape \(128,\); .* 0 .. 127"),
        (lambda: arranged(perm=np.arange(64, dtype=np.int32)), r"perm has shape \(64,\)"),
        (lambda: sorted_(fill=np.full(64, 16, np.uint8)), "fill has 16; a code has 4 bits"),
        (lambda: sorted_(perm=np.zeros(128, np.int32)), "perm has a number twice"),
        (lambda: sorted_(perm=np.arange(64, dtype=np.int32)), r"perm has shape \(64,\)"),
        (lambda: sorted_(rows=112), "rows is 112; it should be at least K = 128"),
        (lambda: sorted_(rows=136), "K is 136; it should be a positive multiple of 16"),
        (lambda: sorted_(fill=np.zeros(96, np.uint8)), "N is 96; it should be a positive multiple of 64"),
        (lambda: sorted_(out=np.zeros((8, 64), np.int32)), r"out has shape \(8, 64\); it should be \(8, 128\)"),
        (lambda: sorted_(qweight=WORDS[:, ::2]), "qweight has strides .*; it should be C-contiguous"),
        (lambda: sorted_(qweight=WORDS[::-1]), "qweight has strides .*; it should be C-contiguous"),
        (
            lambda: cpu.sorted_difference(
                np.zeros((8, 64), np.int32), WORDS, bits=4, perm=ORDER, fill=np.zeros(64, np.uint8)
            ),
            r"B has shape \(8, 64\); it should be \[rows/16, 128\]",
        ),
        (
            lambda: cpu_weights.dequantize_gptq(WORDS, HALVES, zeros=np.zeros((2, 64), np.uint8)),
            r"zeros has shape \(2, 64\)",
        ),
    ],
)
def test_arguments_of_the_extended_format(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


ORDER: Any = np.arange(128, dtype=np.int32)


def sorted_(**changed: Any) -> Any:
    arguments = {"qweight": WORDS, "bits": 4, "rows": 128, "fill": np.zeros(64, np.uint8), "perm": ORDER, **changed}
    return cpu.pack_sorted(**arguments)


def arranged(**changed: Any) -> Any:
    return cpu.arrange(WORDS, **{"bits": 4, "rows": 16, "fill": np.zeros(64, np.uint8), **changed})
