"""Models that the tests of engines load: small ones of every kind of layer that a checkpoint can have."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config

from tests.support.extended_layers import points
from tests.support.gptq_checkpoints import shuffled
from tests.support.tiny_models import BLOCKS, llama, mixtral, qwen3_moe

#: Four ranks have a group of 128 rows each, and two heads.
SIZES = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}


def qwen2() -> Qwen2Config:
    settings = llama(**SIZES).to_diff_dict()
    settings.pop("model_type")
    return Qwen2Config(**settings)


ORDER = {"group_size": 64, "g_idx": shuffled(512, 64)}
EIGHT = {"bits": 8, "group_size": 64}
#: (model, which layers, how they are quantized); the first must be a mixture of experts.
MODELS: dict[str, tuple[PretrainedConfig, str, dict[str, Any]]] = {
    "Mixtral": (mixtral(**SIZES), BLOCKS, {}),
    "Mixtral, one group": (mixtral(**SIZES), BLOCKS, {"group_size": -1}),
    "Mixtral, act-order": (mixtral(**SIZES), BLOCKS, ORDER),
    "Qwen3-MoE, 8 bits": (qwen3_moe(**SIZES, moe_intermediate_size=512), BLOCKS, {"bits": 8, "group_size": 32}),
    "Llama": (llama(**SIZES), BLOCKS, {}),
    "Llama, one group, head": (llama(**SIZES), f"{BLOCKS}|^lm_head$", {"group_size": -1}),
    "Llama, heads shared by ranks": (llama(**{**SIZES, "num_key_value_heads": 2}), BLOCKS, {"group_size": 64}),
    "Llama, asymmetric": (llama(**SIZES), BLOCKS, {"group_size": 64, "stored_zero": points(8, 512, 4)}),
    "Llama, act-order": (llama(**SIZES), BLOCKS, ORDER),
    "Qwen2, biases": (qwen2(), BLOCKS, {}),
    "Llama, groups of 16": (llama(**SIZES), BLOCKS, {"group_size": 16}),
    "Llama, 8 bits, asymmetric": (
        llama(**SIZES),
        BLOCKS,
        {"bits": 8, "group_size": 64, "stored_zero": points(8, 512, 8)},
    ),
}


def is_mixture(name: str) -> bool:
    """Return whether the model of this name has experts."""
    return hasattr(MODELS[name][0], "num_experts_per_tok")
