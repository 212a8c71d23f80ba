"""The native code against the torch twin (bits) and float64 (products), each instruction set on its own."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marlin_convert.errors import DeviceError
from marlin_convert.formats import layout
from marlin_convert.native import _cpu_library, cpu, reference
from tests.support import format_reader

ISAS = ("plain", "avx2", "avx512")


def needs(isa: str) -> Any:
    """A parameter for an instruction set, skipped where it cannot run."""
    absent = isa not in cpu.available_isas()
    return pytest.param(isa, marks=pytest.mark.skipif(absent, reason=f"no {isa} here: {cpu.describe()}"))


every_isa = pytest.mark.parametrize("isa", [needs(isa) for isa in ISAS])
needs_native = pytest.mark.skipif(not cpu.native_available(), reason=cpu.describe())
both_backends = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "twin"])


@pytest.fixture
def backend_set(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "twin":
        monkeypatch.setenv(cpu.NO_NATIVE, "1")


def random_words(rows: int, columns: int, seed: int = 0) -> NDArray[np.int32]:
    info = np.iinfo(np.int32)
    return np.random.default_rng(seed).integers(info.min, info.max, (rows, columns), dtype=np.int32, endpoint=True)


def random_scales(G: int, N: int, seed: int = 0) -> NDArray[np.float16]:
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.2, 1, (G, N)) * rng.choice([-0.02, 0.02], (G, N))).astype(np.float16)


def twin(function: Callable[..., torch.Tensor], *arrays: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(function(*map(torch.from_numpy, arrays)).numpy())


# ---- Packing ----

SHAPES = [(16, 64), (16, 128), (32, 192), (48, 64), (128, 256), (144, 320), (80, 1024)]


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_pack_and_unpack_equal_the_twin(isa: str, threads: int, K: int, N: int) -> None:
    qweight = random_words(K // 8, N, seed=K + N)
    B = twin(reference.gptq_to_marlin, qweight)
    np.testing.assert_array_equal(cpu.pack(qweight, threads=threads, isa=isa), B)
    # Any words are some B, so that unpacking is tested on words that no packing made.
    B = random_words(K // 16, 2 * N, seed=K * N)
    np.testing.assert_array_equal(cpu.unpack(B, threads=threads, isa=isa), twin(reference.marlin_to_gptq, B))


@every_isa
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_enough_work_for_every_thread(isa: str, threads: int) -> None:
    """Small work stays on one thread; this is enough for the threads to be started."""
    qweight = random_words(34 * 2, 64 * 31)
    B = twin(reference.gptq_to_marlin, qweight)
    np.testing.assert_array_equal(cpu.pack(qweight, threads=threads, isa=isa), B)
    np.testing.assert_array_equal(cpu.unpack(B, threads=threads, isa=isa), qweight)


@every_isa
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), threads=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_round_trip(isa: str, rows: int, columns: int, threads: int, seed: int) -> None:
    qweight = random_words(2 * rows, 64 * columns, seed)
    B = cpu.pack(qweight, threads=threads, isa=isa)
    assert B.shape == (rows, 128 * columns)
    np.testing.assert_array_equal(B, twin(reference.gptq_to_marlin, qweight))
    np.testing.assert_array_equal(cpu.unpack(B, threads=threads, isa=isa), qweight)


@both_backends
@pytest.mark.usefixtures("backend_set")
def test_blocks_of_rows_make_the_whole() -> None:
    K, N = 224, 192
    qweight = random_words(K // 8, N)
    whole = twin(reference.gptq_to_marlin, qweight)
    B = np.zeros_like(whole)
    for k0, k1 in [(0, 16), (16, 64), (64, 176), (176, 224)]:
        out = cpu.pack(qweight[k0 // 8 : k1 // 8], B[k0 // 16 : k1 // 16])
        assert np.shares_memory(out, B)
    np.testing.assert_array_equal(B, whole)
    back = np.zeros_like(qweight)
    for k0, k1 in [(0, 48), (48, 64), (64, 224)]:
        cpu.unpack(B[k0 // 16 : k1 // 16], back[k0 // 8 : k1 // 8])
    np.testing.assert_array_equal(back, qweight)


@every_isa
def test_unaligned_and_read_only_memory(isa: str) -> None:
    """As in a mapped file whose header has an odd length."""
    K, N = 32, 128
    qweight = random_words(K // 8, N)
    inside = np.frombuffer(b"?" + qweight.tobytes(), dtype=np.int32, offset=1).reshape(qweight.shape)
    assert not inside.flags.aligned
    assert not inside.flags.writeable
    room = np.zeros(qweight.nbytes + 1, np.uint8)[1:].view(np.int32).reshape(K // 16, 2 * N)
    B = cpu.pack(inside, room, isa=isa)
    assert B is room
    np.testing.assert_array_equal(B, twin(reference.gptq_to_marlin, qweight))
    np.testing.assert_array_equal(cpu.unpack(B, isa=isa), qweight)
    scales = random_scales(1, N)
    odd_scales = np.frombuffer(b"?" + scales.tobytes(), dtype=np.float16, offset=1).reshape(1, N)
    np.testing.assert_array_equal(
        cpu.dequantize_gptq(inside, odd_scales, isa=isa), twin(reference.dequantize_gptq, qweight, scales)
    )
    x, y = np.ones((3, K), np.float32), np.zeros((3, N), np.float32)
    odd_x = np.frombuffer(b"?" + x.tobytes(), dtype=np.float32, offset=1).reshape(3, K)
    odd_y = np.zeros(y.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(3, N)
    cpu.matmul_gptq(x, qweight, scales, y, rows_per_group=K, isa=isa)
    cpu.matmul_gptq(odd_x, inside, odd_scales, odd_y, rows_per_group=K, isa=isa)
    np.testing.assert_array_equal(odd_y, y)


@every_isa
def test_nothing_is_written_outside_of_out(isa: str) -> None:
    room = np.full((4, 256), 0x55555555, np.int32)
    cpu.pack(random_words(4, 128), room[1:3], isa=isa)
    assert (room[[0, 3]] == 0x55555555).all()
    room[...] = 0x55555555
    cpu.unpack(random_words(1, 512), room[1:3], isa=isa)
    assert (room[[0, 3]] == 0x55555555).all()


@needs_native
def test_calls_from_many_threads_at_once() -> None:
    layers = [random_words(32, 640, seed) for seed in range(8)]
    expected = [twin(reference.gptq_to_marlin, layer) for layer in layers]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for B, wanted in zip(pool.map(lambda q: cpu.pack(q, threads=2), layers), expected, strict=True):
                np.testing.assert_array_equal(B, wanted)


# ---- Comparing ----


@both_backends
@pytest.mark.usefixtures("backend_set")
@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 8191, 8192, 9999])
def test_first_difference(place: int) -> None:
    a = random_words(100, 100)
    b = a.copy()
    assert cpu.first_difference(a, b) is None
    b.flat[place] ^= -(2**31)
    b.flat[9999] ^= 1
    assert cpu.first_difference(a, b) == place
    empty = np.empty((0, 4), np.int32)
    assert cpu.first_difference(empty, empty) is None


# ---- Weights ----


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
    assert_same_fp16(cpu.dequantize_gptq(qweight, scales, isa=isa), expected)
    B = twin(reference.pack_marlin, codes)
    assert_same_fp16(cpu.dequantize_marlin(B, layout.permute_scales(scales), isa=isa), expected)


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("K", "N", "G"), [(16, 64, 1), (48, 192, 3), (48, 192, 1), (256, 320, 2), (256, 1984, 16)])
def test_dequantization(isa: str, threads: int, K: int, N: int, G: int) -> None:
    qweight, scales = random_words(K // 8, N), random_scales(G, N)
    expected = exact_weights(twin(reference.unpack_gptq, qweight), scales)
    assert_same_fp16(cpu.dequantize_gptq(qweight, scales, threads=threads, isa=isa), expected)
    B, s = twin(reference.gptq_to_marlin, qweight), layout.permute_scales(scales)
    assert_same_fp16(cpu.dequantize_marlin(B, s, threads=threads, isa=isa), expected)


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
                cpu.matmul_gptq(self.x, weights, self.scales, y, k0=k0, rows_per_group=self.rows_per_group, **options)
            else:
                weights = np.ascontiguousarray(self.B[k0 // 16 : k1 // 16])
                cpu.matmul_marlin(self.x, weights, self.s, y, k0=k0, rows_per_group=self.rows_per_group, **options)
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
    cpu.matmul_gptq(product.x, product.qweight, product.scales, y, rows_per_group=128)
    np.testing.assert_allclose(y, product.exact + 1000, atol=1e-3)


def test_a_wrong_nibble_shows_in_the_product() -> None:
    product = Product(4, 128, 128, 1)
    product.B[3, 77] ^= 1 << 13
    y = product.run("marlin", [(0, 128)])
    wrong = np.abs(y - product.exact) > product.tolerance
    assert wrong.any(axis=0).sum() == 1


# ---- The twin in place of the library ----


def test_the_twin_is_used_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, scales = random_words(16, 128), random_scales(1, 128)
    s = layout.permute_scales(scales)
    expected_B, expected_W = twin(reference.gptq_to_marlin, qweight), twin(reference.dequantize_gptq, qweight, scales)
    monkeypatch.delenv(cpu.NO_NATIVE, raising=False)
    built = cpu.native_available()
    for value, native in [("1", False), ("0", built), ("", built)]:
        monkeypatch.setenv(cpu.NO_NATIVE, value)
        assert cpu.native_available() == native
        out = np.empty_like(expected_B)
        assert cpu.pack(qweight, out, threads=2) is out
        np.testing.assert_array_equal(out, expected_B)
        np.testing.assert_array_equal(cpu.unpack(out), qweight)
        np.testing.assert_array_equal(cpu.dequantize_gptq(qweight, scales), expected_W)
        np.testing.assert_array_equal(cpu.dequantize_marlin(out, s), expected_W)


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.native_available():
        assert re.fullmatch(r"native CPU library \((plain C\+\+|AVX2|AVX-512)\)", cpu.describe())
    monkeypatch.setenv(cpu.NO_NATIVE, "1")
    assert cpu.describe() == "torch twin: MARLIN_CONVERT_NO_NATIVE is set"
    assert cpu.available_isas() == ()
    with pytest.raises(ValueError, match="isa is 'avx2', but the native library is not in use"):
        cpu.pack(random_words(2, 64), isa="avx2")


@needs_native
@pytest.mark.parametrize(("wanted", "title"), [("plain", "plain C++"), ("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_the_instruction_set_is_kept_to(
    library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, wanted: str, title: str
) -> None:
    """Seen from what reaches the native code; an instruction set that this CPU lacks is not used because of it."""
    monkeypatch.delenv(_cpu_library.HIGHEST_ISA, raising=False)
    library(_cpu_library.LIBRARY)
    best = cpu.available_isas()[-1]
    monkeypatch.setenv(_cpu_library.HIGHEST_ISA, wanted)
    library(_cpu_library.LIBRARY)
    used = cpu.available_isas()
    assert used == ISAS[: min(ISAS.index(wanted), ISAS.index(best)) + 1]
    assert used[-1] != wanted or title in cpu.describe()
    called: list[Any] = []
    monkeypatch.setattr(_cpu_library.Native, "call", lambda self, function, *arguments: called.append(arguments[-1]))
    cpu.pack(random_words(2, 64))
    assert called == [ISAS.index(used[-1]) + 1]  # MARLIN_ISA_* of kernels/marlin.h


@needs_native
def test_an_instruction_set_that_does_not_exist(
    library: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(_cpu_library.HIGHEST_ISA, "sse2")
    library(_cpu_library.LIBRARY)
    with pytest.raises(DeviceError, match="MARLIN_CONVERT_ISA is 'sse2'; it should be one of plain, avx2, avx512"):
        cpu.pack(random_words(2, 64))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Point `ops` to another library file, not yet loaded."""

    def use(path: Path) -> None:
        monkeypatch.setattr(_cpu_library, "LIBRARY", path)
        monkeypatch.setattr(_cpu_library, "_loaded", None)

    monkeypatch.delenv(cpu.NO_NATIVE, raising=False)
    return use


def assert_works_without_library() -> None:
    assert not cpu.native_available()
    qweight = random_words(2, 64)
    np.testing.assert_array_equal(cpu.pack(qweight), twin(reference.gptq_to_marlin, qweight))


def test_missing_library(library: Callable[[Path], None], tmp_path: Path) -> None:
    library(tmp_path / "marlin_convert" / "_cpu.so")
    assert cpu.describe() == "torch twin: marlin_convert/_cpu.so is not built: run pip install ."
    assert_works_without_library()


def test_damaged_library(library: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "_cpu.so"
    path.write_bytes(b"not a library")
    library(path)
    assert re.fullmatch(r"torch twin: .*_cpu.so cannot be loaded \(.*\): rebuild it with .*", cpu.describe())
    assert_works_without_library()


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("int marlin_cpu_abi_version(void) { return 999; }", "has ABI version 999, this package wants"),
        ("int other(void) { return 1; }", "cannot be loaded"),
    ],
)
def test_stale_library(library: Callable[[Path], None], tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "_cpu.so"
    (tmp_path / "stale.c").write_text(source)
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "stale.c", "-o", path], check=True)
    library(path)
    assert cpu.describe().startswith("torch twin: ")
    assert message in cpu.describe()
    assert "pip install ." in cpu.describe()
    assert_works_without_library()


def test_importing_and_packing_does_not_import_torch() -> None:
    program = """if True:
        import sys
        import numpy as np
        from marlin_convert.formats import layout
        from marlin_convert.native import _cpu_library, cpu
        from marlin_convert.native import reference
        if cpu.native_available():
            cpu.pack(np.zeros((2, 64), np.int32))
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- Arguments ----

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
        (lambda: cpu.dequantize_gptq(WORDS, FLOATS), TypeError, "scales has dtype float32; it should be float16"),
        (lambda: cpu.dequantize_gptq(WORDS, HALVES[:, :32]), ValueError, "scales has strides|scales has shape"),
        (lambda: cpu.dequantize_gptq(WORDS, halves(1, 128)), ValueError, r"scales has shape \(1, 128\); .* N = 64"),
        (lambda: cpu.dequantize_gptq(WORDS, halves(0, 64)), ValueError, r"scales has shape \(0, 64\)"),
        (lambda: cpu.dequantize_gptq(WORDS, halves(3, 64)), ValueError, "K / G should be a multiple of 16"),
        (lambda: cpu.dequantize_marlin(WORDS.reshape(8, 128), halves(16, 64)), ValueError, "s has shape .*: G = 16"),
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
        cpu.matmul_gptq(x, WORDS, HALVES, y, **arguments)
    with pytest.raises(first.type, match=re.escape(str(first.value))):
        cpu.matmul_marlin(x, WORDS.reshape(8, 128), HALVES, y, **arguments)
    raise first.value


# ---- The extended format ----


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_eight_bits_equal_the_twin(isa: str, threads: int, K: int, N: int) -> None:
    qweight = random_words(K // 4, N, seed=K + N)
    B = np.asarray(reference.gptq_to_marlin(torch.from_numpy(qweight), 8).numpy())
    np.testing.assert_array_equal(cpu.pack(qweight, bits=8, threads=threads, isa=isa), B)
    np.testing.assert_array_equal(cpu.unpack(B, bits=8, threads=threads, isa=isa), qweight)


@both_backends
@pytest.mark.usefixtures("backend_set")
def test_eight_bit_words_by_the_formula() -> None:
    """Each byte of B is the code where docs/concepts/format.md says; the example's words are literal."""
    K, N = 32, 128
    codes = np.random.default_rng(8).integers(0, 256, (K, N))
    codes[:16, :64] = (16 * np.arange(16)[:, None] + np.arange(64)) % 256
    qweight = np.zeros((K // 4, N), np.uint32)
    for k in range(K):
        qweight[k // 4] |= codes[k].astype(np.uint32) << np.uint32(8 * (k % 4))
    B = cpu.pack(qweight.view(np.int32), bits=8).view(np.uint32)
    assert B.shape == (2, 512)
    assert int(B[0, 0]) == 0x90108000
    np.testing.assert_array_equal(format_reader.codes(torch.from_numpy(B.view(np.int32)), 8, N), codes)


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
SORTED_SIZES = [(64, 64, 128, 64), (72, 30, 128, 64), (200, 700, 256, 704), (2048, 192, 2048, 192)]


def sorted_layer(K: int, N: int, rows: int, columns: int, bits: int) -> tuple[NDArray[np.int32], dict[str, Any], Any]:
    """qweight, the arguments for `pack_sorted` beside it, and the codes [rows, columns] as they must be stored."""
    rng = np.random.default_rng(K + N + bits)
    codes, fill = rng.integers(0, 2**bits, (K, N)), rng.integers(0, 2**bits, columns, dtype=np.uint8)
    perm = rng.permutation(K).astype(np.int32)
    stored = np.tile(fill.astype(np.int64), (rows, 1))
    stored[:K, :N] = codes[perm]
    qweight = np.asarray(reference.pack_gptq(torch.from_numpy(codes), bits).numpy())
    return qweight, {"bits": bits, "perm": perm, "fill": fill}, stored


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "N", "rows", "columns"), SORTED_SIZES)
def test_pack_sorted(isa: str, threads: int, bits: int, K: int, N: int, rows: int, columns: int) -> None:
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits)
    expected = twin(partial(reference.pack_marlin, bits=bits), stored)
    B = cpu.pack_sorted(qweight, rows=rows, threads=threads, isa=isa, **order)
    np.testing.assert_array_equal(B, expected)
    assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) is None


@every_isa
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("K", "N", "rows", "columns"), SORTED_SIZES[1:3])
def test_sorted_difference_finds_every_wrong_code(
    isa: str, threads: int, bits: int, K: int, N: int, rows: int, columns: int
) -> None:
    """In the layer and in the padding; where several codes are wrong, the first in the order of B's rows."""
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits)
    rng = np.random.default_rng(1)
    places = [(int(rng.integers(rows)), int(rng.integers(columns))) for _ in range(40)]
    places += [(0, 0), (rows - 1, columns - 1), (K - 1, N - 1), (K, 0), (0, N)]
    for row, column in places:
        wrong = stored.copy()
        wrong[row, column] ^= 1 << int(rng.integers(bits))
        B = twin(partial(reference.pack_marlin, bits=bits), wrong)
        assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) == (row, column)
    for row, column in places:
        stored[row, column] ^= 1
    B = twin(partial(reference.pack_marlin, bits=bits), stored)
    assert cpu.sorted_difference(B, qweight, threads=threads, isa=isa, **order) == min(places)


@every_isa
@pytest.mark.parametrize("bits", [4, 8])
def test_some_columns_of_wider_matrices(isa: str, bits: int) -> None:
    """Nothing beside them is read or written."""
    K, N, rows, columns = 200, 700, 256, 704
    qweight, order, stored = sorted_layer(K, N, rows, columns, bits)
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
    for W_found in (cpu.dequantize_gptq(qweight, scales, **kinds), cpu.dequantize_marlin(B, s, **kinds)):
        assert W_found.dtype == scales.dtype
        np.testing.assert_array_equal(W_found.view(np.uint16) & 0x7FFF, expected.view(np.uint16) & 0x7FFF)
        np.testing.assert_array_equal(np.sign(bf16_value(W_found) if bf16 else W_found), np.sign(rounded))
    x = rng.standard_normal((5, K)).astype(np.float32)
    tolerance = K * 2.0**-23 * (np.abs(x.astype(np.float64)) @ np.abs(rounded))
    for multiply, weights, own in ((cpu.matmul_gptq, qweight, scales), (cpu.matmul_marlin, B, s)):
        y = np.zeros((5, N), np.float32)
        half = len(weights) * 64 // K  # a block that ends within a group
        for part, k0 in ((weights[:half], 0), (weights[half:], 64)):
            multiply(x, np.ascontiguousarray(part), own, y, k0=k0, rows_per_group=K // G, **kinds)
        assert (np.abs(y - x.astype(np.float64) @ rounded) <= tolerance).all()


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
        (lambda: cpu.dequantize_gptq(WORDS, HALVES, zeros=np.zeros((2, 64), np.uint8)), r"zeros has shape \(2, 64\)"),
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
