"""Where a checkpoint's Marlin layers go in a model of Transformers.

A linear is replaced by `MarlinLinear`; experts that Transformers holds fused become a module each (`MarlinExperts`);
a weight that no linear holds (a router's, a convolution's) is dequantized once it is loaded. The same rules, on a model
without weights, tell what Transformers will do with a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from ..checkpoint.reader import Tensor
from ..errors import SourceError, UnsupportedError
from ..formats.stored import StoredLayer
from ..options import Format
from .expert_modules import Joined, MarlinExpert, MarlinExperts, marker
from .linear import DequantizedWeight, MarlinLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

_SCALE_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}

#: How many names a message lists; the rest are counted.
_SHOWN = 6

#: What checkpoints call an expert's gate, up and down, beside what Transformers' own conversion knows of the model: as
#: Transformers 5 and GPTQModel 7 name them in every model, and Mixtral's.
_EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
#: Experts computed as in Transformers' experts interface, although they do not declare it.
_SAME_EXPERTS = ("Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts")


def empty_module(layer: StoredLayer[Tensor]) -> MarlinLinear:
    """Make the module of a layer, still empty, on the device and of the dtype that are the default."""
    return MarlinLinear(
        layer.K, layer.N, layer.bias is not None, bits=layer.bits, group_size=layer.group_size,
        sym=layer.zeros is None, desc_act=layer.perm is not None, extended=layer.format is Format.MARLIN_EXT,
        scale_dtype=_SCALE_DTYPES[layer.scales.dtype],
    )  # fmt: skip


def some(names: list[str]) -> str:
    """Return the first few of `names`, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass
class Placed:
    """What `put_layers` did, and what is left to do once the weights are loaded (`finish`)."""

    #: Layers of the checkpoint for which the model has no place.
    nowhere: list[str] = field(default_factory=list)
    #: Layers that are dequantized to 16 bits, because the model computes them in its own way.
    dequantized: list[str] = field(default_factory=list)
    #: Tensors of the model → tensors of the checkpoint: what Transformers would put elsewhere.
    plain: dict[str, Tensor] = field(default_factory=dict)
    later: list[Callable[[], None]] = field(default_factory=list)

    def finish(self, model: nn.Module, files: Mapping[str, Path]) -> None:
        """Dequantize what has to be, and read what Transformers did not, from `files` by their names."""
        for name, tensor in self.plain.items():
            with safe_open(files[tensor.file], framework="pt") as file:
                value = file.get_tensor(tensor.name)
            owner, _, key = name.rpartition(".")
            module, experts = model.get_submodule(owner), model.get_submodule(owner.rsplit(".", 2)[0])
            where = next(buffer.device for buffer in experts.buffers())  # a quantized layer beside it
            value = value.to(where, getattr(module, key).dtype)
            setattr(module, key, nn.Parameter(value, requires_grad=False))
        for step in self.later:
            step()


def put_layers(
    model: PreTrainedModel, layers: Mapping[str, StoredLayer[Tensor]], tensors: Mapping[str, Tensor]
) -> Placed:
    """Replace the modules of `model` that `layers` are for; `tensors` are all that the checkpoint has.

    Raises SourceError where sizes do not agree, UnsupportedError where the model has no use for a layer.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    modules = dict(model.named_modules())
    experts: dict[str, dict[str, StoredLayer[Tensor]]] = {}
    halves: dict[str, dict[str, StoredLayer[Tensor]]] = {}
    placed = Placed()
    for layer in layers.values():
        name = _renamed(f"{layer.name}.weight", renamings).removesuffix(".weight")
        place = _place(model, name, modules) or _place(model, layer.name, modules)  # as on the Hub, or as in memory
        if place is None:
            placed.nowhere.append(layer.name)
            continue
        holder = _experts_above(place, modules)
        if holder is not None:
            experts.setdefault(holder, {})[place.removeprefix(f"{holder}.")] = layer
        elif place not in modules:
            owner, _, part = place.rpartition(".")
            halves.setdefault(owner, {})[part] = layer
        else:
            _put_layer(model, place, modules[place], layer, placed)
    for owner, found in halves.items():
        _put_halves(model, owner, found)
    for holder, parts in experts.items():
        if _computed_as_usual(modules[holder]):
            module = _expert_layers(holder, modules[holder], parts, converters, tensors, placed)
            model.set_submodule(holder, module)
        else:
            _dequantize_experts_later(holder, modules[holder], parts, placed)
    return placed


def _renamed(key: str, renamings: list[WeightRenaming]) -> str:
    """Return a checkpoint's name of a tensor as the model calls it."""
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key


def _place(model: PreTrainedModel, name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return where in the model a checkpoint's layer belongs: with or without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules or _experts_above(candidate, modules) or _is_half(candidate, modules):
            return candidate
    return None


# ---- One linear ----


def _put_layer(
    model: PreTrainedModel, place: str, module: nn.Module, layer: StoredLayer[Tensor], placed: Placed
) -> None:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        size = (module.in_features, module.out_features)
    elif isinstance(module, Conv1D):
        size = (module.nx, module.nf)
    else:  # includes linears with a forward of their own, such as Llama 4's router
        _dequantize_later(model, place, module, layer, placed)
        return
    _check_size(layer, size, type(model).__name__)
    if f"{place}.weight" in model.all_tied_weights_keys:  # a quantized lm_head is not tied to the embeddings
        del model.all_tied_weights_keys[f"{place}.weight"]
        model.config.tie_word_embeddings = False
    linear = empty_module(layer)
    linear.weight_by_rows = isinstance(module, Conv1D)
    model.set_submodule(place, linear)
    for value in vars(model.get_submodule(place.rpartition(".")[0])).values():  # some models also keep it in a list
        if isinstance(value, list):
            value[:] = [linear if entry is module else entry for entry in value]


def _check_size(layer: StoredLayer[Tensor], size: tuple[int, int], model: str) -> None:
    if size != (layer.K, layer.N):
        raise SourceError(
            f"{layer.name}: the checkpoint has K = {layer.K}, N = {layer.N}, "
            f"{model} has {size[0]} and {size[1]}; config.json and the weights do not belong together."
        )


def _dequantize_later(
    model: PreTrainedModel, place: str, module: nn.Module, layer: StoredLayer[Tensor], placed: Placed
) -> None:
    """Let `module`, which is no linear but has a weight [N, K] (a router) or [N, …] with K numbers each (a
    convolution), load the layer's tensors, and have its weight made of them."""
    weight = module._parameters.get("weight")
    if weight is None or weight.shape[0] != layer.N or weight.numel() != layer.K * layer.N:
        raise UnsupportedError(
            f"{layer.name}: {type(module).__name__} has no weight of {layer.N} x {layer.K}; Marlin cannot replace it."
        )
    linear = empty_module(layer)
    names = [name for name, _ in linear.named_buffers() if name != "bias"]
    for name in names:
        module.register_buffer(name, linear._buffers[name])
    del module._parameters["weight"]
    module.__dict__["weight"] = DequantizedWeight(
        linear, weight.dtype
    )  # for code that reads it before the weights are loaded

    def finish() -> None:
        del module.__dict__["weight"]
        for name in names:
            linear._buffers[name] = module._buffers.pop(name)
        value = linear.dequantize(weight.dtype).t().reshape(weight.shape).contiguous()
        module.weight = nn.Parameter(value, requires_grad=False)

    placed.dequantized.append(layer.name)
    placed.later.append(finish)


# ---- A linear that the model holds as one and the checkpoint as two ----


_HALVES = ("gate_proj", "up_proj")


def _is_half(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether `name` is half of a model's `gate_up_proj`."""
    owner, _, part = name.rpartition(".")
    return part in _HALVES and isinstance(modules.get(f"{owner}.gate_up_proj"), nn.Linear)


def _put_halves(model: PreTrainedModel, owner: str, found: dict[str, StoredLayer[Tensor]]) -> None:
    """Put a gate and an up that the checkpoint holds apart beside the model's `gate_up_proj`, which joins them."""
    module = model.get_submodule(owner)
    whole: Any = module.gate_up_proj
    if found.keys() != set(_HALVES):
        raise UnsupportedError(f"{owner}: gate_proj and up_proj should both be Marlin layers, or none of them.")
    for part in _HALVES:
        _check_size(found[part], (whole.in_features, whole.out_features // 2), type(model).__name__)
        module.add_module(part, empty_module(found[part]))
    module.gate_up_proj = Joined(module.get_submodule(part) for part in _HALVES)  # type: ignore[misc]


# ---- Experts ----


def _experts_above(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return `…experts` for the name of an expert's linear, `…experts.3.up_proj`, if the model holds its experts
    fused."""
    parts = name.split(".")
    holder = modules.get(".".join(parts[:-2]))
    fused = len(parts) > 2 and parts[-2].isdigit() and isinstance(getattr(holder, "down_proj", None), nn.Parameter)
    return ".".join(parts[:-2]) if fused else None


def _expert_layers(
    holder: str, module: nn.Module, parts: dict[str, StoredLayer[Tensor]], converters: list[WeightConverter],
    tensors: Mapping[str, Tensor], placed: Placed,
) -> MarlinExperts:  # fmt: skip
    """Return the module for fused experts `module`, from the checkpoint's layers ("3.up_proj" → layer). Layers of some
    experts that are not quantized are linears in it."""
    kind = type(module).__name__
    gated = isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    names = _names_of_experts(holder, {part.split(".", 1)[1] for part in parts}, converters, gated)
    down = module.down_proj
    assert isinstance(down, nn.Parameter)
    count, one, other = down.shape
    whole = module.gate_up_proj if gated else module.up_proj
    assert isinstance(whole, nn.Parameter)
    by_rows = getattr(module, "is_transposed", kind == "Llama4TextExperts")  # down_proj is [E, I, H], not [E, H, I]
    inner, hidden = (one, other) if by_rows else (other, one)
    sizes = [*((hidden, inner) for _ in names[1:]), (inner, hidden)]
    first = next(iter(parts))
    origin = parts[first].name.removesuffix(first)  # `…experts.` in the checkpoint
    experts = []
    for number in range(count):
        layers: dict[str, nn.Module] = {}
        for name, size in zip(names, sizes, strict=True):
            layer = parts.pop(f"{number}.{name}", None)
            if layer is not None:
                _check_size(layer, size, "the model")
                if getattr(module, "has_bias", False) and layer.bias is None:
                    raise SourceError(f"{layer.name}: it has no bias, as the model's experts have.")
                layers[name] = empty_module(layer)
            else:
                layers[name] = _plain_linear(f"{holder}.{number}.{name}", f"{origin}{number}.{name}", size, tensors,
                                             placed, whole.dtype)  # fmt: skip
        experts.append(MarlinExpert(layers))
    if parts:
        raise UnsupportedError(f"{holder}: the model has {count} experts; {some(sorted(parts))} are not among them.")
    return MarlinExperts(module, experts)


def _computed_as_usual(fused: nn.Module) -> bool:
    """Tell whether fused experts are computed as Transformers' experts interface has it."""
    return hasattr(fused, "is_transposed") or type(fused).__name__ in _SAME_EXPERTS


def _dequantize_experts_later(
    holder: str, fused: nn.Module, parts: dict[str, StoredLayer[Tensor]], placed: Placed
) -> None:
    """Let `fused`, which computes its experts in its own way, load their layers, and have its tensors made of them."""
    shapes = {name: parameter.shape for name, parameter in fused.named_parameters(recurse=False)}
    wanted = {f"{number}.{name}" for name, shape in shapes.items() for number in range(shape[0])}
    if wanted != parts.keys() or any(
        shapes[part.split(".")[1]][1:] != (x.N, x.K) or x.N == x.K or x.bias for part, x in parts.items()
    ):
        raise UnsupportedError(
            f"{holder}: how {type(fused).__name__} holds and computes its experts is not known; "
            "Marlin cannot replace it."
        )
    experts = [
        MarlinExpert({name: empty_module(parts[f"{number}.{name}"]) for name in shapes})
        for number in range(len(parts) // len(shapes))
    ]
    dtypes = {name: parameter.dtype for name, parameter in fused.named_parameters(recurse=False)}
    for name in shapes:
        fused.__dict__[name] = marker(fused._parameters.pop(name))
    for number, expert in enumerate(experts):
        fused.add_module(str(number), expert)

    def finish() -> None:
        for number in range(len(experts)):
            del fused._modules[str(number)]
        for name in shapes:
            del fused.__dict__[name]
            rows = [getattr(expert, name).dequantize(dtypes[name]).t() for expert in experts]
            fused.register_parameter(name, nn.Parameter(torch.stack(rows), requires_grad=False))

    placed.dequantized += [layer.name for layer in parts.values()]
    placed.later.append(finish)


def _plain_linear(
    place: str, name: str, size: tuple[int, int], tensors: Mapping[str, Tensor], placed: Placed, dtype: torch.dtype
) -> nn.Linear:
    """Return an expert's layer that the checkpoint does not have quantized. Transformers would fuse it with the
    others."""
    found = {key: tensors.get(f"{name}.{key}") for key in ("weight", "bias")}
    if found["weight"] is None:
        raise SourceError(f"{name}: it is neither a Marlin layer nor a plain one, as the other experts' are.")
    placed.plain |= {f"{place}.{key}": tensor for key, tensor in found.items() if tensor is not None}
    return nn.Linear(*size, bias=found["bias"] is not None, dtype=dtype)


def _names_of_experts(holder: str, found: set[str], converters: list[WeightConverter], gated: bool) -> tuple[str, ...]:
    """Return what the checkpoint, which has `found`, calls an expert's gate, up and down; without a gate, up and
    down."""
    known: list[str] = []
    for target in ("gate_up_proj" if gated else "up_proj", "down_proj"):
        for converter in converters:
            if converter._original_target_patterns[0].endswith(f"experts.{target}"):
                known += [source.split(".")[-2] for source in converter._original_source_patterns if "." in source]
                break
    count = 3 if gated else 2
    for names in (tuple(known), *_EXPERT_NAMES):
        names = names[-count:]
        if len(names) == count and found <= set(names):
            return names
    raise UnsupportedError(
        f"{holder}: {some(sorted(found))} are not what an expert's layers of this model are called in a checkpoint."
    )
