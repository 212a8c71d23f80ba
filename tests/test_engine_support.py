"""The one table of engines: what the README, the pages, the card and vLLM's own code say of them is the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from marlin_convert import engine_support as engines
from marlin_convert.engine_support import ENGINES, LayerFacts, ResultFacts
from marlin_convert.options import Format, QuantMethod

ROOT = Path(__file__).parents[1]


def result(*layers: LayerFacts, **changes: Any) -> ResultFacts:
    facts: dict[str, Any] = {
        "format": Format.MARLIN, "layers": layers or (LayerFacts("a", 4, 128),), "group_size": 128,
        "quant_method": QuantMethod.GPTQ, "weight_files": 1, "config": {"model_type": "llama"},
    }  # fmt: skip
    return ResultFacts(**{**facts, **changes})


def names(facts: ResultFacts) -> list[str]:
    found = [*engines.readers(facts, with_plugin=True), *engines.readers(facts, with_plugin=False)]
    assert all(engine.how for engine in found)
    return [engine.name for engine in found]


BESIDE = ["vLLM 0.26 to 0.33", "SGLang 0.5.23 (run on a CPU so far)", "Transformers 5"]


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({}, ["vLLM 0.3.3 to 0.10.0", "AutoGPTQ 0.7.1", "TGI 3.x", "candle-vllm"]),
        ({"group_size": -1}, ["vLLM 0.3.3 to 0.10.0", "AutoGPTQ 0.7.1", "TGI 3.x"]),
        ({"weight_files": 2}, ["vLLM 0.3.3 to 0.10.0", "TGI 3.x"]),
        ({"quant_method": QuantMethod.MARLIN}, ["TGI 3.x"]),
        ({"format": Format.MARLIN_EXT}, []),
    ],
    ids=str,
)
def test_who_reads_a_result(changes: dict[str, Any], alone: list[str]) -> None:
    assert names(result(**changes)) == BESIDE + alone


def test_who_reads_experts() -> None:
    first, second = LayerFacts("l.experts.0.up", 4, 128), LayerFacts("l.experts.1.up", 4, 64)
    extended = {"format": Format.MARLIN_EXT}
    assert names(result(first, **extended)) == BESIDE
    assert names(result(first, second, **extended)) == BESIDE
    assert engines.vllm_needs_our_kernels([first, second]) == {engines.DIFFERENT: ["l.experts.0.up", "l.experts.1.up"]}


def test_models_that_were_not_tried() -> None:
    """T5 is no model of vLLM's, minimax_m2 one whose experts its plugin refuses; of nobody's nothing is known."""
    expert = LayerFacts("l.experts.0.up", 4, 128)
    assert names(result(config={"model_type": "t5"}))[0] == "Transformers 5"
    assert names(result(config={"model_type": "nobodys"}))[0] == "vLLM 0.3.3 to 0.10.0"
    assert names(result(config=None)) == names(result(config={"model_type": 3})) == []
    assert engines.doubts(result(expert, config={"model_type": "minimax_m2"})) == {
        "vLLM 0.26 to 0.33": "experts of models of type 'minimax_m2' are refused"
    }


def test_what_vllm_was_tried_with() -> None:
    """The table is that of tests/engines/test_vllm_models.py: what is refused there on one rank is not promised."""
    pytest.importorskip("transformers")
    from tests.support.vllm_architectures import ARCHITECTURES, REFUSED

    refused = {name for name, ranks in REFUSED if ranks == 1}
    assert engines.tried("vllm")["load"] == sorted({name.split(",")[0] for name in ARCHITECTURES.keys() - refused})
    assert set(engines.tried("vllm")["refused"]) <= refused


def test_what_sglang_was_tried_with() -> None:
    """The table is that of tests/engines/test_sglang_models.py."""
    from tests.support.sglang_architectures import LOADED, REFUSED

    assert engines.tried("sglang")["load"] == sorted(LOADED)
    assert not {name for name in REFUSED if "," not in name} & set(LOADED)
    assert engines.SGLANG.startswith(f"SGLang {engines.tried('sglang')['version']} ")


def test_what_sglang_refuses() -> None:
    expert, apart = LayerFacts("l.experts.0.up", 4, 128, bias=True), LayerFacts("l.self_attn.kv_b_proj", 4, 128)
    plain = [LayerFacts("l.experts.0.up", 8, 16, zeros=True, act_order=True, padded=True), LayerFacts("q", 4, 128)]
    assert engines.sglang_refuses([expert, apart, *plain]) == {
        engines.BIASED: [expert.name], engines.TAKEN_APART: [apart.name]
    }  # fmt: skip
    llama = {"model_type": "llama"}
    assert engines.SGLANG in names(result(*plain, config=llama))
    assert engines.doubts(result(apart, config=llama)) == {
        engines.SGLANG: "layers that SGLang takes apart after loading are refused"
    }
    assert "'glm'" in engines.doubts(result(*plain, config={"model_type": "glm"}))[engines.SGLANG]


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        (LayerFacts("x", 4, 128), None),
        (LayerFacts("x", 8, -1), None),
        (LayerFacts("x", 4, 32, zeros=True, act_order=True, padded=True, bias=True), None),
        (LayerFacts("x", 4, 16), "groups of 16"),
        (LayerFacts("x", 8, 128, zeros=True), "8 bits with zero points"),
    ],
    ids=str,
)
def test_what_vllm_lacks(layer: LayerFacts, fault: str | None) -> None:
    assert engines.vllm_needs_our_kernels([layer]) == ({} if fault is None else {fault: ["x"]})


def test_the_readme_has_this_table() -> None:
    assert engines.markdown_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pages_name_the_same_versions() -> None:
    """Wherever a page says which vLLM the plugin is for, and which engines read the original format."""
    versions = engines.VLLM.removeprefix("vLLM ")
    first = versions.split(" to ")[0]
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(rf"{re.escape(first)} to 0\.\d+", text):
            assert found == versions, path
    page = (ROOT / "docs" / "guides" / "tgi.md").read_text(encoding="utf-8")
    assert [x for x in ("TGI 3.x", "AutoGPTQ 0.7.1", "candle-vllm", "GPTQModel") if f"## {x}\n" not in page] == []
    assert {"TGI 3.x", "AutoGPTQ 0.7.1", "candle-vllm", "GPTQModel"} <= {engine.name for engine in ENGINES}


def test_vllms_own_code_says_the_same() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from marlin_convert.engines import vllm_calls as calls

    assert sorted(calls.GROUP_SIZES) == sorted(engines.VLLM_GROUP_SIZES)
    assert set(calls.TYPES) == set(engines.VLLM_KINDS)
