"""Architectures of Transformers: with Marlin layers they load, and give what they give with the dequantized weights.

Some dozens in the ordinary suite; all that Transformers has with `-m sweep`, and with them the page that lists them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from marlin_convert.engine_support import tried as tried_in
from tests.support.architectures import Outcome, quietly, tried
from tests.support.architectures_page import combined, outcomes_of, page
from tests.support.small_models import model_types

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"

#: Those whose code looks at a linear's weight, or has it the other way round, or computes experts in a way of its own,
#: and those that are met most.
ALWAYS = [
    "apertus",
    "arcee",
    "aria_text",
    "bart",
    "bert",
    "biogpt",
    "bitnet",
    "bloom",
    "clip",
    "codegen",
    "cohere2_moe",
    "ctrl",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "glm4_moe",
    "glm4v",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granitemoe",
    "hunyuan_v1_moe",
    "inkling_text",
    "jamba",
    "lfm2",
    "llama",
    "llama4_text",
    "longcat_flash",
    "longt5",
    "mamba",
    "mamba2",
    "minimax_m2",
    "mistral",
    "mixtral",
    "mpt",
    "mt5",
    "nemotron",
    "nemotron_h",
    "olmoe",
    "openai-gpt",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_moe_text",
    "reformer",
    "rwkv",
    "stablelm",
    "starcoder2",
    "switch_transformers",
    "t5",
    "umt5",
    "vit",
    "whisper",
    "xlnet",
    "zamba2",
]


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with quietly():
        yield


@pytest.mark.parametrize("model_type", ALWAYS)
def test_a_model_gives_what_its_dequantized_self_gives(model_type: str) -> None:
    outcome = tried(model_type)
    assert (outcome.state, outcome.layers > 0) == ("loads", True), outcome
    assert (outcome.trial.why_not, len(outcome.trial.dequantized)) == (None, outcome.dequantized), outcome
    assert outcome.compared in outcomes_of(PAGE.read_text(encoding="utf-8"))[model_type], outcome


@pytest.mark.sweep
def test_all_of_them_and_the_page_that_lists_them() -> None:
    found = [tried(model_type) for model_type in model_types()]
    assert not [outcome for outcome in found if outcome.failed]
    assert page(found, transformers.__version__) == PAGE.read_text(encoding="utf-8")


def test_what_is_promised_is_what_the_page_lists() -> None:
    text = PAGE.read_text(encoding="utf-8")
    known = tried_in("transformers")
    assert known["load"] == sorted(outcomes_of(text))
    assert f"Transformers {known['version']} has a configuration for" in text


def test_what_is_told_of_an_outcome() -> None:
    """The page and its reading agree, and a fault is one."""
    found = [
        Outcome("a", "A", 4, "loads", "outputs", 0.0),
        Outcome("b", "B", 4, "loads", "layers", 0.0),
        Outcome("c", state="not built", why="no class"),
        Outcome("d", "D", state="nothing to quantize"),
        Outcome("e", "E", 4, "differs", "outputs", 0.5),
    ]
    assert [outcome.failed for outcome in found] == [False, False, False, False, True]
    assert outcomes_of(page(found, "5.0")) == {"a": "outputs", "b": "layers"}
    assert combined(found)["loads"] == 2
