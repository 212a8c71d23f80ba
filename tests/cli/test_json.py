"""With --json: one document on standard output, of the schema's form, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Run, document
from tests.support.gptq_checkpoints import LAYERS, GPTQLayer, Source, write_source
from tests.support.safetensors_files import flip_bit


def test_json_of_a_conversion(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", "--device", "cpu", "--verify", "--json")
    assert result.err == ""
    report = document(result)
    assert {k: report[k] for k in ("ok", "source", "format", "layers_converted", "tensors_copied", "device")} == {
        "ok": True, "source": "source", "format": "marlin", "layers_converted": 2, "tensors_copied": 3, "device": "cpu",
    }  # fmt: skip
    assert report["out"] == str(tmp_path / "out")
    # B [K/16, 2N] int32 and s [G, N] fp16 of both layers, and the three other tensors.
    layers = (256 * 512 + 384 * 256) // 2 + (2 * 512 + 3 * 256) * 2
    assert report["bytes_out"] == layers + 64 * 256 * 2 + 256 * 4 + 13
    assert report["weight_files"] == ["model.safetensors"]
    assert report["verification"]["ok"] is True
    assert {x["name"] for x in report["verification"]["layers"]} == set(LAYERS)


def test_json_of_a_plan(run: Callable[..., Run], source: Source) -> None:
    result = run("--dry-run", source.folder, "--json")
    assert (result.code, result.err) == (0, "")
    plan = document(result)
    assert plan["convertible"] is True
    by_name = {x["name"]: x for x in plan["layers"]}
    assert by_name[LAYERS[0]] == {
        "name": LAYERS[0], "K": 256, "N": 512, "bits": 4, "group_size": 128, "sym": True,
        "desc_act": False, "stored_K": 256, "stored_N": 512, "stored_group_size": 128, "scales": "F16", "bias": False,
        "action": "convert",
    }  # fmt: skip
    assert {x["name"] for x in plan["copied"]} == set(source.plain)
    assert sorted(plan["dropped"]) == sorted(f"{n}.{p}" for n in LAYERS for p in ("g_idx", "qzeros"))


def test_json_of_a_plan_with_refusals_is_one_document(main: Callable[..., Run], tmp_path: Path) -> None:
    layers = {"good": GPTQLayer(), "narrow": GPTQLayer(K=256, N=320)}
    write_source(tmp_path / "source", layers)
    result = main("--dry-run", tmp_path / "source", "--json", "--format", "marlin")
    assert (result.code, result.err) == (4, "")
    plan = document(result)
    assert plan["convertible"] is False
    assert plan["refused"] == [{"reason": "N = 320 is not a multiple of 256", "layers": ["narrow"]}]
    text = main("--dry-run", tmp_path / "source", "--format", "marlin")
    assert text.code == 4
    assert "1 layers to convert" in text.out
    assert "  - N = 320 is not a multiple of 256: narrow" in text.err


def test_json_of_a_verification(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out")
    good = main("verify", source.folder, tmp_path / "out", "--json")
    assert (good.code, good.err) == (0, "")
    assert document(good)["ok"] is True
    flip_bit(tmp_path / "out" / "model.safetensors")
    bad = main("verify", source.folder, tmp_path / "out", "--json")
    assert (bad.code, bad.err) == (7, "")
    assert document(bad)["ok"] is False
    assert document(bad)["problems"] == ["model.odd.flags: byte 12 differs from the source"]


@pytest.mark.parametrize(
    ("args", "code", "kind", "text"),
    [
        (["nowhere/at/all", "out"], 3, "SourceError", "nowhere/at/all: no such folder."),
        (["source", "out", "--device", "x"], 2, "BadParameter", "Invalid value for '--device': 'x' is not a device"),
        (["source"], 2, "UsageError", "Missing argument 'OUT'"),
        (["source", "source", "--device", "cpu"], 6, "OutputError", "source: it exists already"),
        (["source", "x", "--device", "cuda:99"], 5, "DeviceError", "--device cuda:99: "),
    ],
)
def test_json_of_an_error(
    main: Callable[..., Run], source: Source, args: list[str], code: int, kind: str, text: str
) -> None:
    result = main(*args, "--json")
    error = document(result)
    assert (result.code, result.err) == (code, "")
    assert (error["ok"], error["exit_code"], error["error"]) == (False, code, kind)
    assert text in error["message"]


def test_json_when_there_is_nothing_to_do(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out")
    convert, plan = main(tmp_path / "out", "x", "--json"), main(tmp_path / "out", "--dry-run", "--json")
    assert (convert.code, plan.code) == (0, 0)
    assert document(convert)["already_marlin"] is document(plan)["already_marlin"] is True


def test_json_when_verification_fails_while_converting(
    main: Callable[..., Run], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "marlin_convert.conversion.convert.copy_files", lambda _, folder: flip_bit(folder / "model.safetensors")
    )
    result = main(source.folder, tmp_path / "out", "--verify", "--json")
    assert result.code == document(result)["exit_code"] == 7
    assert "model.odd.flags: byte 12 differs from the source" in document(result)["message"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
