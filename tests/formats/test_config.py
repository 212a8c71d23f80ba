"""What a source says about itself, in every spelling that is met."""

from __future__ import annotations

from typing import Any

import pytest

from marlin_convert.errors import SourceError, UnsupportedError
from marlin_convert.formats.gptq_config import find_configs, parse_settings
from tests.support.gptq_settings import parse, refusal

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
    assert parse_settings({"quantize_config.json": raw}, of_awq=True).bits == 4
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
    [({"act_bits": 8}, "activations are quantized too"), ({"data_type": "nv_fp4"}, "of the type 'nv_fp4'"),
     ({"hadamard_config": {"a": 1}}, "weights are rotated"), ({"spinquant_config": {"r1": True}}, "spinquant_config")],
)  # fmt: skip
@pytest.mark.parametrize("awq", [False, True])
def test_auto_round_beside_whole_numbers(own: dict[str, Any], named: str, awq: bool) -> None:
    packing = "auto_round:auto_awq" if awq else "auto_round"
    with pytest.raises(UnsupportedError, match=named) as error:
        parse_settings({"a": {"quant_method": "auto-round", "packing_format": packing, **own}}, of_awq=awq)
    assert "quantize the model again with scheme='W4A16'" in error.value.message


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
