"""A plugin for SGLang, which loads Marlin checkpoints of both formats and computes with our kernels.

SGLang finds it by its entry point (group `sglang.srt.plugins`) when both packages are installed; nothing is imported by
hand. For SGLang 0.5.23. Nothing is repacked at load: what the checkpoint holds is what the kernel takes.

Here is what SGLang is told. What a checkpoint says is in `sglang_config`, its layers in `sglang_linear` and
`sglang_moe`, how they are filled in `sglang_loading`; what vLLM's plugin does as well is in `serving_…`.
"""

from __future__ import annotations

from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization import QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch import nn

from . import sglang_loading as loading
from .serving_config import NAME
from .sglang_config import CheckpointConfig
from .sglang_linear import MarlinCheckpointMethod
from .sglang_moe import MarlinExpertsMethod


class MarlinCheckpointConfig(CheckpointConfig):
    """A checkpoint's settings with the methods of its layers."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        prefix = self.stored_prefix(prefix)
        if isinstance(layer, FusedMoE):
            if any(name.startswith(f"{prefix}.") for name in self.quantized):
                return MarlinExpertsMethod(self, prefix)
            return None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        if names := self.quantized_parts(prefix, "SGLang"):
            return MarlinCheckpointMethod(self, prefix, names)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def register() -> None:
    """Register the plugin: SGLang calls this in each of its processes, before it applies hooks."""
    if NAME in QUANTIZATION_METHODS:
        return
    others = dict(QUANTIZATION_METHODS)
    QUANTIZATION_METHODS.clear()
    QUANTIZATION_METHODS.update({NAME: MarlinCheckpointConfig, **others})  # asked in this order
    around = {"weight_utils.get_quant_config": loading.configure, "utils.get_model_architecture": loading.architecture}
    for what, hook in around.items():
        HookRegistry.register(f"sglang.srt.model_loader.{what}", hook, HookType.AROUND)
