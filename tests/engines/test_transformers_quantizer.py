"""Marlin checkpoints in Transformers on a CPU: what is replaced, what comes out, what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import GPTQConfig

import marlin_convert
from marlin_convert.engines import transformers_quantizer as hf
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.errors import DeviceError, SourceError, UnsupportedError
from marlin_convert.native import cuda
from tests.support.cli import PATIENCE
from tests.support.hub_server import Hub
from tests.support.tiny_models import (
    BLOCKS,
    Pair,
    continues_greedily,
    from_pretrained,
    llama,
    make,
    marlin_layers,
    qwen3_moe,
    relative,
    same_logits,
    tokens,
)

pytestmark = pytest.mark.slow  # models run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("llama"), llama())


def edited(pair: Pair, folder: Path, **config: Any) -> Path:
    """A copy of the converted checkpoint with other quantization settings; None removes a key."""
    shutil.copytree(pair.out, folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text())
    quantization = {**settings["quantization_config"], **config}
    settings["quantization_config"] = {key: value for key, value in quantization.items() if value is not None}
    file.write_text(json.dumps(settings))
    return folder


def test_from_pretrained(pair: Pair) -> None:
    model, info = from_pretrained(pair.out, output_loading_info=True)
    assert marlin_layers(model) == pair.layers.keys()
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model.dtype == torch.float16
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, pair.reference())


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_format": None},  # is_marlin_format alone: AutoGPTQ 0.7.1
        {"is_marlin_format": None},
        {"quant_method": "marlin", "checkpoint_format": None, "is_marlin_format": None},
        {"group_size": -1},  # the tensors count, not what the settings say
    ],
)
def test_the_same_checkpoint_under_other_names(pair: Pair, tmp_path: Path, config: dict[str, Any]) -> None:
    folder = edited(pair, tmp_path / "model", **config)
    same_logits(from_pretrained(folder), pair.reference())


def test_other_gptq_checkpoints_go_to_the_stock_reader() -> None:
    """The very class and the very object that Transformers makes without this package."""
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "checkpoint_format": "gptq_v2"}
    config = AutoQuantizationConfig.from_dict(dict(settings))
    assert type(config) is GPTQConfig
    assert config.to_dict() == GPTQConfig.from_dict(dict(settings)).to_dict()
    with_marlin_off = {**settings, "checkpoint_format": "gptq", "is_marlin_format": False}  # in every AutoGPTQ config
    assert type(AutoQuantizationConfig.from_dict(with_marlin_off)) is GPTQConfig
    ours = AutoQuantizationConfig.from_dict({**settings, "checkpoint_format": "marlin"})
    assert type(ours) is hf.MarlinConfig


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(pair: Pair, dtype: torch.dtype) -> None:
    """The activations change, the scales do not."""
    model = from_pretrained(pair.out, dtype=dtype)
    stored = pair.tensors()
    assert model.dtype == dtype
    for name in marlin_layers(model):
        assert torch.equal(model.get_submodule(name).s, stored[f"{name}.s"])
    same_logits(model, pair.reference(dtype), 2e-3 if dtype != torch.bfloat16 else 2e-2)


def test_saving_gives_the_same_tensors(pair: Pair, tmp_path: Path) -> None:
    from_pretrained(pair.out).save_pretrained(tmp_path)
    saved, stored = load_file(tmp_path / "model.safetensors"), pair.tensors()
    assert saved.keys() == stored.keys()
    for name, tensor in stored.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path, pair.out)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    same_logits(marlin_convert.load(tmp_path, device="cpu"), pair.reference())


def test_biases_a_quantized_head_and_skipped_layers(tmp_path: Path) -> None:
    which = r"(layers\.0\.self_attn\.[qkvo]_proj|layers\.1\.mlp\.\w+_proj|lm_head)$"
    pair = make(tmp_path, llama(attention_bias=True), which)
    model = from_pretrained(pair.out)
    assert marlin_layers(model) == pair.layers.keys()
    assert model.lm_head.bias is None
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    same_logits(model, pair.reference())


def test_tied_embeddings(tmp_path: Path) -> None:
    pair = make(tmp_path / "tied", llama(tie_word_embeddings=True))
    model = from_pretrained(pair.out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_logits(model, pair.reference())


def test_a_quantized_head_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    pair = make(tmp_path / "model", llama(), BLOCKS + "|lm_head$")
    file = pair.out / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    assert json.loads(file.read_text())["tie_word_embeddings"] is True
    model = from_pretrained(pair.out)
    assert isinstance(model.lm_head, MarlinLinear)
    same_logits(model, pair.reference())
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == pair.tensors().keys()
    same_logits(from_pretrained(tmp_path / "saved"), pair.reference())


def test_prompt_and_continuation(pair: Pair) -> None:
    ids = tokens(512, (1, 5))
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    result = from_pretrained(pair.out).generate(ids, **settings)
    assert result.shape == (1, 5 + 16)
    assert torch.equal(result[:, :5], ids)
    assert continues_greedily(pair.reference(), result, 16)
    assert not continues_greedily(pair.reference(), result.flip(1), 16)


# ---- The extended format ----

#: Settings of the layers of a small Llama; K is 256 or 512, N the same.
EXTENDED: dict[str, dict[str, Any]] = {
    "groups of 32": {"group_size": 32},
    "8 bits": {"bits": 8},
    "asymmetric": {"group_size": -1, "stored_zero": np.arange(512)[None] % 15},
    "bf16 scales": {"scale_dtype": torch.bfloat16},
    "act-order": {"g_idx": np.random.default_rng(5).permutation(np.arange(256) // 128)},
}


@pytest.mark.parametrize("kind", EXTENDED)
def test_extended(kind: str, tmp_path: Path) -> None:
    """Each kind of layer: which modules, which logits, and saved as it was."""
    which = {"act-order": r"(q|k|v|o|gate|up)_proj$", "asymmetric": r"(gate|up)_proj$"}.get(kind, BLOCKS)
    pair = make(tmp_path / "model", llama(attention_bias=True), which, by_hand=True, **EXTENDED[kind])
    model, info = from_pretrained(pair.out, output_loading_info=True, dtype=torch.float16)
    assert marlin_layers(model) == pair.layers.keys()
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(model, pair.reference())
    model.save_pretrained(tmp_path / "saved")
    saved, stored = load_file(tmp_path / "saved" / "model.safetensors"), pair.tensors()
    assert saved.keys() == stored.keys()
    assert all(saved[name].dtype == stored[name].dtype and torch.equal(saved[name], stored[name]) for name in stored)
    same_logits(from_pretrained(tmp_path / "saved", dtype=torch.float16), pair.reference())


def test_extended_padded_and_experts(tmp_path: Path) -> None:
    """Sizes that are no multiples of anything, and experts; layers with settings of their own beside the default."""
    config = llama(hidden_size=200, intermediate_size=328, head_dim=40)
    pair = make(tmp_path / "padded", config, by_hand=True, group_size=-1)
    assert pair.tensors()["model.layers.0.mlp.down_proj.marlin_qweight"].shape == (384 // 16, 256 * 2)
    model = marlin_convert.load(pair.out, device="cpu")
    assert repr(model.model.layers[0].mlp.down_proj) == "MarlinLinear(K=328, N=200, group=-1, bits=4)"
    same_logits(model, pair.reference())
    pair = make(tmp_path / "experts", qwen3_moe(), by_hand=True, group_size=64, bits=8)
    model = marlin_convert.load(pair.out, device="cpu")
    assert marlin_layers(model) == pair.layers.keys()
    same_logits(model, pair.reference())


def test_extended_that_is_damaged_or_newer(tmp_path: Path) -> None:
    pair = make(tmp_path / "model", llama(num_hidden_layers=1), by_hand=True, group_size=32)
    with pytest.raises(UnsupportedError, match="marlin_ext_version is 2"):
        from_pretrained(edited(pair, tmp_path / "a", marlin_ext_version=2))
    folder = without(pair, tmp_path / "b", "model.layers.0.mlp.up_proj.marlin_scales")
    with pytest.raises(SourceError, match=r"up_proj: marlin_scales is missing"):
        from_pretrained(folder)
    folder = edited(pair, tmp_path / "c", checkpoint_format="marlin", is_marlin_format=True, group_size=128)
    with pytest.raises(SourceError, match=r"the settings say marlin, and .* is a layer of marlin_ext"):
        from_pretrained(folder)
    for key in ("bits", "group_size", "desc_act", "sym"):  # settings that the tensors contradict
        changed = {"bits": 8, "group_size": 64, "desc_act": True, "sym": False}[key]
        layers = json.loads((pair.out / "config.json").read_text())["quantization_config"]["layers"]
        layers["model.layers.0.mlp.up_proj"][key] = changed
        with pytest.raises((SourceError, RuntimeError)):
            from_pretrained(edited(pair, tmp_path / key, layers=layers))


# ---- What does not fit ----


def without(pair: Pair, folder: Path, name: str, extra: dict[str, torch.Tensor] | None = None) -> Path:
    shutil.copytree(pair.out, folder)
    tensors = {key: value for key, value in pair.tensors().items() if key != name}
    save_file({**tensors, **(extra or {})}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_missing_keys_are_an_error(pair: Pair, tmp_path: Path) -> None:
    folder = without(pair, tmp_path / "a", "model.layers.1.mlp.up_proj.B")
    with pytest.raises(SourceError, match=r"up_proj.weight \(missing from the checkpoint\).*up_proj.s \(in the chec"):
        from_pretrained(folder)
    folder = without(pair, tmp_path / "b", "model.norm.weight")
    with pytest.raises(SourceError, match=r"does not fit LlamaForCausalLM: model.norm.weight \(missing"):
        from_pretrained(folder)
    folder = without(pair, tmp_path / "c", "model.layers.1.mlp.up_proj.s")
    with pytest.raises(SourceError, match=r"up_proj.B \(in the checkpoint and not in the model\)"):
        from_pretrained(folder)


def test_keys_left_over_are_an_error(pair: Pair, tmp_path: Path) -> None:
    layer = {f"model.layers.7.mlp.up_proj.{x}": pair.tensors()[f"model.layers.1.mlp.up_proj.{x}"] for x in "Bs"}
    folder = without(pair, tmp_path / "a", "", layer)
    with pytest.raises(SourceError, match=r"layers.7.mlp.up_proj.B, .*\(in the checkpoint and not in the model\)"):
        from_pretrained(folder)


def test_other_keys_left_over_are_only_said(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers of older versions, scales of a cache, another class's layer: none makes a weight random."""
    attention = "model.layers.0.self_attn"
    extra = {
        f"{attention}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), f"{attention}.masked_bias": torch.tensor(-1e9),
        f"{attention}.rotary_emb.inv_freq": torch.ones(32), f"{attention}.k_proj.k_scale": torch.ones(1),
        "visual.weight": torch.ones(2),
    }  # fmt: skip
    ids = tokens(512)
    with torch.no_grad():
        expected = from_pretrained(pair.out)(ids).logits
        monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
        found = from_pretrained(without(pair, tmp_path / "a", "", extra))(ids).logits
    assert torch.equal(found, expected)
    assert "k_proj.k_scale" in caplog.text


def test_a_config_of_another_size(pair: Pair, tmp_path: Path) -> None:
    folder = edited(pair, tmp_path / "a")
    file = folder / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 512', '"intermediate_size": 768'))
    with pytest.raises(SourceError, match=r"down_proj: the checkpoint has K = 512, N = 256, .* has 768 and 256"):
        from_pretrained(folder)


def test_a_transformers_that_no_longer_tells_the_keys(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check hangs on a method of Transformers: should that go, no model is returned unchecked."""
    monkeypatch.setattr(hf.MarlinQuantizer, "_check_keys", lambda self, model: setattr(
        model, "_adjust_missing_and_unexpected_keys", lambda info: None))  # fmt: skip
    with pytest.raises(UnsupportedError, match="does not say which keys it could not place"):
        from_pretrained(pair.out)


def test_no_marlin_layer_at_all(pair: Pair, tmp_path: Path) -> None:
    folder = edited(pair, tmp_path / "a")
    shutil.copy(pair.dense / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(SourceError, match="its config says Marlin, but it has no Marlin layer"):
        from_pretrained(folder)


def test_a_gpu_that_does_not_suit_is_refused_before_loading(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def device_info(index: int) -> None:
        raise DeviceError(f"cuda:{index} (an old GPU) has compute capability 7.5; Marlin needs 8.0 or newer.")

    monkeypatch.setattr(cuda, "device_info", device_info)
    quantizer = hf.MarlinQuantizer(hf.MarlinConfig(checkpoint_format="marlin"))
    for device_map in ({"": 1}, {"": "cuda:1"}, {"model": "cpu", "lm_head": torch.device("cuda", 1)}):
        with pytest.raises(DeviceError, match="cuda:1"):
            quantizer.validate_environment(device_map=device_map)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="cuda:0"):
        quantizer.validate_environment(device_map="auto")
    quantizer.validate_environment(device_map=None)
    quantizer.validate_environment(device_map={"": "cpu"})


PLACES = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")


@pytest.mark.parametrize(
    "device_map",
    ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"},
     {"model.layers.1": "disk", **dict.fromkeys(PLACES, "cpu")}],
    ids=["cpu", "auto", "whole", "parts", "disk"],
)  # fmt: skip
def test_device_map(pair: Pair, tmp_path: Path, device_map: Any) -> None:
    pytest.importorskip("accelerate", reason="Transformers needs it for a device_map")
    model = from_pretrained(pair.out, device_map=device_map, offload_folder=tmp_path / "disk")
    same_logits(model, pair.reference())


# ---- load ----


def test_load(pair: Pair) -> None:
    assert marlin_convert.load is hf.load
    model = marlin_convert.load(pair.out, device="cpu")
    assert not model.training
    same_logits(model, pair.reference())
    assert marlin_convert.load(str(pair.out), device="cpu", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_load_what_autogptq_wrote(pair: Pair, tmp_path: Path) -> None:
    """Its weights have another name, and its settings may stand in quantize_config.json alone."""
    shutil.copytree(pair.out, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "a" / "gptq_model-4bit-128g.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    settings = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "is_marlin_format": True}
    (tmp_path / "a" / "quantize_config.json").write_text(json.dumps(settings))
    model = marlin_convert.load(tmp_path / "a", device="cpu")
    same_logits(model, pair.reference())
    model.save_pretrained(tmp_path / "b")
    same_logits(from_pretrained(tmp_path / "b"), pair.reference())


LOAD = """
import sys, torch, marlin_convert
from marlin_convert.errors import HubError
model = marlin_convert.load("me/tiny-marlin", device="cpu")
torch.save(model(torch.arange(3, 12)[None]).logits, sys.argv[1])
try: marlin_convert.load("me/nothing", device="cpu")
except HubError as error: print(error)
"""


@pytest.mark.slow
def test_load_from_the_hub(pair: Pair, hub: Hub, tmp_path: Path) -> None:
    hub.add("me/tiny-marlin", pair.out)
    process = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "logits"],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf-home")},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "me/nothing" in process.stdout
    wanted = pair.reference()(torch.arange(3, 12)[None]).logits
    assert relative(torch.load(tmp_path / "logits"), wanted) <= 2e-3


def test_load_what_is_not_marlin(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a Marlin checkpoint; convert it first"):
        marlin_convert.load(pair.source, device="cpu")
    with pytest.raises(SourceError, match="is not a Marlin checkpoint; convert it first"):
        marlin_convert.load(pair.dense, device="cpu")
    with pytest.raises(SourceError):
        marlin_convert.load(tmp_path / "nowhere", device="cpu")
