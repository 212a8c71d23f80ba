"""Mixtures of experts in Transformers on a CPU: fused there, each by itself in a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

import marlin_convert.hf  # noqa: F401 - Transformers knows of Marlin by it
from marlin_convert.conversion.convert import convert
from marlin_convert.errors import SourceError, UnsupportedError
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import GPTQLayer, quantization_config, write_source
from tests.support.tiny_models import (
    BLOCKS,
    from_pretrained,
    llama,
    make,
    marlin_layers,
    mixtral,
    qwen3_moe,
    same_logits,
)

pytestmark = pytest.mark.slow  # models run


def as_one_operator(experts: Any) -> bool:
    """Whether a block has an operator for all of its experts, which computes what the loop over them does."""
    grouped = experts._in_one()
    if grouped is None:
        return False
    torch.manual_seed(0)
    x, weights = torch.randn(5, grouped.sets[0].gate.in_features), torch.rand(5, 2)
    ids = torch.rand(5, experts._count).argsort(1)[:, :2]
    want, found = experts(x.half(), ids, weights), grouped(x.half(), ids, weights)
    return bool((found - want).float().norm() <= 5e-3 * want.float().norm())


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
def test_mixtures_of_experts(tmp_path: Path, config: Callable[[], Any]) -> None:
    """Transformers fuses the experts into two tensors; a checkpoint has each by itself."""
    pair = make(tmp_path, config())
    assert sum(".experts." in name for name in pair.layers) == 2 * 4 * 3
    model, info = from_pretrained(pair.out, output_loading_info=True)
    assert len(marlin_layers(model)) == len(pair.layers)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, pair.reference())
    assert all(as_one_operator(layer.mlp.experts) for layer in model.model.layers)  # as on a GPU
    same_logits(model, pair.reference())
    model.save_pretrained(tmp_path / "saved")
    saved, stored = load_file(tmp_path / "saved" / "model.safetensors"), pair.tensors()
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)


def test_experts_left_unquantized(tmp_path: Path) -> None:
    pair = make(tmp_path, qwen3_moe(), r"self_attn\.[qkvo]_proj$")
    model = from_pretrained(pair.out)
    assert len(marlin_layers(model)) == 8
    same_logits(model, pair.reference())


def test_some_experts_of_a_block_quantized_and_others_not(tmp_path: Path) -> None:
    """Transformers would fuse those that are plain with the others."""
    pair = make(tmp_path, qwen3_moe(), r"experts\.([012]\.(gate|up|down)|3\.gate)_proj$")
    model, info = from_pretrained(pair.out, output_loading_info=True)
    assert len(marlin_layers(model)) == len(pair.layers) == 2 * 10
    assert not info["missing_keys"]
    same_logits(model, pair.reference())
    assert not as_one_operator(model.model.layers[0].mlp.experts)


def renamed(source: Path, folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of a GPTQ checkpoint of one file with the names of its tensors changed, converted."""
    shutil.copytree(source, folder / "source")
    file = folder / "source" / "model.safetensors"
    tensors = load_file(file)
    for old, new in changes:
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, {"format": "pt"})
    convert(folder / "source", folder / "out", Options(device="cpu"))
    return folder / "out"


def test_experts_under_the_names_of_transformers_and_gptqmodel(tmp_path: Path) -> None:
    """Mixtral's are w1, w3, w2 in `block_sparse_moe` on the Hub, gate_proj, up_proj, down_proj in `mlp` in memory."""
    pair = make(tmp_path / "pair", mixtral())
    names = (
        (r"block_sparse_moe\.", "mlp."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.w2\.", ".down_proj."),
    )
    out = renamed(pair.source, tmp_path / "renamed", *names)
    assert "model.layers.1.mlp.experts.3.gate_proj.B" in load_file(out / "model.safetensors")
    model, info = from_pretrained(out, output_loading_info=True)
    assert len(marlin_layers(model)) == len(pair.layers)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, pair.reference())
    out = renamed(pair.source, tmp_path / "unknown", (r"\.w1\.", ".first."))
    with pytest.raises(UnsupportedError, match=r"experts: first, .* are not what an expert's layers .* are called"):
        from_pretrained(out)


def test_experts_with_biases_and_an_activation_of_their_own(tmp_path: Path) -> None:
    """gpt-oss: columns of gate and up by turns, limits, biases; GPTQModel makes a linear of each."""
    settings = {**llama().to_diff_dict(), "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64}
    del settings["model_type"]
    torch.manual_seed(0)
    reference = GptOssForCausalLM(GptOssConfig(**settings | {"intermediate_size": 256, "num_hidden_layers": 1})).half()
    experts: Any = reference.model.layers[0].mlp.experts
    layers: dict[str, GPTQLayer] = {}
    for number in range(4):
        for part in ("gate_proj", "up_proj", "down_proj"):
            layers[f"model.layers.0.mlp.experts.{number}.{part}"] = GPTQLayer(bias=True, seed=len(layers))
        gate, up, down = list(layers.values())[-3:]
        for start, layer in ((0, gate), (1, up)):
            experts.gate_up_proj.data[number, :, start::2] = torch.from_numpy(layer.weight)
            experts.gate_up_proj_bias.data[number, start::2] = layer.bias_tensor
        experts.down_proj.data[number] = torch.from_numpy(down.weight)
        experts.down_proj_bias.data[number] = down.bias_tensor
    plain = {k: v for k, v in reference.state_dict().items() if ".experts." not in k}
    written = {
        **json.loads(reference.config.to_json_string(use_diff=False)),
        "quantization_config": quantization_config(),
    }
    write_source(tmp_path / "source", layers, plain, config=written)
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    model, info = from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float16)
    assert marlin_layers(model) == layers.keys()
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, reference.eval())
    assert as_one_operator(model.model.layers[0].mlp.experts)
    del layers["model.layers.0.mlp.experts.3.down_proj"]
    write_source(tmp_path / "less", layers, plain, config=written)
    convert(tmp_path / "less", tmp_path / "less-out", Options(device="cpu"))
    with pytest.raises(SourceError, match=r"experts\.3\.down_proj: it is neither a Marlin layer nor a plain one"):
        from_pretrained(tmp_path / "less-out")


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
def test_a_quantized_router(tmp_path: Path, config: Callable[[], Any]) -> None:
    """It is no linear layer in Transformers: its weight is dequantized."""
    pair = make(tmp_path, config(), BLOCKS + r"|\.gate$", group_size=32)
    routers = [name for name in pair.layers if name.endswith(".gate")]
    assert len(routers) == 2
    model, info = from_pretrained(pair.out, output_loading_info=True)
    assert len(marlin_layers(model)) == len(pair.layers) - 2
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    gate = model.model.layers[1].mlp.gate
    assert isinstance(gate.weight, torch.nn.Parameter)
    assert torch.equal(gate.weight, torch.from_numpy(pair.layers[routers[1]].weight).to(gate.weight.dtype).t())
    assert not any("marlin" in name for name, _ in gate.named_buffers())
    same_logits(model, pair.reference())
    model.save_pretrained(tmp_path / "saved")
    same_logits(from_pretrained(tmp_path / "saved"), pair.reference())
