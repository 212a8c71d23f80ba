"""Batch-invariant products: a row has the same bits whatever rows are beside it, however many."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.native import cuda
from tests.cuda.cuda_library import (
    BATCH_INVARIANT,
    COUNTER_BYTES,
    INSTANCES,
    CudaError,
    Layer,
    Library,
    assert_close,
    variant,
)
from tests.cuda.kernel_inputs import runs_here

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]

FP16, BF16 = torch.float16, torch.bfloat16
#: Bits, rows of a group, zero points.
KINDS = [
    (4, 128, False), (4, 128, True), (4, 64, False), (4, 64, True), (4, 32, True), (4, 16, False), (4, -1, False),
    (8, 128, False), (8, 64, True), (8, 32, False), (8, 16, True), (8, -1, True),
]  # fmt: skip
#: From few tiles to many, along K and along N: each way to split the work occurs.
SHAPES = [(4096, 256), (14336, 512), (2176, 4096), (1152, 9472), (576, 192), (64, 64)]


def layer_of(bits: int, size: int, zeros: bool, k: int, n: int, scale_dtype: torch.dtype = FP16) -> Layer | None:
    """None where groups do not divide K."""
    if size > 0 and k % size:
        return None
    return Layer(k, n, 1 if size < 0 else k // size, bits=bits, zeros=zeros, scale_dtype=scale_dtype)


def product(library: Library, layer: Layer, a: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((a.shape[0], layer.n), float("nan"), dtype=a.dtype, device="cuda")
    return library.gemm(a, layer.b, layer.s, out, bias, BATCH_INVARIANT, **layer.rest)


def pieces(rows: int, seed: int) -> list[int]:
    """Where to cut so many rows: at random places, in pieces of one and of many rows."""
    chance = random.Random(seed)
    return sorted({0, 1, 2, rows - 1, rows, *(chance.randrange(rows) for _ in range(8))})


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize(("bits", "size", "zeros"), KINDS)
def test_rows_have_the_bits_that_they_have_alone(
    library: Library, bits: int, size: int, zeros: bool, k: int, n: int
) -> None:
    for number, dtype in enumerate((FP16, BF16)):
        layer = layer_of(bits, size, zeros, k, n, BF16 if n % 512 else FP16)
        if layer is None:
            pytest.skip("groups that do not divide K")
        a, bias = torch.randn(512, k, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
        whole = product(library, layer, a, bias)
        assert_close(whole, a, library.operand(layer, a, BATCH_INVARIANT), bias)
        cuts = pieces(512, 1000 * k + number)
        for first, last in pairwise(cuts):
            assert torch.equal(product(library, layer, a[first:last], bias), whole[first:last]), (first, last)
        for row in (3, 63, 64, 300):
            assert torch.equal(product(library, layer, a[row : row + 1], bias), whole[row : row + 1]), row
    assert not library.workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("m", [2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 511])
def test_every_number_of_rows(library: Library, m: int) -> None:
    """Every row of every batch, at the borders of tiles."""
    for bits, size, zeros, k, n in (
        (4, 128, False, 4096, 1024),
        (4, 32, True, 14336, 256),
        (8, 128, False, 1024, 4096),
    ):
        torch.manual_seed(k)
        layer = layer_of(bits, size, zeros, k, n)
        assert layer is not None
        a = torch.randn(512, k, device="cuda").half()
        alone = torch.cat([product(library, layer, a[i : i + 1]) for i in range(m)])
        assert torch.equal(product(library, layer, a[:m]), alone)


def test_the_cut_of_k_does_not_depend_on_rows(library: Library) -> None:
    for k, n, groups in ((4096, 4096, 32), (14336, 4096, 112), (4096, 28672, 32), (512, 512, 4)):
        plans = [library.plan(m, n, k, groups, BATCH_INVARIANT) for m in (1, 8, 9, 33, 64, 65, 300, 8192)]
        assert len({plan.parts for plan in plans}) == 1
        assert plans[0].parts >= 1


def test_other_variants_do_not_combine_with_it(library: Library) -> None:
    with pytest.raises(CudaError):
        library.plan(1, 512, 512, 4, BATCH_INVARIANT | variant("", 0, 2))


def test_in_a_graph(library: Library) -> None:
    """Captured with many rows and with one, replayed with new inputs."""
    layer = Layer(14336, 512, 112)
    a = torch.randn(300, 14336, device="cuda").half()
    cuda.gemm(a, layer.b, layer.s, batch_invariant=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        whole = cuda.gemm(a, layer.b, layer.s, batch_invariant=True)
        rows = [cuda.gemm(a[i : i + 1], layer.b, layer.s, batch_invariant=True) for i in (0, 63, 64, 299)]
    for seed in range(3):
        torch.manual_seed(seed)
        a.copy_(torch.randn_like(a))
        whole.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for row, i in zip(rows, (0, 63, 64, 299), strict=True):
            assert torch.equal(row, whole[i : i + 1])
        assert torch.equal(whole, product(library, layer, a))


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(4096, 4096), (500, 257), (1001, 576)])
def test_layers(rows: int, columns: int, desc_act: bool) -> None:
    """The module, padded and with act-order, eager and compiled; and what cuda.matmul does with it."""
    module = MarlinLinear(
        rows, columns, bias=True, desc_act=desc_act, extended=True, sym=False, device="cuda", dtype=FP16,
        batch_invariant=True,
    )  # fmt: skip
    buffers: dict[str, Any] = dict(module.named_buffers())
    for name, tensor in buffers.items():
        if name == "marlin_perm":
            tensor.copy_(torch.randperm(rows, device="cuda"))
        elif tensor.dtype == torch.int32:
            tensor.copy_(torch.randint(-(2**31), 2**31 - 1, tensor.shape, device="cuda"))
        else:
            tensor.copy_(torch.rand(tensor.shape, device="cuda") * 0.02)
    a = torch.randn(512, rows, device="cuda").half()
    whole = module(a)
    torch.compiler.reset()  # other tests compiled other layers
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for first, last in ((0, 1), (1, 2), (2, 70), (70, 512)):
        assert torch.equal(module(a[first:last]), whole[first:last])
        assert torch.equal(compiled(a[first:last]), whole[first:last])
    module.batch_invariant = False
    error = (module(a).double() - whole.double()).norm() / whole.double().norm()
    assert error <= 1e-3


def test_the_environment_decides_what_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(14336, 256, 112)
    a = torch.randn(512, 14336, device="cuda").half()
    fixed = cuda.matmul(a, layer.b, layer.s, batch_invariant=True)
    monkeypatch.setattr(cuda, "INVARIANT", True)
    assert torch.equal(cuda.matmul(a, layer.b, layer.s), fixed)
    assert torch.equal(cuda.gemm(a, layer.b, layer.s), fixed)
    monkeypatch.setattr(cuda, "INVARIANT", False)
    assert torch.equal(cuda.gemm(a, layer.b, layer.s, batch_invariant=True), fixed)
    if any(runs_here(name) for name, x in INSTANCES.items() if x.capability == 90):  # others may choose the same
        assert not torch.equal(cuda.gemm(a, layer.b, layer.s), fixed)
