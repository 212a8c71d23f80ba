"""How a model of an engine is filled from a Marlin checkpoint: its own loading code gets marks for quantized layers.

The engine's code says which columns a layer gets (see `column_marks`): a piece is right, or loading stops and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .column_marks import Arriving, Marks
from .serving_config import ServedCheckpoint


@dataclass(frozen=True)
class Engine:
    """What filling a model has to know of an engine: classes of its layers, and of this plugin's methods for them."""

    name: str
    version: str  # with the name before it
    linear: Any
    head: Any
    experts: Any
    linear_method: Any
    experts_method: Any
    default_loader: Callable[..., Any]
    logger: Any


def fill(
    engine: Engine,
    model: nn.Module,
    config: ServedCheckpoint,
    load: Callable[[Iterable[tuple[str, Tensor]]], Any],
    weights: Iterable[tuple[str, Tensor]],
) -> Any:
    """Let `load` read the checkpoint's tensors into a model, which gets marks for the quantized ones.

    Raises ValueError, with names, for what the model cannot take, and for what it leaves out.
    """
    arriving = config.arriving = Arriving(config.settings, config.stored)
    plain = _watch(model, config, engine)
    try:
        result = load(arriving.stream(weights))
        for layer, method in methods(model, engine):
            method.finish(layer)
            lost = arriving.biased & getattr(method, "sources", set())
            if lost and getattr(layer, "bias", None) is None:
                raise ValueError(
                    f"{min(lost)}: it has a bias, and {type(model).__name__} of {engine.version} takes none"
                )
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if arriving.now not in config.stored or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{arriving.now}: {type(model).__name__} of {engine.version} does not take it "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        config.arriving = None
        for watched in plain:
            watched.parameter.weight_loader = watched.loader
    left = arriving.unclaimed()
    loaded = result if isinstance(result, set) else set()
    empty = [w.name for w in plain if not w.filled and isinstance(w.layer, engine.linear) and w.name not in loaded]
    if left and empty:
        raise ValueError(
            f"{type(model).__name__} of {engine.version} leaves out {len(left)} quantized layers of the checkpoint "
            f"({_some(left)}), and {len(empty)} layers of its own are without weights ({_some(empty)})"
        )
    if left:
        engine.logger.info(
            "%d quantized layers of the checkpoint are no part of this model: %s", len(left), _some(left)
        )
    return result


@dataclass
class _Watched:
    """A weight of the model that this plugin did not know to be quantized; `loader` is its weight loader."""

    name: str
    layer: Any
    parameter: Any
    loader: Callable[..., Any]
    filled: bool = False
    ours: bool = False


def _watch(model: nn.Module, config: ServedCheckpoint, engine: Engine) -> list[_Watched]:
    """Let plain layers of the model become this plugin's when marks arrive: engines call some by other names, or say
    nothing of quantization when they build them."""
    found: dict[int, _Watched] = {}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "quant_method", None), (engine.linear_method, engine.experts_method)):
            continue
        if isinstance(layer, (engine.linear, engine.head, engine.experts)):
            for last_name, parameter in layer.named_parameters(recurse=False):
                if last_name.endswith("weight") and id(parameter) not in found:
                    loader = getattr(parameter, "weight_loader", engine.default_loader)
                    watched = found[id(parameter)] = _Watched(f"{name}.{last_name}", layer, parameter, loader)
                    parameter.weight_loader = partial(_load_watched, watched, config, engine)
    return list(found.values())


def _load_watched(
    watched: _Watched,
    config: ServedCheckpoint,
    engine: Engine,
    param: nn.Parameter,
    loaded_weight: Tensor,
    *args: Any,
    **more: Any,
) -> Any:
    layer: Any = watched.layer
    name = watched.name.removesuffix(".weight")
    plain = not isinstance(loaded_weight, Marks)
    if (watched.ours and plain) or (watched.filled and not plain and not watched.ours):
        raise ValueError(f"{name}: {engine.name} computes it as one layer, and a part of it is not quantized")
    watched.filled = True
    if plain:
        return watched.loader(param, loaded_weight, *args, **more)
    if isinstance(layer, engine.experts):
        raise ValueError(f"{name}: {engine.name} calls these experts by another name than the checkpoint does")
    if not watched.ours:
        watched.ours = True
        del layer.weight
        is_models = (
            getattr(watched.loader, "__self__", None) is not layer
        )  # the model's own weight loader shards marks as well
        loader: Any = watched.loader if is_models else type(layer).weight_loader.__get__(layer)
        with param.device:
            _adopt(layer, engine.linear_method(config, name), loader, param.dtype, engine)
    marks: Any = layer.get_parameter("weight")
    return marks.weight_loader(marks, loaded_weight, *args, **more)


def _adopt(layer: Any, method: Any, loader: Callable[..., Any], dtype: torch.dtype, engine: Engine) -> None:
    """Make `method` that of a layer which the engine has built for plain weights."""
    layer.quant_method = method
    if isinstance(layer, engine.head):
        K, widths, N = layer.embedding_dim, [layer.num_embeddings_per_partition], layer.num_embeddings_padded
        method.create_weights(layer, K, widths, K, N, dtype, weight_loader=loader)
    else:
        rank_K = getattr(layer, "input_size_per_partition", layer.input_size)
        widths = getattr(layer, "output_partition_sizes", [layer.output_size])
        method.create_weights(layer, rank_K, widths, layer.input_size, layer.output_size, dtype, weight_loader=loader)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def methods(model: nn.Module, engine: Engine) -> list[tuple[Any, Any]]:
    """Return the layers that this plugin computes, with their methods."""
    kinds = (engine.linear_method, engine.experts_method)
    found = [(layer, getattr(layer, "quant_method", None)) for layer in model.modules()]
    return [(layer, method) for layer, method in found if isinstance(method, kinds)]
