"""Whole models in vLLM: processes of their own, what they are asked, what becomes of those that fail.

Most sides are `tests/support/served/vllm.py` in vLLM's place, in real processes. With a vLLM for CPUs installed, a tiny
model goes through vLLM itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from marlin_convert.bench import served
from marlin_convert.bench.results import Machine
from marlin_convert.bench.served import FP16, GPTQ, MARLIN, Report, Request, Side
from marlin_convert.cli.bench_output import BenchScreen
from marlin_convert.cli.params import OutputOptions
from marlin_convert.cli.plot import Plot
from marlin_convert.errors import MarlinConvertError, SourceError
from marlin_convert.progress import Progress, ProgressEvent, progress_for
from tests.support.cli import PATIENCE, Run, validate
from tests.support.tiny_models import llama, make
from tests.test_docs import documented

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "support" / "served"
MACHINE = Machine("cuda:0", "a GPU", "9.0", 132, 50_000_000, 80_000_000_000, "580", {"vLLM": "0.99"}, None)
REQUEST = Request("models/marlin", (1, 8), ((1, 512), (4, 2000)), revision="main")
GPTQ_REQUEST = replace(REQUEST, model="models/gptq", revision=None)


def path(*folders: Path) -> str:
    return os.pathsep.join(map(str, [*folders, ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Report, list[dict[str, Any]]]]:
    """The report of some sides, and what each was asked."""
    monkeypatch.syspath_prepend(STAND_IN)

    def measure(progress: Progress | None = None, **requests: Request) -> tuple[Report, list[dict[str, Any]]]:
        asked = tmp_path / "asked"
        environment = {"ASKED": str(asked), "OURS": "1"}
        report = served.bench("a model", requests, environment, progress or Progress(), verbose=False)
        return report, [json.loads(line) for line in asked.read_text().splitlines()]

    return measure


def gone(pid: int) -> bool:
    """Whether a process has ended, whoever waits for it, or ends soon: a signal takes its time."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


def test_each_side_is_asked_for_what_it_is(measured: Any) -> None:
    report, asked = measured(marlin=REQUEST, gptq=GPTQ_REQUEST, fp16=replace(REQUEST, random=True))
    settings = [side["settings"] for side in asked]
    assert [x["model"] for x in settings] == ["models/marlin", "models/gptq", "models/marlin"]
    assert [x["revision"] for x in settings] == ["main", None, "main"]
    assert [x.get("load_format") for x in settings] == [None, None, "dummy"]
    assert [x["hf_overrides"] for x in settings] == [None, None, "there"]
    for x in settings:
        assert (x["max_model_len"], x["max_num_seqs"], x["max_num_batched_tokens"]) == (2048, 8, 8192)
        assert x["compilation_config"] == {"cudagraph_capture_sizes": [1, 8]}
        assert "enforce_eager" not in x
    environments = [side["environment"] for side in asked]
    assert [x["VLLM_PLUGINS"] for x in environments] == [os.environ.get("VLLM_PLUGINS"), "", ""]
    assert {x["OURS"] for x in environments} == {"1"}
    # the engine as vLLM runs it by itself
    assert {x["VLLM_ENABLE_V1_MULTIPROCESSING"] for x in environments} == {
        os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
    }
    assert not any(x.get("disable_log_stats", True) for x in settings)  # without them nobody tells the time of a token
    for cache in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH"):
        assert len({x[cache] for x in environments}) == 3
        assert not any(Path(x[cache]).parent.exists() for x in environments)
    assert len({side["pid"] for side in asked}) == 3
    assert report.notes == {}
    assert report.machine.versions["vLLM"] == "0.99"


def test_the_current_folder_is_not_imported_from(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an installed program's is not. A checkout, with another build of the package or none, may be one."""
    for name in ("marlin_convert", "json"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path / "here")
    report, _ = measured(marlin=REQUEST)
    assert report.sides.keys() == {MARLIN}


def test_rates(measured: Any) -> None:
    """Of decoding without the prompt and the first token, once all sequences have one; of a prefill with one token."""
    report, _ = measured(marlin=REQUEST, gptq=GPTQ_REQUEST, fp16=replace(REQUEST, random=True))
    marlin, gptq, fp16 = (report.sides[name] for name in (MARLIN, GPTQ, FP16))
    assert (marlin.start_s, gptq.start_s) == (60.0, 70.25)
    assert marlin.decode == {1: 4.0, 8: 32.0}
    assert gptq.decode == {1: 2.0, 8: 16.0}
    assert fp16.decode == {1: 1.0, 8: 8.0}
    assert marlin.prefill == {
        (1, 512): pytest.approx(512 / (1 + 0.512 + 0.25), abs=0.1),
        (4, 2000): pytest.approx(8000 / (1 + 8 + 0.25), abs=0.1),
    }
    assert (marlin.kernels, gptq.kernels) == (("marlin-convert's kernels", "vLLM's Marlin kernel"), ("Machete",))


def test_progress(measured: Any) -> None:
    """The start, each batch size and each prompt of each side; of one that fails, what was left."""
    events: list[ProgressEvent] = []
    measured(progress_for(events.append), marlin=REQUEST, gptq=replace(GPTQ_REQUEST, model="refused"))
    assert (events[-1].bytes_done, events[-1].bytes_total) == (10, 10)
    assert (events[-1].layers_done, events[-1].layers_total) == (2, 2)
    assert "Marlin, batch 8" in [event.layer for event in events]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("refused", "ValueError: 1 validation error act-order is no longer supported"),
        ("exits", "its process ended with code 3; its last words: the last words"),
        ("killed", "its process ended by signal 9; its last words: the engine speaks"),
        ("leaves a child", "its process ended with code 4; its last words: the engine speaks"),
        ("too few", "RuntimeError: it made 3 tokens instead of 4"),
    ],
)
def test_a_side_that_fails(measured: Any, model: str, why: str) -> None:
    """Of the others it is a note; without the result there is nothing to say. None of its processes is left."""
    report, asked = measured(marlin=REQUEST, gptq=replace(GPTQ_REQUEST, model=model))
    assert report.sides.keys() == {MARLIN}
    assert report.notes == {f"left out: vLLM does not run it ({why})": ["GPTQ"]}
    assert all(gone(line.get("child", line.get("pid"))) for line in asked)
    with pytest.raises(MarlinConvertError) as failure:
        measured(marlin=replace(REQUEST, model=model), gptq=GPTQ_REQUEST)
    assert failure.value.message.startswith(f"vLLM does not run {model}: {why}")


def test_an_interruption_leaves_no_process(measured: Any, tmp_path: Path) -> None:
    class Stopped(Progress):
        def advance(self, nbytes: int, layer: str | None = None, *, done: bool = False) -> None:
            if layer == "Marlin, start" and nbytes:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(Stopped(), marlin=REQUEST)
    (side,) = map(json.loads, (tmp_path / "asked").read_text().splitlines())
    assert gone(side["pid"])
    assert not Path(side["environment"]["VLLM_CACHE_ROOT"]).parent.exists()


def on_a_cpu() -> bool:
    """Whether vLLM is here, and one that computes on CPUs."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cpu())


#: Our operator has a reference on a CPU; vLLM's kernels have none. Read before anything else by the side's process.
PREPARED = """
from marlin_convert.bench import gpu
from marlin_convert.bench.results import Machine
from marlin_convert.native import cuda

gpu.described = lambda versions: Machine("cpu", "a CPU", "0.0", 0, 0, 0, "none", versions, None)
cuda.load_library = lambda: None
"""


@pytest.mark.slow
@pytest.mark.skipif(not on_a_cpu(), reason="needs a vLLM for CPUs")
def test_vllm_itself(tmp_path: Path) -> None:
    """A tiny model through vLLM's engine, torch.compile included: as Marlin, as GPTQ, in fp16."""
    pair = make(tmp_path / "model", llama(), group_size=64)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PREPARED)
    environment = {
        "PYTHONPATH": path(tmp_path / "site"), "MARLIN_CONVERT_VLLM_KERNEL": "ours", "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    request = Request(str(pair.out), (1, 2), ((1, 100),), 256)
    requests = {MARLIN: request, GPTQ: replace(request, model=str(pair.source)), FP16: replace(request, random=True)}
    report = served.bench("a model", requests, environment, Progress(), verbose=False)
    assert report.notes == {}
    for side in report.sides.values():
        assert side.decode.keys() == {1, 2}
        assert side.prefill.keys() == {(1, 100)}
        assert min(side.start_s, *side.decode.values(), *side.prefill.values()) > 0
    assert report.sides[MARLIN].kernels == ("marlin-convert's kernels",)
    assert len(report.sides[GPTQ].kernels) == 1
    assert report.sides[FP16].kernels == ()


# ---- What is shown ----

REPORT = Report(
    "a/model", MACHINE,
    {
        MARLIN: Side(60.0, {1: 375.95, 128: 20494.0}, {(4, 2000): 42271.4}, ("ours",)),
        GPTQ: Side(70.25, {1: 276.0, 128: 17711.0}, {(4, 2000): 39153.0}, ("Machete",)),
    },
    {"left out: vLLM does not run it (memory)": ["fp16"]},
)  # fmt: skip


def test_table() -> None:
    assert REPORT.table() == [
        ["", "GPTQ", "Marlin", "Marlin / GPTQ"],
        ["decode, batch 1", "276", "376", "1.36"],
        ["decode, batch 128", "17711", "20494", "1.16"],
        ["prefill, 4 x 2000 tokens", "39153", "42271", "1.08"],
        ["start, s", "70.2", "60.0", ""],
    ]
    alone = Report("a", MACHINE, {MARLIN: REPORT.sides[MARLIN]})
    assert alone.table()[:2] == [["", "Marlin"], ["decode, batch 1", "376"]]


def test_screen_json_and_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    BenchScreen(OutputOptions()).served(REPORT, None)
    text = capsys.readouterr().out
    assert ["decode,", "batch", "128", "17711", "20494", "1.16"] in [line.split() for line in text.splitlines()]
    assert "GPTQ on Machete" in text
    assert "its caches empty before; Marlin was first, and started with files that nothing had read before" in text
    assert "left out: vLLM does not run it (memory): fp16" in text
    BenchScreen(OutputOptions(as_json=True, source="out")).served(REPORT, None)
    document = json.loads(capsys.readouterr().out)
    validate(document)
    assert document["sides"]["gptq"]["decode"][1] == {"batch": 128, "tokens_per_s": 17711.0}
    assert document["plot"] is None
    assert list(document)[3:] == documented("served")
    again = Report.from_dict(document)
    assert again.table() == REPORT.table()
    assert again.as_dict() == REPORT.as_dict()
    pytest.importorskip("matplotlib")
    assert Plot(tmp_path / "tokens.png").draw(document) is None
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(x.stem for x in (ROOT / "benchmarks" / "results").glob("vllm_*.json")))
def test_the_published_figures_are_the_stored_ones(name: str) -> None:
    """The tables of docs/reference/engines.md."""
    stored = Report.from_dict(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()))
    page = (ROOT / "docs/reference/engines.md").read_text()
    for row in stored.table()[1:]:
        assert f"| {' | '.join(row)} |\n" in page


# ---- What is refused ----


def test_refusals(run: Callable[..., Run], tmp_path: Path) -> None:
    for arguments, why in [
        (["--engine", "vllm"], "--engine goes with --tokens: it runs whole models."),
        (["--tokens", "--source", "x"], "--source and --no-fp16 go with --tokens --engine vllm."),
        (
            ["--tokens", "--engine", "transformers", "--no-fp16"],
            "--source and --no-fp16 go with --tokens --engine vllm.",
        ),
    ]:
        result = run("bench", tmp_path, *arguments)
        assert result.code == 2
        assert why in result.err
    result = run(
        "bench", tmp_path, "--tokens", "--engine", "vllm", "--device", "cpu", env={"PYTHONPATH": path(STAND_IN)}
    )
    assert (result.code, result.out) == (5, "")
    assert result.err == "marlin-convert: bench measures a GPU: give --device cuda or cuda:N.\n"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm(run: Callable[..., Run], tmp_path: Path) -> None:
    result = run("bench", tmp_path, "--tokens", "--engine", "vllm")
    assert (result.code, result.out) == (1, "")
    assert result.err == (
        "marlin-convert: --engine vllm measures vLLM, which is not installed here; install it beside marlin-convert: "
        "pip install vllm.\n"
    )


def test_how_many_tokens_a_model_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Request]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(served, "pick_gpu", lambda request: type("GPU", (), {"index": 1})())
    monkeypatch.setattr(
        served, "bench", lambda title, requests, environment, *rest: asked.append({**requests, **environment})
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    (tmp_path / "config.json").write_text('{"text_config": {"max_position_embeddings": 1024}}')
    served.run(tmp_path, "org/gptq", batch=(8, 1))
    request = Request(str(tmp_path), (1, 8), ((1, 512),), 1024)
    assert asked == [{
        MARLIN: request, GPTQ: replace(request, model="org/gptq"), FP16: replace(request, random=True),
        "CUDA_VISIBLE_DEVICES": "6",
    }]  # fmt: skip
    assert list(asked[0]) == [FP16, MARLIN, GPTQ, "CUDA_VISIBLE_DEVICES"]  # whose start is compared: not the first
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 255}')
    with pytest.raises(SourceError, match="the model takes 255 tokens; measuring needs 256"):
        served.run(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"its config\.json cannot be read"):
        served.run(tmp_path)
