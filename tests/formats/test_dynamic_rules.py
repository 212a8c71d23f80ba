"""Rules for some of the layers (`dynamic`), as GPTQModel has them."""

from __future__ import annotations

import re
import resource
import subprocess
from typing import Any

import pytest

from marlin_convert.errors import SourceError
from marlin_convert.formats.gptq_config import GPTQSettings, parse_settings
from tests.support.gptq_settings import parse, refusal

ONE = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
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
