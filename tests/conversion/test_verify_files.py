"""Damage beside the layers, files that are missing or say something else, and the wrong pair."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.errors import SourceError, VerificationError
from marlin_convert.options import Options, QuantMethod
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, write_source
from tests.support.results import CPU, Q, change, layer_check


def changed_byte(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"].view(torch.uint8).reshape(-1)[12345] ^= 64


def missing_tensor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def additional_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q}.g_idx"] = torch.zeros(256, dtype=torch.int32)


def converted_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def flattened_tensor(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].reshape(-1)


TENSOR_DAMAGE: dict[Any, str] = {
    changed_byte: "model.embed_tokens.weight: byte 12345 differs from the source",
    missing_tensor: "model.norm.weight: model.norm.weight is missing",
    additional_tensor: f"{Q}.g_idx is in the result and should not be",
    converted_tensor: "model.norm.weight: model.norm.weight is F16 [256], not F32 [256]",
    flattened_tensor: "model.embed_tokens.weight: model.embed_tokens.weight is BF16 [16384], not BF16 [64, 256]",
}


@pytest.mark.parametrize("edit", TENSOR_DAMAGE, ids=lambda e: e.__name__)
def test_damage_to_other_tensors(source: Source, out: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    change(out, edit)
    report = verify_pair(source.folder, out, "cpu")
    assert report.problems == [TENSOR_DAMAGE[edit]]
    assert not report.ok
    assert all(x.ok for x in report.layers)
    assert report.tensors_equal == (3 if edit is additional_tensor else 2)


def test_a_byte_far_into_a_tensor(tmp_path: Path) -> None:
    """Beyond the first of the blocks in which tensors are compared (2 MiB)."""
    source = write_source(tmp_path / "source", {"a": GPTQLayer()}, {"x": torch.zeros(5_000_000, dtype=torch.uint8)})
    convert(source.folder, tmp_path / "out", CPU)
    change(tmp_path / "out", lambda t: t["x"][4_999_999].fill_(1))
    assert verify_pair(source.folder, tmp_path / "out", "cpu").problems == ["x: byte 4999999 differs from the source"]


SETTINGS = {
    "bits": 8, "group_size": 64, "sym": False, "desc_act": True, "checkpoint_format": "gptq", "is_marlin_format": False,
    "quant_method": "awq",
}  # fmt: skip


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("how", ["altered", "missing"])
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_a_config_that_says_something_else(source: Source, out: Path, file: str, key: str, how: str) -> None:
    config = json.loads((out / file).read_text())
    settings = config.get("quantization_config", config)
    was, now = settings.pop(key), None
    if how == "altered":
        now = settings[key] = SETTINGS[key]
    (out / file).write_text(json.dumps(config))
    (problem,) = verify_pair(source.folder, out, "cpu").problems
    expected = "gptq or marlin" if key == "quant_method" else repr(was)
    assert problem == f"{file}: {key} is {now!r}, not {expected}"


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_a_config_that_is_missing(source: Source, out: Path, file: str) -> None:
    (out / file).unlink()
    assert verify_pair(source.folder, out, "cpu").problems == [f"{file} has no quantization settings"]


def test_both_quant_methods_are_fine(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out", Options(device="cpu", quant_method=QuantMethod.MARLIN))
    assert verify_pair(source.folder, tmp_path / "out", "cpu").ok


def test_damaged_files_are_the_results_and_not_the_sources(source: Source, out: Path, run: Callable[..., Run]) -> None:
    with (out / "model.safetensors").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(SourceError, match="truncated") as error:
        verify_pair(source.folder, out, "cpu")
    assert str(out / "model.safetensors") in error.value.message


@pytest.mark.parametrize("what", ["nothing", "empty", "file"])
def test_there_is_no_result(source: Source, tmp_path: Path, run: Callable[..., Run], what: str) -> None:
    out = tmp_path / "out"
    if what == "empty":
        out.mkdir()
    if what == "file":
        out.write_text("mine")
    result = run("verify", source.folder, out)
    assert result.code == 3
    assert result.err.startswith(f"marlin-convert: {out}: ")
    assert result.err.count("\n") == 1


def test_another_source(source: Source, out: Path, tmp_path: Path) -> None:
    """The same shapes, other weights: no layer is equal, and the outputs show it too."""
    other = {n: GPTQLayer(K=x.K, N=x.N, seed=x.seed + 100) for n, x in source.layers.items()}
    write_source(tmp_path / "other", other)
    report = verify_pair(tmp_path / "other", out, "cpu")
    assert [x.exact for x in report.layers] == [False, False]
    assert all(x.relative_error is not None and x.relative_error > 0.1 for x in report.layers)
    assert report.tensors_equal == 3


def test_a_source_of_other_names(source: Source, out: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "other", {"elsewhere": GPTQLayer()}, {})
    report = verify_pair(tmp_path / "other", out, "cpu")
    assert layer_check(report, "elsewhere").problem == "elsewhere.B is missing"
    assert f"{Q}.B is in the result and should not be" in report.problems


def test_the_pair_the_wrong_way_round(source: Source, out: Path, run: Callable[..., Run]) -> None:
    result = run("verify", out, source.folder)
    assert result.code == 4
    assert result.err == (
        f"marlin-convert: {out} is a Marlin checkpoint, and {source.folder} is none: the source comes first. "
        f"Run `marlin-convert verify {source.folder} {out}`.\n"
    )
    assert not (source.folder / "verify.json").exists()


def test_the_source_against_itself(source: Source) -> None:
    report = verify_pair(source.folder, source.folder, "cpu")
    assert not report.ok
    assert layer_check(report, Q).problem == f"{Q}.B is missing"
    assert f"{Q}.qweight is in the result and should not be" in report.problems


def test_long_lists_are_cut(tmp_path: Path) -> None:
    layers = {f"layer{i:02}": GPTQLayer(K=128, N=256, seed=i) for i in range(30)}
    source = write_source(tmp_path / "source", layers)
    convert(source.folder, tmp_path / "out", CPU)
    change(tmp_path / "out", lambda t: [t[f"{n}.s"].mul_(2) for n in layers])
    with pytest.raises(VerificationError) as error:
        verify_pair(source.folder, tmp_path / "out", "cpu").require_ok()
    lines = error.value.message.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  - and 10 more"
