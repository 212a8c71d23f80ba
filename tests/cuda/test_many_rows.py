"""The kernel for many rows on Hopper (gemm_sm90_wide.cuh): every instance, kind of weights, split, border of tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cuda.cuda_library import (
    CLUSTERS,
    COUNTER_BYTES,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    assert_close,
    variant,
)  # fmt: skip
from tests.cuda.kernel_inputs import BF16, FP16, GROUP_SIZES, activations, groups_of, poisoned, why_not

SPLITS = (*CLUSTERS, STREAM_K, DATA_PARALLEL)
WIDE = [name for name in INSTANCES if name.startswith("sm90_wide")]
PLAIN = [name for name in WIDE if INSTANCES[name].takes(4, 128, False)]


def reason() -> str | None:
    found = why_not()
    if found is None and torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is no Hopper"
    return found if found or WIDE else "the library is not built for sm_90a"


pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("fresh_inputs"),
    pytest.mark.skipif(reason() is not None, reason=str(reason())),
]


def run(
    library: Library,
    layer: Layer,
    a: torch.Tensor,
    choice: int,
    bias: torch.Tensor | None = None,
    **rest: Any,
) -> torch.Tensor | None:
    """The product, or None where the library refuses: no rest of tiles to split so, too few steps, or other stages."""
    out = poisoned(a.shape[0], rest.get("out_features") or layer.n, a.dtype)
    try:
        return library.gemm(a, layer.b, layer.s, out, bias, choice, **layer.rest, **rest)
    except CudaError as error:
        if error.code != -9 or choice == variant("", 0, DATA_PARALLEL) | choice & 0xFFF:
            raise
        return None


@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("name", WIDE)
def test_operand_is_what_dequantize_writes(library: Library, name: str, size: int) -> None:
    """Rows of the identity give W bit for bit, also where one group's scales enter after the sums."""
    x = INSTANCES[name]
    for scale_dtype in (FP16, BF16):
        for k, n in ((64, 64), (192, 320), (384, 512)):
            if size == 128 and k % 128:
                continue
            layer = Layer(k, n, groups_of(k, size), bits=x.bits, zeros=x.zero_points == 2, scale_dtype=scale_dtype)
            for dtype in (FP16, BF16):
                expected = library.dequantize(layer.b, layer.s, dtype, **layer.rest)
                eye = torch.eye(k, device="cuda").to(dtype)
                for split in SPLITS:
                    out = run(library, layer, eye, variant(name, 0, split))
                    assert out is None or torch.equal(out, expected)  # which takes -0.0 for 0.0


@pytest.mark.parametrize("name", PLAIN)
def test_every_scale_and_code(library: Library, name: str) -> None:
    """All 16 codes with all finite fp16 scales that leave the product finite, and in bf16 too: one rounding."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(FP16)
    scales = bits[bits.isfinite() & (bits.abs() < 8000)]
    k, n = 256, len(scales) // 64 * 64
    layer = Layer(k, n, 2, scales[:n].repeat(2, 1))
    for dtype in (FP16, BF16):  # bf16: scales of the other type
        eye = torch.eye(k, device="cuda").to(dtype)
        out = run(library, layer, eye, variant(name, 0, DATA_PARALLEL))
        assert out is not None
        assert torch.equal(out, layer.weight(torch.float32).to(dtype))


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("size", GROUP_SIZES)
@pytest.mark.parametrize("name", WIDE)
def test_kinds_and_splits(library: Library, name: str, size: int, dtype: torch.dtype) -> None:
    x = INSTANCES[name]
    ran = 0
    for scale_dtype in (FP16, BF16):
        for k, n in ((64, 64), (192, 320), (1152, 448)):
            if size == 128 and k % 128:
                continue
            layer = Layer(k, n, groups_of(k, size), bits=x.bits, zeros=x.zero_points == 2, scale_dtype=scale_dtype)
            for m in (1, x.block_m - 1, x.block_m + 1, 2 * x.block_m + 3):
                a, bias = activations(m, k, dtype), torch.randn(n, device="cuda").to(dtype)
                for split in (1, 2, 3, STREAM_K, DATA_PARALLEL):
                    choice = variant(name, 0, split)
                    out = run(library, layer, a, choice, bias)
                    if out is not None:
                        assert_close(out, a, library.operand(layer, a, choice), bias)
                        ran += 1
    assert ran >= 16


@pytest.mark.parametrize("name", PLAIN)
def test_rows_across_tiles(library: Library, name: str) -> None:
    layer = Layer(512, 448, 4)
    block = INSTANCES[name].block_m
    for m in {1, 2, 7, 8, 9, *(i * block + d for i in (1, 2, 5, 9) for d in (-1, 0, 1)), 2048, 4097, 8192}:
        a = activations(m, 512, FP16)
        choice = variant(name, 0, DATA_PARALLEL)
        out = run(library, layer, a, choice)
        assert out is not None
        assert_close(out, a, library.operand(layer, a, choice))


SHARED = [(640, 2560, 1024), (4096, 6144, 1000), (4096, 6144, 300), (2048, 28672, 700)]


@pytest.mark.parametrize(("k", "n", "m"), SHARED)
@pytest.mark.parametrize("name", PLAIN)
def test_shared_tiles(library: Library, name: str, k: int, n: int, m: int) -> None:
    """Whole waves and a split rest, ranges that end anywhere; the same bits in every repetition, other sums between."""
    layer = Layer(k, n, k // 128)
    a, other = activations(m, k, FP16), activations(m, k, FP16)
    weight = library.operand(layer, a, variant(name))
    for split in SPLITS:
        choice = variant(name, 0, split)
        first = run(library, layer, a, choice)
        if first is None:
            continue
        assert_close(first, a, weight)
        for _ in range(10):
            run(library, layer, other, choice)
            again = run(library, layer, a, choice)
            assert again is not None
            assert torch.equal(again, first)
    assert not library.workspace[:COUNTER_BYTES].any()


@pytest.mark.parametrize("stages", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("name", WIDE)
def test_few_stages_and_steps(library: Library, name: str, stages: int) -> None:
    """The shortest ring, one to three steps of K."""
    x = INSTANCES[name]
    for k in (64, 128, 192, 1088):
        layer = Layer(k, 320, k // 64, bits=x.bits, zeros=x.zero_points == 2)
        a, choice = activations(2 * x.block_m + 5, k, FP16), variant(name, stages, DATA_PARALLEL)
        out = run(library, layer, a, choice)
        if stages == 2:  # a block holds two while it waits for the third
            assert out is None
        elif out is None:
            assert stages > 4  # so many fit into every instance's shared memory
        else:
            assert_close(out, a, library.operand(layer, a, choice))


@pytest.mark.parametrize("name", WIDE)
def test_padding(library: Library, name: str) -> None:
    """Columns from out_features on are not written, rows from in_features on not read, whatever stands there."""
    x = INSTANCES[name]
    k, n, around = 640, 320, 4096
    for size in (64, -1):
        layer = Layer(k, n, groups_of(k, size), bits=x.bits, zeros=x.zero_points == 2)
        for rows, columns in ((640, 320), (520, 257), (584, 318), (632, 5), (8, 300)):
            for m in (70, x.block_m + 1):
                wide = torch.full((m, rows + 8), float("nan"), dtype=FP16, device="cuda")
                wide[:, :rows] = activations(m, rows, FP16)
                a, bias = wide[:, :rows], torch.randn(columns, device="cuda").half()
                for split in (2, STREAM_K, DATA_PARALLEL):
                    choice = variant(name, 0, split)
                    buffer = torch.full((2 * around + m * columns,), 7.0, dtype=FP16, device="cuda")
                    out = buffer[around:-around].view(m, columns)
                    out.fill_(float("nan"))
                    library.gemm(
                        a, layer.b, layer.s, out, bias, choice, in_features=rows, out_features=columns, **layer.rest
                    )
                    assert_close(out, a, library.operand(layer, a, choice)[:rows, :columns], bias)
                    assert (buffer[:around] == 7).all()
                    assert (buffer[-around:] == 7).all()


def test_two_streams_share_the_gpu(library: Library) -> None:
    """Blocks of a tile that do not run at the same time: nobody waits for ever, and the bits are the same."""
    layers = [Layer(4096, 4096, 32), Layer(8192, 2048, 64)]
    inputs = [activations(m, layer.k, FP16) for m, layer in zip((256, 200), layers, strict=True)]
    choices = [variant(PLAIN[0], 0, 2), variant(PLAIN[0], 0, STREAM_K)]
    alone = [
        library.gemm(a, x.b, x.s, poisoned(a.shape[0], x.n, FP16), None, c)
        for a, x, c in zip(inputs, layers, choices, strict=True)
    ]
    streams, workspaces = [torch.cuda.Stream() for _ in layers], [library.new_workspace() for _ in layers]
    outs = [[poisoned(o.shape[0], o.shape[1], FP16) for _ in range(50)] for o in alone]
    torch.cuda.synchronize()
    for i in range(50):
        for j, (a, x) in enumerate(zip(inputs, layers, strict=True)):
            with torch.cuda.stream(streams[j]):
                library.gemm(a, x.b, x.s, outs[j][i], None, choices[j], workspaces[j])
    torch.cuda.synchronize()
    for expected, got in zip(alone, outs, strict=True):
        assert all(torch.equal(expected, out) for out in got)


def test_in_a_graph(library: Library) -> None:
    layer = Layer(4096, 4096, 32)
    for m, split in ((256, 2), (300, STREAM_K), (1000, DATA_PARALLEL)):
        a, out = activations(m, 4096, FP16), poisoned(m, 4096, FP16)
        choice = variant(PLAIN[0], 0, split)
        library.gemm(a, layer.b, layer.s, out, None, choice)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.gemm(a, layer.b, layer.s, out, None, choice)
        for _ in range(3):
            a.copy_(activations(m, 4096, FP16))
            out.fill_(float("nan"))
            graph.replay()
            assert_close(out, a, library.operand(layer, a, choice))


def test_more_than_64_rows_run_here(library: Library) -> None:
    for bits, zeros in ((4, None), (4, 1), (8, None), (8, 1)):
        for groups in (1, 32, 64, 128, 256):
            for m in (1, 64, 65, 128, 1000, 8192):
                plan = library.plan(m, 4096, 4096, groups, bits=bits, zeros=zeros)
                (chosen,) = [x for x in INSTANCES.values() if x.id == plan.instance]
                assert chosen.name.startswith(b"sm90_wide") == (m > 64)
