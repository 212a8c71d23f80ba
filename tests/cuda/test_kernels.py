"""The CUDA kernels against float64 and slow twins: fresh random inputs, poisoned outputs, every element checked."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from . import cuda_library
from .cuda_library import (
    BATCH_INVARIANT,
    CLUSTERS,
    COUNTER_BYTES,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    assert_close,
    pack_gptq,
    pack_gptq8,
    pack_marlin,
    pack_marlin8,
    pack_zeros,
    permute_scales,
    product,
    variant,
)  # fmt: skip


def why_not() -> str | None:
    if not cuda_library.PATH.exists():
        return f"the CUDA library is not built ({cuda_library.PATH})"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or torch was built without CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

FP16, BF16 = torch.float16, torch.bfloat16
GROUP = cuda_library.GROUP_SIZE


@pytest.fixture(scope="module")
def library() -> Library:
    return Library()


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print(f"torch seed {torch.seed()}")  # shown when the test fails


def poisoned(m: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((m, n), float("nan"), dtype=dtype, device="cuda")


def activations(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, device="cuda").to(dtype)


def runs_here(name: str) -> bool:
    return INSTANCES[name].capability != 90 or torch.cuda.get_device_capability() == (9, 0)


def names(bits: int, group_size: int, zeros: bool = False) -> list[str]:
    """The instances that take such weights and run here."""
    return [name for name, x in INSTANCES.items() if x.takes(bits, group_size, zeros) and runs_here(name)]


# ---- Repack and dequantize: exact. -----------------------------------------------------------------------------------

EXACT_SHAPES = [(64, 64, 1), (128, 64, 1), (192, 320, 1), (256, 128, 2), (1024, 4096, 8), (1152, 448, 9)]


@pytest.mark.parametrize(("k", "n"), sorted({shape[:2] for shape in EXACT_SHAPES}))
def test_repack_and_unpack(library: Library, k: int, n: int) -> None:
    code = torch.randint(0, 16, (k, n), dtype=torch.uint8, device="cuda")
    qweight, b = pack_gptq(code), pack_marlin(code)
    assert torch.equal(library.repack(qweight), b)
    assert torch.equal(library.unpack(b), qweight)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("k", "n", "groups"), EXACT_SHAPES)
def test_dequantize(library: Library, k: int, n: int, groups: int, dtype: torch.dtype) -> None:
    # Any bit pattern of a finite scale: subnormal, zero, negative, up to 65504, where fp16 weights become infinite.
    scales = torch.randint(-(2**15), 2**15, (groups, n), dtype=torch.int16).view(FP16)
    scales[~scales.isfinite()] = 65504
    layer = Layer(k, n, groups, scales)
    expected = layer.weight(torch.float32).to(dtype)  # the fp32 product is exact, so this rounds once
    out = library.dequantize(layer.b, layer.s, dtype)
    assert torch.equal(out, expected)  # which takes -0.0 for 0.0: code 8 with a negative scale


# ---- GEMM: values. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize(("k", "n", "groups"), [(1152, 448, 9), (1088, 320, 1)])
def test_rows(library: Library, k: int, n: int, groups: int, dtype: torch.dtype) -> None:
    layer = Layer(k, n, groups)
    for m in [*range(1, 300, 2), 2, 8, 16, 32, 64, 128, 256]:
        a = activations(m, k, dtype)
        assert_close(library.gemm(a, layer.b, layer.s, poisoned(m, n, dtype)), a, library.operand(layer, a))


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("m", [511, 1024, 2047, 4096, 8192])
def test_many_rows(library: Library, m: int, dtype: torch.dtype) -> None:
    layer = Layer(1024, 1536, 8)
    a = activations(m, 1024, dtype)
    assert_close(library.gemm(a, layer.b, layer.s, poisoned(m, 1536, dtype)), a, library.operand(layer, a))


SHAPES = [
    *[(k, n, 1) for k in (64, 128, 192, 320) for n in (64, 128, 192, 704)],
    *[(k, n, k // 128) for k in (256, 384, 2176) for n in (64, 256, 320, 4096)],
    (4096, 4096, 32), (4096, 6144, 1), (4096, 28672, 32), (14336, 4096, 112), (28672, 8192, 224),
]  # fmt: skip


@pytest.mark.parametrize(("k", "n", "groups"), SHAPES)
def test_shapes(library: Library, k: int, n: int, groups: int) -> None:
    layer = Layer(k, n, groups)
    for m in (1, 7, 16, 24, 48, 65, 128, 257):
        a = activations(m, k, FP16)
        assert_close(library.gemm(a, layer.b, layer.s, poisoned(m, n, FP16)), a, library.operand(layer, a))


def test_largest_shape(library: Library) -> None:
    k, n, groups = 8192, 57344, 64
    layer = Layer(k, n, groups)
    for m in (1, 16, 33, 128, 300):
        a = activations(m, k, FP16)
        out = library.gemm(a, layer.b, layer.s, poisoned(m, n, FP16))
        for first in range(0, n, 8192):  # float64 weights of an eighth at a time
            columns = slice(first, first + 8192)
            scales = layer.scales[:, columns].float().repeat_interleave(GROUP, dim=0)
            weight = (layer.code[:, columns].float() - 8) * scales  # exact
            rounded = library.instance(layer, a).rounds_weights
            assert_close(out[:, columns], a, (weight.to(a.dtype) if rounded else weight).double())


def run_splits(library: Library, name: str, layer: Layer, a: torch.Tensor, bias: torch.Tensor) -> int:
    """One instance with every split that it can do, against float64; how many these are."""
    weight, ran = library.operand(layer, a, variant(name)), 0
    optional = (*CLUSTERS, STREAM_K) if name.startswith("sm90_wide") else CLUSTERS  # needs a rest of tiles to split
    for split in (*CLUSTERS, STREAM_K, DATA_PARALLEL):
        out = poisoned(a.shape[0], layer.n, a.dtype)
        try:
            library.gemm(a, layer.b, layer.s, out, bias, variant(name, 0, split), **layer.rest)
        except CudaError as error:
            if error.code != -9 or split not in optional:  # more blocks than steps, or than fit
                raise
            continue
        assert_close(out, a, weight, bias)
        ran += 1
    return ran


@pytest.mark.parametrize("name", [name for name, x in INSTANCES.items() if x.takes(4, GROUP, False)])
def test_every_instance_and_split(library: Library, name: str) -> None:
    """Also those that the library would not choose here: ragged in M, N and K, tiles shared by many blocks."""
    if not runs_here(name):
        pytest.skip("an instance for compute capability 9.0")
    for dtype in (FP16, BF16):
        for k, n, groups in ((64, 64, 1), (1088, 320, 1), (1152, 448, 9), (4096, 512, 32), (2048, 4096, 16)):
            layer = Layer(k, n, groups)
            for m in (1, 17, 130, 257):
                a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                assert run_splits(library, name, layer, a, bias) >= (1 if k == 64 else 2)


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 6, 8, 10])
def test_stages(library: Library, stages: int) -> None:
    ran = 0
    for bits in (4, 8):
        layer = Layer(4096, 1024, 32, bits=bits)
        for name in names(bits, GROUP):
            for split in (STREAM_K, DATA_PARALLEL):
                a, out, choice = activations(9, 4096, FP16), poisoned(9, 1024, FP16), variant(name, stages, split)
                try:
                    library.gemm(a, layer.b, layer.s, out, None, choice, **layer.rest)
                except CudaError as error:
                    if error.code != -9:  # more stages than fit, or not a number that the instance can use
                        raise
                    continue
                assert_close(out, a, library.operand(layer, a, choice))
                ran += 1
    assert ran or stages > 8


@pytest.mark.parametrize("m", [1, 16, 100])
def test_bias_and_row_stride(library: Library, m: int) -> None:
    layer = Layer(512, 192, 4)
    for dtype in (FP16, BF16):
        wide = torch.full((m, 512 + 24), float("nan"), dtype=dtype, device="cuda")  # what lies between rows is not read
        wide[:, :512] = activations(m, 512, dtype)
        a, bias = wide[:, :512], torch.randn(192, device="cuda").to(dtype) * 10
        out = library.gemm(a, layer.b, layer.s, poisoned(m, 192, dtype), bias)
        assert_close(out, a, library.operand(layer, a), bias)


@pytest.mark.parametrize("m", [1, 16, 130])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    ("scale", "activation"),
    [
        (2.0**-24, 1000.0),  # the smallest subnormal scale
        (2.0**-16, 30000.0),  # subnormal
        (60000.0, 2.0**-18),  # weights beyond fp16, activations subnormal
        (65504.0, 2.0**-24),  # the largest scale, the smallest activation
        (2.0**-10, 2.0**-14),
    ],
)
def test_extremes(library: Library, m: int, groups: int, scale: float, activation: float) -> None:
    k, n = 1024, 256
    scales = ((torch.rand(groups, n) * 0.5 + 0.5) * scale).half()
    scales[:, ::7] = scale
    scales[:, 5::11] = 0
    layer = Layer(k, n, groups, scales)
    a = (torch.randn(m, k, device="cuda").clamp(-2, 2) * activation).to(FP16)
    out = library.gemm(a, layer.b, layer.s, poisoned(m, n, FP16))
    weight = library.operand(layer, a)
    overflows = ~torch.isfinite(weight).all(dim=0)  # where weights are rounded to fp16 before the product
    assert overflows.any() == (library.instance(layer, a).rounds_weights and groups > 1 and scale >= 60000)
    assert not torch.isfinite(out[:, overflows]).any()
    assert torch.isfinite(out[:, ~overflows]).all()
    assert_close(out[:, ~overflows], a, weight[:, ~overflows])


def test_infinite_activation_stays_in_its_row(library: Library) -> None:
    layer = Layer(512, 256, 4)
    for m in (2, 16, 40, 130):
        a = activations(m, 512, FP16)
        a[1, 100] = float("inf")
        out = library.gemm(a, layer.b, layer.s, poisoned(m, 256, FP16))
        assert torch.isfinite(out[0]).all()
        assert torch.isfinite(out[2:]).all()
        assert not torch.isfinite(out[1]).any()


# ---- The extended format: 8 bits, small groups, zero points, bf16 scales, padding, act-order. ------------------------

GROUP_SIZES = (16, 32, 64, 128, -1)


def groups_of(k: int, size: int) -> int:
    return 1 if size < 0 else k // size


@pytest.mark.parametrize(("k", "n"), [(64, 64), (192, 320), (1024, 4096)])
def test_repack_and_unpack_8_bits(library: Library, k: int, n: int) -> None:
    code = torch.randint(0, 256, (k, n), dtype=torch.uint8, device="cuda")
    qweight, b = pack_gptq8(code), pack_marlin8(code)
    assert torch.equal(library.repack(qweight, 8), b)
    assert torch.equal(library.unpack(b, 8), qweight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_extended_dequantize(library: Library, size: int, zeros: bool, bits: int) -> None:
    """Exact, also with rows in another order and sizes that are no multiples of anything."""
    k, n = 384, 192
    for scale_dtype in (FP16, BF16):
        layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros, scale_dtype=scale_dtype)
        for dtype in (FP16, BF16):
            expected = layer.weight(torch.float32).to(dtype)
            assert torch.equal(library.dequantize(layer.b, layer.s, dtype, **layer.rest), expected)
            for rows, columns in ((384, 192), (381, 190), (300, 129), (257, 176)):
                perm = torch.randperm(rows, device="cuda").int()
                out = library.dequantize(
                    layer.b, layer.s, dtype, perm=perm, in_features=rows, out_features=columns, **layer.rest
                )
                assert torch.equal(out[perm.long()], expected[:rows, :columns])


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_extended(library: Library, size: int, zeros: bool, bits: int, dtype: torch.dtype) -> None:
    """Every instance for all GPUs that takes the layer, both splits, ragged in M, N and K."""
    for k, n in ((64, 64), (1152, 448), (2048, 1024)):
        if size == 128 and k == 64:
            continue
        for scale_dtype in (FP16, BF16):
            layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros, scale_dtype=scale_dtype)
            for m in (1, 9, 17, 130, 257):
                a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                out = library.gemm(a, layer.b, layer.s, poisoned(m, n, dtype), bias, **layer.rest)
                assert_close(out, a, library.operand(layer, a), bias)
                generic = [name for name in names(bits, size, zeros) if INSTANCES[name].capability == 80]
                assert generic
                for name in generic:
                    for split in (STREAM_K, DATA_PARALLEL, 3):
                        choice, out = variant(name, 0, split), poisoned(m, n, dtype)
                        try:
                            library.gemm(a, layer.b, layer.s, out, bias, choice, **layer.rest)
                        except CudaError as error:
                            if error.code != -9 or split != 3:  # fewer steps, or more blocks than are resident
                                raise
                            continue
                        assert_close(out, a, library.operand(layer, a, choice), bias)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (name, size)
        for name, x in INSTANCES.items()
        for size in GROUP_SIZES
        if x.capability == 90 and x.takes(x.bits, size, True)
    ],
)
def test_extended_every_sm90_instance_and_split(library: Library, name: str, size: int) -> None:
    """With and without zero points, clusters too; also those that the library would not choose here."""
    if not runs_here(name):
        pytest.skip("an instance for compute capability 9.0")
    bits = INSTANCES[name].bits
    for k, n in ((64, 64), (1152, 448), (4096, 320)):
        if k <= size:  # one group, which is another instance's
            continue
        for zeros in (False, True):
            if not INSTANCES[name].takes(bits, size, zeros):
                continue
            layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros)
            for dtype in (FP16, BF16):
                for m in (1, 17, 131):
                    a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                    assert run_splits(library, name, layer, a, bias) >= (1 if k == 64 else 2)


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_padded(library: Library, size: int, bits: int, dtype: torch.dtype) -> None:
    """Columns from out_features on are not written, rows from in_features on not read, whatever stands there."""
    k, n, around = 640, 320, 4096
    for zeros in (False, True):
        layer = Layer(k, n, groups_of(k, size), bits=bits, zeros=zeros)
        for rows, columns in ((640, 320), (520, 257), (584, 318), (632, 5), (8, 300)):
            for m in (1, 16, 65):
                wide = torch.full((m, rows + 8), float("nan"), dtype=dtype, device="cuda")
                wide[:, :rows] = activations(m, rows, dtype)
                a, bias = wide[:, :rows], torch.randn(columns, device="cuda").to(dtype)
                few_rows = f"sm80_m16n256_b{bits}_gany" + "z" * (bits == 4)
                for choice in (0, variant(few_rows), variant("", 0, STREAM_K)):
                    buffer = torch.full((2 * around + m * columns,), 7.0, dtype=dtype, device="cuda")
                    out = buffer[around:-around].view(m, columns)
                    out.fill_(float("nan"))
                    library.gemm(
                        a, layer.b, layer.s, out, bias, choice, in_features=rows, out_features=columns, **layer.rest
                    )
                    assert_close(out, a, library.operand(layer, a, choice)[:rows, :columns], bias)
                    assert (buffer[:around] == 7).all()
                    assert (buffer[-around:] == 7).all()


@pytest.mark.parametrize("m", [1, 3, 63, 64, 101, 303, 1001])
def test_gather(library: Library, m: int) -> None:
    """By rows in shared memory from 64 rows on, one, two or four a block; 120000 columns do not fit there."""
    for rows, k in ((640, 640), (637, 640), (1, 128), (4001, 4096), (14336, 14336), (60001, 60032), (120000, 120064)):
        if m * rows > 1 << 25:
            continue
        for pitch in (rows + 3, (rows + 15) // 8 * 8):  # rows that start anywhere, or at multiples of 16 bytes
            a = torch.randn(m, pitch, device="cuda").half()[:, :rows]
            for perm in (None, torch.randperm(rows, device="cuda").int()):
                out = library.gather(a, perm, k)
                assert torch.equal(out[:, :rows], a if perm is None else a[:, perm.long()])
                assert (out[:, rows:] == 0).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("m", [1, 16, 200])
def test_extended_equal_bits_every_time(library: Library, m: int, bits: int) -> None:
    layer = Layer(14336, 1024, 448, bits=bits, zeros=True)
    a = activations(m, 14336, FP16)

    def call(choice: int) -> torch.Tensor:
        return library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, choice, **layer.rest)

    for choice in (0, variant("", 0, STREAM_K)):
        first = call(choice)
        assert_close(first, a, library.operand(layer, a, choice))
        assert all(torch.equal(first, call(choice)) for _ in range(50))
    assert not library.workspace[:COUNTER_BYTES].any()


# ---- GEMM: what it leaves alone, and how it may be called. -----------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3, 16, 33, 129])
def test_writes_nothing_else(library: Library, m: int) -> None:
    k, n = 1152, 320
    layer = Layer(k, n, 9)
    a = activations(m, k, FP16)
    around = 4096
    for choice in [0, *(variant(name) for name in names(4, GROUP) if INSTANCES[name].capability == 80)]:
        buffer = torch.full((2 * around + m * n,), 7.0, dtype=FP16, device="cuda")
        library.gemm(a, layer.b, layer.s, buffer[around:-around].view(m, n), None, choice)
        assert (buffer[:around] == 7).all()
        assert (buffer[-around:] == 7).all()
    assert not library.workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_equal_bits_every_time(library: Library, m: int) -> None:
    layer = Layer(14336, 1024, 112)  # tall: every tile is shared
    a = activations(m, 14336, FP16)
    for split in (0, STREAM_K):
        first = library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, variant("", 0, split))
        for _ in range(50):
            again = library.gemm(a, layer.b, layer.s, poisoned(m, 1024, FP16), None, variant("", 0, split))
            assert torch.equal(first, again)


def test_two_streams(library: Library) -> None:
    layers = [Layer(4096, 1536, 32), Layer(8192, 1024, 64)]
    inputs = [activations(m, layer.k, FP16) for m, layer in zip((5, 70), layers, strict=True)]
    for split in (0, STREAM_K):
        alone = [
            library.gemm(a, x.b, x.s, poisoned(a.shape[0], x.n, FP16), None, variant("", 0, split))
            for a, x in zip(inputs, layers, strict=True)
        ]
        streams = [torch.cuda.Stream() for _ in layers]
        workspaces = [library.new_workspace() for _ in layers]
        outs = [[poisoned(o.shape[0], o.shape[1], FP16) for _ in range(100)] for o in alone]
        torch.cuda.synchronize()
        for i in range(100):
            for j, (a, x) in enumerate(zip(inputs, layers, strict=True)):
                with torch.cuda.stream(streams[j]):
                    library.gemm(a, x.b, x.s, outs[j][i], None, variant("", 0, split), workspaces[j])
        torch.cuda.synchronize()
        for expected, got in zip(alone, outs, strict=True):
            assert all(torch.equal(expected, out) for out in got)


def test_in_a_graph(library: Library) -> None:
    layer = Layer(2048, 1024, 16)
    for m in (1, 100):
        a, out = activations(m, 2048, FP16), poisoned(m, 1024, FP16)
        library.gemm(a, layer.b, layer.s, out)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.gemm(a, layer.b, layer.s, out)
        for _ in range(3):
            a.copy_(activations(m, 2048, FP16))
            out.fill_(float("nan"))
            graph.replay()
            assert_close(out, a, library.operand(layer, a))


# ---- Answers and errors. ---------------------------------------------------------------------------------------------


def test_version_and_device(library: Library) -> None:
    assert library.lib.marlin_cuda_abi_version() == 7
    count = ctypes.c_int()
    library.check(library.lib.marlin_cuda_device_count(ctypes.byref(count)))
    assert count.value == torch.cuda.device_count()
    info = (ctypes.c_char * 1024)()
    library.check(library.lib.marlin_cuda_device_info(0, ctypes.byref(info)))
    assert int.from_bytes(info.raw[0:4], "little") == torch.cuda.get_device_capability()[0]
    assert int.from_bytes(info.raw[8:12], "little") == torch.cuda.get_device_properties(0).multi_processor_count


def test_choose(library: Library) -> None:
    for k, n in ((64, 64), (4096, 4096), (8192, 57344)):
        for bits in (4, 8):
            assert library.choose(1, n, k, bits=bits) == 0
            assert all(library.choose(m, n, k, k // 64, bits=bits) in (0, 1) for m in (1, 100, 1000, 10000, 100000))
    # cuBLAS is faster than mma.sync on large products; the kernel for many rows on Hopper is as fast as cuBLAS.
    assert library.choose(16384, 28672, 4096, 32) == (torch.cuda.get_device_capability() != (9, 0))
    assert library.choose(0, 64, 64) == -2
    assert library.choose(1, 64, 96) == -2
    assert library.choose(1, 64, 128, 3) == -3
    assert library.choose(1, 64, 64, bits=3) == -10


def test_plan(library: Library) -> None:
    """What is chosen is one of the instances that fit; what is asked for is what is planned."""
    for m in (1, 16, 100, 3000):
        plan = library.plan(m, 4096, 4096, 32)
        (chosen,) = [x for x in INSTANCES.values() if x.id == plan.instance]
        assert chosen.takes(4, GROUP, False)
        has_sm90 = any(x.capability == 90 and runs_here(name) for name, x in INSTANCES.items())
        assert chosen.capability == (90 if has_sm90 else 80)
        assert 0 < plan.us <= plan.gemm_us
        assert library.choose(m, 4096, 4096, 32) == (plan.gemm_us > plan.dense_us)
        asked = library.plan(m, 4096, 4096, 32, variant("sm80_m16n256_b4_g128", 3, STREAM_K))
        assert (asked.instance, asked.stages, asked.split) == (INSTANCES["sm80_m16n256_b4_g128"].id, 3, STREAM_K)


def test_errors(library: Library) -> None:
    layer = Layer(256, 128, 2)
    a, out = activations(4, 256, FP16), poisoned(4, 128, FP16)
    weights = {"B": layer.b.data_ptr(), "s": layer.s.data_ptr(), "zeros": None, "perm": None, "K": 256, "N": 128,
               "G": 2, "in_features": 256, "out_features": 128, "bits": 4, "scale_dtype": 0}  # fmt: skip
    x: dict[str, Any] = {
        "A": a.data_ptr(), "bias": None, "C": out.data_ptr(), "workspace": library.workspace.data_ptr(),
        "workspace_bytes": library.workspace.numel(), "stream": library.stream(), "M": 4, "lda": 256, "dtype": 0,
        "device": 0, "variant": 0, "early": 0,
    }  # fmt: skip
    cases: list[tuple[int, dict[str, Any]]] = [
        (-1, {"A": None}), (-1, {"C": None}), (-1, {"workspace": None}), (-1, {"B": None}), (-1, {"s": None}),
        (-2, {"M": 0}), (-2, {"M": -1}), (-2, {"N": 96}), (-2, {"K": 250}), (-2, {"K": 0}), (-2, {"M": 1 << 40}),
        (-2, {"in_features": 257}), (-2, {"in_features": 0}), (-2, {"out_features": 129}), (-2, {"out_features": 0}),
        (-3, {"G": 3}), (-3, {"G": 0}), (-3, {"K": 192, "in_features": 192, "G": 2}), (-3, {"G": 32}),
        (-4, {"lda": 255}), (-4, {"lda": 260}), (-4, {"in_features": 250}),
        (-5, {"A": x["A"] + 2}), (-5, {"C": x["C"] + 8}), (-5, {"bias": x["C"] + 4}), (-5, {"zeros": x["C"] + 4}),
        (-6, {"dtype": 2}), (-6, {"scale_dtype": 2}), (-7, {"workspace_bytes": 1000}), (-8, {"device": 99}),
        (-8, {"device": -1}), (-9, {"variant": 4000}), (-9, {"variant": -1}), (-9, {"variant": 1 << 21}),
        (-9, {"variant": BATCH_INVARIANT | 1}),
        (-9, {"variant": variant("sm80_m8n256_b4_g128", 0, 1)}), (-9, {"variant": variant("sm80_m8n256_b4_g128", 15)}),
        (-9, {"variant": variant("sm80_m8n256_b8_gany")}), (-10, {"bits": 3}),
        (-9, {"variant": variant("sm80_m8n256_b4_g128"), "zeros": x["C"]}),
        *((-9, {"variant": variant(name)}) for name in INSTANCES if name == "sm90_m8n128_b4_g64"),
    ]  # fmt: skip

    def call(change: dict[str, Any]) -> int:
        merged = cuda_library.Weights(**{k: change.get(k, v) for k, v in weights.items()})
        return library.lib.marlin_cuda_gemm(merged, product(**{k: change.get(k, v) for k, v in x.items()}))

    for code, change in cases:
        assert call(change) == code, change
        assert library.lib.marlin_cuda_error_string(code)
    torch.cuda.synchronize()
    assert torch.isnan(out).all()  # a refused call queues nothing
    assert call({}) == 0
    assert_close(out, a, layer.weight())


def test_twins_agree() -> None:
    """The twin of the packing against the formula for single nibbles."""
    code = torch.randint(0, 16, (32, 128), dtype=torch.uint8)
    b = pack_marlin(code)
    for k, n in ((0, 0), (17, 3), (31, 127), (9, 70), (24, 44)):
        row, column = k % 16, n % 64
        j, g, high = column // 16, column % 8, column % 16 // 8
        t, p = row % 8 // 2, row // 8 + 2 * high + 4 * (row % 2)
        word = b[k // 16, n // 64 * 128 + (4 * g + t) * 4 + j]
        assert int(word) >> (4 * p) & 0xF == code[k, n]
    byte = (16 * torch.arange(16)[:, None] + torch.arange(64)).to(torch.uint8)
    assert int(pack_marlin8(byte)[0, 0]) & 0xFFFFFFFF == 0x90108000
    zeros = torch.arange(64, dtype=torch.uint8)[None, :]
    assert pack_zeros(zeros // 8, 4)[0, 0].item() == 0x75316420
    assert pack_zeros(zeros, 8)[0, 0].item() == 0x18081000
    scales = torch.arange(64).half()
    assert permute_scales(scales[None, :]).tolist()[0][:9] == [0, 1, 8, 9, 16, 17, 24, 25, 2]
    assert permute_scales(torch.stack([scales, scales])).tolist()[1][:9] == [0, 8, 16, 24, 32, 40, 48, 56, 1]
