"""Back to GPTQ: every tensor of the source again, bit for bit, from Marlin checkpoints of both formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import OptionError, SourceError
from marlin_convert.native import reference
from marlin_convert.options import Format, Options
from tests.support.gptq_checkpoints import (
    GPTQLayer,
    Source,
    asymmetric,
    pack_columns,
    plain_tensors,
    quantization_config,
    shuffled,
    two_layers,
    write_source,
)
from tests.support.marlin_checkpoints import assert_same_tensors, marlin_ext

NAME = "model.layers.0.mlp.down_proj"


LAYERS = [
    {"K": 256, "N": 256},
    {"K": 256, "N": 128, "bits": 8, "group_size": 32},
    {"K": 576, "N": 72, "group_size": 64},
    {"K": 1000, "N": 64, "group_size": 128},  # the last group is short
    {"K": 512, "N": 64, "group_size": 256},
    {"K": 600, "N": 96, "group_size": 256, "bits": 8},
    {"K": 192, "N": 64, "group_size": 96},
    {"K": 144, "N": 40, "group_size": 16},
    {"K": 384, "N": 64, "group_size": -1, "scale_dtype": torch.bfloat16},
]


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("settings", LAYERS)
def test_from_the_extended_format(tmp_path: Path, settings: dict[str, Any], asym: bool, order: bool) -> None:
    K, N, bits, group_size = (settings.get(k, d) for k, d in (("K", 0), ("N", 0), ("bits", 4), ("group_size", 128)))
    layer = GPTQLayer(
        **settings,
        stored_zero=asymmetric(K, N, group_size, bits) if asym else 2 ** (bits - 1) - 1,
        g_idx=shuffled(K, group_size) if order and group_size != -1 else "sequential",
        bias=order,
    )
    marlin_ext(tmp_path / "marlin", {NAME: layer})
    report = restore(tmp_path / "marlin", tmp_path / "gptq")
    assert (report.format, report.settings_known) == ("marlin_ext", False)
    assert_same_tensors(tmp_path / "gptq", layer.tensors(NAME) | plain_tensors())
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    expected = {"bits": bits, "group_size": group_size, "sym": not asym, "desc_act": order and group_size != -1,
                "quant_method": "gptq", "checkpoint_format": "gptq"}  # fmt: skip
    assert expected.items() <= config["quantization_config"].items()
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == config["quantization_config"]


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_as_v2_stores_them(tmp_path: Path, bits: int) -> None:
    stored = asymmetric(256, 64, 128, bits)
    layers = {
        "a": GPTQLayer(N=64, bits=bits, stored_zero=stored),
        "b": GPTQLayer(N=64, bits=bits, stored_zero=2 ** (bits - 1) - 1),
    }
    marlin_ext(tmp_path / "marlin", layers)
    restore(tmp_path / "marlin", tmp_path / "gptq", v2=True)
    found = load_file(tmp_path / "gptq" / "model.safetensors")
    np.testing.assert_array_equal(found["a.qzeros"].numpy(), pack_columns(stored + 1, bits))
    middle = 0x88888888 if bits == 4 else 0x80808080
    assert (found["b.qzeros"].numpy().view(np.uint32) == middle).all()
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize(("reading", "word"), [("nibble", 0x1F), ("word", 0x0F)])
def test_a_zero_point_of_zero(tmp_path: Path, reading: str, word: int) -> None:
    """Zero points 0, 2, 1, 1, …: each number less one, or the word less 0x11111111, whose borrow goes on."""
    stored = np.zeros((2, 64), np.int64)
    stored[:, 0], stored[:, 1] = -1, 1
    layer = GPTQLayer(N=64, stored_zero=stored)
    marlin_ext(tmp_path / "marlin", {NAME: layer})
    noted = {"source_quantization": {"zero_point_reading": reading}}
    (tmp_path / "marlin" / "marlin_convert.json").write_text(json.dumps(noted))
    restore(tmp_path / "marlin", tmp_path / "gptq")
    qzeros = load_file(tmp_path / "gptq" / "model.safetensors")[f"{NAME}.qzeros"]
    assert qzeros[:, 0].tolist() == [word, word]
    assert (qzeros[:, 1:] == 0).all()


def test_layers_that_differ_are_named_in_dynamic(tmp_path: Path) -> None:
    layers = {"a.x": GPTQLayer(), "a.y": GPTQLayer(), "a.z": GPTQLayer(bits=8, group_size=64, stored_zero=127)}
    marlin_ext(tmp_path / "marlin", layers)
    restore(tmp_path / "marlin", tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"]) == (4, 128)
    assert config["dynamic"] == {"+:^a\\.z$": {"bits": 8, "group_size": 64}}
    convert(tmp_path / "gptq", tmp_path / "again", Options(device="cpu"))
    assert_same_tensors(tmp_path / "again", load_file(tmp_path / "marlin" / "model.safetensors"))


@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("shards", [1, 2])
def test_round_trip_through_the_original_format(tmp_path: Path, group_size: int, shards: int) -> None:
    source = write_source(
        tmp_path / "source",
        two_layers(group_size=group_size, bias=True),
        quantization=quantization_config(group_size=group_size, damp_percent=0.07),
        shards=shards,
        extra={"tokenizer.json": "{}"},
    )
    convert(source.folder, tmp_path / "marlin", Options(device="cpu"))
    report = restore(tmp_path / "marlin", tmp_path / "gptq")
    assert report.format == "marlin"
    assert_same_tensors(tmp_path / "gptq", source.tensors)
    quantization = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    expected = {"bits": 4, "group_size": group_size, "sym": True, "desc_act": False, "damp_percent": 0.07}
    assert expected.items() <= quantization.items()
    assert "is_marlin_format" not in quantization
    assert (tmp_path / "gptq" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "settings",
    [
        {
            "quant_method": "gptq",
            "is_marlin_format": True,
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "sym": True,
        },
        {"quant_method": "gptq", "checkpoint_format": "marlin", "bits": 4, "group_size": 128},
        {"quant_method": "marlin", "group_size": 128},
        {"is_marlin_format": True, "bits": 4, "group_size": 128, "damp_percent": 0.01, "true_sequential": False},
    ],
)
@pytest.mark.parametrize("file", ["config.json", "quantize_config.json"])
def test_checkpoints_that_others_made(tmp_path: Path, settings: dict[str, Any], file: str) -> None:
    """`B` and `s`, with the settings that AutoGPTQ and the models of vLLM's time have."""
    layer, folder = GPTQLayer(bias=True), tmp_path / "marlin"
    folder.mkdir()
    tensors = {
        f"{NAME}.B": reference.pack_marlin(torch.from_numpy(layer.codes)),
        f"{NAME}.s": reference.permute_scales(layer.scale_tensor),
        f"{NAME}.bias": layer.bias_tensor,
    }
    save_file(tensors | plain_tensors(), folder / "gptq_model-4bit-128g.safetensors", {"format": "pt"})
    config: dict[str, Any] = {"model_type": "llama", "torch_dtype": "float16"}
    if file == "config.json":
        config["quantization_config"] = settings
    else:
        (folder / file).write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("theirs")
    restore(folder, tmp_path / "gptq")
    assert_same_tensors(tmp_path / "gptq", layer.tensors(NAME) | plain_tensors())
    restored = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    expected = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    assert expected.items() <= restored.items()
    assert restored["true_sequential"] == settings.get("true_sequential", True)
    assert (tmp_path / "gptq" / "README.md").read_text() == "theirs"


@pytest.mark.parametrize("group_size", [128, -1])
def test_a_stray_g_idx(tmp_path: Path, group_size: int) -> None:
    """AutoGPTQ once left it beside B and s, and could not load what it had saved. One with another order is refused."""
    layer, folder = GPTQLayer(K=256, group_size=group_size), tmp_path / "marlin"
    folder.mkdir()
    tensors = {
        f"{NAME}.B": reference.pack_marlin(torch.from_numpy(layer.codes)),
        f"{NAME}.s": reference.permute_scales(layer.scale_tensor),
        f"{NAME}.g_idx": torch.from_numpy(layer.groups.astype(np.int32)),
    }
    settings = {"is_marlin_format": True, "bits": 4, "group_size": group_size}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    restore(folder, tmp_path / "gptq")
    assert_same_tensors(tmp_path / "gptq", layer.tensors(NAME))
    tensors[f"{NAME}.g_idx"] = torch.from_numpy(shuffled(256, 128).astype(np.int32))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SourceError, match=r"it holds .*g_idx beside that layer's Marlin tensors"):
        restore(folder, tmp_path / "other")


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "quantization_config.json"])
@pytest.mark.parametrize("format_", ["marlin", "marlin-ext"])
def test_every_config_of_the_source_is_replaced_and_restored(tmp_path: Path, file: str, format_: str) -> None:
    """AutoRound writes quantization_config.json. No file of the result may say what its tensors are no longer."""
    config = quantization_config(autoround_version="0.16.1", checkpoint_format=None)
    source = write_source(
        tmp_path / "source", quantization=config, extra={file: json.dumps(config), "vocab/quant_config.json": "{}"}
    )
    before = {p.name: json.loads(p.read_text()) for p in source.folder.glob("*.json")}
    convert(source.folder, tmp_path / "out", Options(device="cpu", format=Format.chosen(format_, "format")))
    result = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json")}
    assert set(result) == {"config.json", "quantize_config.json", "marlin_convert.json"}
    wanted = format_.replace("-", "_")
    assert result["config.json"]["quantization_config"] == result["quantize_config.json"]
    assert result["quantize_config.json"]["checkpoint_format"] == wanted
    restore(tmp_path / "out", tmp_path / "back")
    after = {p.name: json.loads(p.read_text()) for p in (tmp_path / "back").glob("*.json")}
    assert after.pop("marlin_convert.json")
    assert after == before
    assert (tmp_path / "back" / "vocab" / "quant_config.json").read_text() == "{}"


@pytest.mark.parametrize("format_", [Format.MARLIN, Format.MARLIN_EXT])
def test_every_tensor_comes_back_in_its_own_type_or_not_at_all(tmp_path: Path, format_: Format) -> None:
    """Layers with g_idx in int64, in int32 and without; with qzeros and without; stored as the label says, or not."""
    layers = {
        "a": GPTQLayer(), "b": GPTQLayer(), "c": GPTQLayer(g_idx=None), "d": GPTQLayer(stored_zero=None),
        "e": GPTQLayer(stored_zero=8), "f": GPTQLayer(group_size=128, K=128),
    }  # fmt: skip
    if format_ is Format.MARLIN_EXT:
        layers["g"] = GPTQLayer(K=256, N=64, g_idx=shuffled(256, 128))
        layers["h"] = GPTQLayer(bits=8, stored_zero=128)
    tensors = {key: value for name, layer in layers.items() for key, value in layer.tensors(name).items()}
    for name in ("b", "g"):
        if name in layers:
            tensors[f"{name}.g_idx"] = tensors[f"{name}.g_idx"].to(torch.int64)
    write_source(tmp_path / "source", {}, tensors)
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu", format=Format(format_)))
    restore(tmp_path / "out", tmp_path / "back")
    assert_same_tensors(tmp_path / "back", tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (tmp_path / "source" / "config.json").read_text()
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
        ({}, {"tie_word_embeddings": False}),  # the default of many models
        (
            {"text_config": {"hidden_size": 256}, "thinker": {"tie_word_embeddings": True}},
            {
                "tie_word_embeddings": False, "text_config": {"hidden_size": 256, "tie_word_embeddings": False},
                "thinker": {"tie_word_embeddings": False},
            },
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", [True, False])
def test_a_quantized_head_is_not_tied(
    tmp_path: Path, config: dict[str, Any], expected: dict[str, Any], head: bool
) -> None:
    """Engines leave the head out where the config says that it is the embedding."""
    source = {"model_type": "llama", **config, "quantization_config": quantization_config()}
    write_source(tmp_path / "source", {"lm_head" if head else NAME: GPTQLayer()}, config=source)
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    result = json.loads((tmp_path / "out" / "config.json").read_text())
    for key, value in (expected if head else config).items():
        assert result[key] == value
    noted = json.loads((tmp_path / "out" / "marlin_convert.json").read_text())["notes"]
    tied = [note for note in noted if "ties it to the embedding" in note["note"]]
    assert len(tied) == (head and "true" in json.dumps(config))
    restore(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == source


def test_names_that_others_use_too_are_only_copied(tmp_path: Path) -> None:
    """`B` and `s` that are no words, `scales` of something that is no layer."""
    plain = {name: torch.arange(6.0) for name in ("ssm.B", "ssm.s", "cache.scales", "other.s")}
    write_source(tmp_path / "source", {NAME: GPTQLayer(bits=8, stored_zero=127)}, plain)
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    restore(tmp_path / "out", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_command(run: Callable[..., Any], source: Source, tmp_path: Path) -> None:
    assert run(source.folder, "marlin", "--quiet").code == 0
    result = run("to-gptq", "marlin", "back", "--json")
    assert result.code == 0, result.err
    report = result.json()
    assert report["ok"] is True
    assert (report["layers_restored"], report["tensors_copied"], report["format"]) == (2, 3, "gptq")
    assert_same_tensors(tmp_path / "back", source.tensors)
    shown = run("to-gptq", "marlin", "back", "--force", "--v2")
    assert shown.code == 0, shown.err
    assert "restored 2 layers from marlin to gptq_v2, 3 tensors copied" in shown.out
    assert run("to-gptq", "marlin", "back", "--quiet").code == 6
    assert run("to-gptq", source.folder, "other").code == 4
    assert run("to-gptq", "nowhere/at/all", "other").code != 0


@pytest.mark.parametrize("name", ["awq-g64", "autoround-auto_gptq-g64"])
def test_a_source_that_says_nothing_of_its_quantization(tmp_path: Path, name: str) -> None:
    """Restored, it says nothing again; as GPTQ, which was asked for, it says what it is then."""
    data = Path(__file__).parents[1] / "data" / "sources" / name
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(data / "model.safetensors", source)
    config = json.loads((data / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", Options(device="cpu"))
    restore(tmp_path / "out", tmp_path / "back", original=True)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert not (tmp_path / "back" / "quantize_config.json").exists()
    back, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "back", source))
    assert back.keys() == before.keys()
    assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in before.items())
    restore(tmp_path / "out", tmp_path / "gptq", v2=True)
    stated = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert (stated["quant_method"], stated["checkpoint_format"], stated["bits"]) == ("gptq", "gptq_v2", 4)
    with pytest.raises(OptionError, match="v2 is for writing GPTQ"):
        restore(tmp_path / "out", tmp_path / "c", original=True, v2=True)
