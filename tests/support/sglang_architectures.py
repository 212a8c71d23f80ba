"""What SGLang makes of the architectures in `vllm_architectures`, on a CPU without its own kernels."""

from __future__ import annotations

#: Those that it loads, layers of the plugin included.
LOADED = (
    "afmoe", "apertus", "arcee", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "gemma",
    "gemma3_text", "glm4", "glm4_moe", "gpt_bigcode", "gptj", "granite", "hyperclovax", "lfm2", "lfm2_moe",
    "llama", "minimax_m2", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "opt", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip

_TAKEN_APART = "this plugin does not run layers that SGLang takes apart after loading"
#: Those that the plugin refuses, and why. Of the others, SGLang does not load the plain model either.
REFUSED = {
    "glm4_moe_lite": _TAKEN_APART,
    "minicpm3": _TAKEN_APART,
    "llama, biases": "it has a bias, and LlamaForCausalLM of SGLang 0.5.23 takes none",
}
