"""What a Marlin checkpoint says, as vLLM asks for it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..formats.marlin_config import LayerSettings, is_marlin, read_marlin_settings
from .column_marks import Arriving

NAME = "marlin_convert"
_MIN_CAPABILITY = 80


class CheckpointConfig(QuantizationConfig):  # type: ignore[misc]
    """What a Marlin checkpoint says, for vLLM. `quantized` has the names of its quantized layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.settings = read_marlin_settings(config)
        self.layers = dict(self.settings.layers)
        self.quantized: set[str] = set()
        self.biases: set[str] = set()  # layers with a bias, quantized or not
        self.stored: frozenset[str] = frozenset()  # the quantized layers, by the checkpoint's names
        self.arriving: Arriving | None = None  # while weights are loaded

    def __repr__(self) -> str:
        return f"CheckpointConfig({self.settings.format}, {self.settings.default}, {len(self.layers)} exceptions)"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return _MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CheckpointConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Return this plugin's name for Marlin checkpoints, None for all others."""
        asked = user_quant in (None, NAME, "gptq", "marlin", "gptq_marlin", "auto_gptq")
        return NAME if asked and is_marlin(hf_quant_cfg) else None

    def maybe_update_config(self, model_name: str, *_: Any, revision: str | None = None, **__: Any) -> None:
        """Find the quantized layers: those whose tensors are there."""
        names = set(get_safetensors_params_metadata(model_name, revision=revision))
        ending = ".marlin_qweight" if self.settings.format == "marlin_ext" else ".B"
        self.quantized = {name.removesuffix(ending) for name in names if name.endswith(ending)}
        self.stored = frozenset(self.quantized)
        self.biases = {name.removesuffix(".bias") for name in names if name.endswith(".bias")}
        if not self.quantized:
            raise ValueError(f"{model_name}: the settings say {self.settings.format}, and no tensor ends in {ending}")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename layers as vLLM's model does."""
        self.quantized = set(hf_to_vllm_mapper.apply_list(sorted(self.quantized)))
        self.biases = set(hf_to_vllm_mapper.apply_list(sorted(self.biases)))
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def parts(self, prefix: str) -> list[str]:
        """Return the checkpoint's names of what vLLM fuses in `prefix`: q_proj, k_proj and v_proj of a qkv_proj,
        say."""
        parent, dot, last = prefix.rpartition(".")
        if prefix in self.quantized:
            return [prefix]
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]

    def layer(self, name: str) -> LayerSettings:
        return self.layers.get(name, self.settings.default)
