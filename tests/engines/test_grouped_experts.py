"""The experts of a block as one operator, against the loop over their layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from marlin_convert.engines.grouped_experts import GroupedExperts, formula_of
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.native import moe
from tests.support.pieces import random_layer

H, INNER, E = 128, 256, 4


def linear(K: int, N: int, seed: int, bias: bool = False, **kind: Any) -> MarlinLinear:
    piece, _ = random_layer(K, N, seed=seed, **kind)
    made = MarlinLinear(
        K, N, bias, bits=piece.bits, group_size=kind.get("group", 128), sym=piece.zeros is None,
        desc_act=piece.perm is not None, extended=True, dtype=torch.float16,
    )  # fmt: skip
    tensors = {"marlin_qweight": piece.weight, "marlin_scales": piece.scales * 2.0 ** -(piece.bits + 1)}
    tensors |= {} if piece.zeros is None else {"marlin_qzeros": piece.zeros}
    tensors |= {} if piece.perm is None else {"marlin_perm": piece.perm}
    tensors |= {"bias": torch.randn(N).half()} if bias else {}
    made.load_state_dict(tensors)
    return made


def block(kinds: list[dict[str, Any]]) -> list[tuple[MarlinLinear, ...]]:
    sizes = ((H, INNER), (H, INNER), (INNER, H))
    return [
        tuple(linear(*size, seed=10 * n + i, **kind) for i, size in enumerate(sizes)) for n, kind in enumerate(kinds)
    ]


def by_turns(experts: list[tuple[MarlinLinear, ...]], x: Any, ids: Any, weights: Any) -> torch.Tensor:
    y = torch.zeros(x.shape)
    for t in range(x.shape[0]):
        for number, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            if number < len(experts):
                gate, up, down = experts[number]
                y[t] += weight * down(nn.functional.silu(gate(x[t : t + 1])) * up(x[t : t + 1]))[0].float()
    return y


CASES: dict[str, list[dict[str, Any]]] = {
    "plain": [{}] * E,
    "act-order": [{"group": 64, "order": True, "bias": True}] * E,
    "different": [{}, {"bits": 8, "group": 32, "asym": True}, {}, {"group": 64}],
}


@pytest.mark.parametrize("name", CASES)
def test_as_one_after_the_other(name: str) -> None:
    torch.manual_seed(0)
    experts = block(CASES[name])
    stored = [{key: t.clone() for key, t in layer.state_dict().items()} for layers in experts for layer in layers]
    x, weights = torch.randn(6, H).half(), torch.rand(6, 2)
    ids = torch.rand(6, E).argsort(1)[:, :2]
    ids[0, 0] = E  # Transformers' mark for "no expert"
    want = by_turns(experts, x, ids, weights)
    grouped = GroupedExperts(experts, moe.Formula())
    assert len(grouped.sets) == len({str(kind) for kind in CASES[name]})
    assert grouped.current()
    y = grouped(x, ids, weights)
    assert (y.float() - want).norm() <= 3e-3 * want.norm()
    # The layers are views of the stacks, and otherwise as they were.
    layers = [layer for parts in experts for layer in parts]
    for layer, before in zip(layers, stored, strict=True):
        after = layer.state_dict()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    first = layers[0].get_buffer("marlin_qweight")
    assert first.untyped_storage().data_ptr() == grouped.sets[0].gate.B.untyped_storage().data_ptr()
    assert torch.equal(by_turns(experts, x, ids, weights), want)
    layers[2].to(torch.bfloat16)
    layers[2].load_state_dict({key: t.clone() for key, t in layers[2].state_dict().items()}, assign=True)
    assert not grouped.current()


def gpt_oss(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("silu", moe.Formula("silu")),
        ("gelu", moe.Formula("gelu")),
        ("gelu_pytorch_tanh", moe.Formula("gelu_tanh")),
        ("relu", moe.Formula("relu")),
        ("relu2", moe.Formula("relu_squared")),
        ("mish", None),
        ("tanh", None),
    ],
)
def test_the_formula_of_an_activation(name: str, formula: moe.Formula | None) -> None:
    activation = ACT2FN[name]
    assert formula_of(lambda gate, up: activation(gate) * up, True, limit=7.0, alpha=1.702) == formula
    assert formula_of(activation, False) == formula


def test_the_formula_of_gpt_oss() -> None:
    found = formula_of(gpt_oss, True, alpha=1.702, limit=7.0)
    assert found == moe.Formula("silu", limit=7.0, alpha=1.702, beta=1.0)
    assert formula_of(gpt_oss, True) is None
