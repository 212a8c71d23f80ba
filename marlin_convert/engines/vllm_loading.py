"""How a model of vLLM is filled from a Marlin checkpoint: its own loading code gets marks for the quantized layers.

vLLM's code says which columns a layer gets (see `column_marks`): a piece is right, or loading stops and says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.version import __version__ as VLLM_VERSION

from .column_marks import Arriving, Marks
from .vllm_choice import logger
from .vllm_config import CheckpointConfig
from .vllm_linear import MarlinCheckpointMethod
from .vllm_moe import MarlinExpertsMethod

_configure = loader_utils.configure_quant_config
_expected: dict[type, CheckpointConfig] = {}  # model classes being built


def _configure_model(quant_config: QuantizationConfig, model_class: Any) -> None:
    """Do vLLM's own step before it builds a model; a model of a Marlin checkpoint then loads through `_load_model`."""
    _configure(quant_config, model_class)
    _expected.pop(model_class, None)
    if isinstance(quant_config, CheckpointConfig):
        _expected[model_class] = quant_config
        if not hasattr(model_class.load_weights, "_marlin_convert"):
            load = model_class.load_weights

            @wraps(load)
            def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], *args: Any, **kwargs: Any) -> Any:
                return _load_model(model, partial(load, model), weights, *args, **kwargs)

            load_weights._marlin_convert = True  # type: ignore[attr-defined]
            model_class.load_weights = load_weights


loader_utils.configure_quant_config = _configure_model


def _load_model(model: nn.Module, load: Callable[..., Any], weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Let `load` read the checkpoint's tensors into a model of vLLM, which gets marks for the quantized ones.

    Raises ValueError, with names, for what the model cannot take, and for what it leaves out.
    """
    config = next((_expected[kind] for kind in type(model).__mro__ if kind in _expected), None)
    ours = {id(method.config) for _, method in _methods(model)}
    known = get_current_vllm_config_or_none()
    if config is None or (ours != {id(config)} and (ours or known is None or known.quant_config is not config)):
        return load(weights, *args, **kwargs)
    if config.arriving is not None:  # a model within a model
        return load(weights, *args, **kwargs)
    arriving = config.arriving = Arriving(config.settings, config.stored)
    plain = _watch(model, config)
    try:
        result = load(arriving.stream(weights), *args, **kwargs)
        for layer, method in _methods(model):
            method.finish(layer)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if arriving.now not in config.stored or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{arriving.now}: {type(model).__name__} of vLLM {VLLM_VERSION} does not take it "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        config.arriving = None
        for kind in [kind for kind, its in _expected.items() if its is config]:
            del _expected[kind]
        for watched in plain:
            watched.parameter.weight_loader = watched.way
    left = arriving.unclaimed()
    loaded = result if isinstance(result, set) else set()
    empty = [w.name for w in plain if not w.filled and isinstance(w.layer, LinearBase) and w.name not in loaded]
    if left and empty:
        raise ValueError(
            f"{type(model).__name__} of vLLM {VLLM_VERSION} leaves out {len(left)} quantized layers of the checkpoint "
            f"({_some(left)}), and {len(empty)} layers of its own are without weights ({_some(empty)})"
        )
    if left:
        logger.info("%d quantized layers of the checkpoint are no part of this model: %s", len(left), _some(left))
    return result


@dataclass
class _Watched:
    """A weight of the model that this plugin did not know to be quantized; `way` is its loader."""

    name: str
    layer: Any
    parameter: Any
    way: Callable[..., Any]
    filled: bool = False
    ours: bool = False


def _watch(model: nn.Module, config: CheckpointConfig) -> list[_Watched]:
    """Let plain layers of the model become this plugin's when marks arrive: vLLM calls some by other names, or says
    nothing of quantization when it builds them."""
    found: dict[int, _Watched] = {}
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "quant_method", None), (MarlinCheckpointMethod, MarlinExpertsMethod)):
            continue
        if isinstance(layer, (LinearBase, ParallelLMHead, RoutedExperts)):
            for own, parameter in layer.named_parameters(recurse=False):
                if own.endswith("weight") and id(parameter) not in found:
                    way = getattr(parameter, "weight_loader", default_weight_loader)
                    watched = found[id(parameter)] = _Watched(f"{name}.{own}", layer, parameter, way)
                    parameter.weight_loader = partial(_load_watched, watched, config)
    return list(found.values())


def _load_watched(
    watched: _Watched,
    config: CheckpointConfig,
    param: nn.Parameter,
    loaded_weight: Tensor,
    *args: Any,
    **more: Any,
) -> Any:
    layer: Any = watched.layer
    name = watched.name.removesuffix(".weight")
    plain = not isinstance(loaded_weight, Marks)
    if (watched.ours and plain) or (watched.filled and not plain and not watched.ours):
        raise ValueError(f"{name}: vLLM computes it as one layer, and a part of it is not quantized")
    watched.filled = True
    if plain:
        return watched.way(param, loaded_weight, *args, **more)
    if isinstance(layer, RoutedExperts):
        raise ValueError(f"{name}: vLLM calls these experts by another name than the checkpoint does")
    if not watched.ours:
        watched.ours = True
        del layer.weight
        own = getattr(watched.way, "__self__", None) is not layer  # the model's own weight loader shards marks as well
        way: Any = watched.way if own else type(layer).weight_loader.__get__(layer)
        with param.device:
            _adopt(layer, MarlinCheckpointMethod(config, name), way, param.dtype)
    marks: Any = layer.get_parameter("weight")
    return marks.weight_loader(marks, loaded_weight, *args, **more)


def _adopt(layer: Any, method: MarlinCheckpointMethod, way: Callable[..., Any], dtype: torch.dtype) -> None:
    """Make `method` that of a layer which vLLM has built for plain weights."""
    layer.quant_method = method
    if isinstance(layer, ParallelLMHead):
        K, widths, N = layer.embedding_dim, [layer.num_embeddings_per_partition], layer.num_embeddings_padded
        method.create_weights(layer, K, widths, K, N, dtype, weight_loader=way)
    else:
        method.create_weights(
            layer, getattr(layer, "input_size_per_partition", layer.input_size), layer.output_partition_sizes,
            layer.input_size, layer.output_size, dtype, weight_loader=way,
        )  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _methods(model: nn.Module) -> list[tuple[Any, Any]]:
    """Return the layers that this plugin computes, with their methods."""
    kinds = (MarlinCheckpointMethod, MarlinExpertsMethod)
    found = [(layer, getattr(layer, "quant_method", None)) for layer in model.modules()]
    return [(layer, method) for layer, method in found if isinstance(method, kinds)]
