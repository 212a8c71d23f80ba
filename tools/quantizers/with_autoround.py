"""Small checkpoints made by AutoRound, in GPTQ and other packings, with its own fake-quantized weights as references.

python tools/quantizers/with_autoround.py OUT_DIR [NAME ...]
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny
import torch
from auto_round import AutoRound
from auto_round.export.export_to_awq.utils import dequantize_gemm
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EIGHT_BITS = {"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": 64, "sym": True}}
SETTINGS: dict[str, dict[str, Any]] = {
    "autoround-g128": {"bits": 4, "group_size": 128, "sym": True},
    "autoround-g32-asym": {"bits": 4, "group_size": 32, "sym": False},
    # In its own packings, and others'; see FORMATS.
    "autoround-plain-g32": {"bits": 4, "group_size": 32, "sym": False, "layer_config": EIGHT_BITS},
    "autoround-8bit-gptqmodel": {"bits": 8, "group_size": 64, "sym": True},
    "awq-g128": {"bits": 4, "group_size": 128, "sym": False},
    "autoround-auto_gptq-g64": {"bits": 4, "group_size": 64, "sym": True},
    "autoround-llm_compressor": {"bits": 4, "group_size": 128, "sym": True},
    # With AutoRound 0.9.2; 0.16.1 fails to write it.
    "autoround-auto_awq-g64": {"bits": 4, "group_size": 64, "sym": False},
}
FORMATS = {
    "autoround-auto_gptq-g64": "auto_round:auto_gptq",
    "autoround-llm_compressor": "auto_round:llm_compressor",
    "autoround-auto_awq-g64": "auto_round:auto_awq",
    "autoround-plain-g32": "auto_round",
    "autoround-8bit-gptqmodel": "auto_round:gptqmodel",
    "awq-g128": "auto_awq",
}
ITERATIONS = 20


def quantize(source: Path, folder: Path, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """Write the checkpoint; return the weights, `[K, N]`, that AutoRound's own kernel reads from it.

    The number is how many of them differ from the rounded weights that AutoRound tuned: its packing stores a zero
    point of 0 as that of 1.
    """
    settings = SETTINGS[name]
    autoround = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32),
        AutoTokenizer.from_pretrained(source),
        **settings,
        dataset=list(tiny.calibration_tokens().split(8)),
        seqlen=tiny.CONTEXT,
        nsamples=tiny.WINDOWS,
        batch_size=8,
        iters=ITERATIONS,
        seed=tiny.SEED,
        device_map="cpu",
        amp=False,
    )
    model, _ = autoround.quantize()
    tuned = {name: m.weight.detach().T.half() for name, m in model.named_modules() if hasattr(m, "zp")}
    autoround.save_quantized(str(folder), format=FORMATS.get(name, "auto_gptq"), inplace=True)
    weights = {layer: read(folder, layer, name) for layer in tuned}
    return weights, sum(int((weights[layer] != tuned[layer]).sum()) for layer in tuned)


def read(folder: Path, layer: str, name: str) -> torch.Tensor:
    """The layer's weight, `[K, N]`: AutoRound's QuantLinear applied to the identity matrix, without its bias; of AWQ's
    packing, what its `dequantize_gemm` gives, of compressed-tensors', what that library does."""
    tensors = load_file(folder / "model.safetensors")
    if FORMATS.get(name) == "auto_round:llm_compressor":
        return decompressed({k.removeprefix(f"{layer}."): t for k, t in tensors.items() if k.startswith(f"{layer}.")})
    state = {kind: tensors[f"{layer}.{kind}"] for kind in ("qweight", "qzeros", "scales")}
    settings = {**SETTINGS[name], **SETTINGS[name].get("layer_config", {}).get(layer, {})}
    bits, size, packing = settings["bits"], settings["group_size"], FORMATS.get(name, "auto_gptq")
    if packing.endswith("auto_awq"):
        return dequantize_gemm(state["qweight"], state["qzeros"], state["scales"], bits, size)
    K, N = state["qweight"].shape[0] * 32 // bits, state["scales"].shape[1]
    # Without g_idx, which says nothing new here: with it, the kernel cuts K columns where there are N.
    kind = qlinear_torch_zp if packing.endswith("auto_gptq") else qlinear_torch
    linear = kind.QuantLinear(bits, size, K, N, bias=False, g_idx=False)
    linear.load_state_dict(state)
    return linear(torch.eye(K))


def decompressed(state: dict[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"].T


def make(source: Path, folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    weights, changed = quantize(source, folder, name)
    return weights, {
        "tool": "AutoRound",
        "version": version("auto-round"),
        "settings": SETTINGS[name],
        "weights_changed_by_packing": changed,
    }


if __name__ == "__main__":
    tiny.main(__doc__, SETTINGS, make)
