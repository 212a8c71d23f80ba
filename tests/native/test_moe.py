"""The operator for a block of experts where there is no GPU: its reference, shapes, its contract with the header."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_convert.formats.layout import pack_factor
from marlin_convert.native import cuda, cuda_library, moe, moe_library
from marlin_convert.native import reference as twin

HIDDEN, INNER = 64, 128


def test_constants_and_structures_are_those_of_the_header() -> None:
    header = (Path(__file__).parents[2] / "kernels" / "marlin_cuda.h").read_text()
    defined = dict(re.findall(r"^#define MARLIN_CUDA_(\w+) (\d+)", header, re.MULTILINE))
    for name, number in moe.ACTIVATIONS.items():
        assert int(defined[name.upper()]) == number
    joined = {"NOT_JOINED": moe.NOT_JOINED, "JOINED": moe.JOINED, "ALTERNATING": moe.ALTERNATING}
    assert all(int(defined[name]) == number for name, number in joined.items())
    pointer, i32, i64 = 8, 4, 8
    assert ctypes.sizeof(cuda_library.Weights) == 4 * pointer + 5 * i64 + 2 * i32
    assert ctypes.sizeof(moe_library.SetArguments) == 3 * (ctypes.sizeof(cuda_library.Weights) + pointer) + 2 * i32
    assert ctypes.sizeof(moe_library.CallArguments) == 10 * pointer + 2 * i64 + 10 * i32 + 3 * 4 + i32
    assert ctypes.sizeof(moe_library.Layout) == 12 * i64 + 2 * i32
    assert moe_library.variant(64, 256, 10, True, True, True) == 64 | 256 << 10 | 10 << 20 | 7 << 24


def stack(
    E: int, K: int, N: int, *, bits: int = 4, group: int = 64, order: bool = False, asym: bool = False,
    bias: bool = False, inputs: int | None = None, outputs: int | None = None,
) -> moe.Stack:  # fmt: skip
    """Random experts of K x N as stored."""
    G, inputs = (1 if group < 0 else K // group), inputs or K
    words = torch.randint(-(2**31), 2**31 - 1, (E, K // 16, N * 16 // pack_factor(bits)), dtype=torch.int32)
    scales = (torch.rand(E, G, N) * 0.02 + 0.001).half()
    zeros = torch.randint(-(2**31), 2**31 - 1, (E, G, N // pack_factor(bits)), dtype=torch.int32) if asym else None
    perm = torch.stack([torch.randperm(inputs).int() for _ in range(E)]) if order else None
    own = torch.randn(E, outputs or N).half() if bias else None
    return moe.Stack(words, scales, own, zeros, perm, bits, inputs, outputs or N)


def weight(layer: moe.Stack, number: int) -> torch.Tensor:
    zeros, perm = (None if t is None else t[number] for t in (layer.zeros, layer.perm))
    return twin.dequantize_layer(
        layer.B[number], layer.s[number], zeros, perm, bits=layer.bits, in_features=layer.in_features,
        out_features=layer.out_features, dtype=torch.float32,
    ).double()  # fmt: skip


def formula(sets: list[moe.Set], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, how: moe.Formula) -> Any:
    """What the operator is to compute, token by token, in float64."""
    places = [(group, number) for group in sets for number in range(group.count)]
    out = torch.zeros(x.shape[0], sets[0].down.out_features, dtype=torch.float64)
    for t in range(x.shape[0]):
        for j in range(ids.shape[1]):
            group, number = places[int(ids[t, j])]

            def product(layer: moe.Stack, a: torch.Tensor, number: int = number) -> torch.Tensor:
                y = a @ weight(layer, number)
                return y if layer.bias is None else y + layer.bias[number].double()

            first = product(group.gate, x[t].double())
            if group.up is not None:
                gate, up = first, product(group.up, x[t].double())
            elif how.joined == moe.JOINED:
                gate, up = first[: len(first) // 2], first[len(first) // 2 :]
            else:
                gate, up = first[::2], first[1::2]
            gate, up = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit)
            h = (up + how.beta) * gate / (1 + torch.exp(-how.alpha * gate))
            out[t] += float(weights[t, j]) * product(group.down, h)
    return out


CASES: list[tuple[str, dict[str, Any], moe.Formula]] = [
    ("plain", {}, moe.Formula()),
    ("order", {"order": True, "asym": True, "bias": True}, moe.Formula(limit=1.0)),
    ("eight", {"bits": 8, "group": -1}, moe.Formula(alpha=1.702, beta=1.0)),
]


@pytest.mark.parametrize("joined", [moe.NOT_JOINED, moe.JOINED, moe.ALTERNATING])
@pytest.mark.parametrize(("name", "kind", "how"), CASES, ids=[c[0] for c in CASES])
def test_the_reference_is_the_formula(name: str, kind: dict[str, Any], how: moe.Formula, joined: int) -> None:
    torch.manual_seed(0)
    how = moe.Formula(how.activation, joined, how.limit, how.alpha, how.beta)
    sets = [
        moe.Set(
            stack(E, HIDDEN, INNER * (2 if joined else 1), **kind),
            None if joined else stack(E, HIDDEN, INNER, **kind),
            stack(E, INNER, HIDDEN, **kind),
        )
        for E in (2, 1)
    ]
    x, ids = torch.randn(5, HIDDEN).half(), torch.stack([torch.randperm(3)[:2] for _ in range(5)])
    weights = torch.rand(5, 2)
    result = moe.experts(x, weights, ids, sets, how)
    want = formula(sets, x, weights, ids, how)
    assert (result.double() - want).norm() <= 3e-3 * want.norm()


def test_experts_elsewhere_and_none() -> None:
    torch.manual_seed(1)
    sets = [moe.Set(stack(2, HIDDEN, INNER), stack(2, HIDDEN, INNER), stack(2, INNER, HIDDEN))]
    x, weights = torch.randn(3, HIDDEN).half(), torch.rand(3, 2)
    position = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    ids = torch.tensor([[1, 3], [0, 2], [-1, 4]])
    out = moe.experts(x, weights, ids, sets, count=4, position=position)
    want = moe.experts(x[:1], weights[:1], torch.tensor([[1, 0]]), sets)
    assert torch.equal(out[:1], want)
    assert not out[1:].any()
    single = moe.experts(x[:1], weights[:1], torch.tensor([[1, -1]]), sets, weights_on_input=True)
    scaled = (x[:1].float() * weights[0, 0]).half()
    assert torch.equal(single, moe.experts(scaled, torch.ones(1, 1), torch.tensor([[1]]), sets))


def test_flat_is_undone() -> None:
    sets = [
        moe.Set(stack(2, HIDDEN, INNER, order=True), None, stack(2, INNER // 2, HIDDEN, bias=True)),
        moe.Set(stack(1, HIDDEN, INNER, bits=8), None, stack(1, INNER // 2, HIDDEN, asym=True)),
    ]
    again = moe._sets(*moe.flat(sets))
    for old, new in zip(sets, again, strict=True):
        assert new.up is None
        for a, b in ((old.gate, new.gate), (old.down, new.down)):
            assert b.numbers == a.numbers
            assert all(x is y for x, y in zip(a.tensors, b.tensors, strict=True))


def test_shapes_are_known_beforehand() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    sets = [moe.Set(stack(2, HIDDEN, INNER), stack(2, HIDDEN, INNER), stack(2, INNER, 128, outputs=100))]
    x, weights, ids = torch.randn(3, HIDDEN).half(), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = moe.experts(mode.from_tensor(x), mode.from_tensor(weights), mode.from_tensor(ids), sets)
    assert (tuple(out.shape), out.dtype) == ((3, 100), torch.float16)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3, HIDDEN), "x is float32"),
        ("x", torch.zeros(3, 8).half(), r"x has shape \(3, 8\)"),
        ("ids", torch.zeros(2, 2, dtype=torch.int64), "ids has shape"),
        ("ids", torch.zeros(3, 2), "ids is float32"),
        ("weights", torch.zeros(3, 1), "weights has shape"),
        ("position", torch.zeros(2), "position is float32"),
    ],
)
def test_what_does_not_fit(name: str, value: torch.Tensor, message: str) -> None:
    sets = [moe.Set(stack(2, HIDDEN, INNER), stack(2, HIDDEN, INNER), stack(2, INNER, HIDDEN))]
    given: dict[str, Any] = {
        "x": torch.zeros(3, HIDDEN).half(), "weights": torch.zeros(3, 2), "ids": torch.zeros(3, 2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        moe.experts(sets=sets, **{**given, name: value})
    with pytest.raises(ValueError, match="activation is tanh"):
        moe.Formula("tanh")
    with pytest.raises(ValueError, match="up has 1 experts"):
        moe.experts(**given, sets=[moe.Set(sets[0].gate, stack(1, HIDDEN, INNER), sets[0].down)])
    assert math.isinf(moe.Formula().limit)


def test_tokens_have_the_bits_that_they_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, or by MARLIN_BATCH_INVARIANT; where it is not, fp32 sums depend on the number of rows somewhere."""
    torch.manual_seed(0)
    experts = [moe.Set(stack(4, HIDDEN, 4 * INNER), stack(4, HIDDEN, 4 * INNER), stack(4, 4 * INNER, HIDDEN))]
    x, weights, ids = torch.randn(40, HIDDEN).half(), torch.rand(40, 2), torch.rand(40, 4).argsort(1)[:, :2]

    def computed(rows: slice, **asked: Any) -> torch.Tensor:
        return moe.experts(x[rows], weights[rows], ids[rows], experts, **asked)

    def alone(**asked: Any) -> torch.Tensor:
        return torch.cat([computed(slice(t, t + 1), **asked) for t in range(40)])

    every = slice(None)
    assert torch.equal(computed(every, batch_invariant=True), alone(batch_invariant=True))
    want = formula(experts, x, weights, ids, moe.Formula())
    assert (computed(every, batch_invariant=True).double() - want).norm() <= 2e-3 * want.norm()
    passed: list[int] = []
    monkeypatch.setattr(torch.ops.marlin_convert, "experts", lambda *given: passed.append(given[-1]))
    for invariant in (False, True):
        monkeypatch.setattr(cuda, "INVARIANT", invariant)
        computed(every)
        computed(every, batch_invariant=False)
    moe.experts(x, weights, ids, experts, batch_invariant=True, variant=7)
    assert passed == [0, 0, cuda_library.BATCH_INVARIANT, 0, 7]
