"""The native code against the torch twin, bit for bit, each instruction set on its own."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin_convert.native import cpu, cpu_weights, reference
from tests.support import format_reader
from tests.support.native_cpu import both_backends, every_isa, needs_native, random_scales, random_words, twin

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
        cpu_weights.dequantize_gptq(inside, odd_scales, isa=isa), twin(reference.dequantize_gptq, qweight, scales)
    )
    x, y = np.ones((3, K), np.float32), np.zeros((3, N), np.float32)
    odd_x = np.frombuffer(b"?" + x.tobytes(), dtype=np.float32, offset=1).reshape(3, K)
    odd_y = np.zeros(y.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(3, N)
    cpu_weights.matmul_gptq(x, qweight, scales, y, rows_per_group=K, isa=isa)
    cpu_weights.matmul_gptq(odd_x, inside, odd_scales, odd_y, rows_per_group=K, isa=isa)
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
