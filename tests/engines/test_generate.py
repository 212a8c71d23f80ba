"""A prompt through a converted model, on a CPU; and the proof that it is the model that was converted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import marlin_convert
from marlin_convert.cli.commands import DEMO_FOLDER
from marlin_convert.conversion.convert import convert
from marlin_convert.engines import transformers_quantizer as hf
from marlin_convert.engines.generate import Sampling, generate
from marlin_convert.options import Options
from tests.support.cli import Run
from tests.support.tiny_models import PROMPT, SAMPLE, continues_greedily, dequantized_demo, perplexity, relative

pytestmark = pytest.mark.slow

CPU = Options(device="cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    convert(DEMO_FOLDER, folder, CPU)
    return folder


# ---- Proof ----


@pytest.fixture(scope="module")
def both(out: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(the converted model, the same with dequantized weights, the tokenizer)"""
    dense = dequantized_demo(tmp_path_factory.mktemp("dense") / "model")
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float16)
    return marlin_convert.load(out, device="cpu"), reference, AutoTokenizer.from_pretrained(out)


def test_logits(both: tuple[Any, Any, Any]) -> None:
    model, reference, tokenizer = both
    ids = tokenizer(SAMPLE.read_text()[:1500], return_tensors="pt")["input_ids"][:, :256]
    assert ids.shape == (1, 256)
    with torch.no_grad():
        assert relative(model(ids).logits, reference(ids).logits) <= 2e-3


def test_perplexity(out: Path, tmp_path: Path) -> None:
    """In float32, which every CPU multiplies fast."""
    dense = dequantized_demo(tmp_path / "dense")
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model, tokenizer = marlin_convert.load(out, device="cpu", dtype=torch.float32), AutoTokenizer.from_pretrained(out)
    text = SAMPLE.read_text()
    measured, wanted = perplexity(model, tokenizer, text), perplexity(reference, tokenizer, text)
    assert 5 < wanted < 50  # a model that knows its text: one with random weights has some 2000
    assert measured == pytest.approx(wanted, rel=1e-3)


def test_greedy_continuation(both: tuple[Any, Any, Any]) -> None:
    model, reference, tokenizer = both
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    text = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert text.shape == (1, inputs["input_ids"].shape[1] + 64)
    assert continues_greedily(reference, text, 64)


def test_the_source_dequantized_by_the_program(both: tuple[Any, Any, Any]) -> None:
    """What `demo` and `bench --tokens` compare with: every weight as the formula has it."""
    _, reference, _ = both
    model = hf.load_dequantized(DEMO_FOLDER, device="cpu")
    state, wanted = model.state_dict(), reference.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert model.generation_config.eos_token_id == 1


# ---- The command ----


@pytest.fixture(scope="module")
def greedy(out: Path) -> str:
    return generate(out, PROMPT, Sampling(max_new_tokens=12), "cpu").text


def test_text_arrives_while_it_is_made(out: Path, greedy: str) -> None:
    pieces: list[str] = []
    done = generate(out, PROMPT, Sampling(max_new_tokens=12), "cpu", pieces.append)
    assert done.text == greedy == "".join(pieces)
    assert len(pieces) > 3
    assert (done.new_tokens, done.device, done.dtype, done.note) == (12, "cpu", "float16", None)


def test_command(out: Path, greedy: str, run: Callable[..., Run]) -> None:
    settings = ("generate", out, "--prompt", PROMPT, "--max-new-tokens", 12, "--device", "cpu")
    for option, stdout in (("--device", f"{PROMPT}{greedy}\n"), ("--quiet", f"{greedy}\n")):
        result = run(*settings, option, *(["cpu"] if option == "--device" else []))
        assert result.code == 0, result.err
        assert result.out == stdout
        assert ("12 tokens in " in result.err) == (option == "--device")
        assert ("exact, and slow" in result.err) == (option == "--device")
    result = run(*settings, "--json")
    report = result.json()
    assert result.err == ""
    assert report["text"] == greedy
    assert {"ok": True, "prompt": PROMPT, "new_tokens": 12, "greedy": True, "device": "cpu"}.items() <= report.items()


def test_sampling(out: Path, greedy: str) -> None:
    """The model's own settings say do_sample; without options it is greedy all the same. A seed repeats a sample."""
    assert json.loads((out / "generation_config.json").read_text())["do_sample"] is True

    def sampled(**settings: Any) -> str:
        return generate(out, PROMPT, Sampling(12, **settings), "cpu").text

    first, again, other = (sampled(temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({first, other, greedy}) == 3
    assert sampled(temperature=0.0) == greedy
    assert sampled(top_k=1, seed=3) == greedy
    assert sampled(top_p=1e-6, seed=3) == greedy


def test_no_more_tokens_than_the_model_takes(out: Path) -> None:
    short = generate(out, "In the beginning " * 100, Sampling(max_new_tokens=200), "cpu")
    assert short.prompt_tokens + short.new_tokens <= 512
    assert short.note is not None
    assert "the model takes 512" in short.note


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("In the beginning " * 300, "tokens; this model takes 512, the answer included")],
)
def test_prompts_that_do_not_fit(out: Path, run: Callable[..., Run], prompt: str, message: str) -> None:
    result = run("generate", out, "--prompt", prompt, "--device", "cpu")
    assert (result.code, result.out) == (4, "")
    assert message in result.err


def test_what_cannot_be_run(out: Path, tmp_path: Path, run: Callable[..., Run]) -> None:
    def refused(folder: Path, code: int, text: str, **env: str) -> None:
        result = run("generate", folder, "--prompt", "x", "--device", "cpu", env=env)
        assert (result.code, result.out) == (code, "")
        lines = [line for line in result.err.splitlines() if not line.startswith("loading the model … for")]
        assert len(lines) == 1, result.err
        assert text in lines[0]

    refused(DEMO_FOLDER, 3, "demo is not a Marlin checkpoint; convert it first: marlin-convert demo ./out")
    refused(tmp_path / "nowhere", 3, "no such folder")
    shutil.copytree(out, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    refused(tmp_path / "a", 3, "a: it has no tokenizer that Transformers can read")
    shutil.copytree(out, tmp_path / "b")
    config = json.loads((out / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    refused(tmp_path / "b", 3, "Transformers cannot run it")
    refused(out, 1, 'pip install "torch>=2.6" "transformers>=5.6"', PYTHONPATH=without_transformers(tmp_path))


def without_transformers(folder: Path) -> str:
    """A PYTHONPATH with which Transformers cannot be imported."""
    (folder / "hidden" / "transformers").mkdir(parents=True)
    (folder / "hidden" / "transformers" / "__init__.py").write_text("raise ImportError('No module named transformers')")
    return os.pathsep.join([str(folder / "hidden"), *filter(None, [os.environ.get("PYTHONPATH")])])


# ---- The demo ----


def test_demo_continues_a_prompt(tmp_path: Path, run: Callable[..., Run]) -> None:
    result = run("demo", tmp_path / "out", "--device", "cpu")
    assert result.code == 0, result.err
    assert f"prompt: {PROMPT}" in result.out
    lines = {
        line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in result.out.splitlines() if ":" in line
    }
    assert lines["source, dequantized"] == lines["result"]
    assert len(lines["result"].split()) > 15
    assert "  the same text" in result.out


def test_demo_without_transformers(tmp_path: Path, run: Callable[..., Run]) -> None:
    hidden = {"PYTHONPATH": without_transformers(tmp_path)}
    result = run("demo", tmp_path / "out", "--device", "cpu", env=hidden)
    assert result.code == 0, result.err
    assert "verified  56 of 56 layers" in result.out
    assert "no prompt was continued: running a model needs Transformers 5 or newer" in result.out
    report = run("demo", tmp_path / "out2", "--device", "cpu", "--json", env=hidden).json()
    assert (report["ok"], report["continuation"]) == (True, None)
