"""What a dry run says of engines: which read the result, on how many ranks, and what is not promised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marlin_convert.cli import commands
from marlin_convert.engine_support import VLLM
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, write_source


def test_the_engines_are_those_that_read_it(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    plain = run(source.folder, tmp_path / "a", "--dry-run")
    assert (
        "original Marlin format, which vLLM 0.26 to 0.33, SGLang 0.5.23 (run on a CPU so far) and Transformers 5 with "
        "marlin-convert, and vLLM 0.3.3" in plain.out
    )
    assert "vLLM computes" not in plain.out
    layers = {f"model.layers.0.mlp.experts.{i}.up_proj": GPTQLayer(bias=True) for i in range(3)}
    experts = write_source(tmp_path / "experts", layers)
    for command in ([experts.folder, "--dry-run"], [experts.folder, tmp_path / "out"]):
        said = run(*command).out
        assert "vLLM 0.26 to 0.33 and Transformers 5 with marlin-convert" in said
        assert "SGLang 0.5.23 (run on a CPU so far): experts with biases are refused" in said
        assert "vLLM computes experts with biases where marlin-convert's CUDA kernels are built: 3 layers" in said


def test_an_engine_on_several_ranks(run: Callable[..., Run], tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.o_proj": GPTQLayer(K=256, N=256, g_idx=np.arange(256)[::-1] // 128),
        "model.layers.0.mlp.down_proj": GPTQLayer(K=512, N=256),
    }
    source = write_source(tmp_path / "source", layers)
    ask = [source.folder, "--dry-run", "--engine", "vllm"]
    one = run(*ask)
    assert "vLLM 0.26 to 0.33 with marlin-convert, 1 rank: takes every layer" in one.out, one.err
    two = run(*ask, "--tensor-parallel", 2).out
    assert "vLLM 0.26 to 0.33 with marlin-convert, 2 ranks: takes every layer" in two
    assert "act-order in rows that 2 ranks share out: model.layers.0.self_attn.o_proj: exact on marlin-convert's" in two
    assert "refuses 2 of 2 layers" in run(*ask, "--tensor-parallel", 3).out
    told = json.loads(run(*ask, "--tensor-parallel", 2, "--json").out)["tensor_parallel"]
    assert told["ranks"] == 2
    assert [cut["layers"] for cut in told["cuts"]] == [["model.layers.0.self_attn.o_proj"]]


def test_experts_that_vllm_refuses(run: Callable[..., Run], tmp_path: Path) -> None:
    layers = {f"model.layers.0.block_sparse_moe.experts.{i}.w1": GPTQLayer() for i in range(3)}
    source = write_source(tmp_path / "source", {**layers, "model.layers.0.self_attn.o_proj": GPTQLayer()})
    config = json.loads((source.folder / "config.json").read_text())
    (source.folder / "config.json").write_text(json.dumps({**config, "model_type": "minimax_m2"}))
    said = run(source.folder, "--dry-run", "--engine", "vllm").out
    assert "vLLM 0.26 to 0.33 with marlin-convert, 1 rank: refuses 3 of 4 layers" in said
    assert (
        "experts of models of type 'minimax_m2': 3 layers, model.layers.0.block_sparse_moe.experts.{0-2}.w1: "
        "refused; in Transformers they run"
    ) in said


def test_sglang_on_several_ranks(main: Callable[..., Run], tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.o_proj": GPTQLayer(K=256, N=256, g_idx=np.arange(256)[::-1] // 128),
        "model.layers.0.self_attn.kv_b_proj": GPTQLayer(K=256, N=256),
    }
    source = write_source(tmp_path / "source", layers)
    said = main(source.folder, "--dry-run", "--engine", "sglang", "--tensor-parallel", 2).out
    assert "SGLang 0.5.23 (run on a CPU so far) with marlin-convert, 2 ranks: refuses 1 of 2 layers" in said
    assert "layers that SGLang takes apart after loading: model.layers.0.self_attn.kv_b_proj: refused" in said
    assert (
        "act-order in rows that 2 ranks share out: model.layers.0.self_attn.o_proj: exact on marlin-convert's" in said
    )
    assert "computed on GPUs of compute capability 8.0 and newer by marlin-convert's CUDA kernels alone" in said


def test_transformers_is_asked_itself(run: Callable[..., Run], source: Source) -> None:
    """This source's config says the sizes of another model, by saying none."""
    ask = [source.folder, "--dry-run", "--engine", "transformers"]
    said = run(*ask)
    assert said.code == 0
    assert "Transformers 5 with marlin-convert: does not load it: model.layers.0." in said.out
    assert "config.json and the weights do not belong together" in said.out
    told = run(*ask, "--json").json()
    assert told["transformers"]["why_not"].endswith("config.json and the weights do not belong together")
    good = run(commands.DEMO_FOLDER, "--dry-run", "--engine", "transformers").out
    assert "Transformers 5 with marlin-convert: loads it, as LlamaForCausalLM; on GPUs" in good


@pytest.mark.parametrize(
    ("config", "doubts"),
    [
        ({"model_type": "t5"}, {VLLM: "models of type 't5' are not among those that were tried and load"}),
        (
            {"model_type": "x", "auto_map": {}},
            {
                VLLM: "models of type 'x', with code of their own, are not among those that were tried and load",
                "Transformers 5": "models of type 'x', with code of their own, are not among those that were tried and "
                "load (Transformers ",
            },
        ),
        (
            {"architectures": ["A"]},
            dict.fromkeys((VLLM, "Transformers 5"), "config.json has no model_type, which says what the model is"),
        ),
        (None, dict.fromkeys((VLLM, "Transformers 5"), "there is no config.json, which says what the model is")),
    ],
    ids=["t5", "own code", "no type", "no config"],
)
def test_engines_that_are_not_promised(
    main: Callable[..., Run], tmp_path: Path, config: dict[str, Any] | None, doubts: dict[str, str]
) -> None:
    settings = quantization_config()
    source = write_source(tmp_path / "source", config={**(config or {}), "quantization_config": settings})
    if config is None:
        (source.folder / "config.json").rename(source.folder / "quantize_config.json")
        (source.folder / "quantize_config.json").write_text(json.dumps(settings))
    for command in ([source.folder, "--dry-run"], [source.folder, tmp_path / "out", "--device", "cpu"]):
        said = main(*command)
        for name in (VLLM, "Transformers 5"):
            line = next(line for line in said.out.splitlines() if line.startswith(("format: ", "read by")))
            assert (name in line.replace("vLLM 0.3.3 to 0.10.0", "")) == (name not in doubts), said.out
            if name in doubts:
                assert f"  {name}: {doubts[name]}" in said.out
    engines = {x["name"]: x for x in main(source.folder, "--dry-run", "--json").json()["engines"]}
    assert [engines[name]["reads"] for name in (VLLM, "Transformers 5")] == [
        name not in doubts for name in (VLLM, "Transformers 5")
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("In Transformers 5:" in card) == ("Transformers 5" not in doubts)
    assert (f"In {VLLM}, in the same environment:" in card) == (VLLM not in doubts)


@pytest.mark.parametrize(
    "arguments",
    [["OUT", "--engine", "vllm"], ["--dry-run", "--tensor-parallel", 2], ["--dry-run", "--engine", "tgi"]],
)
def test_engines_without_their_options(run: Callable[..., Run], source: Source, arguments: list[Any]) -> None:
    assert run(source.folder, *arguments).code == 2


def test_a_refused_source_has_no_format(run: Callable[..., Run], tmp_path: Path) -> None:
    write_source(tmp_path / "source", {"a": GPTQLayer(bits=2, stored_zero=1)}, plain={})
    result = run(tmp_path / "source", "--dry-run")
    assert result.code == 4
    assert "2-bit weights; Marlin has 4 and 8 bits, with which the model has to be quantized: a" in result.err
    assert "format:" not in result.out
