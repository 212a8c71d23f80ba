"""What a source says about itself, in every spelling that is met; and what a Marlin checkpoint says."""

from __future__ import annotations

import copy
import re
import resource
import subprocess
from typing import Any

import pytest

from marlin_convert.errors import MarlinConvertError, SourceError, UnsupportedError
from marlin_convert.formats.gptq_config import GPTQSettings, find_configs, parse_settings, with_format
from marlin_convert.formats.marlin_config import (
    LayerSettings,
    marlin_ext_settings,
    marlin_model_config,
    marlin_settings,
    read_marlin_settings,
)
from marlin_convert.options import QuantMethod


def parse(**raw: Any) -> GPTQSettings:
    """The settings of a source whose only config is a quantize_config.json with `raw`."""
    return parse_settings({"quantize_config.json": raw})


def refusal(configs: dict[str, dict[str, Any]], kind: type[MarlinConvertError] = UnsupportedError) -> str:
    with pytest.raises(kind) as caught:
        parse_settings(configs)
    assert type(caught.value) is kind
    message = caught.value.message
    assert "\n" not in message
    assert message.endswith(".")
    return message


# ---- Spellings ----


@pytest.mark.parametrize(
    ("raw", "key", "value"),
    [
        ({"bits": 4}, "bits", 4),
        ({"w_bit": 8}, "bits", 8),
        ({"wbits": 3}, "bits", 3),
        ({"bits": None, "w_bit": 4}, "bits", 4),
        ({"group_size": 128}, "group_size", 128),
        ({"group_size": -1}, "group_size", -1),
        ({"q_group_size": 64}, "group_size", 64),
        ({"groupsize": 32}, "group_size", 32),
        ({"sym": True}, "sym", True),
        ({"sym": False}, "sym", False),
        ({"zero_point": True}, "sym", False),  # zero_point = not sym
        ({"zero_point": False}, "sym", True),
        ({"sym": True, "zero_point": True}, "sym", True),
        ({"desc_act": True}, "desc_act", True),
        ({"desc_act": False}, "desc_act", False),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format", "gptq_v2"),
        ({"checkpoint_format": "GPTQ"}, "checkpoint_format", "gptq"),
        ({"format": "gptq_v2"}, "checkpoint_format", "gptq_v2"),
        ({"version": "gptq_v2"}, "checkpoint_format", "gptq_v2"),
        ({"version": "GPTQ"}, "checkpoint_format", "gptq"),
        ({"checkpoint_format": None, "format": "gptq"}, "checkpoint_format", "gptq"),
        ({"version": "1.0"}, "checkpoint_format", None),  # a version number, and no layout
        ({"version": 2}, "checkpoint_format", None),
        ({"checkpoint_format": "gptq", "version": "7.3.0"}, "checkpoint_format", "gptq"),
        ({"checkpoint_format": "gptq_v2", "version": "gptq"}, "checkpoint_format", "gptq_v2"),
    ],
    ids=str,
)
def test_spelling(raw: dict[str, Any], key: str, value: object) -> None:
    settings = parse(**raw)
    assert getattr(settings, key) == value
    others = {"bits", "group_size", "sym", "desc_act", "checkpoint_format"} - {key}
    assert all(getattr(settings, other) is None for other in others)


@pytest.mark.parametrize("method", [{"quant_method": "gptq"}, {"method": "gptq"}, {"quant_method": "GPTQ"},
                                    {"quant_method": "gptqmodel"}, {"quant_method": None}, {}], ids=str)  # fmt: skip
def test_method_that_is_gptq(method: dict[str, Any]) -> None:
    assert parse(bits=4, **method).bits == 4


@pytest.mark.parametrize("configs", [{}, {"config.json": {}}, {"config.json": {"quantization_config": None}},
                                     {"config.json": {"text_config": 3}}, {"quantize_config.json": {}}],
                         ids=str)  # fmt: skip
def test_nothing_said(configs: dict[str, dict[str, Any]]) -> None:
    settings = parse_settings(configs)
    said = (settings.bits, settings.group_size, settings.sym, settings.desc_act, settings.checkpoint_format)
    assert said == (None, None, None, None, None)
    assert not settings.is_marlin
    assert settings.dynamic == {}
    assert settings.conflicts == {}


@pytest.mark.parametrize("key", ["bits", "w_bit", "wbits", "group_size", "q_group_size", "groupsize"])
@pytest.mark.parametrize("value", ["4", 4.0, True, [4], {}])
def test_number_that_is_none(key: str, value: object) -> None:
    message = refusal({"quantize_config.json": {key: value}}, SourceError)
    assert message.startswith("quantize_config.json: ")
    assert repr(value) in message


@pytest.mark.parametrize("key", ["sym", "desc_act"])
@pytest.mark.parametrize("value", ["true", 1, 0, "", []])
def test_boolean_that_is_none(key: str, value: object) -> None:
    message = refusal({"config.json": {"quantization_config": {key: value}}}, SourceError)
    assert message.startswith(f"config.json: {key} ")


# ---- Places ----


ONE = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
PLACES = {
    "config.json": {"config.json": {"quantization_config": ONE}},
    "config.json text_config": {"config.json": {"text_config": {"quantization_config": ONE}}},
    "quantize_config.json": {"quantize_config.json": ONE},
    "quant_config.json": {"quant_config.json": ONE},
    "quantization_config.json": {"quantization_config.json": ONE},
}


@pytest.mark.parametrize(("where", "configs"), PLACES.items(), ids=PLACES)
def test_place(where: str, configs: dict[str, dict[str, Any]]) -> None:
    assert find_configs(configs) == {where: ONE}
    settings = parse_settings(configs)
    assert (settings.bits, settings.group_size, settings.sym, settings.desc_act) == (4, 128, True, False)


def test_places_complete_each_other() -> None:
    settings = parse_settings(
        {"config.json": {"quantization_config": {"bits": 4}, "text_config": {"quantization_config": {"sym": True}}},
         "quantize_config.json": {"group_size": 128}, "quant_config.json": {"desc_act": False, "w_bit": 4}}
    )  # fmt: skip
    assert (settings.bits, settings.group_size, settings.sym, settings.desc_act) == (4, 128, True, False)
    assert settings.conflicts == {}


@pytest.mark.parametrize(
    ("key", "a", "b"),
    [("bits", 4, 8), ("group_size", 128, -1), ("sym", True, False), ("desc_act", False, True),
     ("checkpoint_format", "gptq", "gptq_v2")],
)  # fmt: skip
@pytest.mark.parametrize("third", [None, "a", "b"])
def test_conflict(key: str, a: object, b: object, third: str | None) -> None:
    """Neither is believed, whichever comes first and however many say the same."""
    configs: dict[str, dict[str, Any]] = {
        "config.json": {"quantization_config": {**ONE, key: a}}, "quantize_config.json": {**ONE, key: b},
    }  # fmt: skip
    if third:
        configs["quant_config.json"] = {**ONE, key: {"a": a, "b": b}[third]}
    settings = parse_settings(configs)
    assert getattr(settings, key) is None
    assert settings.conflicts.keys() == {key}
    for part in ("config.json", "quantize_config.json", str(a), str(b)):
        assert part in settings.conflicts[key]
    for other in ONE.keys() - {key}:
        assert getattr(settings, other) == ONE[other]


@pytest.mark.parametrize(
    ("a", "b"),
    [({"bits": 4}, {"w_bit": 4}), ({"sym": True}, {"zero_point": False}), ({"format": "GPTQ"}, {"version": "gptq"}),
     ({"sym": None}, {"sym": False}), ({"desc_act": False}, {})],
)  # fmt: skip
def test_the_same_in_other_words_is_no_conflict(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert parse_settings({"config.json": {"quantization_config": a}, "quantize_config.json": b}).conflicts == {}


# ---- Marlin's own label ----


def test_is_marlin_format_false_is_accepted() -> None:
    """AutoGPTQ 0.7.1 writes it into every config."""
    settings = parse(**ONE, is_marlin_format=False)
    assert not settings.is_marlin
    assert settings.bits == 4


@pytest.mark.parametrize("raw", [{"is_marlin_format": True}, {"checkpoint_format": "marlin"}, {"format": "marlin"},
                                 {"quant_method": "marlin"}, {"quant_method": "Marlin"}], ids=str)  # fmt: skip
def test_labelled_marlin(raw: dict[str, Any]) -> None:
    assert parse(**raw).is_marlin
    both = parse_settings({"config.json": {"quantization_config": {"bits": 4}}, "quantize_config.json": raw})
    assert both.is_marlin


# ---- Per-layer rules ----


RULES: dict[str, dict[str, Any]] = {
    "+:.*\\.mlp\\.down_proj": {"bits": 8, "group_size": 32},
    ".*\\.mlp\\.": {"desc_act": True},
    "-:.*\\.lm_head": {},
    "+:.*lm_head": {"sym": False},
    ".*o_proj$": {"bits": 3},
    ".*o_proj_extra": {"bits": 2},
}
DEFAULT = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}


def of_layer(settings: GPTQSettings, name: str) -> GPTQSettings:
    return settings.for_layers([name])[name]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model.layers.0.self_attn.q_proj", {}),
        ("model.layers.0.mlp.down_proj", {"bits": 8, "group_size": 32}),  # the first hit wins, also over the second
        ("model.layers.0.mlp.up_proj", {"desc_act": True}),
        ("model.lm_head", {}),  # "-:" overrides nothing, and is a hit: the next rule is not asked
        ("lm_head", {"sym": False}),  # "-:" wants a dot before it
        ("model.layers.3.o_proj", {"bits": 3}),
        ("model.layers.3.o_proj_extra", {"bits": 2}),  # "$" keeps the rule before from matching
        ("x", {}),
    ],
)
def test_dynamic_rules(name: str, changes: dict[str, Any]) -> None:
    layer = of_layer(parse(**ONE, dynamic=RULES), name)
    assert {key: getattr(layer, key) for key in DEFAULT} == {**DEFAULT, **changes}


def test_dynamic_rules_match_from_the_start_of_the_name() -> None:
    """re.match, not re.search."""
    settings = parse(**ONE, dynamic={"mlp": {"bits": 8}, "+:model": {"bits": 3}})
    assert of_layer(settings, "layers.mlp").bits == 4
    assert of_layer(settings, "mlp.up").bits == 8
    assert of_layer(settings, "model.mlp").bits == 3


def test_dynamic_rule_in_other_spellings() -> None:
    settings = parse(**ONE, dynamic={"a": {"w_bit": 8, "q_group_size": 32, "zero_point": True}, "b": None})
    layer = of_layer(settings, "a.x")
    assert (layer.bits, layer.group_size, layer.sym) == (8, 32, False)
    assert of_layer(settings, "b").bits == 4


def test_dynamic_rule_settles_a_conflict_for_its_layers() -> None:
    settings = parse_settings(
        {"config.json": {"quantization_config": {"sym": True, "dynamic": {"a": {"sym": True}}}},
         "quantize_config.json": {"sym": False}}
    )  # fmt: skip
    assert of_layer(settings, "a").sym is True
    assert of_layer(settings, "a").conflicts == {}
    assert of_layer(settings, "b").conflicts.keys() == {"sym"}


def test_dynamic_rules_of_a_second_config_count_where_the_first_has_none() -> None:
    configs: dict[str, Any] = {"config.json": {"quantization_config": {"dynamic": {}}},
               "quantize_config.json": {"dynamic": {"a": {"bits": 8}}}}  # fmt: skip
    assert of_layer(parse_settings(configs), "a").bits == 8


@pytest.mark.parametrize(
    "pattern", ["+:(", "-:[", "*", "+:a{2,1}", "(?P<x", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "(?(9)a)"]
)
def test_dynamic_rule_that_is_no_regular_expression(pattern: str) -> None:
    """Refused, also when an earlier rule matches everything."""
    settings = parse(dynamic={".*": {}, pattern: {"bits": 8}})
    with pytest.raises(SourceError) as error:
        of_layer(settings, "a")
    assert error.value.message.startswith(f"the dynamic rule {repr(pattern)[:60]}")
    assert error.value.message.count("\n") == 0
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+c", "(.*a){20}b", "(?i)" + r"[\x00-\U0010ffff]" * 200]
)
def test_dynamic_rule_that_takes_for_ever(pattern: str) -> None:
    """It ends within its share of the processor's time, whatever the machine's speed."""
    settings = parse(dynamic={".*x": {"bits": 8}, pattern: {"bits": 4}})
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(SourceError) as error:
        of_layer(settings, "a" * 200)
    assert error.value.message.startswith(f"the dynamic rule {repr(pattern)[:60]}")
    assert error.value.message.endswith(" it takes too long to match.")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        (r"model\.(?!mtp)", ["model.a", "model.layers.0.up"]),
        (r"(\w+)\.\1", ["mlp.mlp.x"]),
        (r"^model\.layers\.0\.up$", ["model.layers.0.up"]),
        (r"model\.layers\.0\.up$", ["model.layers.0.up"]),
        (r"^model\.layers\.0$", []),
        (r"model.layers.0.up$", ["model.layers.0.up", "modelXlayers.0.up"]),
        (r"(?i)MODEL", ["model.a", "model.mtp", "model.layers.0.up", "modelXlayers.0.up"]),
        (r"größe\b", ["größe.up"]),
        (r"[^\W\d]+e\.up\Z", ["größe.up"]),
    ],
)
def test_dynamic_rules_are_those_of_re(pattern: str, hits: list[str]) -> None:
    names = ["model.a", "model.mtp", "model.layers.0.up", "modelXlayers.0.up", "mlp.mlp.x", "größe.up"]
    assert [name for name in names if re.match(pattern, name)] == hits
    found = parse(bits=4, dynamic={pattern: {"bits": 8}}).for_layers(names)
    assert [name for name in names if found[name].bits == 8] == hits


def test_thousands_of_rules_for_single_layers() -> None:
    """As GPTQModel writes them: one rule for each layer."""
    names = [f"model.layers.{i // 8}.mlp.experts.{i % 8}.up_proj" for i in range(4000)]
    rules = {"+:^" + re.escape(name) + "$": {"bits": 2 + i % 7} for i, name in enumerate(names[:2000])}
    found = parse(**ONE, dynamic=rules).for_layers(names)
    assert [found[name].bits for name in names] == [2 + i % 7 for i in range(2000)] + [4] * 2000


def test_no_process_without_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert of_layer(parse(bits=4), "a").bits == 4


@pytest.mark.parametrize("dynamic", [["a"], "a", 3])
def test_dynamic_that_is_no_map(dynamic: object) -> None:
    assert "dynamic" in refusal({"quantize_config.json": {"dynamic": dynamic}}, SourceError)


@pytest.mark.parametrize("dynamic", [None, {}, False])
def test_no_dynamic_rules(dynamic: object) -> None:
    assert parse(dynamic=dynamic).dynamic == {}


def test_dynamic_rule_with_an_odd_value() -> None:
    message = refusal({"quantize_config.json": {"dynamic": {"+:a": {"bits": "four"}}}}, SourceError)
    assert "'+:a'" in message
    assert "'four'" in message


# ---- Other methods ----


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"quant_method": "awq"}, "AWQ"),
        ({"method": "awq"}, "AWQ"),
        ({"quant_method": "AWQ"}, "AWQ"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "AWQ"),
        ({"version": "gemv_fast"}, "AWQ"),
        ({"quant_method": "gptq", "checkpoint_format": "gemm"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "exl2"}, "EXL2"),
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "gguf"}, "GGUF"),
        ({"quant_method": "hqq"}, "HQQ"),
        ({"quant_method": "aqlm"}, "AQLM"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "something-new"}, "'something-new'"),
        ({"quant_method": "gptq", "checkpoint_format": "bitblas"}, "'bitblas'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_other_method_is_named(raw: dict[str, Any], named: str, file: str) -> None:
    message = refusal({file: {"quantization_config": raw} if file == "config.json" else raw})
    assert message.startswith(f"{file}: ")
    assert named in message


@pytest.mark.parametrize("method", ["auto-round", "auto_round", "autoround", "intel/auto-round"])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_gptq", "AUTO_ROUND:AUTO_GPTQ"])
def test_auto_round_in_gptq_packing(method: str, packing: str) -> None:
    settings = parse(quant_method=method, packing_format=packing, bits=4, group_size=128, sym=True, format="int")
    assert (settings.bits, settings.group_size, settings.sym) == (4, 128, True)


def test_auto_round_exported_as_gptq() -> None:
    assert parse(quant_method="gptq", autoround_version="0.5", bits=4, packing_format="auto_round:auto_gptq").bits == 4


@pytest.mark.parametrize("packing", ["auto_round:mlx", None, "", "auto_round:fp8"])
def test_auto_round_in_another_packing(packing: str | None) -> None:
    message = refusal(
        {"config.json": {"quantization_config": {"quant_method": "auto-round", "packing_format": packing}}}
    )
    assert "AutoRound" in message
    assert "format='auto_round'" in message  # the way out
    assert packing is None or packing.removeprefix("auto_round:") in message


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:awq"])
def test_auto_round_in_awq_s_packing(packing: str) -> None:
    raw = {"quant_method": "auto-round", "packing_format": packing, "bits": 4}
    assert parse_settings({"quantize_config.json": raw}, awq=True).bits == 4
    assert "AutoRound in AWQ's packing, and the tensors are GPTQ's" in refusal({"quantize_config.json": raw})


@pytest.mark.parametrize(
    ("packing", "format"),
    [("auto_round", "gptq_v2"), ("auto_round:gptqmodel", "gptq_v2"), ("auto_round:exllamav2", "gptq_v2"),
     ("auto_round:auto_gptq", "gptq")],
)  # fmt: skip
def test_how_auto_round_stores_zero_points(packing: str, format: str) -> None:
    assert parse(quant_method="auto-round", packing_format=packing).checkpoint_format == format


@pytest.mark.parametrize(
    ("own", "named"),
    [({"act_bits": 8}, "activations are quantized too"), ({"data_type": "nv_fp4"}, "of type 'nv_fp4'"),
     ({"hadamard_config": {"a": 1}}, "weights are rotated")],
)  # fmt: skip
@pytest.mark.parametrize("awq", [False, True])
def test_auto_round_beside_whole_numbers(own: dict[str, Any], named: str, awq: bool) -> None:
    packing = "auto_round:auto_awq" if awq else "auto_round"
    with pytest.raises(UnsupportedError, match=named):
        parse_settings({"a": {"quant_method": "auto-round", "packing_format": packing, **own}}, awq=awq)


def test_extra_config_names_layers_or_matches_them() -> None:
    extra = {"a.b": {"bits": 8, "group_size": 64, "sym": False}, "c": {"bits": 16}, r".*\.q_proj": {"group_size": 32}}
    settings = parse(quant_method="auto-round", packing_format="auto_round", bits=4, group_size=128, sym=True,
                     extra_config=extra)  # fmt: skip
    found = settings.for_layers(["a.b", "aXb", "x.q_proj"])
    assert [(x.bits, x.group_size, x.sym) for x in found.values()] == [(8, 64, False), (4, 128, True), (4, 32, True)]
    assert "extra_config" in refusal({"a": {**settings.raw, "extra_config": ["a"]}}, SourceError)


@pytest.mark.parametrize("pack_dtype", ["int32", "torch.int32", None])
def test_pack_dtype_int32(pack_dtype: str | None) -> None:
    assert parse(bits=4, pack_dtype=pack_dtype).bits == 4


@pytest.mark.parametrize("pack_dtype", ["int8", "int16", "int64", "torch.int8", 8])
def test_other_pack_dtype(pack_dtype: object) -> None:
    message = refusal({"quantize_config.json": {"bits": 4, "pack_dtype": pack_dtype}})
    assert message.startswith(f"quantize_config.json: pack_dtype {pack_dtype}")


# ---- What a Marlin checkpoint says ----


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


@pytest.mark.parametrize("name", ["tie_word_embeddings", "quantization_config", ""])
def test_what_is_no_part_of_a_model_ties_nothing(name: str) -> None:
    """A map under a name that means something else, as nobody writes it: the head still is its own."""
    settings = {"bits": 4}
    config = {"tie_word_embeddings": True, name: {"tie_word_embeddings": {"a": 1}}}
    result = marlin_model_config(config, settings, own_head=True)
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
