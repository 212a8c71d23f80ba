"""Checkpoints of formats beside GPTQ that somebody changed: refused in a sentence, or converted to what they say."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.checkpoint.reader import Checkpoint
from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.plan import make_plan, plan_as_dict
from marlin_convert.errors import MarlinConvertError, UnsupportedError
from marlin_convert.options import Options
from tests.support import format_reader, source_definitions
from tests.support.plans import plan_of

DATA = Path(__file__).parents[1] / "data" / "sources"
NAMES = tuple(sorted(path.name for path in DATA.iterdir()))
#: How the names of a quantized layer's tensors end.
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx", "_packed", "_scale", "_shape", "_zero_point", "_g_idx")

ODD: list[Any] = [None, -1, 0, 3, 1 << 40, 1.5, True, "", "gemv", "group", [], [1], {}, {"a": {}}, "\x1b[2J", "x" * 999]
DTYPES = (
    torch.int32,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def changed_config(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """`config` with one value, at any depth, replaced or left out."""
    changed = copy.deepcopy(config)
    holders = [changed]
    for holder in holders:
        holders += [value for value in holder.values() if isinstance(value, dict)]
    holder = chance.choice([h for h in holders if h])
    key = chance.choice(sorted(holder))
    if chance.random() < 0.2:
        del holder[key]
    else:
        holder[key] = chance.choice(ODD)
    return changed


def changed_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor | None:
    kind = chance.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return tensor.to(chance.choice(DTYPES))
    if kind == 2:
        return tensor[: chance.randrange(len(tensor) + 1)].contiguous()
    if kind == 3:
        return tensor.flatten() if chance.random() < 0.5 else tensor[None].contiguous()
    if kind == 4 and tensor.ndim == 2:
        return tensor.T.contiguous()
    noise = np.random.default_rng(chance.randrange(1 << 30)).integers(0, 256, tensor.nbytes, dtype=np.uint8)
    return torch.from_numpy(noise).view(tensor.dtype).reshape(tensor.shape)


def outcome(source: Path, out: Path) -> tuple[str, dict[str, Any] | None]:
    """What a conversion says against the source, "" if nothing; and its plan. A dry run says and plans the same."""
    said, planned = "", None
    try:
        with Checkpoint(source) as checkpoint:
            plan = make_plan(checkpoint)
            planned = plan_as_dict(plan, "")
            plan.require_convertible()
    except MarlinConvertError as error:
        said = str(error)
    try:
        report = convert(source, out, Options(device="cpu", verify=True))
    except MarlinConvertError as error:
        refused = str(error)
    else:
        refused = ""
    assert refused == said
    if refused:
        assert not out.exists()
        return said, planned
    assert plan_as_dict(report.plan, "") == planned
    assert report.verification is not None
    assert report.verification.ok
    return said, planned


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_changed_by_chance(tmp_path: Path, name: str) -> None:
    """Each source of the test data, its config or a tensor of a layer changed. What is converted is what an independent
    reader of the format's definition finds there."""
    source = tmp_path / "source"
    source.mkdir()
    main = json.loads((DATA / name / "config.json").read_text())
    tensors = load_file(DATA / name / "model.safetensors")
    own = sorted(n for n in tensors if n.endswith(PARTS))
    said: list[str] = []
    for seed in range(14):
        chance = random.Random(f"{name} {seed}")
        config = main
        kept: dict[str, torch.Tensor | None] = dict(tensors)
        if seed < 5:
            config = {**main, "quantization_config": changed_config(main["quantization_config"], chance)}
        else:
            key = chance.choice(own)
            kept[key] = changed_tensor(tensors[key], chance)
        (source / "config.json").write_text(json.dumps(config))
        save_file({n: t for n, t in kept.items() if t is not None}, source / "model.safetensors")
        out = tmp_path / f"out {seed}"
        said.append(outcome(source, out)[0])
        if not said[-1] and seed >= 5:
            expected = source_definitions.read(source)
            found = format_reader.read(out)
            assert found.keys() == expected.keys()
            for layer, weight in found.items():
                np.testing.assert_array_equal(weight, expected[layer])
    assert any(said)
    assert not all(said)


#: Of a layer whose tensors have these endings: what is put in their place, and what is said of it.
Change = Callable[[torch.Tensor], torch.Tensor]
LIES: list[tuple[str, str, Change, str]] = [
    ("ct-g128", "weight_scale", lambda t: torch.full_like(t, float("inf")), "scales contain inf or NaN"),
    ("ct-g128", "weight_scale", lambda t: torch.full_like(t, float("nan")), "scales contain inf or NaN"),
    ("awq-g64", "scales", lambda t: torch.full_like(t, float("nan")), "scales contain inf or NaN"),
    ("awq-gemv-g64", "scales", lambda t: torch.full_like(t, float("inf")), "damaged"),
    ("autoround-plain-g32", "scales", lambda t: torch.full_like(t, float("-inf")), "scales contain inf or NaN"),
    (
        "ct-stacked-8bit-channel-bf16",
        "weight_scale",
        lambda t: torch.full_like(t, float("nan")),
        "scales contain inf or NaN",
    ),
    ("ct-g128", "weight_shape", lambda t: t + 1, "is not that of weight_shape"),
    ("ct-g128", "weight_shape", lambda t: -t, "an empty layer"),
    ("ct-g128", "weight_shape", lambda t: t * 0 + (1 << 62), "is not that of weight_shape"),
    ("ct-stacked-g32-asym", "weight_shape", lambda t: t + 1, "is not that of 4 experts"),
    ("ct-g32-asym-int8", "weight_zero_point", lambda t: t * 0 + 8, "which 4 bits cannot hold"),
    ("ct-g32-asym-int8", "weight_zero_point", lambda t: t * 0 - 9, "which 4 bits cannot hold"),
    ("ct-g32-asym", "weight_zero_point", lambda t: t.to(torch.int8), "does not match"),
    ("ct-g32-asym", "weight_zero_point", lambda t: t.half(), "not whole numbers"),
    ("ct-g32-act-order", "weight_g_idx", lambda t: t + 1, "g_idx names group"),
    ("ct-g32-act-order", "weight_g_idx", lambda t: t - 1, "g_idx names group -1"),
    ("ct-8bit-g64-asym-act-order", "weight_g_idx", lambda t: t * 0, "every row into group 0"),
    ("awq-g64", "qzeros", lambda t: t[:1].contiguous(), "does not match"),
    ("awq-g64", "qzeros", lambda t: t.half(), "only zero points packed in int32"),
    ("awq-gemv-g32", "qzeros", lambda t: t.to(torch.int64), "int32"),
]


@pytest.mark.parametrize(("name", "part", "change", "reason"), LIES, ids=[f"{x[0]} {x[1]} {x[3]}" for x in LIES])
def test_lies(tmp_path: Path, name: str, part: str, change: Change, reason: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(DATA / name / "model.safetensors")
    key = next(n for n in sorted(tensors) if n.endswith((f"down_proj.{part}", f"output_linear.{part}")))
    save_file({**tensors, key: change(tensors[key]).contiguous()}, source / "model.safetensors")
    (source / "config.json").write_bytes((DATA / name / "config.json").read_bytes())
    said, _ = outcome(source, tmp_path / "out")
    assert reason in said
    assert key.rpartition(".")[0].removesuffix(".output_linear").removesuffix(".experts.down_proj") in said


@pytest.mark.parametrize("name", ["ct-g128", "ct-g32-asym", "awq-g64", "awq-gemv-g64", "autoround-plain-g32"])
def test_two_layers_of_one_name(tmp_path: Path, name: str) -> None:
    """Whoever looks at a layer's tensors finds those of another format, or of the result, beside them."""
    tensors = load_file(DATA / name / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj"
    for extra in ("marlin_qweight", "B", "weight_packed" if "ct" not in name else "qweight"):
        source = tmp_path / extra
        source.mkdir()
        beside = {f"{layer}.{extra}": torch.zeros(16, 16, dtype=torch.int32)}
        save_file({**tensors, **beside}, source / "model.safetensors")
        (source / "config.json").write_bytes((DATA / name / "config.json").read_bytes())
        assert layer in outcome(source, tmp_path / f"out {extra}")[0]


#: A source → what its tensors are; a quantization config that is of other tensors → what it says.
TENSORS = {
    "autoround-auto_gptq-g64": "GPTQ's",
    "gptq_p-g32-asym": "GPTQ's",
    "awq-g64": "AWQ's",
    "awq-gemv-g64": "AWQ's",
    "autoround-auto_awq-g64": "AWQ's",
    "ct-g128": "compressed-tensors'",
    "autoround-llm_compressor": "compressed-tensors'",
}
LABELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPTQ": ("GPTQ's", {"quant_method": "gptq", "bits": 4, "group_size": 64}),
    "GPTQ, v2": ("GPTQ's", {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}),
    "AWQ": ("AWQ's", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}),
    "AWQ, of old": ("AWQ's", {"w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}),
    "AutoRound in GPTQ's packing": ("GPTQ's", {"quant_method": "auto-round", "packing_format": "auto_round"}),
    "AutoRound in AWQ's packing": (
        "AWQ's",
        {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "group_size": 64},
    ),
    "AutoRound in compressed-tensors' packing": (
        "compressed-tensors'",
        {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor"},
    ),
    "compressed-tensors": (
        "compressed-tensors'",
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    ),
}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("label", LABELS)
def test_mislabelled(tmp_path: Path, name: str, label: str) -> None:
    """A config of other tensors is refused, and one that is of these, though of another tool, is a claim as any."""
    means, config = LABELS[label]
    write(tmp_path, load_file(DATA / name / "model.safetensors"), config)
    if means != TENSORS[name]:
        said = label.partition(",")[0]
        with pytest.raises(UnsupportedError, match=f"it says {said}, and the tensors are {TENSORS[name]}; restore"):
            plan_of(tmp_path)
        return
    assert plan_of(tmp_path).layers or plan_of(tmp_path).refusals


@pytest.mark.parametrize("name", TENSORS)
def test_an_unquantized_weight_beside_a_layer(tmp_path: Path, name: str) -> None:
    """It is copied, and said."""
    tensors = load_file(DATA / name / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 4)
    config = json.loads((DATA / name / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    write(tmp_path, tensors, config)
    notes = {note: layers for note, layers in plan_of(tmp_path).notes.items() if "unquantized weight" in note}
    assert list(notes.values()) == [["model.layers.0.mlp.up_proj"]]
