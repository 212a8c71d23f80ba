"""Marks in the place of weights: what an engine's loader does to them is what happens to the stored columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from marlin_convert.engines.column_marks import Arriving, Marks
from marlin_convert.formats.layout import EXTENDED_NAMES
from marlin_convert.formats.marlin_config import LayerSettings, MarlinSettings
from marlin_convert.options import Format
from tests.support.pieces import random_layer, weight_of

HEADS, SIZE = 4, 32
CPU = torch.device("cpu")


def arriving(**layers: dict[str, Any]) -> tuple[Arriving, list[tuple[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A checkpoint of random layers of 128 rows: itself, its tensors, and the weights [128, N]."""
    settings, tensors, weights = {}, [], {}
    for seed, (name, kind) in enumerate(layers.items()):
        own = {"group": 64, **kind}
        piece, weights[name] = random_layer(128, own.pop("N", 3 * HEADS * SIZE), seed=seed, **own)
        sizes = {"out_features": piece.N if piece.stored_N != piece.N else None}
        asym, order = piece.zeros is not None, piece.perm is not None
        settings[name] = LayerSettings(piece.bits, own["group"], not asym, order, **sizes)
        found = ((ending, getattr(piece, what)) for what, ending in EXTENDED_NAMES.items())
        tensors += [(f"{name}.{ending}", tensor) for ending, tensor in found if tensor is not None]
    whole = MarlinSettings(Format.MARLIN_EXT, LayerSettings(4, 64, True, False), settings)
    return Arriving(whole, settings), tensors, weights


def apart(x: torch.Tensor) -> torch.Tensor:
    """[heads, (q, k, v)] → [(q, k, v), heads], as models that keep them apart reorder a weight [N, K]."""
    return x.view(HEADS, 3, SIZE, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def rank(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.narrow(0, SIZE, SIZE) for part in apart(x).chunk(3)])


EDITS = {
    "none": lambda x: x,
    "heads apart": apart,
    "one rank's heads": rank,
    "transposed": lambda x: x.t(),
    "heads twice": lambda x: x.view(-1, SIZE, 1).repeat_interleave(2, 0).reshape(-1, 1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("kind", [{}, {"bits": 8, "asym": True}, {"order": True}])
def test_what_a_loader_does_to_a_weight(edit: Callable[[Any], Any], kind: dict[str, Any]) -> None:
    coming, tensors, weights = arriving(a=kind)
    ((name, marks),) = coming.stream(tensors)
    assert name == "a.weight"
    assert marks.shape == (384, 1)
    edited = edit(marks)
    assert isinstance(edited, Marks)
    target = torch.full(edited.shape, -1)
    target.data.copy_(edited)
    (piece,) = coming.pieces("here", target, CPU)
    order = edit(torch.arange(384).reshape(-1, 1)).flatten()  # the same edit of plain numbers
    assert torch.equal(weight_of(piece), weights["a"][:, order])
    assert coming.unclaimed() == []


def test_layers_side_by_side_and_padding() -> None:
    """Two layers, columns of zeros behind each, then the first again."""
    coming, tensors, weights = arriving(a={"N": 64}, b={"N": 72, "bits": 8})
    (_, a), (_, b) = coming.stream(tensors)
    zeros = torch.zeros(8, 1, dtype=torch.int64)
    pieces = coming.pieces("here", torch.cat([a, zeros, b, zeros, a[:32]]), CPU)
    assert [(piece.bits, piece.N) for piece in pieces] == [(4, 72), (8, 80), (4, 32)]
    found = [weight_of(piece) for piece in pieces]
    assert torch.equal(found[0], torch.nn.functional.pad(weights["a"], (0, 8)))
    assert torch.equal(found[1], torch.nn.functional.pad(weights["b"], (0, 8)))
    assert torch.equal(found[2], weights["a"][:, :32])


def test_a_rank_of_padding_alone() -> None:
    coming, tensors, _ = arriving(a={})
    ((_, marks),) = coming.stream(tensors)
    (piece,) = coming.pieces("here", torch.zeros(64, 1, dtype=torch.int64), CPU, given=marks)
    assert piece.N == 64
    assert (weight_of(piece) == 0).all()


def test_other_tensors_pass() -> None:
    """Not the ending makes a tensor quantized, but the layer that it belongs to."""
    coming, tensors, _ = arriving(a={})
    other = ("norm.marlin_scales", torch.ones(3))
    names = [name for name, _ in coming.stream([("x.weight", torch.ones(2)), *tensors, other])]
    assert names == ["x.weight", "a.weight", "norm.marlin_scales"]


def test_columns_that_have_not_come() -> None:
    coming, tensors, _ = arriving(a={})
    ((_, marks),) = coming.stream(tensors)
    target = torch.full((384, 1), -1)
    target[:100] = marks[:100]
    with pytest.raises(ValueError, match=r"^here: 284 of its 384 columns have not been loaded"):
        coming.pieces("here", target, CPU)
    assert coming.unclaimed() == ["a"]


@pytest.mark.parametrize(
    "write",
    [
        lambda marks: torch.zeros(384, 128).copy_(marks),
        lambda marks: torch.zeros(384, 1).__setitem__(slice(0, 384), marks),
        lambda marks: torch.nn.Parameter(torch.zeros(384, 128)).data.copy_(marks),
    ],
)
def test_marks_do_not_become_weights(write: Callable[[torch.Tensor], Any]) -> None:
    coming, tensors, _ = arriving(a={})
    ((_, marks),) = coming.stream(tensors)
    with pytest.raises(TypeError, match="a tensor that is not the weight of one of its linear layers"):
        write(marks)


@pytest.mark.parametrize("change", [lambda x: x * 2.5, lambda x: -x, lambda x: x << 8, lambda x: x.half()])
def test_arithmetic_is_found(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    coming, tensors, _ = arriving(a={})
    ((_, marks),) = coming.stream(tensors)
    with pytest.raises(TypeError, match="the engine changes the values of its weights"):
        coming.asked(change(marks))


def test_a_layer_is_asked_for_once() -> None:
    """Its tensors are let go as soon as all of its columns have been given away."""
    coming, tensors, _ = arriving(a={})
    ((_, marks),) = coming.stream(tensors)
    for half in marks.chunk(2):
        coming.asked(half)
        coming.pieces("here", half, CPU)
    assert coming.stored[0].tensors == {}
    with pytest.raises(ValueError, match="there: the engine asks for a again, after all of it was loaded"):
        coming.pieces("there", marks, CPU)


def test_layers_that_are_not_complete() -> None:
    coming, tensors, _ = arriving(a={}, b={"order": True})
    with pytest.raises(ValueError, match=r"^b: marlin_perm is missing"):
        list(coming.stream(tensors[:-1]))
