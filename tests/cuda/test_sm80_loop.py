"""What is special in the main loop for every GPU, asked for by its instances, also on a Hopper card.

A ring of stages with a barrier for each slot, two or three blocks on an SM, sums that stay in registers when blocks
share a tile along K, and kernels of their own for one group. References are float64; outputs are poisoned.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda.cuda_library import (
    COUNTER_BYTES,
    DATA_PARALLEL,
    INSTANCES,
    STREAM_K,
    CudaError,
    Layer,
    Library,
    assert_close,
    pack_zeros,
    variant,
)
from tests.cuda.kernel_inputs import BF16, FP16, KERNEL_TESTS, activations, poisoned

pytestmark = KERNEL_TESTS

NAMES = [name for name, x in INSTANCES.items() if x.capability == 80]


def layer_for(name: str, k: int, n: int, groups: int) -> Layer:
    """With zero points where the name has a z."""
    return Layer(k, n, groups, bits=INSTANCES[name].bits, zeros=name.endswith("z"))


def runs(library: Library, layer: Layer, a: torch.Tensor, choice: int) -> torch.Tensor | None:
    """The product, or None where the instance cannot do it in that way (more blocks than fit, or too many stages)."""
    out = poisoned(a.shape[0], layer.n, a.dtype)
    try:
        return library.gemm(a, layer.b, layer.s, out, None, choice, **layer.rest)
    except CudaError as error:
        if error.code != -9:
            raise
        return None


@pytest.mark.parametrize("groups", [8, 1])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_across_tile_borders(library: Library, name: str, groups: int) -> None:
    """Every row of a product, for numbers of rows around each border; nothing is written below the last."""
    layer, block = layer_for(name, 1024, 320, groups), INSTANCES[name].block_m
    rows = sorted({*range(1, 10), *range(block - 1, block + 3), *range(2 * block - 1, 2 * block + 10)})
    for dtype in (FP16, BF16):
        a = activations(rows[-1], layer.k, dtype)
        weight = library.operand(layer, a, variant(name))
        buffer = torch.empty((rows[-1] + 8, layer.n), dtype=dtype, device="cuda")
        for m in rows:
            for split in (STREAM_K, DATA_PARALLEL):
                buffer.fill_(float("nan"))
                library.gemm(a[:m], layer.b, layer.s, buffer[:m], None, variant(name, 0, split), **layer.rest)
                assert_close(buffer[:m], a[:m], weight)
                assert torch.isnan(buffer[m:]).all(), (m, split)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_the_stages(library: Library, name: str) -> None:
    """Fewer steps than stages, as many, and many more: the ring turns at other steps, the sums are the same."""
    for k in (128, 640, 4096):
        layer = layer_for(name, k, 256, k // 128)
        a = activations(INSTANCES[name].block_m + 3, k, FP16)
        for split in (DATA_PARALLEL, STREAM_K):
            whole = runs(library, layer, a, variant(name, 0, split))
            assert whole is not None
            assert_close(whole, a, library.operand(layer, a, variant(name)))
            depths = [runs(library, layer, a, variant(name, stages, split)) for stages in range(2, 9)]
            assert any(out is not None for out in depths)
            assert all(out is None or torch.equal(out, whole) for out in depths)


@pytest.mark.parametrize("name", NAMES)
def test_more_tiles_than_blocks_on_every_sm(library: Library, name: str) -> None:
    """Blocks that share an SM take several tiles each, while another stream's product runs beside them."""
    x, sms = INSTANCES[name], torch.cuda.get_device_properties(0).multi_processor_count
    layer = layer_for(name, 512, x.block_n * (sms // 4 + 1), 4)
    a = activations(17 * x.block_m - 1, layer.k, BF16)
    weight, beside, workspace = library.operand(layer, a, variant(name)), torch.cuda.Stream(), library.new_workspace()
    for split in (DATA_PARALLEL, STREAM_K):
        first = runs(library, layer, a, variant(name, 0, split))
        if first is None:  # stream-K with more tiles than there are counters
            continue
        assert_close(first, a, weight)
        torch.cuda.synchronize()
        for _ in range(4):
            with torch.cuda.stream(beside):
                other = poisoned(a.shape[0], layer.n, a.dtype)
                library.gemm(a, layer.b, layer.s, other, None, variant(name, 0, split), workspace, **layer.rest)
            again = runs(library, layer, a, variant(name, 0, split))
            torch.cuda.synchronize()
            assert again is not None
            assert torch.equal(again, first)
            assert torch.equal(other, first)


@pytest.mark.parametrize("groups", [56, 1])
@pytest.mark.parametrize("name", NAMES)
def test_shared_tiles(library: Library, name: str, groups: int) -> None:
    """K in two to eight parts: parts of unequal length, a ragged last tile, the same bits every time, counters zero."""
    layer = layer_for(name, 7168, 448, groups)
    ran = 0
    for dtype in (FP16, BF16):
        for m in (1, INSTANCES[name].block_m + 1):
            a = activations(m, layer.k, dtype)
            weight = library.operand(layer, a, variant(name))
            for split in (2, 3, 7, 8, STREAM_K):
                first = runs(library, layer, a, variant(name, 0, split))
                if first is None:
                    continue
                ran += 1
                assert_close(first, a, weight)
                for _ in range(2):
                    again = runs(library, layer, a, variant(name, 0, split))
                    assert again is not None
                    assert torch.equal(again, first)
                assert not library.workspace[:COUNTER_BYTES].any()
    assert ran >= 6


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("name", [name for name in NAMES if INSTANCES[name].group_size == 0])
def test_one_group_has_the_bits_of_equal_groups(library: Library, name: str, dtype: torch.dtype) -> None:
    """Scales that are powers of two round nothing, so one group is the product of many groups with the same scales."""
    x, k, n = INSTANCES[name], 512, 192
    scales = (2.0 ** torch.randint(-8, -2, (1, n)).float()).half()
    one = Layer(k, n, 1, scales, bits=x.bits, zeros=name.endswith("z"))
    many = Layer(k, n, 4, scales.repeat(4, 1), bits=x.bits)
    many.code, many.b = one.code, one.b
    if one.zeros is not None:
        many.zeros = one.zeros.repeat(4, 1)
        many.rest["zeros"] = pack_zeros(many.zeros, x.bits)
    for m in (1, 13, x.block_m + 2):
        a = activations(m, k, dtype)
        alone, repeated = (runs(library, layer, a, variant(name, 0, DATA_PARALLEL)) for layer in (one, many))
        assert alone is not None
        assert repeated is not None
        assert_close(alone, a, one.weight())
        assert_close(repeated, a, one.weight())
        if x.rounds_weights:  # before they are summed: in the same order
            assert torch.equal(alone, repeated)
