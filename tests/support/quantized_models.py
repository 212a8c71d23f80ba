"""A model of Transformers quantized by the GPTQ definition, whatever its linears and experts are called."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.gptq_checkpoints import GPTQLayer

GROUP = 32


@dataclass
class Quantized:
    """A checkpoint of `model`: GPTQ `layers` by their names in it, and what stays `plain`."""

    layers: dict[str, GPTQLayer] = field(default_factory=dict)
    plain: dict[str, torch.Tensor] = field(default_factory=dict)


def quantize(model: Any) -> Quantized:
    """Quantize every linear of `model` that can be, and put the dequantized weights into `model` itself."""
    result = Quantized()
    state = dict(model.state_dict())
    tied = {*getattr(model, "all_tied_weights_keys", {}), *getattr(model, "all_tied_weights_keys", {}).values()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen[id(parameter)] = "shared" if id(parameter) in seen else name
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if module is head or name.endswith("lm_head") or f"{name}.weight" in tied or seen.get(id(weight)) == "shared":
            continue
        by_rows = isinstance(module, Conv1D)
        router = isinstance(weight, nn.Parameter) and weight.ndim == 2 and re.search(r"(gate|router)$", name)
        if isinstance(module, nn.Linear) or by_rows or (router and not isinstance(module, nn.Embedding)):
            shape = weight.shape if by_rows else weight.shape[::-1]
            if layer := _layer(result, name, *shape):
                W = torch.from_numpy(layer.weight).float()
                weight.data = (W if by_rows else W.t()).contiguous()
                state.pop(f"{name}.weight", None)
        elif isinstance(getattr(module, "down_proj", None), nn.Parameter):
            for key in _quantize_experts(result, name, module):
                state.pop(f"{name}.{key}")
    result.plain = {k: v.detach().clone().contiguous() for k, v in state.items() if k not in tied or k in _kept(model)}
    return result


def _kept(model: Any) -> set[str]:
    """Of tensors that share their memory, those that a checkpoint holds."""
    return set(getattr(model, "all_tied_weights_keys", {}).values())


def _layer(result: Quantized, name: str, K: int, N: int, **settings: Any) -> GPTQLayer | None:
    if not K or not N or K % GROUP or N % 8:
        return None
    layer = GPTQLayer(K=K, N=N, group_size=GROUP, seed=len(result.layers), **settings)
    assert layer.scales is not None
    layer.scale_tensor = layer.scale_tensor / 4  # signals that do not grow from layer to layer
    result.layers[name] = layer
    return layer


def _quantize_experts(result: Quantized, name: str, module: Any) -> list[str]:
    """Quantize fused experts as linears of their own; return the names of the tensors that these stand for."""
    if module.down_proj.ndim != 3:
        return []
    gated = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    if isinstance(getattr(module, "gate_proj", None), nn.Parameter):  # each of the three by itself
        own = ["gate_proj", "up_proj", "down_proj"]
        for key in own:
            held = getattr(module, key)
            for number in range(held.shape[0]):
                layer = _layer(result, f"{name}.{number}.{key}", held.shape[2], held.shape[1])
                assert layer
                held.data[number] = torch.from_numpy(layer.weight).float().t()
        return own
    first, last = module.gate_up_proj if gated else getattr(module, "up_proj", None), module.down_proj
    if not isinstance(first, nn.Parameter):
        return []
    by_rows = getattr(module, "is_transposed", type(module).__name__ == "Llama4TextExperts")
    interleaved = not getattr(module, "is_concatenated", True)
    biased = isinstance(getattr(module, "down_proj_bias", None), nn.Parameter)
    one, two = last.shape[1:]
    inner, hidden = (one, two) if by_rows else (two, one)
    if inner % GROUP or hidden % GROUP:
        return []

    def put(tensor: Any, number: int, W: torch.Tensor) -> None:
        tensor.data[number] = W if by_rows else W.t()

    for number in range(last.shape[0]):
        names = ("gate_proj", "up_proj") if gated else ("up_proj",)
        parts = [_layer(result, f"{name}.{number}.{part}", hidden, inner, bias=biased) for part in names]
        down = _layer(result, f"{name}.{number}.down_proj", inner, hidden, bias=biased)
        assert down
        assert all(parts)
        weights = [torch.from_numpy(x.weight).float() for x in parts if x]
        biases = [x.bias_tensor.float() for x in parts if x]
        join = (lambda xs: torch.stack(xs, -1).flatten(-2)) if interleaved else (lambda xs: torch.cat(xs, -1))
        put(first, number, join(weights))
        put(last, number, torch.from_numpy(down.weight).float())
        if biased:
            module.gate_up_proj_bias.data[number] = join(biases)
            module.down_proj_bias.data[number] = down.bias_tensor.float()
    own = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    return own + ([f"{key}_bias" for key in own] if biased else [])
