"""When a model of vLLM is filled from a Marlin checkpoint; `serving_loading` says how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.version import __version__ as VLLM_VERSION

from .serving_loading import Engine, fill, methods
from .vllm_choice import logger
from .vllm_config import CheckpointConfig
from .vllm_linear import MarlinCheckpointMethod
from .vllm_moe import MarlinExpertsMethod

ENGINE = Engine(
    "vLLM", f"vLLM {VLLM_VERSION}", LinearBase, ParallelLMHead, RoutedExperts, MarlinCheckpointMethod,
    MarlinExpertsMethod, default_weight_loader, logger,
)  # fmt: skip
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
    """Fill a model that is expected, `load` any other."""
    config = next((_expected[kind] for kind in type(model).__mro__ if kind in _expected), None)
    ours = {id(method.config) for _, method in methods(model, ENGINE)}
    known = get_current_vllm_config_or_none()
    if config is None or (ours != {id(config)} and (ours or known is None or known.quant_config is not config)):
        return load(weights, *args, **kwargs)
    if config.arriving is not None:  # a model within a model
        return load(weights, *args, **kwargs)
    try:
        return fill(ENGINE, model, config, lambda given: load(given, *args, **kwargs), weights)
    finally:
        for kind in [kind for kind, its in _expected.items() if its is config]:
            del _expected[kind]
