"""Pieces of layers for tensor parallelism: each against the same piece of the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marlin_convert.engines import tensor_parallel as shards
from marlin_convert.formats.marlin_config import LayerSettings
from marlin_convert.native import reference
from tests.support.pieces import random_layer, weight_of

KINDS = [
    {"group": 128},
    {"group": -1},
    {"group": 32, "bits": 8},
    {"group": 64, "asym": True},
    {"group": -1, "asym": True},
]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", [*KINDS, {"group": 64, "order": True}, {"group": 128, "order": True, "asym": True}])
def test_columns(ranks: int, kind: dict[str, Any]) -> None:
    whole, weight = random_layer(256, 512, **kind)
    for rank in range(ranks):
        first, count = rank * 512 // ranks, 512 // ranks
        piece = shards.columns(whole, torch.arange(first, first + count))
        assert (piece.K, piece.N, piece.stored_N) == (256, count, count)
        assert torch.equal(weight_of(piece), weight[:, first : first + count])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rows(ranks: int, kind: dict[str, Any]) -> None:
    whole, weight = random_layer(512, 128, **kind)
    for rank in range(ranks):
        first, count = rank * 512 // ranks, 512 // ranks
        piece = shards.rows(whole, first, count)
        assert (count, 128) == (piece.K, piece.N)
        assert piece.perm is None
        assert torch.equal(weight_of(piece), weight[first : first + count])


@pytest.mark.parametrize("kind", [*KINDS, {"group": 64, "order": True}])
def test_pieces_keep_nothing_of_the_whole_in_memory(kind: dict[str, Any]) -> None:
    whole, _ = random_layer(512, 256, **kind)
    pieces = [shards.columns(whole, torch.arange(128, 256)), shards.columns(whole, torch.arange(100, 200))]
    if whole.perm is None:
        pieces.append(shards.rows(whole, 256, 256))
    pieces.append(shards.rows(whole, 100, 300))
    for piece in pieces:
        for what in ("weight", "scales", "zeros"):
            tensor = getattr(piece, what)
            if tensor is not None and tensor is not getattr(whole, what):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, what


def test_one_group_left_on_a_rank_changes_the_order_of_its_scales() -> None:
    """With G = 1 every reader takes the other permutation: new[8i + j] = old[2i + (0, 1, 8, 9, 16, 17, 24, 25)[j]]."""
    whole, _ = random_layer(256, 64)
    piece = shards.rows(whole, 128, 128)
    natural = reference.unpermute_scales(whole.scales)[1]
    assert piece.G == 1
    expected = [
        natural[32 * run + 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[j]]
        for run in range(2)
        for i in range(4)
        for j in range(8)
    ]
    assert piece.scales[0].tolist() == [float(x) for x in expected]


ORDERED = [*KINDS, {"group": 64, "order": True}, {"group": 32, "bits": 8, "asym": True, "order": True}]


@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize("N", [320, 296])
def test_columns_in_any_order(kind: dict[str, Any], N: int) -> None:
    """Single columns, whole tiles, tiles that begin elsewhere, columns twice, columns of zeros, the last of them."""
    whole, weight = random_layer(128, N, **kind)
    orders = [
        torch.randperm(N, generator=torch.Generator().manual_seed(1)),
        torch.cat([torch.arange(128, 192), torch.arange(0, 64)]),
        torch.arange(32, 96),
        torch.cat([torch.arange(96), torch.arange(96)]),
        torch.cat([torch.arange(64, 100), torch.full((28,), -1), torch.arange(64)]),
        torch.full((70,), -1),
        torch.arange(192, N),
        torch.arange(256, 296),
        torch.tensor([N - 1]),
    ]
    for order in orders:
        piece = shards.columns(whole, order)
        assert (piece.K, piece.N, piece.stored_N) == (128, len(order), -(-len(order) // 64) * 64)
        assert torch.equal(weight_of(piece), torch.where(order < 0, 0, weight[:, order.clamp(min=0)]))


@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize("K", [512, 456])
def test_rows_cut_anywhere(kind: dict[str, Any], K: int) -> None:
    """Act-order, cuts through groups and through blocks of 128: the same weights, in groups of 16 or one group."""
    whole, weight = random_layer(K, 128, **kind)
    for first, count in [(0, 64), (0, 256), (256, K - 256), (100, 37), (192, 192), (K - 1, 1)]:
        piece = shards.rows(whole, first, count)
        assert (piece.K, piece.N, piece.stored_K % 128) == (count, 128, 0)
        assert torch.equal(weight_of(piece), weight[first : first + count])
        assert piece.G == 1 or piece.stored_K // piece.G in (16, kind["group"])


def test_the_rows_of_all_ranks_are_not_many_more() -> None:
    """A group of 128 rows in random order has about 64 on each of two ranks, filled up to a multiple of 16."""
    whole, _ = random_layer(2048, 64, order=True)
    stored = sum(shards.rows(whole, first, 1024).stored_K for first in (0, 1024))
    assert stored <= 2048 * 1.25


def test_columns_of_a_large_layer_are_moved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CODES_AT_ONCE", 64 * 16 * 3)
    whole, weight = random_layer(256, 128, asym=True)
    order = torch.arange(127, -1, -1)
    assert torch.equal(weight_of(shards.columns(whole, order)), weight[:, order])
    assert torch.equal(weight_of(shards.rows(whole, 8, 200)), weight[8:208])


def test_all_columns_are_no_copy() -> None:
    whole, _ = random_layer(128, 200)
    assert shards.columns(whole, torch.arange(200)) is whole


def test_padding_of_a_vocabulary_is_zero() -> None:
    whole, weight = random_layer(128, 200, asym=True)
    piece = shards.columns(whole, torch.cat([torch.arange(128, 200), torch.full((120,), -1)]))
    assert piece.stored_N == 192
    found = weight_of(piece)
    assert torch.equal(found[:, :72], weight[:, 128:])
    assert (found[:, 72:] == 0).all()


def test_neighbours_are_joined_where_one_product_can_do_them() -> None:
    a, wa = random_layer(256, 128, seed=1)
    b, wb = random_layer(256, 64, seed=2)
    c, wc = random_layer(256, 64, bits=8, seed=3)
    d, wd = random_layer(256, 72, bits=8, seed=4)
    e, we = random_layer(256, 64, bits=8, seed=5)
    joined = shards.join([a, b, c, d, e])
    assert [(p.bits, p.N) for p in joined] == [(4, 192), (8, 136), (8, 64)]  # d ends in padding: e stands alone
    expected = [torch.cat([wa, wb], 1), torch.cat([wc, wd], 1), we]
    for piece, weight in zip(joined, expected, strict=True):
        assert torch.equal(weight_of(piece), weight)


@pytest.mark.parametrize("same", [True, False])
def test_act_order_is_joined_only_in_one_order(same: bool) -> None:
    a, _ = random_layer(256, 64, order=True, seed=1)
    b, _ = random_layer(256, 64, order=True, seed=1 if same else 2)
    c, _ = random_layer(256, 64, seed=1)
    assert len(shards.join([a, b])) == (1 if same else 2)
    assert len(shards.join([a, c])) == 2
    assert len(shards.join([c, a])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"perm": torch.zeros(256, dtype=torch.int32)}, "x: marlin_perm should not be there by the settings"),
        ({"scales": torch.ones(3, 64, dtype=torch.float16)}, "do not fit its settings"),
        ({"scales": torch.ones(2, 128, dtype=torch.float16)}, "do not fit its settings"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    piece, _ = random_layer(256, 64)
    tensors = {"weight": piece.weight, "scales": piece.scales, **change}
    with pytest.raises(ValueError, match=message):
        shards.whole("x", LayerSettings(4, 128, True, False), tensors)
