"""What a Marlin checkpoint says, as SGLang asks for it; whether our kernels can compute it here."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_server_args

from ..errors import DeviceError
from ..formats.marlin_config import is_marlin
from ..native import cuda
from .serving_config import NAME, ServedCheckpoint

#: What SGLang's models join, where they do not say it themselves.
_JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class CheckpointConfig(ServedCheckpoint, QuantizationConfig):  # type: ignore[misc]
    """What a Marlin checkpoint says, for SGLang. `quantized` has the names of its quantized layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        QuantizationConfig.__init__(self)
        # SGLang's own additions to what the checkpoint says
        settings = {key: value for key, value in config.items() if key not in ("packed_modules_mapping", "hf_config")}
        ServedCheckpoint.__init__(self, settings)
        self.packed_modules_mapping = {**_JOINED, **(config.get("packed_modules_mapping") or {})}

    def update_packed_modules_mapping(self, mapping: dict[str, list[str]]) -> None:
        self.packed_modules_mapping = {**_JOINED, **mapping}

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_cache_scale(self, name: str) -> None:
        """Return None: no tensor is a scale of the cache of keys and values; some models ask."""

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None) -> str | None:
        """Return this plugin's name for Marlin checkpoints, None for all others."""
        asked = user_quant in (None, NAME, "gptq", "marlin", "gptq_marlin")
        return NAME if asked and is_marlin(hf_quant_cfg) else None

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Rename layers as SGLang's model does."""
        self.rename(hf_to_sglang_mapper)

    def stored_prefix(self, prefix: str) -> str:
        """Return what the checkpoint calls a layer: some models of SGLang leave out what stands before `layers.`."""
        leads = {name.partition("layers.")[0] for name in self.quantized if "layers." in name}
        return f"{leads.pop()}{prefix}" if prefix.startswith("layers.") and len(leads) == 1 else prefix


def batch_invariant() -> bool:
    """Tell whether SGLang promises results that do not depend on the number of rows."""
    return bool(get_server_args().enable_deterministic_inference)


@cache
def missing_kernels() -> str:
    """Return why our kernels cannot compute on this machine's GPU, or nothing; without a GPU, a reference computes."""
    if not torch.cuda.is_available():
        return ""
    try:
        cuda.load_library()
    except DeviceError as error:
        return str(error).rstrip(".")
    return ""


def check_kernels(name: str) -> None:
    """Raise ValueError where nothing computes a layer: SGLang's own Marlin kernel is not used."""
    if missing := missing_kernels():
        raise ValueError(f"{name}: marlin-convert's kernels compute Marlin checkpoints in SGLang, and {missing}")
