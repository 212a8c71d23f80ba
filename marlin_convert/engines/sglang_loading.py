"""When a model of SGLang is filled from a Marlin checkpoint; `serving_loading` says how."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from safetensors import safe_open
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_loader.utils import get_model_architecture
from sglang.srt.model_loader.weight_utils import default_weight_loader, download_weights_from_hf
from sglang.version import __version__ as SGLANG_VERSION
from torch import nn

from .serving_config import NAME
from .serving_loading import Engine, fill, methods
from .sglang_config import CheckpointConfig
from .sglang_linear import MarlinCheckpointMethod
from .sglang_moe import MarlinExpertsMethod

ENGINE = Engine(
    "SGLang", f"SGLang {SGLANG_VERSION}", LinearBase, ParallelLMHead, FusedMoE, MarlinCheckpointMethod,
    MarlinExpertsMethod, default_weight_loader, logging.getLogger(__name__),
)  # fmt: skip
_expected: dict[type, CheckpointConfig] = {}  # classes of models that are about to be built


def configure(original: Callable[..., Any], model_config: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a checkpoint's settings as SGLang does; a model of a Marlin checkpoint then loads through `fill`."""
    config = original(model_config, load_config, *args, **kwargs)
    if isinstance(config, CheckpointConfig):
        config.find_layers(names_of(model_config, load_config), model_config.model_path)
        model_class = get_model_architecture(model_config)[0]
        _expected[model_class] = config
        if not hasattr(model_class.load_weights, "_marlin_convert"):
            load = model_class.load_weights

            @wraps(load)
            def load_weights(model: nn.Module, weights: Any, *args: Any, **kwargs: Any) -> Any:
                return _load_model(model, partial(load, model), weights, *args, **kwargs)

            load_weights._marlin_convert = True  # type: ignore[attr-defined]
            model_class.load_weights = load_weights
    return config


def architecture(original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Choose a model's class as SGLang does. For a Mixtral it asks whether it knows the quantization, and takes a
    class that computes experts one by one if not."""
    if model_config.quantization != NAME:
        return original(model_config, *args, **kwargs)
    model_config.quantization = "gptq_marlin"
    try:
        return original(model_config, *args, **kwargs)
    finally:
        model_config.quantization = NAME


def _load_model(model: nn.Module, load: Callable[..., Any], weights: Any, *args: Any, **kwargs: Any) -> Any:
    """Fill a model that is expected, `load` any other."""
    mine = {id(method.config): method.config for _, method in methods(model, ENGINE)}
    config = next((_expected[kind] for kind in type(model).__mro__ if kind in _expected), None)
    if config is None or (mine and id(config) not in mine):
        if mine and all(known.arriving is None for known in mine.values()):
            raise ValueError(f"{type(model).__name__}: its weights can be loaded once only; start SGLang again")
        return load(weights, *args, **kwargs)
    if config.arriving is not None:  # a model within a model
        return load(weights, *args, **kwargs)
    try:
        return fill(ENGINE, model, config, lambda given: load(given, *args, **kwargs), weights)
    except AttributeError as error:
        if "'weight'" not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} of {ENGINE.version} looks for the plain weights of a quantized layer ({error})"
        ) from error
    finally:
        for kind in [kind for kind, its in _expected.items() if its is config]:
            del _expected[kind]


def names_of(model_config: Any, load_config: Any) -> set[str]:
    """Return the names of a checkpoint's tensors."""
    folder = Path(model_config.model_path)
    if not folder.is_dir():
        folder = Path(
            download_weights_from_hf(
                model_config.model_path, load_config.download_dir, ["*.safetensors"], model_config.revision
            )
        )
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names
