"""The experts of a block as one operator (`native/moe.py`), from the layers that a checkpoint has for each.

Experts with the same settings become a set: their tensors are stacked, and a layer's own become views of the stack, so
that nothing is held twice. One kind of tensor is stacked at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..native import moe
from .linear import MarlinLinear

#: A block's own activation: of (gate, up), or of up alone.
Activation = Callable[..., Tensor]


class GroupedExperts:
    """A block's experts, each (gate, up, down) or without a gate (up, down), in the order of their numbers."""

    def __init__(self, experts: Sequence[Sequence[MarlinLinear]], formula: moe.Formula) -> None:
        self.formula, self.count = formula, len(experts)
        kinds: dict[tuple[object, ...], list[int]] = {}
        for number, layers in enumerate(experts):
            kinds.setdefault(tuple(map(_kind, layers)), []).append(number)
        order = [number for numbers in kinds.values() for number in numbers]
        device = experts[0][0]._tensor("weight").device  # type: ignore[union-attr]
        self.position: Tensor | None = None  # None: the experts' own order
        if order != sorted(order):
            position = torch.empty(self.count, dtype=torch.int32)
            position[torch.tensor(order)] = torch.arange(self.count, dtype=torch.int32)
            self.position = position.to(device)
        self._first = [experts[numbers[0]][-1] for numbers in kinds.values()]
        self.sets = []
        for numbers in kinds.values():
            *inner, down = (_stack([experts[number][part] for number in numbers]) for part in range(len(experts[0])))
            self.sets.append(moe.Set(inner[0], inner[1] if len(inner) > 1 else None, down))

    def current(self) -> bool:
        """Tell whether the layers' tensors are still these: a module that moves gets new ones."""
        tensors = [layer._tensor("weight") for layer in self._first]
        return all(
            tensor is not None and tensor.data_ptr() == group.down.B.data_ptr()
            for tensor, group in zip(tensors, self.sets, strict=True)
        )

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Turn x [T, H], with ids and weights [T, k], into [T, H]. An id of no expert counts nothing."""
        sets = [_with_bias_of(group, x.dtype) for group in self.sets]
        return moe.experts(x, weights.float(), ids, sets, self.formula, count=self.count, position=self.position)


def _kind(layer: MarlinLinear) -> tuple[object, ...]:
    tensors = [layer._tensor(what) for what in ("weight", "scales", "zeros", "perm")] + [layer._buffers["bias"]]
    shapes = (None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in tensors)
    return (layer.bits, layer.in_features, layer.out_features, *shapes)


def _stack(layers: Sequence[MarlinLinear]) -> moe.Stack:
    """Return one layer of each of some experts. Weights, scales and zero points of the layers become views of the
    result."""
    first = layers[0]

    def stacked(what: str, views: bool = True) -> Tensor | None:
        name = first._names.get(what, what)
        if first._buffers.get(name) is None:
            return None
        tensor = first._buffers[name]
        assert tensor is not None
        result = tensor.new_empty((len(layers), *tensor.shape))
        for row, layer in zip(result, layers, strict=True):
            row.copy_(layer._buffers[name])
            if views:  # only rows of whole 16 bytes, as kernels need them aligned
                layer._buffers[name] = row
        return result

    B, s, zeros = (stacked(what) for what in ("weight", "scales", "zeros"))
    perm, bias = (stacked(what, views=False) for what in ("perm", "bias"))
    assert B is not None
    assert s is not None
    return moe.Stack(B, s, bias, zeros, perm, first.bits, first.in_features, first.out_features)


def _with_bias_of(group: moe.Set, dtype: torch.dtype) -> moe.Set:
    """Return the set with biases of the activations' dtype."""
    stacks = [group.gate, group.up, group.down]
    if all(stack is None or stack.bias is None or stack.bias.dtype == dtype for stack in stacks):
        return group
    return moe.Set(*(None if stack is None else stack.with_bias(dtype) for stack in stacks))  # type: ignore[arg-type]


def formula_of(activation: Activation, gated: bool, **numbers: float | None) -> moe.Formula | None:
    """Return the formula that computes what `activation` does; None if there is none.

    Found by trying: what models call their activations says little. `numbers` are those that it may use: alpha, limit.
    """
    gate = torch.linspace(-12, 12, 121).repeat_interleave(61)
    up = torch.linspace(-9, 9, 61).repeat(121)
    alphas = [1.0, *(value for name, value in numbers.items() if name == "alpha" and value is not None)]
    limits = [value for name, value in numbers.items() if name == "limit" and value is not None]
    with torch.no_grad():
        want = activation(gate, up) if gated else activation(gate)
        for name in moe.ACTIVATIONS:
            for alpha in alphas if name == "silu" else alphas[:1]:
                for limit in (float("inf"), *limits):
                    for beta in (0.0, 1.0):
                        found = moe.Formula(name, limit=limit, alpha=alpha, beta=beta)
                        if torch.allclose(moe.activate(gate, up if gated else None, found), want, 1e-4, 1e-5):
                            return found
    return None
