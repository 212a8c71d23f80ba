"""Experts that compressed-tensors holds stacked: taken apart, refused where names or shapes lie, stacked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.plan import make_plan
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import MarlinConvertError, SourceError, UnsupportedError
from marlin_convert.options import REPORT_FILE, Format, Options
from tests.support import format_reader
from tests.support.ct_checkpoints import CTLayer, ct_config, write_ct
from tests.support.gptq_checkpoints import tensors_of

CPU = Options(device="cpu", verify=True)
GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
HIDDEN, INNER, EXPERTS = 128, 64, 3


def zero_points(G: int, N: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 16, (G, N))


def layers(K: int, N: int, **settings: Any) -> list[CTLayer]:
    """One of each expert, with zero points."""
    G = K // 32
    return [
        CTLayer(K=K, N=N, group_size=32, zeros=zero_points(G, N, seed), seed=seed, **settings)
        for seed in range(EXPERTS)
    ]


def stacked(name: str, experts: list[CTLayer]) -> dict[str, torch.Tensor | None]:
    own = [layer.tensors(name) for layer in experts]
    found: dict[str, torch.Tensor | None] = {key: torch.stack([x[key] for x in own]) for key in own[0]}
    found[f"{name}.weight_shape"] = torch.tensor([len(experts), experts[0].N, experts[0].K])
    return found


def write(
    folder: Path, extra: dict[str, torch.Tensor | None] | None = None, *, hidden: Any = HIDDEN, int8: bool = False
) -> dict[str, Any]:
    """A block's experts, and a linear by itself; the weights, by the names of the result's layers."""
    both, down = layers(HIDDEN, 2 * INNER, int8_zeros=int8), layers(INNER, HIDDEN, int8_zeros=int8)
    plain = CTLayer(K=HIDDEN, N=HIDDEN, seed=9)
    tensors = {**stacked(GATE_UP, both), **stacked(DOWN, down), **(extra or {})}
    write_ct(folder, {"model.layers.0.o_proj": plain}, ct_config({"symmetric": None, "group_size": None}), tensors)
    main = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**main, "hidden_size": hidden}))
    weights = {"model.layers.0.o_proj": plain.weight}
    for number, (one, other) in enumerate(zip(both, down, strict=True)):
        owner = f"model.layers.0.mlp.experts.{number}"
        weights |= {f"{owner}.gate_proj": one.weight[:, :INNER], f"{owner}.up_proj": one.weight[:, INNER:]}
        weights |= {f"{owner}.down_proj": other.weight}
    return weights


@pytest.mark.parametrize("int8", [False, True])
def test_taken_apart_and_stacked_again(tmp_path: Path, int8: bool) -> None:
    weights = write(tmp_path / "source", int8=int8)
    report = convert(tmp_path / "source", tmp_path / "out", CPU)
    assert report.verification is not None
    assert report.verification.ok
    found = format_reader.read(tmp_path / "out")
    assert found.keys() == weights.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight, weights[name])
    assert any("stacked" in note for note in report.plan.notes)
    assert {t.name.rpartition(".")[0] for t in report.plan.dropped} == {GATE_UP, DOWN, "model.layers.0.o_proj"}
    restore(tmp_path / "out", tmp_path / "again", original=True)
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(tmp_path / "source")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)


def test_as_gptq_each_expert_has_its_own(tmp_path: Path) -> None:
    weights = write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", CPU)
    restore(tmp_path / "out", tmp_path / "gptq", v2=True)
    names = {name.removesuffix(".qweight") for name in tensors_of(tmp_path / "gptq") if name.endswith(".qweight")}
    assert names == weights.keys()
    convert(tmp_path / "gptq", tmp_path / "again", Options(device="cpu", format=Format.MARLIN_EXT))
    for name, weight in format_reader.read(tmp_path / "again").items():
        np.testing.assert_array_equal(weight, weights[name])


def test_an_expert_of_which_a_code_changed_is_found(tmp_path: Path) -> None:
    write(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", CPU)
    (layer,) = (x for x in report.plan.layers if x.name.endswith("experts.1.up_proj"))
    path = tmp_path / "source" / layer.source.weight.file
    content = bytearray(path.read_bytes())
    content[layer.source.weight.offset + 5] ^= 1
    path.write_bytes(content)
    checked = verify_pair(tmp_path / "source", tmp_path / "out", "cpu")
    assert [x.name for x in checked.layers if not x.ok] == [layer.name]


@pytest.mark.parametrize(
    ("extra", "hidden", "reason"),
    [
        ({f"{GATE_UP}.bias": torch.zeros(EXPERTS, 2 * INNER)}, HIDDEN, "stacked with biases (bias)"),
        ({f"{GATE_UP}_bias": torch.zeros(EXPERTS, 2 * INNER)}, HIDDEN, "stacked with biases (gate_up_proj_bias)"),
        ({f"{DOWN}.weight_g_idx": torch.zeros(EXPERTS, INNER, dtype=torch.int32)}, HIDDEN, "with act-order"),
        ({}, 2 * INNER + 1, "128 inputs, where the model's hidden size is 129"),
        ({}, None, "hidden size is None"),
        ({}, [HIDDEN], "hidden size is"),
        (
            {f"model.mixture.{k.rpartition('.')[2]}": t for k, t in stacked("x", layers(64, 64)).items()},
            HIDDEN,
            "its name is not one that stacked experts are known by",
        ),
    ],
)
def test_refused(tmp_path: Path, extra: dict[str, torch.Tensor | None], hidden: Any, reason: str) -> None:
    write(tmp_path / "source", extra, hidden=hidden)
    with Checkpoint(tmp_path / "source") as checkpoint, pytest.raises(UnsupportedError) as error:
        make_plan(checkpoint).require_convertible()
    assert reason in str(error.value)
    with pytest.raises(UnsupportedError):
        convert(tmp_path / "source", tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_zero_points_of_two_projections_in_one_word(tmp_path: Path) -> None:
    """Six outputs each: their zero points, 24 bits, do not end where a word does."""
    source = tmp_path / "source"
    write(source, stacked(GATE_UP, layers(HIDDEN, 12)))
    with Checkpoint(source) as checkpoint:
        assert any("share words" in reason for reason in make_plan(checkpoint).refusals)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({f"{GATE_UP}.weight_shape": torch.tensor([EXPERTS, 2 * INNER + 2, HIDDEN])}, "weight_shape"),
        ({f"{GATE_UP}.weight_shape": torch.tensor([EXPERTS + 1, 2 * INNER, HIDDEN])}, "not that of 3 experts"),
        ({f"{GATE_UP}.weight_shape": torch.tensor([2 * INNER, HIDDEN])}, "three whole numbers"),
        ({f"{DOWN}.weight_scale": torch.ones(EXPERTS - 1, HIDDEN, 2).half()}, "not that of 3 experts"),
        ({f"{DOWN}.weight_scale": torch.ones(HIDDEN, 2).half()}, "not that of 3 experts"),
        ({f"{GATE_UP}.weight_scale": torch.ones(EXPERTS, 2 * INNER - 1, 4).half()}, "2 projections each"),
        ({f"{DOWN}.weight_scale": None}, "no weight_scale"),
        ({"model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(INNER, HIDDEN)}, "remove the one or the other"),
        (CTLayer(K=HIDDEN, N=INNER).tensors("model.layers.0.mlp.experts.2.gate_proj"), "remove the one or the other"),
        (stacked("model.layers.0.mlp.experts.gate_proj", layers(HIDDEN, INNER)), "remove the one or the other"),
    ],
)
def test_damaged(tmp_path: Path, extra: dict[str, torch.Tensor | None], reason: str) -> None:
    write(tmp_path / "source", extra)
    with Checkpoint(tmp_path / "source") as checkpoint, pytest.raises(SourceError) as error:
        make_plan(checkpoint)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "stacks",
    [
        {GATE_UP: "4"},
        {GATE_UP: "2", "model.layers.0.mlp.experts.gate_proj": "3"},
        {GATE_UP: "0"},
        {GATE_UP: "-1"},
        {GATE_UP: "99999999999"},
        {"model.layers.0": "3"},
    ],
)
def test_a_note_that_somebody_changed(tmp_path: Path, stacks: dict[str, str]) -> None:
    write(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", CPU)
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["source_quantization"]["stacks"] == {GATE_UP: "3", DOWN: "3"}
    report["source_quantization"]["stacks"] = stacks
    (tmp_path / "out" / REPORT_FILE).write_text(json.dumps(report))
    with pytest.raises(MarlinConvertError, match="damaged"):
        restore(tmp_path / "out", tmp_path / "again", original=True)
    assert not (tmp_path / "again").exists()
