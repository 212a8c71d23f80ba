"""Architectures that vLLM has and Transformers can build small, for `test_vllm_models`: one tiny model of each."""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # type: ignore[attr-defined]

#: What every configuration gets that has such a field.
SMALL: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # mixtures of experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 256, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    # gated delta nets
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    # state space models
    "mamba_d_ssm": 512, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64, "time_step_rank": 128,
    "mamba_dt_rank": 128,
}  # fmt: skip

#: model_type → what its configuration needs beside SMALL. More than one name for a type: "type, variant".
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
    "cohere": {"model_max_length": 256},
    "cohere2": {"model_max_length": 256},
    "cohere2_moe": {},
    "deepseek_v2": {},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "ernie4_5": {},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "exaone4": {},
    "exaone_moe": {"first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"]},
    "falcon, one head of keys": {"multi_query": True, "alibi": False, "num_kv_heads": 1},
    "falcon, heads interleaved": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon, many heads of keys": {"multi_query": False, "alibi": True, "bias": True},
    "falcon_h1": {},
    "falcon_mamba": {},
    "gemma": {},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"head_dim": 64},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "topk_method": "noaux_tc"},
    "gpt_bigcode": {"n_embd": 256, "n_layer": 2, "n_head": 4, "n_inner": 512, "n_positions": 256},
    "gpt_neox": {},
    "gpt_neox, heads of 96": {"hidden_size": 384, "num_attention_heads": 4},
    "gptj": {"n_embd": 256, "n_layer": 2, "n_head": 4, "rotary_dim": 32, "n_positions": 256},
    "granite": {},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_expand": 2, "num_local_experts": 0,
                         "shared_intermediate_size": 512},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hyperclovax": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_dim": 256, "conv_L_cache": 3, "block_dim": 256},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, "conv_L_cache": 3},
    "llama": {},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 64, "state_size": 64, "n_groups": 1},
    "minicpm3": {},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "ministral3": {},
    "mistral": {},
    "mixtral": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}  # fmt: skip

#: Those that vLLM runs in bfloat16 only: scales and plain weights are rounded to it, each for itself.
ROUNDED = ("gemma2", "gemma3_text", "glm4")
#: (name, ranks) → why it is refused.
REFUSED = {
    ("minimax_m2", ranks): "vLLM calls these experts by another name than the checkpoint does" for ranks in (1, 2)
}
REFUSED["gpt_neox, heads of 96", 2] = "of 384, of this rank, become groups of 16 (they cut through its 6 groups)"

#: The linears of all of them: neither embeddings, heads and norms, nor what quantizers leave alone.
LINEARS = (
    r"^(?!.*(embed|\bwte\b|\bwpe\b|lm_head|norm|\bln_|router|\.gate$|shared_expert_gate|conv1d|\.conv\.conv$|"
    r"in_proj_ba|in_proj_[ab]$|[xd]t?_proj$))"
)


def configuration(name: str) -> PretrainedConfig:
    """The tiny configuration of an entry of ARCHITECTURES."""
    # Not by AutoConfig, with which engines register classes of their own.
    kind = getattr(transformers, CONFIG_MAPPING_NAMES[name.split(",")[0]])
    fields = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    return kind(**{key: value for key, value in SMALL.items() if key in fields} | ARCHITECTURES[name])
