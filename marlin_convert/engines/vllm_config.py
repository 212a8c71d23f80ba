"""What a Marlin checkpoint says, as vLLM asks for it."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..formats.marlin_config import is_marlin
from .serving_config import NAME, ServedCheckpoint


class CheckpointConfig(ServedCheckpoint, QuantizationConfig):  # type: ignore[misc]
    """What a Marlin checkpoint says, for vLLM. `quantized` has the names of its quantized layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        QuantizationConfig.__init__(self)
        ServedCheckpoint.__init__(self, config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return this plugin's name for Marlin checkpoints, None for all others."""
        asked = user_quant in (None, NAME, "gptq", "marlin", "gptq_marlin", "auto_gptq")
        return NAME if asked and is_marlin(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, *_: Any, revision: str | None = None, **__: Any) -> None:
        """Find the quantized layers: those whose tensors are there."""
        self.find_layers(get_safetensors_params_metadata(model_name, revision=revision), model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as vLLM's model does."""
        self.rename(hf_to_vllm_mapper)
