"""What a Marlin checkpoint says about itself: written, read, and told from what others say."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from marlin_convert.errors import SourceError, UnsupportedError
from marlin_convert.formats.gptq_config import parse_settings, with_format
from marlin_convert.formats.marlin_config import (
    LayerSettings,
    marlin_ext_settings,
    marlin_model_config,
    marlin_settings,
    read_marlin_settings,
)
from marlin_convert.options import QuantMethod
from tests.support.gptq_settings import parse

#: What AutoGPTQ, vLLM ≤ 0.10.0, TGI and candle-vllm look for.
MARLIN = {
    "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "static_groups": False, "true_sequential": True,
    "lm_head": False, "quant_method": "gptq", "checkpoint_format": "marlin", "is_marlin_format": True,
    "model_file_base_name": "model",
}  # fmt: skip


def settings_of(group_size: int = 128, lm_head: bool = False, quant_method: str = "gptq", **raw: Any) -> dict[str, Any]:
    return marlin_settings(parse(**raw), group_size=group_size, lm_head=lm_head, quant_method=QuantMethod(quant_method))


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ({}, {}),
        ({"group_size": -1}, {"group_size": -1}),
        ({"lm_head": True}, {"lm_head": True}),
        ({"quant_method": "marlin"}, {"quant_method": "marlin"}),
        ({"true_sequential": False}, {"true_sequential": False}),
        ({"true_sequential": None}, {}),
        ({"damp_percent": 0.1}, {"damp_percent": 0.1}),
        ({"damp_percent": None}, {}),
        ({"meta": {"damp_percent": 0.05, "true_sequential": False, "quantizer": ["x:1"]}},
         {"damp_percent": 0.05, "true_sequential": False}),
        ({"meta": {"damp_percent": 0.05}, "damp_percent": 0.01}, {"damp_percent": 0.01}),
        ({"meta": {"damp_percent": 0.05, "true_sequential": None}, "damp_percent": None}, {"damp_percent": 0.05}),
        ({"meta": "gptqmodel"}, {}),
        ({"bits": 4, "desc_act": True, "sym": False, "static_groups": True, "is_marlin_format": False,
          "dynamic": {"a": {}}, "model_file_base_name": "gptq_model-4bit-128g", "pack_dtype": "int32", "version": "1"},
         {}),
    ],
)  # fmt: skip
def test_marlin_settings(source: dict[str, Any], changes: dict[str, Any]) -> None:
    assert settings_of(**source) == {**MARLIN, **changes}


def test_config_json_is_believed_first() -> None:
    configs: dict[str, Any] = {"config.json": {"quantization_config": {"damp_percent": 0.1}},
               "quantize_config.json": {"damp_percent": 0.01, "true_sequential": False}}  # fmt: skip
    result = marlin_settings(parse_settings(configs), group_size=128, lm_head=False, quant_method=QuantMethod.GPTQ)
    assert (result["damp_percent"], result["true_sequential"]) == (0.1, False)


def test_marlin_settings_are_recognised_as_marlin() -> None:
    for place in ("config.json", "quantize_config.json"):
        configs = {place: {"quantization_config": MARLIN} if place == "config.json" else settings_of()}
        settings = parse_settings(configs)
        assert settings.is_marlin
        assert settings.checkpoint_format == "marlin"


def test_marlin_model_config() -> None:
    source = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {"bits": 4, "dynamic": {"-:x": {}}},
        "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 8.0, "dtype": "kept"},
    }
    before = copy.deepcopy(source)
    assert marlin_model_config(source, MARLIN) == {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": MARLIN,
        "torch_dtype": "float16",
        "dtype": "float16",
        "rope_scaling": {"factor": 8.0, "dtype": "kept"},
    }
    assert source == before


def test_marlin_model_config_with_a_text_config() -> None:
    """Where the source has the quantization inside text_config, a reader may look there; elsewhere it stays absent."""
    source = {"text_config": {"hidden_size": 1, "dtype": "bfloat16", "quantization_config": {"bits": 4}}}
    result = marlin_model_config(source, MARLIN)
    assert result["quantization_config"] == MARLIN
    assert result["text_config"] == {"hidden_size": 1, "dtype": "float16", "quantization_config": MARLIN}
    source = {"quantization_config": {"bits": 4}, "text_config": {"hidden_size": 1, "torch_dtype": "bfloat16"}}
    result = marlin_model_config(source, MARLIN)
    assert result["text_config"] == {"hidden_size": 1, "torch_dtype": "float16"}


def test_marlin_model_config_without_settings_in_it() -> None:
    """The source kept them in quantize_config.json only; engines look into config.json."""
    result = marlin_model_config({"model_type": "llama"}, MARLIN)
    assert result == {
        "model_type": "llama", "quantization_config": MARLIN, "torch_dtype": "float16", "dtype": "float16",
    }  # fmt: skip


# ---- Marlin settings ----

EXT = {
    "quant_method": "gptq", "checkpoint_format": "marlin_ext", "marlin_ext_version": 1,
    "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "lm_head": False,
    "layers": {
        "a.q_proj": {"bits": 8, "group_size": 32, "sym": False, "desc_act": True},
        "a.down_proj": {"in_features": 1000, "out_features": 576, "source_group_size": 256},
    },
}  # fmt: skip


def test_read_the_example_of_the_specification() -> None:
    settings = read_marlin_settings(EXT)
    assert settings.format == "marlin_ext"
    assert settings.layer("a.k_proj") == LayerSettings(4, 128, True, False)
    assert settings.layer("a.q_proj") == LayerSettings(8, 32, False, True)
    assert settings.layer("a.down_proj") == LayerSettings(4, 128, True, False, 1000, 576, 256)


def test_write_what_is_most_common_once() -> None:
    plain, other = LayerSettings(4, 64, True, True), LayerSettings(8, -1, False, False, out_features=576)
    layers = {"a": other, "b": plain, "c": plain}
    assert marlin_ext_settings(layers, lm_head=True) == {
        "quant_method": "gptq", "checkpoint_format": "marlin_ext", "marlin_ext_version": 1,
        "bits": 4, "group_size": 64, "sym": True, "desc_act": True, "lm_head": True,
        "layers": {"a": {"bits": 8, "group_size": -1, "sym": False, "desc_act": False, "out_features": 576}},
    }  # fmt: skip
    read = read_marlin_settings(marlin_ext_settings(layers, lm_head=True))
    assert {name: read.layer(name) for name in layers} == layers
    assert "layers" not in marlin_ext_settings({"b": plain}, lm_head=False)


@pytest.mark.parametrize(
    "config",
    [
        {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "is_marlin_format": True},
        {"bits": 4, "group_size": 128, "sym": True, "quant_method": "gptq", "checkpoint_format": "marlin"},
        {"group_size": 128, "quant_method": "marlin"},
    ],
    ids=["AutoGPTQ 0.7.1", "AutoGPTQ main", "quant_method alone"],
)
def test_read_original_settings_of_others(config: dict[str, Any]) -> None:
    settings = read_marlin_settings(config)
    assert settings.format == "marlin"
    assert settings.layer("any") == LayerSettings(4, 128, True, False)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({**EXT, "marlin_ext_version": 2}, UnsupportedError, "marlin_ext_version is 2"),
        ({**EXT, "marlin_ext_version": True}, UnsupportedError, "marlin_ext_version is True"),
        ({**EXT, "bits": 3}, SourceError, "bits is 3; one of 4, 8"),
        ({**EXT, "group_size": 96}, SourceError, "group_size is 96"),
        ({**EXT, "sym": None}, SourceError, "sym is None"),
        ({**EXT, "layers": {"a": {"in_features": 0}}}, SourceError, "quantization_config, a: in_features is 0"),
        ({**EXT, "layers": {"a": {"colour": 1}}}, SourceError, "not as the format has it"),
        ({**EXT, "layers": []}, SourceError, r"layers is \[\]"),
        ({"quant_method": "gptq", "bits": 4}, UnsupportedError, "does not describe a Marlin checkpoint"),
        ({"is_marlin_format": True, "bits": 8, "group_size": 128}, SourceError, "here it is 8 bits"),
    ],
    ids=str,
)
def test_refuse_other_marlin_settings(config: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_marlin_settings(config)


@pytest.mark.parametrize("name", ["tie_word_embeddings", "quantization_config", "torch_dtype", "dtype", ""])
def test_what_is_no_part_of_a_model_ties_nothing(name: str) -> None:
    """A map under a name that means something else, as nobody writes it: the head still is its own."""
    settings = {"bits": 4}
    config = {"tie_word_embeddings": True, name: {"tie_word_embeddings": {"a": 1}}}
    result = marlin_model_config(config, settings, untied_head=True)
    assert result["tie_word_embeddings"] is False
    assert result["quantization_config"] == {"bits": 4} == settings


@pytest.mark.parametrize(
    ("config", "format", "expected"),
    [
        ({"quant_method": "gptq"}, "gptq", {}),
        ({"quant_method": "gptq"}, "gptq_v2", {"checkpoint_format": "gptq_v2"}),
        ({"format": "gptq"}, "gptq_v2", {"format": "gptq_v2"}),
        ({"checkpoint_format": "gptq_v2"}, "gptq", {"checkpoint_format": "gptq"}),
        ({"checkpoint_format": "gptq_p"}, "gptq_v2", {}),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "gptq", {}),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "gptq_v2", {}),
        ({"quant_method": "auto-round", "packing_format": "auto_round"}, "gptq",
         {"packing_format": "auto_round:auto_gptq"}),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, "gptq_v2",
         {"packing_format": "auto_round:gptqmodel"}),
    ],
)  # fmt: skip
def test_a_config_with_another_format(config: dict[str, Any], format: str, expected: dict[str, Any]) -> None:
    assert with_format(config, format) == {**config, **expected}
