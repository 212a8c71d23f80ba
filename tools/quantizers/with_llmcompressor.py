"""Small compressed-tensors checkpoints made by llm-compressor, with compressed-tensors' own weights as references.

python tools/quantizers/with_llmcompressor.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

try:
    from llmcompressor.modifiers.gptq import GPTQModifier
except ImportError:  # of old, it lay there
    from llmcompressor.modifiers.quantization import GPTQModifier


def weights(**settings: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **settings}


LINEARS = ["re:.*self_attn.*", "re:.*mlp.*"]
CHANNEL = {"strategy": "channel", "group_size": None}
#: Name → the modifier, and the weights' settings of each of its groups: what it is for, and those.
SETTINGS: dict[str, tuple[Any, dict[str, tuple[list[str], dict[str, Any]]]]] = {
    "ct-g128": (GPTQModifier, {"group_0": (LINEARS, weights())}),
    "ct-g32-asym": (GPTQModifier, {"group_0": (LINEARS, weights(group_size=32, symmetric=False))}),
    "ct-channel": (QuantizationModifier, {"group_0": (LINEARS, weights(**CHANNEL))}),
    "ct-channel-asym-bf16": (QuantizationModifier, {"group_0": (LINEARS, weights(**CHANNEL, symmetric=False))}),
    "ct-8bit-g64-asym": (
        QuantizationModifier,
        {"group_0": (LINEARS, weights(num_bits=8, group_size=64, symmetric=False))},
    ),
    "ct-mixed-bf16": (
        QuantizationModifier,
        {
            "group_0": (["re:.*self_attn.*"], weights(num_bits=8, **CHANNEL)),
            "group_1": (["re:.*(gate|up)_proj.*"], weights(group_size=64)),
        },
    ),
    # With compressed-tensors 0.18 or older only, and the llm-compressor that goes with it.
    "ct-g32-act-order": (GPTQModifier, {"group_0": (LINEARS, weights(group_size=32, actorder="group"))}),
    "ct-8bit-g64-asym-act-order": (
        GPTQModifier,
        {"group_0": (LINEARS, weights(num_bits=8, group_size=64, symmetric=False, actorder="group"))},
    ),
    # With compressed-tensors 0.9.3 or older only, which stores zero points as int8.
    "ct-g32-asym-int8": (GPTQModifier, {"group_0": (["Linear"], weights(group_size=32, symmetric=False))}),
    "ct-8bit-channel-asym-int8": (
        QuantizationModifier,
        {"group_0": (["Linear"], weights(num_bits=8, **CHANNEL, symmetric=False))},
    ),
}


def quantize(source: Path, folder: Path, name: str) -> None:
    modifier, groups = SETTINGS[name]
    dtype = torch.bfloat16 if "bf16" in name else torch.float16
    model = AutoModelForCausalLM.from_pretrained(source, torch_dtype=dtype)
    rows = tiny.calibration_tokens().tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    config = {group: {"targets": targets, "weights": args} for group, (targets, args) in groups.items()}
    torch.manual_seed(tiny.SEED)
    oneshot(
        model=model, processor=str(source), dataset=data, num_calibration_samples=tiny.WINDOWS,
        max_seq_length=tiny.CONTEXT, recipe=modifier(config_groups=config, ignore=["lm_head"]),
    )  # fmt: skip
    model.save_pretrained(folder, save_compressed=True)


def decompressed(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Each layer, `[K, N]`, as compressed-tensors itself decompresses it, rounded once to the type of its scales."""
    tensors, found = load_file(folder / "model.safetensors"), {}
    _, groups = SETTINGS[name]
    for key in tensors:
        layer, _, part = key.rpartition(".")
        if part != "weight_packed":
            continue
        state = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{layer}.weight")}
        bits = 32 * state["weight_packed"].shape[1] // int(state["weight_shape"][1])
        (args,) = {str(a): a for _, a in groups.values() if a["num_bits"] == bits}.values()
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        found[layer] = read(state, scheme).T
    return found


def read(state: dict[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    if not hasattr(PackedQuantizationCompressor, "decompress_weight"):
        return PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    data = {key.removeprefix("weight_"): tensor for key, tensor in state.items()}
    data = {f"weight_{key}": tensor for key, tensor in data.items()}
    return PackedQuantizationCompressor().decompress_weight(data, scheme.weights)


def make(source: Path, folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    quantize(source, folder, name)
    return decompressed(folder, name), {
        "tool": "llm-compressor",
        "version": version("llmcompressor"),
        "compressed-tensors": version("compressed-tensors"),
        "settings": {group: args for group, (_, args) in SETTINGS[name][1].items()},
    }


if __name__ == "__main__":
    tiny.main(__doc__, SETTINGS, make)
