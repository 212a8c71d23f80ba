"""The whole path on small checkpoints: what comes out is what the definition says, complete, and always the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.errors import AlreadyMarlin, OutputError, UnsupportedError
from marlin_convert.options import Format, Options, QuantMethod
from tests.support import format_reader
from tests.support.gptq_checkpoints import GPTQLayer, Source, quantization_config, tensors_of, two_layers, write_source


def assert_equal_to_source(source: Source, out: Path) -> None:
    """Every layer of `out` stands for the weights of `source`, by the published formulas; the rest is equal bytes."""
    found = tensors_of(out)
    for name, layer in source.layers.items():
        B, s = found.pop(f"{name}.B"), found.pop(f"{name}.s")
        assert (B.dtype, tuple(B.shape)) == (torch.int32, (layer.K // 16, 2 * layer.N))
        assert (s.dtype, tuple(s.shape)) == (torch.float16, (layer.G, layer.N))
        np.testing.assert_array_equal(format_reader.codes(B, 4, layer.N), layer.codes)
        scales = format_reader.scales(s)
        np.testing.assert_array_equal(scales, layer.scale_tensor.to(torch.float16).double().numpy())
        weight = (format_reader.codes(B, 4, layer.N) - 8) * scales[layer.groups]
        np.testing.assert_allclose(weight, layer.weight, rtol=2**-11)  # exact for fp16 scales, rounded once for others
        if layer.scale_dtype == torch.float16:
            np.testing.assert_array_equal(weight, layer.weight)
        if layer.bias:
            assert torch.equal(found.pop(f"{name}.bias"), layer.bias_tensor)
    assert found.keys() == source.plain.keys()
    for name, tensor in source.plain.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"group_size": -1},
        {"stored_zero": 8},
        {"g_idx": None},
        {"scale_dtype": torch.bfloat16},
        {"scale_dtype": torch.float32},
        {"K": 128, "N": 256},  # group_size == K: one group, so the other scale permutation
        {"K": 128, "N": 256, "group_size": -1},
        {"K": 1024, "N": 768},
    ],
    ids=str,
)
def test_converts_exactly(tmp_path: Path, changes: dict[str, object]) -> None:
    source = write_source(tmp_path / "source", two_layers(**changes))
    report = convert(source.folder, tmp_path / "out", Options(verify=True, device="cpu"))
    assert_equal_to_source(source, tmp_path / "out")
    assert report.verification is not None
    assert report.verification.ok
    assert verify_pair(source.folder, tmp_path / "out", "cpu").ok


def test_many_blocks_in_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one tile row each: the seams between blocks are where a wrong offset would show."""
    monkeypatch.setattr("marlin_convert.conversion.blocks.BLOCK_BYTES", 1)
    plain = {"x": torch.arange(40, dtype=torch.int16)}
    source = write_source(tmp_path / "source", {"a": GPTQLayer(K=512, N=512)}, plain)
    assert convert(source.folder, tmp_path / "out", Options(verify=True, device="cpu")).verification
    assert_equal_to_source(source, tmp_path / "out")


def test_same_source_same_bytes(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=3, extra={"tokenizer.json": "{}"})
    for name in ("a", "b"):
        convert(source.folder, tmp_path / name, Options(verify=True, device="cpu", max_shard_size="150KB"))
    first = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    assert len([name for name in first if name.endswith(".safetensors")]) > 1


def test_shards_and_index(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", shards=2)
    convert(source.folder, tmp_path / "out", Options(max_shard_size="100KB", device="cpu"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors_of(tmp_path / "out"))
    for tensor, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert tensor in opened.keys()  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert_equal_to_source(source, tmp_path / "out")


def test_one_file_when_it_fits(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    size = {"I32": 4, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % size[entry["dtype"]] == 0, name


def test_configs(tmp_path: Path) -> None:
    quantization = quantization_config(
        damp_percent=0.05, true_sequential=False, dynamic={"-:lm_head": {}}, desc_act=True
    )
    source = write_source(tmp_path / "source", quantization=quantization, quantize_config=quantization)
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {
        "bits": 4, "group_size": 128, "sym": True, "desc_act": False, "static_groups": False, "true_sequential": False,
        "damp_percent": 0.05, "lm_head": False, "quant_method": "gptq", "checkpoint_format": "marlin",
        "is_marlin_format": True, "model_file_base_name": "model",
    }  # fmt: skip
    assert config["quantization_config"] == expected
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == expected
    assert (config["torch_dtype"], config["dtype"]) == ("float16", "float16")
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_quant_method_marlin(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out", Options(quant_method=QuantMethod.MARLIN, device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "marlin"


def test_per_channel_config(tmp_path: Path) -> None:
    """One group over all of K is -1 in the result, whatever the source's config says."""
    source = write_source(
        tmp_path / "source", two_layers(group_size=-1), quantization=quantization_config(group_size=1024)
    )
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    config = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert config["group_size"] == -1


def test_quantized_head_and_experts(tmp_path: Path) -> None:
    names = ["lm_head", *(f"model.layers.0.block_sparse_moe.experts.{i}.w{j}" for i in range(2) for j in (1, 2, 3))]
    layers = {name: GPTQLayer(seed=i) for i, name in enumerate(names)}
    plain = {"model.layers.0.block_sparse_moe.gate.weight": torch.randn(2, 256)}
    source = write_source(tmp_path / "source", layers, plain)
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    assert_equal_to_source(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text())["lm_head"] is True


def test_config_under_text_config(tmp_path: Path) -> None:
    nested = {"model_type": "x", "text_config": {"dtype": "bfloat16", "quantization_config": quantization_config()}}
    source = write_source(tmp_path / "source", config=nested)
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["quantization_config"]["checkpoint_format"] == "marlin"
    assert config["quantization_config"]["checkpoint_format"] == "marlin"
    assert config["text_config"]["dtype"] == "float16"


def test_what_lies_beside_the_weights_travels(tmp_path: Path) -> None:
    extra = {
        "tokenizer.json": "{}", "tokenizer_config.json": "{}", "generation_config.json": '{"top_p": 0.9}',
        "chat_template.jinja": "{{ x }}", "LICENSE": "free", "modeling_x.py": "x = 1", "assets/logo.txt": "logo",
        "pytorch_model.bin": "pickle", "model.gguf": "GGUF", "optimizer.pt": "pickle", ".git/config": "hidden",
    }  # fmt: skip
    source = write_source(tmp_path / "source", extra=extra)
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    out = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    carried = {name for name in extra if not name.startswith(".git")}
    made = {"model.safetensors", "config.json", "quantize_config.json", "marlin_convert.json", "README.md"}
    assert out == carried | made
    for name in carried:
        assert (tmp_path / "out" / name).read_text() == extra[name]


def test_already_marlin(source: Source, tmp_path: Path) -> None:
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    with pytest.raises(AlreadyMarlin):
        convert(tmp_path / "out", tmp_path / "again", Options(device="cpu"))
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("inf"), torch.float16, "inf or NaN"),
        (float("nan"), torch.bfloat16, "inf or NaN"),
        (1e5, torch.bfloat16, "beyond what fp16 can hold"),
        (1e-9, torch.float32, "would be 0 in fp16"),
    ],
)
def test_scales_that_fp16_cannot_hold(tmp_path: Path, value: float, dtype: torch.dtype, reason: str) -> None:
    scales = np.full((2, 256), 0.01)
    scales[1, 200] = value
    layers = {"bad": GPTQLayer(scales=scales, scale_dtype=dtype), "good": GPTQLayer()}
    write_source(tmp_path / "source", layers)
    with pytest.raises(UnsupportedError, match=reason) as error:
        convert(tmp_path / "source", tmp_path / "out", Options(device="cpu", format=Format.MARLIN))
    assert "bad" in error.value.message
    assert "good" not in error.value.message
    assert not (tmp_path / "out").exists()


def test_zero_scales_stay_zero(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", {"a": GPTQLayer(scales=np.zeros((2, 256)), scale_dtype=torch.float32)})
    convert(source.folder, tmp_path / "out", Options(verify=True, device="cpu"))
    assert_equal_to_source(source, tmp_path / "out")


def test_rounding_of_scales_is_reported(tmp_path: Path) -> None:
    scales = np.full((2, 256), 0.01)
    scales[0, 0] = 1 + 2**-12  # between two fp16 numbers: rounds to 1
    source = write_source(tmp_path / "source", {"a": GPTQLayer(scales=scales, scale_dtype=torch.float32)})
    report = convert(source.folder, tmp_path / "out", Options(device="cpu"))
    own = np.float32(0.01)
    expected = max(2**-12 / (1 + 2**-12), abs(float(np.float16(own)) - float(own)) / float(own))
    assert report.plan.scale_rounding == pytest.approx(expected, rel=1e-6)


def test_output_must_not_touch_the_source(source: Source, tmp_path: Path) -> None:
    for out in (source.folder / "out", source.folder / ".." / "source" / "deep" / "out"):
        with pytest.raises(OutputError, match="overlaps the source"):
            convert(source.folder, out, Options(device="cpu"))
    before = {p: p.stat().st_mtime_ns for p in source.folder.rglob("*")}
    convert(source.folder, tmp_path / "out", Options(device="cpu"))
    assert {p: p.stat().st_mtime_ns for p in source.folder.rglob("*")} == before
