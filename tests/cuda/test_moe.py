"""Mixtures of experts on the GPU: every kind of weights, tile and formula, and what a call promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from marlin_convert.native import cuda, moe, moe_library
from tests.cuda.cuda_library import BATCH_INVARIANT, DATA_PARALLEL, STREAM_K
from tests.cuda.mixtures import Experts, Kind, check, choices

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not cuda.available(), reason="needs an NVIDIA GPU of compute capability 8.0 and _cuda.so"),
]

FP16, BF16 = torch.float16, torch.bfloat16
PLAIN = Kind()
KINDS = [
    Kind(),
    Kind(group=-1),
    Kind(group=64),
    Kind(group=32, zeros=True),
    Kind(group=16),
    Kind(zeros=True),
    Kind(group=-1, zeros=True),
    Kind(order=True, bias=True),
    Kind(group=32, zeros=True, order=True, bias=True),
    Kind(bits=8),
    Kind(bits=8, group=-1, bias=True),
    Kind(bits=8, group=64, zeros=True),
    Kind(bits=8, group=32, order=True),
    Kind(bits=8, group=16, zeros=True),
    Kind(scale_dtype=torch.bfloat16),
    Kind(group=64, zeros=True, scale_dtype=torch.bfloat16),
]
NAMES = [str(k).removeprefix("Kind(").replace("scale_dtype=torch.float16", "") for k in KINDS]


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_kind_of_weights(kind: Kind, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for T in (1, 9, 100, 700, 1500):
        check(T, 2, 8, 384, 256, kind, kind, dtype)


@pytest.mark.parametrize("kind", [Kind(), Kind(group=32), Kind(bits=8, zeros=True)], ids=["4", "4 group 32", "8 zeros"])
@pytest.mark.parametrize("split", [STREAM_K, DATA_PARALLEL])
@pytest.mark.parametrize(
    ("block_m", "block_n", "rounding"),
    [(8, 128, 0), (16, 128, 0), (32, 128, 0), (64, 128, 0), (64, 256, 0), (64, 256, 1), (128, 128, 0), (128, 256, 0)],
)
def test_every_tile(block_m: int, block_n: int, rounding: int, split: int, kind: Kind) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these instances need compute capability 9.0")
    torch.manual_seed(1)
    for T in (3, 200, 333):
        variant = moe_library.variant(block_m, block_n, split, rounding=bool(rounding))
        check(T, 2, 5, 576, 320, kind, kind, FP16, variant=variant)


@pytest.mark.parametrize("kind", KINDS[:14], ids=NAMES[:14])
@pytest.mark.parametrize("split", [STREAM_K, DATA_PARALLEL])
@pytest.mark.parametrize("block_m", [16, 64])
def test_the_kernels_for_every_gpu(block_m: int, split: int, kind: Kind) -> None:
    torch.manual_seed(2)
    for T, dtype in ((3, BF16), (200, FP16)):
        check(T, 2, 5, 576, 320, kind, kind, dtype, variant=moe_library.variant(block_m, 0, split, portable=True))


@pytest.mark.parametrize("T", [1, 2, 5, 17, 64, 129, 1000, 4096])
@pytest.mark.parametrize(("E", "k"), [(8, 1), (8, 2), (128, 8)])
def test_tokens(T: int, E: int, k: int) -> None:
    torch.manual_seed(3)
    check(T, k, E, 256, 128, PLAIN, PLAIN, FP16, moe.Formula(joined=moe.JOINED))


def test_a_split_of_few_tiles() -> None:
    """Long K, few columns: blocks share tiles, without being asked to."""
    torch.manual_seed(4)
    for T in (1, 4, 40):
        check(T, 2, 4, 512, 4096, PLAIN, PLAIN, FP16, moe.Formula(joined=moe.JOINED))


def test_padding() -> None:
    torch.manual_seed(5)
    for T in (1, 30, 900):
        check(T, 2, 6, 200, 72, Kind(group=64), Kind(group=32, zeros=True, bias=True), FP16)
        check(T, 2, 6, 331, 75, Kind(group=16, order=True, bias=True), Kind(group=16, order=True), BF16)


GPT_OSS = moe.Formula("silu", moe.ALTERNATING, 7.0, 1.702, 1.0)


@pytest.mark.parametrize(
    "formula",
    [
        GPT_OSS,
        replace(GPT_OSS, joined=moe.JOINED),
        moe.Formula("silu", limit=1.5),
        moe.Formula("gelu"),
        moe.Formula("gelu_tanh", moe.JOINED),
        moe.Formula("relu"),
    ],
)
def test_formulas(formula: moe.Formula) -> None:
    torch.manual_seed(6)
    for T in (2, 50):
        check(T, 2, 4, 256, 128, Kind(bias=True), Kind(bias=True, order=True), FP16, formula)


@pytest.mark.parametrize("name", ["relu_squared", "gelu", "silu"])
def test_experts_without_a_gate(name: str) -> None:
    torch.manual_seed(7)
    check(20, 2, 4, 256, 128, PLAIN, PLAIN, FP16, moe.Formula(name), gated=False)


def test_experts_elsewhere_and_no_experts() -> None:
    """Half of the experts are here, in another order; some choices name none at all, and one token has none."""
    torch.manual_seed(8)
    position = torch.full((8,), -1, dtype=torch.int32, device="cuda")
    position[torch.tensor([5, 0, 3, 6], device="cuda")] = torch.arange(4, dtype=torch.int32, device="cuda")
    sets = [Experts(4, 256, 128, PLAIN, PLAIN, FP16)]
    for T in (1, 60, 800):
        _, ids = choices(T, 2, 8)
        ids[0, 0], ids[-1, 1] = -1, 8
        ids[T // 2] = torch.tensor([1, 2], device="cuda")
        out = check(
            T, 2, 8, 256, 128, PLAIN, PLAIN, FP16, sets=sets, position=position, ids=ids, wide=T == 60, on_input=T == 1
        )
        assert not out[T // 2].any()


def test_settings_that_differ() -> None:
    torch.manual_seed(9)
    kinds = [(PLAIN, Kind(bits=8)), (Kind(group=32, zeros=True), PLAIN), (Kind(bits=8, order=True), Kind(group=-1))]
    sets = [Experts(E, 256, 128, *kind, FP16) for E, kind in zip((3, 1, 4), kinds, strict=True)]
    position = torch.tensor([7, 0, 3, 1, 5, 6, 2, 4], dtype=torch.int32, device="cuda")
    for T in (1, 33, 600):
        check(T, 2, 8, 256, 128, PLAIN, PLAIN, FP16, sets=sets, position=position)


def test_many_experts() -> None:
    torch.manual_seed(10)
    for T in (1, 300):
        check(T, 6, 700, 128, 64, Kind(group=64), Kind(group=64), FP16)


def test_equal_bits_every_time() -> None:
    torch.manual_seed(11)
    experts = Experts(8, 1024, 2048, PLAIN, PLAIN, FP16, moe.JOINED)
    for T in (1, 16, 200, 1500):
        x = torch.randn((T, 1024), device="cuda").half()
        weights, ids = choices(T, 2, 8)
        results = [
            moe.experts(x, weights, ids, [experts.set], moe.Formula(joined=moe.JOINED), variant=v)
            for v in (0, 0, moe_library.variant(one_by_one=True)) * 10
        ]
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", KINDS[:14], ids=NAMES[:14])
def test_tokens_have_the_bits_that_they_have_alone(kind: Kind, portable: bool) -> None:
    """However many tokens are beside them: an expert has from none to hundreds of rows."""
    torch.manual_seed(12)
    variant = BATCH_INVARIANT | moe_library.variant(portable=portable)
    for hidden, inner, dtype in ((384, 256, FP16), (512, 4096, BF16)):
        experts = Experts(8, hidden, inner, kind, kind, dtype)
        x = torch.randn((700, hidden), device="cuda").to(dtype)
        weights, ids = choices(700, 2, 8)
        whole = moe.experts(x, weights, ids, [experts.set], variant=variant)
        for first, last in pairwise([0, 1, 2, 5, 21, 60, 250, 700]):
            own = slice(first, last)
            part = moe.experts(x[own], weights[own], ids[own], [experts.set], variant=variant)
            assert torch.equal(part, whole[own])
        if not portable:
            assert torch.equal(moe.experts(x, weights, ids, [experts.set], batch_invariant=True), whole)
    for T in (1, 30, 700):
        check(T, 2, 8, 384, 256, kind, kind, FP16, variant=variant)


def test_cuda_graph() -> None:
    """Captured once, replayed with other tokens and other experts; two blocks in one graph."""
    torch.manual_seed(12)
    sets = [Experts(8, 256, 128, PLAIN, PLAIN, FP16).set]
    for T in (4, 900):
        x = torch.randn((T, 256), device="cuda").half()
        weights, ids = choices(T, 2, 8)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = moe.experts(x, weights, ids, sets)
            second = moe.experts(first, weights, ids, sets)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            new_weights, new_ids = choices(T, 2, 8)
            weights.copy_(new_weights)
            ids.copy_(new_ids)
            first.fill_(math.nan)
            second.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            want = moe.experts(x, weights, ids, sets)
            assert torch.equal(first, want)
            assert torch.equal(second, moe.experts(want, weights, ids, sets))


def test_a_view_of_tokens_and_none_of_them() -> None:
    torch.manual_seed(13)
    sets = [Experts(4, 256, 128, PLAIN, PLAIN, FP16).set]
    wide = torch.randn((7, 600), device="cuda").half()
    weights, ids = choices(7, 2, 4)
    for start in (0, 8, 3):
        x = wide[:, start : start + 256]
        assert torch.equal(moe.experts(x, weights, ids, sets), moe.experts(x.contiguous(), weights, ids, sets))
    assert moe.experts(wide[:0, :256], weights[:0], ids[:0], sets).shape == (0, 256)


def test_compiled() -> None:
    sets = [Experts(4, 256, 128, PLAIN, PLAIN, FP16).set]
    x = torch.randn((5, 256), device="cuda").half()
    weights, ids = choices(5, 2, 4)

    def block(x: torch.Tensor) -> torch.Tensor:
        return moe.experts(x * 2, weights, ids, sets) + x

    compiled: Any = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), block(x))


def test_what_does_not_fit() -> None:
    experts = Experts(4, 256, 128, PLAIN, PLAIN, FP16)
    x, (weights, ids) = torch.randn((5, 256), device="cuda").half(), choices(5, 2, 4)
    with pytest.raises(TypeError, match="x is float32"):
        moe.experts(x.float(), weights, ids, [experts.set])
    with pytest.raises(ValueError, match=r"x has shape \(5, 128\)"):
        moe.experts(x[:, :128], weights, ids, [experts.set])
    with pytest.raises(ValueError, match="weights has shape"):
        moe.experts(x, weights[:, :1], ids, [experts.set])
    with pytest.raises(RuntimeError, match="no such variant"):
        moe.experts(x, weights, ids, [experts.set], variant=moe_library.variant(24))
