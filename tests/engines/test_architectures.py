"""Architectures of Transformers whose own code looks at a linear layer's weight, or has it the other way round: with
Marlin layers they load, and give the logits of the same model with the dequantized weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import marlin_convert
from marlin_convert.conversion.convert import convert
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, write_source
from tests.support.tiny_models import relative, tokens

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
UNTIED: dict[str, Any] = {**SMALL, "tie_word_embeddings": False}
T5: dict[str, Any] = {
    "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "vocab_size": 512, "decoder_start_token_id": 0,
}  # fmt: skip
MAMBA: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16}
LAYERS: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**LAYERS, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, Any] = {
    "gpt2": lambda: T.GPT2Config(n_embd=128, n_layer=2, n_head=4, **SMALL),
    "gpt-bigcode": lambda: T.GPTBigCodeConfig(n_embd=128, n_layer=2, n_head=4, **SMALL),
    "gpt-j": lambda: T.GPTJConfig(n_embd=128, n_layer=2, n_head=4, rotary_dim=32, **UNTIED),
    "codegen": lambda: T.CodeGenConfig(n_embd=128, n_layer=2, n_head=4, rotary_dim=32, **UNTIED),
    "openai-gpt": lambda: T.OpenAIGPTConfig(n_embd=128, n_layer=2, n_head=4, vocab_size=512),
    "t5": lambda: T.T5Config(**T5),
    "t5, gated": lambda: T.T5Config(**{**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": lambda: T.MT5Config(**T5),
    "umt5": lambda: T.UMT5Config(**T5),
    "longt5": lambda: T.LongT5Config(**T5),
    "mamba": lambda: T.MambaConfig(**MAMBA, time_step_rank=32, **UNTIED),
    "mamba2": lambda: T.Mamba2Config(**MAMBA, num_heads=8, head_dim=32, n_groups=1, **UNTIED),
    "opt": lambda: T.OPTConfig(hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, **LAYERS),
    "bloom": lambda: T.BloomConfig(hidden_size=128, n_layer=2, n_head=4, **SMALL),
    "falcon": lambda: T.FalconConfig(hidden_size=128, **LAYERS),
    "gpt-neo": lambda: T.GPTNeoConfig(hidden_size=128, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
                                      **SMALL),
    "gpt-neox": lambda: T.GPTNeoXConfig(hidden_size=128, intermediate_size=256, **LAYERS),
    "phi": lambda: T.PhiConfig(hidden_size=128, intermediate_size=256, **LAYERS),
    "phi3": lambda: T.Phi3Config(hidden_size=128, intermediate_size=256, **LAYERS),
    "gemma": lambda: T.GemmaConfig(hidden_size=128, intermediate_size=256, **GROUPED),
    "qwen2": lambda: T.Qwen2Config(hidden_size=128, intermediate_size=256, num_key_value_heads=2, **LAYERS),
    "mpt": lambda: T.MptConfig(d_model=128, n_layers=2, n_heads=4, vocab_size=512),
    "stablelm": lambda: T.StableLmConfig(hidden_size=128, intermediate_size=256, num_key_value_heads=4, **LAYERS),
    "bart": lambda: T.BartConfig(d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                 decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, **SMALL),
    "rwkv": lambda: T.RwkvConfig(hidden_size=128, attention_hidden_size=128, num_hidden_layers=2, **SMALL),
    "switch-transformers": lambda: T.SwitchTransformersConfig(**T5, num_experts=2, num_sparse_encoder_layers=0,
                                                              num_sparse_decoder_layers=0),
    "falcon-mamba": lambda: T.FalconMambaConfig(**MAMBA, time_step_rank=32, **UNTIED),
}  # fmt: skip


def auto_class(config: Any) -> Any:
    if config.is_encoder_decoder:
        return T.AutoModelForSeq2SeqLM
    return T.AutoModelForCausalLM


def quantized(folder: Path, config: Any) -> tuple[Path, Path, int]:
    """The model with random weights, every linear of which that GPTQ can hold is quantized: converted, and dense; and
    how many layers that are."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float16)
    model.save_pretrained(folder / "dense")
    plain = load_file(folder / "dense" / "model.safetensors")
    layers: dict[str, GPTQLayer] = {}
    whole = dict(plain)
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)) or f"{name}.weight" not in plain or name.endswith("lm_head"):
            continue
        stored = plain[f"{name}.weight"]
        K, N = stored.shape if isinstance(module, Conv1D) else stored.shape[::-1]
        if K % 32 or N % 8:
            continue
        layers[name] = GPTQLayer(K=K, N=N, group_size=32, seed=len(layers))
        del plain[f"{name}.weight"]
        W = torch.from_numpy(layers[name].weight).to(torch.float16)
        whole[f"{name}.weight"] = (W if isinstance(module, Conv1D) else W.t()).contiguous()
    save_file(whole, folder / "dense" / "model.safetensors", {"format": "pt"})
    written = json.loads((folder / "dense" / "config.json").read_text())
    written["quantization_config"] = quantization_config(group_size=32)
    write_source(folder / "source", layers, plain, config=written)
    convert(folder / "source", folder / "out", Options(device="cpu"))
    return folder / "out", folder / "dense", len(layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_gives_the_logits_of_its_dequantized_self(tmp_path: Path, name: str) -> None:
    config = CONFIGS[name]()
    out, dense, layers = quantized(tmp_path, config)
    assert layers >= 4
    inputs = {"input_ids": tokens(512)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens(512, (2, 5))
    kind = auto_class(config)
    with torch.no_grad():
        expected = kind.from_pretrained(dense, dtype=torch.float32)(**inputs).logits
        model = marlin_convert.load(out, device="cpu", dtype=torch.float32, auto_class=kind)
        found = model(**inputs).logits
    assert sum(type(module).__name__ == "MarlinLinear" for module in model.modules()) == layers
    assert relative(found, expected) < 5e-3
