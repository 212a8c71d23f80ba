"""Tiny Transformers models for the tests: quantized layers of known codes and scales, converted, beside the same model
with those layers' weights in fp16. The weights come from the GPTQ definition (`gptq.GPTQLayer`), not from the code
under test.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.convert import convert
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.options import Options
from tests.support.extended_layers import extended
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, write_source

#: Public-domain text that the demo's model has not seen.
SAMPLE = Path(__file__).parents[1] / "data" / "kjv_sample.txt"
PROMPT = "And the king said unto the woman,"

#: The linears of a decoder's blocks; not the head, not the router.
BLOCKS = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|experts\.\d+\.(w[123]|(gate|up|down)_proj))$"

from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its type does not say what comes out


def llama(**changes: Any) -> LlamaConfig:
    settings = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    settings = {**llama().to_diff_dict(), "num_local_experts": 4, "num_experts_per_tok": 2}
    settings.pop("model_type")
    return MixtralConfig(**{**settings, **changes})


def qwen3_moe(**changes: Any) -> Qwen3MoeConfig:
    settings = {**llama().to_diff_dict(), "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                "head_dim": 64, "norm_topk_prob": True}  # fmt: skip
    settings.pop("model_type")
    return Qwen3MoeConfig(**{**settings, **changes})


@dataclass
class Pair:
    """The same model thrice: as GPTQ, converted, and with dequantized weights."""

    source: Path
    out: Path
    dense: Path
    layers: dict[str, GPTQLayer]

    def reference(self, dtype: torch.dtype = torch.float16) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.dense, dtype=dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "model.safetensors")


def make(folder: Path, config: PretrainedConfig, which: str = BLOCKS, *, by_hand: bool = False, **layer: Any) -> Pair:
    """Write `config`'s model with random weights, its linears that `which` finds quantized as `layer` says.

    `by_hand` writes the result here, as docs/concepts/format.md has the extended format, and not by the converter.
    """
    torch.manual_seed(0)
    dense, source, out = folder / "dense", folder / "source", folder / "out"
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(dense)
    plain = load_file(dense / "model.safetensors")
    layers: dict[str, GPTQLayer] = {}
    for name in [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]:
        if not re.search(which, name):
            continue
        N, K = plain.pop(f"{name}.weight").shape
        bias = plain.pop(f"{name}.bias", None)
        settings = {"K": K, "N": N, "seed": len(layers), "bias": bias is not None, **layer}
        if settings.get("bits") == 8:  # weights of the same size as with 4 bits
            size = settings.get("group_size", 128)
            G = 1 if size == -1 else -(-K // size)
            settings |= {
                "stored_zero": settings.get("stored_zero", 127),
                "scales": np.random.default_rng(G).uniform(6e-5, 1.2e-3, (G, N)),
            }
        layers[name] = GPTQLayer(**settings)
    assert layers
    weights = {f"{name}.weight": torch.from_numpy(x.weight).to(torch.float16).t() for name, x in layers.items()}
    biases = {f"{name}.bias": x.bias_tensor for name, x in layers.items() if x.bias}
    whole = {name: tensor.contiguous() for name, tensor in {**plain, **weights, **biases}.items()}
    save_file(whole, dense / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((dense / "config.json").read_text())
    first = next(iter(layers.values()))
    symmetric = first.stored_zero is None or isinstance(first.stored_zero, int)
    written["quantization_config"] = quantization_config(
        bits=first.bits, group_size=first.group_size, sym=symmetric, desc_act=not isinstance(first.g_idx, str),
        lm_head="lm_head" in layers,
    )  # fmt: skip
    write_source(source, layers, plain, config=written)
    if by_hand:
        write_extended(out, layers, plain, written)
    else:
        convert(source, out, Options(device="cpu"))
    return Pair(source, out, dense, layers)


def write_extended(
    folder: Path, layers: dict[str, GPTQLayer], plain: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """A checkpoint in the extended format; each layer's settings stand under `layers`, the first's are the default."""
    tensors, entries = dict(plain), {}
    for name, layer in layers.items():
        module, _ = extended(layer)
        tensors |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
        if layer.bias:
            tensors[f"{name}.bias"] = layer.bias_tensor
        entry = {"bits": layer.bits, "group_size": layer.group_size, "sym": module.sym, "desc_act": module.desc_act}
        sizes = {"in_features": (layer.K, 128), "out_features": (layer.N, 64)}
        entries[name] = entry | {key: size for key, (size, multiple) in sizes.items() if size % multiple}
    shared = {key: value for key, value in next(iter(entries.values())).items() if not key.endswith("features")}
    quantization = {
        "quant_method": "gptq", "checkpoint_format": "marlin_ext", "marlin_ext_version": 1, **shared,
        "lm_head": "lm_head" in layers, "layers": entries,
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    """‖result - reference‖ / ‖reference‖ in float64."""
    result, reference = result.detach().double(), reference.detach().double()
    return float((result - reference).norm() / reference.norm())


def continues_greedily(model: Any, ids: torch.Tensor, count: int, tolerance: float = 2e-3) -> bool:
    """Whether to `model` each of the last `count` tokens of `ids` [B, L] is the most likely one after those before it:
    but for ties within `tolerance` of the logits, which fall as the order of sums does.
    """
    with torch.no_grad():
        logits = model(ids).logits[:, -count - 1 : -1].double()
    chosen = logits.gather(2, ids[:, -count:, None])[..., 0]
    return bool((logits.amax(2) - chosen <= tolerance * logits.abs().amax()).all())


def tokens(vocab: int, shape: tuple[int, int] = (2, 9)) -> torch.Tensor:
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(1))


def dequantized_demo(folder: Path) -> Path:
    """The demo's GPTQ checkpoint (4 bits, symmetric) with plain fp16 weights, by the formula, written to `folder`."""
    shutil.copytree(DEMO_FOLDER, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    packed = load_file(folder / "model.safetensors")
    tensors = {k: v for k, v in packed.items() if k.split(".")[-1] not in ("qweight", "qzeros", "scales", "g_idx")}
    for name in [name.removesuffix(".qweight") for name in packed if name.endswith(".qweight")]:
        words, scales = packed[f"{name}.qweight"].to(torch.int64), packed[f"{name}.scales"].double()
        codes = torch.stack([words >> 4 * i & 15 for i in range(8)], dim=1).flatten(0, 1)  # [K, N]
        W = (codes - 8) * scales.repeat_interleave(codes.shape[0] // scales.shape[0], dim=0)
        tensors[f"{name}.weight"] = W.to(torch.float16).t().contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def perplexity(model: Any, tokenizer: Any, text: str, window: int = 256) -> float:
    """exp of the mean loss over all tokens of `text`, in windows that do not overlap."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0].to(model.device)
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, window):
            part = ids[start : start + window + 1]
            logits = model(part[None, :-1]).logits[0].float()
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            count += len(part) - 1
    return math.exp(total / count)


def marlin_layers(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, MarlinLinear)}


def same_logits(model: Any, reference: Any, tolerance: float = 2e-3) -> None:
    ids = tokens(model.config.vocab_size)
    with torch.no_grad():
        result, wanted = model(ids).logits, reference(ids).logits
    assert result.dtype == wanted.dtype
    assert relative(result, wanted) <= tolerance
    assert wanted.std() > 0.01
