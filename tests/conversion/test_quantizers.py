"""Checkpoints made by real quantizers: a conversion keeps the weights that the quantizer itself reads from its files.

tests/data/quantizers holds them, tools/quantizers/README.md says how they were made. The references are the
quantizers' own; the float64 weights here come from the definition of GPTQ alone.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file

from marlin_convert.conversion.convert import convert
from marlin_convert.formats.marlin_config import read_marlin_settings
from marlin_convert.native.reference import dequantize_layer
from marlin_convert.options import Options
from tests.support import format_reader

DATA = Path(__file__).parents[1] / "data" / "quantizers"
LAYERS = {
    "model.layers.0.self_attn.q_proj": (128, 128),
    "model.layers.0.self_attn.k_proj": (128, 32),
    "model.layers.0.self_attn.v_proj": (128, 32),
    "model.layers.0.self_attn.o_proj": (128, 128),
    "model.layers.0.mlp.gate_proj": (128, 256),
    "model.layers.0.mlp.up_proj": (128, 256),
    "model.layers.0.mlp.down_proj": (256, 128),
}
NAMES = (
    "autoround-g128",
    "autoround-g32-asym",
    "gptqmodel-8bit",
    "gptqmodel-8bit-g32-asym-act-order",
    "gptqmodel-dynamic",
    "gptqmodel-g128",
    "gptqmodel-g128-act-order",
    "gptqmodel-g128-v2",
    "gptqmodel-g32",
    "gptqmodel-g64-asym",
    "gptqmodel-g64-asym-v2",
)


def layers_of(name: str) -> dict[str, tuple[int, int]]:
    """Shapes [K, N] of the quantized layers."""
    skipped = "o_proj" if name == "gptqmodel-dynamic" else None
    return {layer: shape for layer, shape in LAYERS.items() if layer.rpartition(".")[2] != skipped}


def bits_of(name: str, layer: str) -> int:
    return 8 if "8bit" in name or (name == "gptqmodel-dynamic" and layer.endswith("down_proj")) else 4


def numbers(words: npt.NDArray[Any], bits: int) -> npt.NDArray[np.int64]:
    """words [R, C] → [R, 32/bits, C]: the numbers in each word, from the lowest bits up."""
    return np.stack([words.view(np.uint32).astype(np.int64) >> bits * i & 2**bits - 1 for i in range(32 // bits)], 1)


def definition(name: str, layer: str, *, word_by_word: bool = True) -> npt.NDArray[np.float64]:
    """W [K, N] = (code - zero point) · scale of the row's group, from the checkpoint's tensors, in float64.

    Format v1 stores zero points less 1. GPTQModel subtracts from whole words, so 1 is added to whole words again;
    with `word_by_word` false, to each number by itself.
    """
    tensors = load_file(DATA / name / "model.safetensors")
    K, N = LAYERS[layer]
    bits = bits_of(name, layer)
    scales = tensors[f"{layer}.scales"].astype(np.float64)
    qzeros = tensors[f"{layer}.qzeros"].view(np.uint32)
    if word_by_word and not name.endswith("-v2"):
        qzeros = qzeros + np.uint32(0x11111111 if bits == 4 else 0x01010101)
    codes = numbers(tensors[f"{layer}.qweight"], bits).reshape(K, N)
    zeros = numbers(qzeros, bits).transpose(0, 2, 1).reshape(-1, N)
    if not word_by_word and not name.endswith("-v2"):
        zeros = (zeros + 1) % 2**bits
    groups = tensors[f"{layer}.g_idx"]
    return (codes - zeros[groups]) * scales[groups]


def assert_as_the_quantizer_says(name: str, layer: str, weight: npt.NDArray[Any]) -> None:
    """`weight` [K, N], rounded once to fp16, equals the reference: by values in some columns, by hash in all."""
    about = json.loads((DATA / name / "reference.json").read_text(encoding="utf-8"))
    half = weight.astype(np.float16) + np.float16(0)
    assert list(half.shape) == about["layers"][layer]["shape"]
    kept = load_file(DATA / name / "reference.safetensors")[layer]
    assert kept.shape == (half.shape[0], 8)
    np.testing.assert_array_equal(half[:, :8], kept)
    assert hashlib.sha256(half.astype("<f2").tobytes()).hexdigest() == about["layers"][layer]["sha256"]


def test_all_of_the_data_is_tested() -> None:
    assert tuple(sorted(path.name for path in DATA.iterdir())) == NAMES
    for name in NAMES:
        about = json.loads((DATA / name / "reference.json").read_text(encoding="utf-8"))
        assert about["layers"].keys() == layers_of(name).keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_what_the_quantizer_means(name: str) -> None:
    for layer in layers_of(name):
        assert_as_the_quantizer_says(name, layer, definition(name, layer))


@pytest.mark.parametrize("name", ["gptqmodel-g64-asym", "gptqmodel-8bit-g32-asym-act-order"])
def test_zero_points_that_borrow_are_in_the_data(name: str) -> None:
    """Read number by number, these files mean something else: a converter that does so fails here."""
    for layer in layers_of(name):
        assert (definition(name, layer) != definition(name, layer, word_by_word=False)).any()


def test_act_order_is_in_the_data() -> None:
    for name, layer in (("gptqmodel-g128-act-order", "down_proj"), ("gptqmodel-8bit-g32-asym-act-order", "k_proj")):
        tensors = load_file(DATA / name / "model.safetensors")
        (g_idx,) = [tensor for key, tensor in tensors.items() if key.endswith(f"{layer}.g_idx")]
        assert (np.diff(g_idx) < 0).any()


def test_negative_scales_are_in_the_data() -> None:
    tensors = load_file(DATA / "autoround-g128" / "model.safetensors")
    assert all((tensors[f"{layer}.scales"] < 0).any() for layer in LAYERS)


# ---------------------------------------------------------------------------------------------------------------
# Converted


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Each checkpoint's name, and where its conversion, verified, lies."""
    name: str = request.param
    out = tmp_path_factory.mktemp(name) / "out"
    report = convert(DATA / name, out, Options(device="cpu", verify=True))
    assert report.verification is not None
    assert report.verification.ok
    return name, out


def test_the_settings_of_every_layer(converted: tuple[str, Path]) -> None:
    name, out = converted
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert config["checkpoint_format"] == "marlin_ext"  # no layer here has a multiple of 256 columns alone
    settings = read_marlin_settings(config)
    for layer, (K, N) in layers_of(name).items():
        kind = layer.rpartition(".")[2]
        found = settings.layer(layer)
        assert found.bits == bits_of(name, layer)
        mixed = name == "gptqmodel-dynamic" and kind in ("k_proj", "v_proj")
        assert found.sym == ("asym" not in name and not mixed)
        groups = load_file(DATA / name / "model.safetensors")[f"{layer}.scales"].shape[0]
        assert found.group_size == (-1 if groups == 1 else K // groups)
        assert found.desc_act == ("act-order" in name and groups > 1)
        assert found.out_features == (32 if N == 32 else None)  # stored as 64
        assert found.in_features is None


def test_the_converted_weights_are_the_quantizers(converted: tuple[str, Path]) -> None:
    name, out = converted
    settings = read_marlin_settings(json.loads((out / "config.json").read_text())["quantization_config"])
    tensors = {key: torch.from_numpy(value) for key, value in load_file(out / "model.safetensors").items()}
    for layer in layers_of(name):
        found = settings.layer(layer)
        weight = dequantize_layer(
            tensors[f"{layer}.marlin_qweight"],
            tensors[f"{layer}.marlin_scales"],
            tensors.get(f"{layer}.marlin_qzeros"),
            tensors.get(f"{layer}.marlin_perm"),
            bits=found.bits,
            in_features=found.in_features,
            out_features=found.out_features,
            dtype=torch.float32,
        ).numpy()
        np.testing.assert_array_equal(weight, definition(name, layer))
        assert_as_the_quantizer_says(name, layer, weight)


def test_the_published_format_says_the_same(converted: tuple[str, Path]) -> None:
    """Read from docs/concepts/format.md, without any code of the package."""
    name, out = converted
    for layer, weight in format_reader.read(out).items():
        np.testing.assert_array_equal(weight, definition(name, layer))


def test_everything_else_is_as_in_the_source(converted: tuple[str, Path]) -> None:
    name, out = converted
    source, result = load_file(DATA / name / "model.safetensors"), load_file(out / "model.safetensors")
    kinds = (".qweight", ".qzeros", ".scales", ".g_idx")
    plain = {key: tensor for key, tensor in source.items() if not key.endswith(kinds)}
    assert {key for key in result if ".marlin_" not in key} == plain.keys()
    for key, tensor in plain.items():
        assert result[key].dtype == tensor.dtype
        np.testing.assert_array_equal(result[key], tensor)
