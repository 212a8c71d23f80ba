"""Small mixtures of experts packed by compressed-tensors, each block's experts stacked in tensors of three dimensions,
with compressed-tensors' own weights as references.

python tools/quantizers/with_compressed_tensors.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

import argparse
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GraniteMoeConfig, Qwen3MoeConfig

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": tiny.CONTEXT,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
#: As the checkpoints of Granite's mixtures call the two stacks, and as Transformers does itself.
GRANITE = {"experts.gate_up_proj": "input_linear", "experts.down_proj": "output_linear"}
#: Name → the model, what its stacks are called if not as in Transformers, an expert's gate, up and down, weights.
SETTINGS: dict[str, tuple[Any, dict[str, str], tuple[str, str, str], dict[str, Any]]] = {
    "ct-stacked-g32-asym": (
        GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        GRANITE,
        ("w1", "w3", "w2"),
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32},
    ),
    "ct-stacked-8bit-channel-bf16": (
        Qwen3MoeConfig(
            **SIZES, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
        ),
        {},
        ("gate_proj", "up_proj", "down_proj"),
        {"num_bits": 8, "symmetric": True, "strategy": "channel"},
    ),
}


def packed(weight: torch.Tensor, scheme: QuantizationScheme) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What compressed-tensors makes of a weight [.., N, K], and its own reading of that."""
    args = scheme.weights
    rows = weight.float().unflatten(-1, (-1, args.group_size or weight.shape[-1]))
    scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    state = PackedQuantizationCompressor.compress(state, scheme)
    return state, PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def write(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write the checkpoint; return the weights, [K, N], by the names that each expert's layers would have alone."""
    config, renamed, (gate, up, down), args = SETTINGS[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    torch.manual_seed(tiny.SEED)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **args))
    tensors: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for key, value in model.state_dict().items():
        weight = torch.randn_like(value).mul_(0.05) if value.ndim > 1 else value
        layer, stacked = key.removesuffix(".weight"), value.ndim == 3
        if key == "lm_head.weight":
            continue
        if not stacked and not layer.endswith("_proj"):
            tensors[key.replace("router.weight", "router.layer.weight") if renamed else key] = weight
            continue
        owner, _, part = layer.rpartition(".experts.")
        kept = f"{owner}.{renamed[f'experts.{part}']}" if stacked and renamed else layer
        state, read = packed(weight, scheme)
        tensors |= {f"{kept}.{what}": tensor.contiguous() for what, tensor in state.items()}
        if not stacked:
            weights[layer] = read.T
            continue
        for expert, whole in enumerate(read):
            halves = dict(zip((gate, up), whole.chunk(2), strict=True)) if part == "gate_up_proj" else {down: whole}
            weights |= {f"{owner}.experts.{expert}.{own}": half.T for own, half in halves.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.dtype = dtype
    model.config.quantization_config = QuantizationConfig(
        config_groups={"group_0": scheme}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
    ).model_dump(exclude={"quant_method"}) | {"quant_method": "compressed-tensors"}
    model.config.save_pretrained(folder)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", help="which; default all")
    options = parser.parse_args()
    for name in options.names or SETTINGS:
        folder = options.out_dir / name
        shutil.rmtree(folder, ignore_errors=True)
        weights = write(folder, name)
        about = {
            "tool": "compressed-tensors",
            "version": version("compressed-tensors"),
            "settings": SETTINGS[name][3],
        }
        tiny.save_reference(folder, weights, about)


if __name__ == "__main__":
    main()
