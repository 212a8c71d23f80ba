"""Random mixtures of experts on the GPU, and each step of a call against float64, on the very bits it was given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from marlin_convert.native import moe, moe_library
from tests.cuda.cuda_library import assert_close, pack_marlin, pack_marlin8, pack_zeros, permute_scales

USUAL = moe.Formula()


@dataclass(frozen=True)
class Kind:
    """The settings of a layer of some experts; group -1: one group."""

    bits: int = 4
    group: int = 128
    zeros: bool = False
    order: bool = False
    bias: bool = False
    scale_dtype: torch.dtype = torch.float16


class Layer:
    """A random layer of E experts: what the operator takes, and its weights in float64, in the source's order."""

    def __init__(self, E: int, inputs: int, outputs: int, kind: Kind, dtype: torch.dtype) -> None:
        K, N = -(-inputs // 64) * 64, -(-outputs // 64) * 64
        if kind.group == 128:
            K = -(-K // 128) * 128
        G = 1 if kind.group < 0 else K // kind.group
        self.dtype, self.G, self.kind, self.inputs, self.outputs = dtype, G, kind, inputs, outputs
        code = torch.randint(0, 1 << kind.bits, (E, K, N), dtype=torch.uint8, device="cuda")
        size = 0.02 / 2 ** (kind.bits - 4 + 2 * kind.zeros)  # fp16 is to hold what follows
        scales = (torch.rand((E, G, N), device="cuda") * size + size / 20).to(kind.scale_dtype)
        zeros = torch.randint(0, 1 << kind.bits, (E, G, N), dtype=torch.uint8, device="cuda") if kind.zeros else None
        bias = torch.randn((E, outputs), device="cuda").to(dtype) if kind.bias else None
        perm = None
        if kind.order:
            perm = torch.stack([torch.randperm(inputs, device="cuda", dtype=torch.int32) for _ in range(E)])
        pack = pack_marlin if kind.bits == 4 else pack_marlin8
        self.stack = moe.Stack(
            pack(code.view(E * K, N)).view(E, K // 16, -1),
            permute_scales(scales.view(E * G, N) if G > 1 else scales.view(1, E * N)).view(E, G, N),
            bias,
            None if zeros is None else pack_zeros(zeros.view(E * G, N), kind.bits).view(E, G, -1),
            perm, kind.bits, inputs, outputs,
        )  # fmt: skip
        self.code, self.scales, self.zeros = code, scales, zeros

    def weight(self, expert: int, rounds: bool) -> torch.Tensor:
        """What a product multiplies with: exact, or rounded once to the activations' type."""
        rows = self.code.shape[1] // self.G
        scales = self.scales[expert].double().repeat_interleave(rows, 0)
        zero: Any = 1 << (self.kind.bits - 1)
        if self.zeros is not None:
            zero = self.zeros[expert].double().repeat_interleave(rows, 0)
        W = (self.code[expert].double() - zero) * scales
        if rounds and self.G > 1:
            W = W.float().to(self.dtype).double()
        W = W[: self.inputs, : self.outputs]
        if self.stack.perm is None:
            return W
        natural = torch.empty_like(W)
        natural[self.stack.perm[expert].long()] = W
        return natural

    def bias(self, expert: int) -> torch.Tensor | None:
        return None if self.stack.bias is None else self.stack.bias[expert]


class Experts:
    """A set of them."""

    def __init__(
        self, E: int, hidden: int, inner: int, first: Kind, second: Kind, dtype: torch.dtype, joined: int = 0,
        gated: bool = True,
    ) -> None:  # fmt: skip
        self.gate = Layer(E, hidden, inner * (2 if joined else 1), first, dtype)
        self.up = Layer(E, hidden, inner, first, dtype) if gated and not joined else None
        self.down = Layer(E, inner, hidden, second, dtype)
        self.set = moe.Set(self.gate.stack, None if self.up is None else self.up.stack, self.down.stack)


def choices(T: int, k: int, E: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, ids) of a router that likes some experts better than others, and one not at all."""
    scores = torch.randn((T, E), device="cuda") + torch.linspace(0, 2, E, device="cuda")
    if k < E:
        scores[:, E // 2] = -math.inf
    values, ids = torch.topk(scores, k)
    return torch.softmax(values, -1).float(), ids.int()


def run(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, sets: Sequence[Experts], formula: moe.Formula,
    position: torch.Tensor | None = None, count: int | None = None, on_input: bool = False, variant: int = 0,
) -> tuple[torch.Tensor, moe_library.Layout, dict[str, torch.Tensor]]:  # fmt: skip
    """The output and what each step left in the scratch memory; both hold NaN where nothing was written."""
    tensors, numbers = moe.flat([s.set for s in sets])
    count = count or sum(s.set.count for s in sets)
    mixture, call, out = moe._prepared(
        x, weights, ids, position, tensors, numbers, count, formula.activation, formula.joined, formula.limit,
        formula.alpha, formula.beta, on_input, variant,
    )  # fmt: skip
    layout = moe._layout(mixture, call)
    scratch = torch.full((layout.bytes,), 0xFF, dtype=torch.uint8, device="cuda")
    out.fill_(math.nan)
    moe._launch(mixture, call, scratch)
    torch.cuda.synchronize()

    def part(at: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return scratch[at : at + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    n, gate, down = ids.numel(), sets[0].gate.outputs, sets[0].down
    parts = {
        "rows": part(layout.rows, torch.int32, n),
        "places": part(layout.places, torch.int32, n),
        "first_row": part(layout.first_row, torch.int32, mixture.positions + 1),
        "gate": part(layout.gate, x.dtype, n, gate),
        "up": part(layout.up, x.dtype, n, gate),
        "hidden": part(layout.hidden, x.dtype, n, layout.hidden_columns),
        "down": part(layout.down, x.dtype, n, down.outputs),
    }
    return out, layout, parts


def check(
    T: int, k: int, E: int, hidden: int, inner: int, first: Kind, second: Kind, dtype: torch.dtype,
    formula: moe.Formula = USUAL, variant: int = 0, gated: bool = True, sets: Sequence[Experts] | None = None,
    position: torch.Tensor | None = None, on_input: bool = False, wide: bool = False,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run T random tokens through k of E experts, hold each step to its definition, and return the output."""
    sets = sets or [Experts(E, hidden, inner, first, second, dtype, formula.joined, gated)]
    x = torch.randn((T, hidden), device="cuda").to(dtype)
    weights, chosen = choices(T, k, E)
    chosen = chosen if ids is None else ids
    chosen = chosen.long() if wide else chosen
    out, layout, parts = run(x, weights, chosen, sets, formula, position, E, on_input, variant)
    order, places, first_row = check_sorting(chosen, E, position, sum(s.set.count for s in sets), parts)
    a = x[order // k]  # a row for each choice that has an expert here, sorted by expert
    if on_input:
        a = (a.float() * weights.flatten()[order, None]).to(dtype)
    start = 0
    for experts in sets:
        for number in range(experts.set.count):
            rows = slice(*(int(row) for row in first_row[start + number : start + number + 2]))
            if rows.start < rows.stop:
                mine = {name: parts[name][rows] for name in ("gate", "up", "hidden", "down")}
                check_expert(experts, number, a[rows], mine, formula, bool(layout.rounds_weights))
        start += experts.set.count
    check_sums(out, parts["down"], places.view(T, k), torch.ones_like(weights) if on_input else weights)
    return out


def check_sorting(
    chosen: torch.Tensor, E: int, position: torch.Tensor | None, positions: int, parts: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choices are sorted by position, in their own order; those of no expert are left out.

    Returns: the choice of each row; the row of each choice, -1 for none; the first row of each position, and the end.
    """
    of_expert = torch.arange(E, device="cuda", dtype=torch.int32) if position is None else position
    known = (chosen >= 0) & (chosen < E)
    at = torch.where(known, of_expert[chosen.clamp(0, E - 1).long()], -1).flatten().long()
    order = torch.argsort(torch.where(at < 0, positions, at), stable=True)[: int((at >= 0).sum())]
    assert torch.equal(parts["rows"][: order.numel()].long(), order)
    places = torch.full_like(at, -1)
    places[order] = torch.arange(order.numel(), device="cuda")
    assert torch.equal(parts["places"].long(), places)
    first_row = torch.zeros(positions + 1, dtype=torch.long, device="cuda")
    first_row[1:] = torch.bincount(at[at >= 0], minlength=positions).cumsum(0)
    assert torch.equal(parts["first_row"].long(), first_row)
    return order, places, first_row


def digits(dtype: torch.dtype) -> int:
    """Of a significand, with the leading one."""
    return 11 if dtype == torch.float16 else 8


def check_expert(
    experts: Experts, number: int, a: torch.Tensor, parts: dict[str, torch.Tensor], formula: moe.Formula, rounds: bool
) -> None:
    """The rows of one expert: its products and its activation, each from what the step before it wrote."""
    gate = parts["gate"]
    assert_close(gate, a, experts.gate.weight(number, rounds), experts.gate.bias(number))
    up: torch.Tensor | None = None
    if experts.up is not None:
        up = parts["up"]
        assert_close(up, a, experts.up.weight(number, rounds), experts.up.bias(number))
    elif formula.joined == moe.JOINED:
        gate, up = gate.chunk(2, -1)
    elif formula.joined == moe.ALTERNATING:
        gate, up = gate[:, ::2], gate[:, 1::2]
    want = moe.activate(gate.double(), None if up is None else up.double(), formula)
    down, h = experts.down, parts["hidden"]
    assert not h[:, down.inputs :].any()
    natural = h[:, : down.inputs].clone()
    if down.stack.perm is not None:
        natural[:, down.stack.perm[number].long()] = h[:, : down.inputs]
    error, size = (natural.double() - want).abs(), gate.double().abs()  # fp32 cancels in 1 + erf and 1 + tanh
    size = size if up is None else size * (up.double().abs() + formula.beta)
    allowed = want.abs() * (2.0 ** -digits(a.dtype) * 1.01 + 1e-5) + size * 1e-6 + 2.0**-24
    assert bool((error <= allowed).all())
    assert_close(parts["down"], natural, down.weight(number, rounds), down.bias(number))


def check_sums(out: torch.Tensor, down: torch.Tensor, places: torch.Tensor, factor: torch.Tensor) -> None:
    """Each token is the sum of its choices' rows, each by its weight."""
    y = torch.zeros(out.shape, dtype=torch.float64, device="cuda")
    size = torch.zeros_like(y)
    for j in range(places.shape[1]):
        row = places[:, j]
        part = down[row.clamp(min=0)].double() * (row >= 0)[:, None] * factor[:, j, None].double()
        part = torch.where((row >= 0)[:, None], part, 0.0)
        y, size = y + part, size + part.abs()
    assert bool(((out.double() - y).abs() <= y.abs() * 2.0 ** -digits(out.dtype) * 1.01 + size * 1e-6 + 2.0**-25).all())
