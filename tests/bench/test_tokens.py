"""Tokens per second, on a rig without a GPU: what is decoded, what is reported, what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

import marlin_convert
from marlin_convert.bench.results import Machine
from marlin_convert.bench.tokens import CONTEXT, GRAPHS, LAUNCHES, STEPS, Decoder, ModelRig, bench, time_launched
from marlin_convert.cli.bench_output import BenchScreen
from marlin_convert.cli.params import OutputOptions
from marlin_convert.cli.plot import Plot
from marlin_convert.engines.linear import MarlinLinear
from marlin_convert.errors import DeviceError, OutputError
from tests.support.cli import Run, validate
from tests.support.tiny_models import Pair, continues_greedily, llama, make, relative, tokens

MACHINE = Machine("cuda:0", "a GPU", "9.0", 132, 50_000_000, 80_000_000_000, "580", {"torch": "2"}, None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make(tmp_path_factory.mktemp("model"), llama(num_hidden_layers=1))


def rig(seconds: Callable[[Decoder], float] = lambda decoder: 0.5, why: str | None = None) -> ModelRig:
    return ModelRig(
        lambda: MACHINE, lambda decoder, steps: (seconds(decoder), LAUNCHES if why else GRAPHS, why), lambda: None
    )


def mistral() -> MistralConfig:
    settings = llama(num_hidden_layers=1).to_diff_dict()
    settings.pop("model_type")
    return MistralConfig(**settings, sliding_window=64)


@pytest.mark.parametrize("config", [llama, mistral])
def test_what_is_timed_is_greedy_decoding(config: Callable[[], Any]) -> None:
    """Step after step, the most likely token; and after another prefill, so again."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config()).eval()
    decoder = Decoder(model, 3, context=9, steps=6)
    for _ in range(2):
        decoder.prefill()
        made = [decoder.tokens.clone()]
        for _ in range(6):
            decoder.step()
            made.append(decoder.tokens.clone())
        assert continues_greedily(model, torch.cat([decoder.prompt, *made], dim=1), 7)
        assert len(set(torch.cat(made).flatten().tolist())) > 3


def test_steps_are_timed_without_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Recorded:
        def prefill(self) -> None:
            calls.append("prefill")

        def step(self) -> None:
            calls.append("step")

    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    seconds = time_launched(Recorded(), 4, lambda: calls.append("wait"))  # type: ignore[arg-type]
    assert seconds == 1 / 4
    assert calls == ["prefill", "wait", *["step"] * 4, "wait"] * 3


def test_report(pair: Pair) -> None:
    """First Marlin, then the same model in fp16; rates are those of all sequences together."""
    model = marlin_convert.load(pair.out, device="cpu")
    seen: list[tuple[int, int, bool]] = []

    def seconds(decoder: Decoder) -> float:
        marlin = any(isinstance(module, MarlinLinear) for module in decoder.model.modules())
        seen.append((decoder.batch, decoder.prompt.shape[1], marlin))
        return 0.25 if marlin else 0.5

    report = bench("a model", model, rig(seconds), batch=(1, 8))
    assert seen == [(1, CONTEXT, True), (8, CONTEXT, True), (1, CONTEXT, False), (8, CONTEXT, False)]
    assert report.as_dict()["cells"] == [
        {"batch": 1, "fp16": 2.0, "marlin": 4.0, "speedup": 2.0},
        {"batch": 8, "fp16": 16.0, "marlin": 32.0, "speedup": 2.0},
    ]
    assert report.as_dict()["method"] == {
        "context": 128, "steps": 64, "repeats": 3, "execution": {"marlin": GRAPHS, "fp16": GRAPHS}
    }  # fmt: skip
    assert report.weight_bytes["marlin"] < report.weight_bytes["fp16"]
    ids = tokens(512)
    assert relative(model(ids).logits, pair.reference()(ids).logits) <= 2e-3


def test_memory_runs_out(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(decoder: Decoder) -> float:
        marlin = any(isinstance(module, MarlinLinear) for module in decoder.model.modules())
        if decoder.batch == 8 or (decoder.batch == 4 and not marlin):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    report = bench("a model", marlin_convert.load(pair.out, device="cpu"), rig(seconds), batch=(1, 4, 8))
    assert [(c.batch, c.fp16, c.marlin, c.speedup) for c in report.cells] == [(1, 1.0, 1.0, 1.0), (4, None, 4.0, None)]
    assert report.notes == {"left out: the GPU's memory ran out": ["marlin, batch 8", "fp16, batch 4", "fp16, batch 8"]}

    def no_memory(self: MarlinLinear, dtype: torch.dtype | None = None) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MarlinLinear, "dequantize", no_memory)
    report = bench("a model", marlin_convert.load(pair.out, device="cpu"), rig(), batch=(2,))
    assert [(c.fp16, c.marlin) for c in report.cells] == [(None, 4.0)]
    assert "left out: the GPU's memory does not hold the model" in report.notes
    model = marlin_convert.load(pair.out, device="cpu")
    with pytest.raises(DeviceError, match="nothing could be measured on a GPU: left out"):
        bench("a model", model, rig(seconds), batch=(8,))


def test_without_a_graph_it_is_said(pair: Pair) -> None:
    model = marlin_convert.load(pair.out, device="cpu")
    report = bench("a model", model, rig(why="operation not permitted"), batch=(1,))
    assert report.execution == {"marlin": LAUNCHES, "fp16": LAUNCHES}
    assert report.notes == {
        "timed with every launch from Python, no CUDA graph: operation not permitted":
            ["marlin, batch 1", "fp16, batch 1"]
    }  # fmt: skip


def test_dequantized_by_transformers_own_name(pair: Pair) -> None:
    model = AutoModelForCausalLM.from_pretrained(pair.out)
    model.dequantize()
    reference = pair.reference()
    state, wanted = model.state_dict(), reference.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not hasattr(model.config, "quantization_config")


# ---- What is shown ----


def shown(pair: Pair, capsys: pytest.CaptureFixture[str], as_json: bool, plot: Path | None = None) -> str:
    model = marlin_convert.load(pair.out, device="cpu")
    report = bench("a/model", model, rig(lambda d: 0.5 if d.batch > 1 else 0.25), batch=(1, 2))
    capsys.readouterr()
    BenchScreen(OutputOptions(as_json=as_json, source="out")).tokens(report, plot)
    if plot:
        assert Plot(plot).draw(report.as_dict()) is None
    return capsys.readouterr().out


def test_table_and_json(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(pair, capsys, as_json=False)
    assert "a GPU (cuda:0), capability 9.0" in text
    assert [line.split() for line in text.splitlines() if line.strip().endswith("x")] == [
        ["1", "4.0", "4.0", "1.00x"],
        ["2", "4.0", "4.0", "1.00x"],
    ]
    assert "decoding behind 128 tokens, all sequences together; marlin: CUDA graph; fp16: CUDA graph" in text
    document = json.loads(shown(pair, capsys, as_json=True))
    validate(document)
    assert document["ok"] is True
    assert document["plot"] is None
    assert [cell["batch"] for cell in document["cells"]] == [1, 2]


def test_plot(pair: Pair, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown(pair, capsys, as_json=False, plot=tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    report = bench("m", marlin_convert.load(pair.out, device="cpu"), rig(), batch=(1,))
    plot = Plot(tmp_path / "a.png")
    plot.path = tmp_path / "nowhere" / "a.png"
    assert isinstance(plot.draw(report.as_dict()), OutputError)


def test_refusals(pair: Pair, run: Callable[..., Run]) -> None:
    result = run("bench", pair.out, "--tokens", "--device", "cpu")
    assert (result.code, result.out) == (5, "")
    assert "bench measures a GPU" in result.err
    result = run("bench", "--tokens")
    assert result.code == 2
    assert "--tokens needs a SOURCE, a Marlin checkpoint" in result.err
    assert run("bench", pair.out, "--tokens", "--compare").code == 2
    assert CONTEXT + STEPS == 192
