"""A vLLM plugin: vLLM loads Marlin checkpoints of both formats, computes with our kernels or its own Marlin kernel.

vLLM finds it by its entry point (group `vllm.general_plugins`) when both packages are installed; nothing is imported by
hand. For vLLM 0.26 to 0.33. Nothing is repacked at load: what the checkpoint holds is what the kernel takes.

Here is what vLLM is told. What a checkpoint says is in `vllm_config`, its layers in `vllm_linear` and `vllm_moe`, how
they are filled in `vllm_loading`, which kernel computes them in `vllm_choice`, how vLLM's is called in `vllm_calls`.
"""

from __future__ import annotations

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from . import vllm_loading as _loading  # noqa: F401 - it puts itself into vLLM's way of loading
from .serving_config import NAME
from .vllm_config import CheckpointConfig
from .vllm_linear import MarlinCheckpointMethod
from .vllm_moe import MarlinExpertsMethod


def register() -> None:
    """Do nothing when vLLM calls it in each of its processes. Importing this module has registered the
    configuration."""


@register_quantization_config(NAME)
class MarlinCheckpointConfig(CheckpointConfig):
    """A checkpoint's settings with the methods of its layers."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            if any(name.startswith(f"{prefix}.") for name in self.quantized):
                return MarlinExpertsMethod(self, prefix, layer)
            return None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        if names := self.quantized_parts(prefix, "vLLM"):
            return MarlinCheckpointMethod(self, prefix, names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
