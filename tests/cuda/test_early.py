"""Products that begin while the work before them still runs: the same bits, and nothing is read or written too soon."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlin_convert.native import cuda
from marlin_convert.native.cuda_library import PRODUCT
from tests.cuda.cuda_library import (
    BATCH_INVARIANT,
    CLUSTERS,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    variant,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]

FP16, BF16 = torch.float16, torch.bfloat16
WIDTH = 1024  # K and N: products stand in a chain
LENGTH = 6


def layers(bits: int = 4, size: int = 128, zeros: bool = False) -> list[Layer]:
    """Whose products neither grow nor vanish along a chain."""
    made = []
    for _ in range(LENGTH):
        groups = 1 if size < 0 else WIDTH // size
        scales = ((torch.rand(groups, WIDTH) * 0.5 + 0.75) / ((75 if bits == 8 else 4.6) * WIDTH**0.5)).half()
        made.append(Layer(WIDTH, WIDTH, groups, scales, bits=bits, zeros=zeros))
    return made


def chain(library: Library, of: list[Layer], a: torch.Tensor, early: bool, choice: int = 0) -> torch.Tensor:
    """Each product reads what the one before wrote, and writes what that one read. All results, side by side."""
    buffers, results = [a.clone(), torch.empty_like(a)], torch.empty((LENGTH, *a.shape), dtype=a.dtype, device="cuda")
    torch.cuda.synchronize()
    for i, layer in enumerate(of):
        library.gemm(buffers[i % 2], layer.b, layer.s, buffers[1 - i % 2], None, choice, early=early, **layer.rest)
        if i == LENGTH - 1 or i % 3 == 2:  # some products follow a kernel that lets none begin before it ends
            results[i] = buffers[1 - i % 2]
    return results[2::3].clone()


@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 100, 300])
@pytest.mark.parametrize(
    ("bits", "size", "zeros"),
    [(4, 128, False), (4, 128, True), (4, 32, False), (4, -1, False), (8, 128, False), (8, 32, True)],
)
def test_a_chain_has_the_same_bits(library: Library, bits: int, size: int, zeros: bool, m: int) -> None:
    of = layers(bits, size, zeros)
    for dtype in (FP16, BF16):
        a = torch.randn(m, WIDTH, device="cuda").to(dtype)
        for choice in (0, BATCH_INVARIANT):
            expected = chain(library, of, a, False, choice)
            assert expected.isfinite().all()
            for _ in range(5):
                assert torch.equal(chain(library, of, a, True, choice), expected)


@pytest.mark.parametrize("name", [name for name, x in INSTANCES.items() if x.takes(4, 128, False)])
def test_every_instance_and_split(library: Library, name: str) -> None:
    if INSTANCES[name].capability == 90 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("its instructions are of compute capability 9.0")
    of, rows = layers(), INSTANCES[name].block_m
    a, ran = torch.randn(rows, WIDTH, device="cuda").half(), 0
    for split in (*CLUSTERS, STREAM_K, DATA_PARALLEL):
        choice = variant(name, split=split)
        try:
            expected = chain(library, of, a, False, choice)
        except CudaError:  # not a split of this instance, or not on this GPU
            continue
        ran += 1
        for _ in range(3):
            assert torch.equal(chain(library, of, a, True, choice), expected), split
    assert ran > 0


def test_in_a_graph(library: Library) -> None:
    of, a = layers(), torch.randn(3, WIDTH, device="cuda").half()
    expected = chain(library, of, a, False)
    buffers = [a.clone(), torch.empty_like(a)]

    def products() -> None:
        for i, layer in enumerate(of):
            library.gemm(buffers[i % 2], layer.b, layer.s, buffers[1 - i % 2], early=True, **layer.rest)

    graph = torch.cuda.CUDAGraph()
    products()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        products()
    for _ in range(50):
        buffers[0].copy_(a)
        graph.replay()
        assert torch.equal(buffers[LENGTH % 2], expected[-1])


def test_from_torch_in_a_graph() -> None:
    """The graph's first node clears the counters of its workspace, and is no kernel."""
    of, a = layers(), torch.randn(3, WIDTH, device="cuda").half()

    def products(early: bool) -> torch.Tensor:
        x = a
        for layer in of:
            x = cuda.gemm(x, layer.b, layer.s, early=early)
        return x

    expected = products(False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = products(True)
    for _ in range(20):
        result.zero_()
        graph.replay()
        assert torch.equal(result, expected)


def test_waits_for_kernels_of_others(library: Library) -> None:
    """Activations come from a long kernel of torch, and one of torch overwrites them afterwards."""
    layer = layers()[0]
    rows = torch.randn(4, WIDTH, device="cuda").half()
    expected = library.gemm(rows, layer.b, layer.s, torch.empty_like(rows))
    large = torch.randn(1 << 26, device="cuda")
    for _ in range(20):
        a, out = torch.full_like(rows, float("nan")), torch.empty_like(rows)
        torch.cuda.synchronize()
        a.copy_(rows + (large.mul(0.0).sum() * 0).half())
        library.gemm(a, layer.b, layer.s, out, early=True)
        a.fill_(float("inf"))
        assert torch.equal(out, expected)


def test_a_first_product_never_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    begins: list[bool] = []

    class Spy:
        """`PRODUCT`, whose last field says whether a product begins early."""

        @staticmethod
        def pack(*fields: int) -> bytes:
            begins.append(bool(fields[-1]))
            return PRODUCT.pack(*fields)

    monkeypatch.setattr(cuda, "PRODUCT", Spy)
    monkeypatch.setattr(cuda, "_layers", {})  # else an earlier test's layer at these addresses counts as this one
    layer, a = layers()[0], torch.randn(2, WIDTH, device="cuda").half()
    results = [cuda.gemm(a, layer.b, layer.s, early=early) for early in (True, True, None)]
    monkeypatch.setattr(cuda, "EARLY", True)
    results += [cuda.gemm(a, layer.b, layer.s, early=early) for early in (None, False)]
    results.append(cuda.matmul(a, layer.b, layer.s))
    assert begins == [False, True, False, True, False, True]
    assert all(torch.equal(result, results[0]) for result in results)
    operator: Any = torch.ops.marlin_convert.gemm
    assert torch.equal(operator(a, layer.b, layer.s, early=True), results[0])
