"""Modules that stand in a model of Transformers for what it holds fused: a block's experts, a gate beside its up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .grouped_experts import GroupedExperts, formula_of
from .linear import MarlinLinear

#: Parameters of fused experts.
_FUSED = tuple(f"{name}{bias}" for name in ("gate_up_proj", "up_proj", "down_proj") for bias in ("", "_bias"))


def marker(parameter: Any) -> torch.Tensor:
    """Return a placeholder for a tensor that was removed. Code that initializes tensors at random leaves it alone."""
    marker = torch.empty_like(parameter, device="meta")
    marker._is_hf_initialized = True  # type: ignore[attr-defined]
    return marker


class MarlinExpert(nn.Module):
    """One expert, with its layers under the names that the checkpoint has for them: gate (if it has one), up, down."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._parts = tuple(layers)

    def forward(self, x: torch.Tensor, activation: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Turn x [T, H] into [T, H]. `activation` makes of the outputs of all but the last layer the input of that."""
        *inner, down = (self._modules[name] for name in self._parts)
        result: torch.Tensor = down(activation(*(layer(x) for layer in inner)))  # type: ignore[misc]
        return result


class MarlinExperts(nn.Module):
    """A block's experts, one module each, where Transformers holds them fused into tensors; all else of the block's
    module (its activation and limits, a norm) is as it was there."""

    def __init__(self, fused: nn.Module, experts: list[MarlinExpert]) -> None:
        super().__init__()
        attributes = self.__dict__
        attributes.update({name: value for name, value in fused.__dict__.items() if name not in attributes})
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        for name, module in fused.named_children():
            self.add_module(name, module)
        for name, parameter in fused.named_parameters(recurse=False):
            if name not in _FUSED:
                self.register_parameter(name, parameter)
        self._count = len(experts)
        for name in _FUSED:
            if name in fused._parameters:
                attributes[name] = marker(fused._parameters[name])
        self._gate = getattr(type(fused), "_apply_gate", None)
        self._identity = hasattr(fused, "identity_expert")  # "identity" experts come after the real ones
        self._interleaved = not getattr(fused, "is_concatenated", True)
        self._norm = bool(getattr(fused, "has_post_expert_norm", False))
        self._grouped: GroupedExperts | None = None
        self._loops = False  # True: loop over the experts, because the operator cannot compute them

    def _in_one(self) -> GroupedExperts | None:
        """Return all experts as one operator; None for those that it does not compute."""
        if self._grouped is not None and self._grouped.current():
            return self._grouped
        if self._loops:
            return None
        experts: Any = [expert.children() for expert in (self._modules[str(n)] for n in range(self._count))]  # type: ignore[union-attr]
        layers = [tuple(parts) for parts in experts]
        formula = None
        if not (self._identity or self._norm) and all(isinstance(x, MarlinLinear) for parts in layers for x in parts):
            limit = getattr(self, "limit", getattr(self, "swiglu_limit", None))
            formula = formula_of(self._activation, len(layers[0]) == 3, alpha=getattr(self, "alpha", None), limit=limit)
        self._loops = formula is None
        self._grouped = None if formula is None else GroupedExperts(layers, formula)
        return self._grouped

    def _activation(self, *parts: torch.Tensor) -> torch.Tensor:
        """Return the block's own activation of (gate, up), or of up alone."""
        if len(parts) == 1 or self._gate is None:
            result: torch.Tensor = self.act_fn(parts[0])  # type: ignore[operator]
            return result * parts[1] if len(parts) == 2 else result
        both = torch.stack(parts, dim=-1).flatten(-2) if self._interleaved else torch.cat(parts, dim=-1)
        gated: torch.Tensor = self._gate(self, both)
        return gated

    def _computed(self, number: int, x: torch.Tensor) -> torch.Tensor:
        expert: Any = self._modules[str(number)]
        result: torch.Tensor = expert(x, self._activation)
        return self.post_expert_norm(result) if self._norm else result  # type: ignore[operator]

    def forward(self, hidden_states: torch.Tensor, *choice: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        """Turn hidden_states [T, H] and, whatever the model calls them, each token's experts [T, k] and their weights
        [T, k] into [T, H]: each token's experts, weighted, summed. Without them, as Llama 4 has it: hidden_states holds
        as many rows for each expert, in their order."""
        choice = (*choice, *named.values())
        if not choice:
            rows = hidden_states.view(self._count, -1, hidden_states.shape[-1])
            return torch.cat([self._computed(number, x) for number, x in enumerate(rows)])
        index, weights = choice
        gradient = (
            hidden_states.requires_grad and torch.is_grad_enabled()
        )  # the layers themselves raise: they have no gradient
        if hidden_states.is_cuda and not gradient and (together := self._in_one()) is not None:
            return together(hidden_states, index, weights)
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(index).tolist():
            if number >= self._count and not self._identity:  # Transformers' mark for "no expert"
                continue
            tokens, rank = torch.where(index == number)
            x = hidden_states[tokens]
            output = (self._computed(number, x) if number < self._count else x) * weights[tokens, rank, None]
            result.index_add_(0, tokens, output.to(result.dtype))
        return result


class Joined(nn.Module):
    """The outputs of two linears beside each other; it holds neither."""

    def __init__(self, parts: Iterable[MarlinLinear]) -> None:
        super().__init__()
        self._parts_joined = tuple(parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self._parts_joined], dim=-1)
