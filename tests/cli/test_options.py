"""Options that every command has or that conversions share: what they change, and what is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from marlin_convert.cli import commands
from tests.support.cli import Run
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, write_source
from tests.support.safetensors_files import flip_bit


def test_quiet_says_nothing(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for args in (
        [source.folder, out, "--verify"], ["verify", source.folder, out], [source.folder, "--dry-run"], [out, "x"]
    ):  # fmt: skip
        result = main(*args, "--quiet")
        assert (result.code, result.out, result.err) == (0, "", ""), args


def test_quiet_names_what_differs(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    main(source.folder, tmp_path / "out", "--quiet")
    flip_bit(tmp_path / "out" / "model.safetensors")
    result = main("verify", "-q", source.folder, tmp_path / "out")
    assert (result.code, result.out) == (7, "")
    assert result.err == (
        "marlin-convert: the Marlin checkpoint is not equal to its source:\n"
        "  - model.odd.flags: byte 12 differs from the source\n"
    )


def test_verbose_names_everything(main: Callable[..., Run], tmp_path: Path) -> None:
    layers = {f"model.layers.{i}.proj": GPTQLayer(K=128, N=256, seed=i) for i in range(14)}
    write_source(tmp_path / "source", layers)
    short = main("--dry-run", tmp_path / "source").out
    plan = main("--dry-run", tmp_path / "source", "--verbose").out
    assert not any(name in short for name in layers)
    assert all(f"  convert {name}  128 x 256" in plan for name in layers)
    assert "  copy    model.norm.weight  F32 [256]" in plan
    brief = main(tmp_path / "source", tmp_path / "out", "--verify").out
    full = main("verify", tmp_path / "source", tmp_path / "out", "-v").out
    assert not any(name in brief for name in layers)
    assert all(name in full for name in layers)


def test_options_may_stand_anywhere(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for i, args in enumerate((
        ["--quiet", "--device", "cpu", source.folder, tmp_path / "out0"],
        [source.folder, "--quiet", tmp_path / "out1"],
        ["convert", "--quiet", source.folder, tmp_path / "out2"],
        ["-q", "--", source.folder, tmp_path / "out3"],
    )):  # fmt: skip
        assert main(*args).code == 0
        assert (tmp_path / f"out{i}").is_dir()


def test_dry_run_writes_nothing(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    for args in ([], [tmp_path / "out"]):
        result = main(source.folder, "--dry-run", *args)
        assert result.code == 0
        assert "2 layers to convert, 3 tensors to copy" in result.out
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert re.search(r"1 +256 x 512 +4 +128 +f16 +convert", result.out)
    assert re.search(r"1 +384 x 256 +4 +128 +f16 +convert", result.out)


def test_force_replaces(main: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    assert main(source.folder, tmp_path / "out").code == 0
    assert main(source.folder, tmp_path / "out", "--quant-method", "marlin").code == 6
    assert main(source.folder, tmp_path / "out", "--quant-method", "marlin", "--force").code == 0
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["quant_method"] == "marlin"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_notes_are_shown(main: Callable[..., Run], tmp_path: Path) -> None:
    scales = np.full((2, 256), 0.01)

    layers = {"a": GPTQLayer(scales=scales, scale_dtype=torch.float32, stored_zero=8)}
    write_source(tmp_path / "source", layers, quantization=quantization_config(desc_act=True))
    result = main(tmp_path / "source", tmp_path / "out")
    assert result.code == 0
    assert "note desc_act in name only: g_idx is sequential, converted as plain: a" in result.out
    assert "note checkpoint_format gptq stores zero point 8 as 7, here it is 8; read as symmetric: a" in result.out
    own = np.float32(0.01)
    rounding = abs(float(np.float16(own)) - float(own)) / float(own)
    assert f"note scales rounded, by at most {rounding:.2e} of their value" in result.out


def test_demo(run: Callable[..., Run], tmp_path: Path) -> None:
    """The checkpoint that ships with the package, through everything, where nothing but the package is there."""
    result = run("demo", "--device", "cpu", env={"HF_HUB_OFFLINE": "1"})
    assert result.code == 0, result.err
    out = tmp_path / "demo-out"
    assert "result    demo-out (model.safetensors): " in result.out
    verdict = json.loads((out / "verify.json").read_text())
    assert verdict["ok"]
    assert verdict["layers_checked"] > 10
    assert f"{verdict['layers_checked']} of {verdict['layers_checked']} layers exactly equal" in result.out
    assert {"tokenizer.json", "config.json", "quantize_config.json", "marlin_convert.json"} <= {
        p.name for p in out.iterdir()
    }
    assert run("demo").code == 6
    assert run("demo", "elsewhere", "--json").json()["ok"]
    assert run("verify", commands.DEMO_FOLDER, out).code == 0
    # Nothing is left of GPTQ in the result.
    header = (out / "model.safetensors").read_bytes()[:20000]
    assert b".B" in header
    assert not any(part in header for part in (b".qweight", b".qzeros", b".g_idx", b".scales"))


def test_slow_work_is_announced(run: Callable[..., Run], source: Source, tmp_path: Path) -> None:
    result = run(source.folder, tmp_path / "out", env={"MARLIN_CONVERT_NO_NATIVE": "1"})
    assert result.code == 0
    assert "slow: torch twin: MARLIN_CONVERT_NO_NATIVE is set" in result.err
    assert "torch twin" in result.out
