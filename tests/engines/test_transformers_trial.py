"""What a dry run says of Transformers is what `load` does with the result: the same class, or the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import marlin_convert
from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.configs import result_config
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.plan import make_plan
from marlin_convert.engines.transformers_trial import Trial, try_loading
from marlin_convert.errors import MarlinConvertError
from marlin_convert.options import Options, QuantMethod
from tests.support.tiny_models import llama, make, qwen3_moe

SMALL = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def trial_of(folder: Path) -> Trial:
    with Checkpoint(folder) as checkpoint:
        plan = make_plan(checkpoint)
    return try_loading(result_config(plan, QuantMethod.GPTQ), plan.out_tensors)


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """The checkpoint at `folder`, its config and tensors changed."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path, llama(**SMALL)).source


def test_a_model_that_loads(source: Path, tmp_path: Path) -> None:
    assert trial_of(source) == Trial("LlamaForCausalLM")
    assert type(marlin_convert.load(tmp_path / "out", device="cpu")).__name__ == "LlamaForCausalLM"


def test_a_router_is_dequantized(tmp_path: Path) -> None:
    """A router has a weight and is no linear."""
    pair = make(tmp_path, qwen3_moe(**SMALL, moe_intermediate_size=256, num_experts=32), r"_proj$|mlp\.gate$")
    assert trial_of(pair.source) == Trial("Qwen3MoeForCausalLM", ["model.layers.0.mlp.gate"])


def sizes_of_another_model(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["intermediate_size"] = 512


def no_norm(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def a_norm_of_another_shape(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(128)


def layers_that_the_model_has_not(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    layer = {name: tensor for name, tensor in tensors.items() if "q_proj" in name}
    tensors |= {name.replace("layers.0", "layers.7"): tensor.clone() for name, tensor in layer.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (sizes_of_another_model, "config.json and the weights do not belong together"),
        (no_norm, "model.norm.weight (missing from the checkpoint)"),
        (a_norm_of_another_shape, "model.norm.weight (of another shape)"),
        (layers_that_the_model_has_not, "(in the checkpoint and not in the model)"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_it_says_what_load_will_say(source: Path, tmp_path: Path, change: Any, words: str) -> None:
    trial = trial_of(changed(source, change))
    assert trial.model is None
    assert trial.why_not is not None
    assert words in trial.why_not
    convert(source, tmp_path / "result", Options(device="cpu"))
    with pytest.raises(MarlinConvertError) as caught:
        marlin_convert.load(tmp_path / "result", device="cpu")
    said = caught.value.message.replace(f"{tmp_path / 'result'}: ", "").rstrip(".")
    assert said == trial.why_not


def of_its_own_code(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config |= {"model_type": "nobodys", "auto_map": {"AutoModelForCausalLM": "modeling.Nobodys"}}


def very_deep(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["num_hidden_layers"] = 10**9


def of_wrong_types(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["hidden_size"] = "many"


def of_a_part(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config |= {"model_type": "clip_vision_model", "architectures": ["../nothing"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            of_its_own_code,
            "has no models of type 'nobodys'; its code is its own, which marlin-convert does not run here",
        ),
        (very_deep, "config.json says num_hidden_layers 1000000000, and the checkpoint has "),
        (of_wrong_types, ": "),
        (of_a_part, "config.json names no architecture that Transformers "),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_configs_of_other_kinds(source: Path, change: Any, words: str) -> None:
    trial = trial_of(changed(source, change))
    assert trial.model is None
    assert trial.why_not is not None
    assert words in trial.why_not
    assert "\n" not in trial.why_not


def test_without_a_config_there_is_no_model(source: Path) -> None:
    assert try_loading(None, []) == Trial(why_not="there is no config.json")
