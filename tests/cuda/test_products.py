"""Products of the original format against float64: fresh random inputs, poisoned outputs, every element checked."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.cuda_library import DATA_PARALLEL, INSTANCES, STREAM_K, CudaError, Layer, Library, assert_close, variant
from tests.cuda.kernel_inputs import (
    BF16,
    FP16,
    GROUP,
    KERNEL_TESTS,
    activations,
    names,
    poisoned,
    run_splits,
    runs_here,
)

pytestmark = KERNEL_TESTS


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
