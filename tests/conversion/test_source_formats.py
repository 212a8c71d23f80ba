"""Checkpoints in formats beside GPTQ, as real tools write them: converted exactly, and restored bit for bit.

tests/data/sources holds them, tools/quantizers/README.md says how they were made. The references are the tools' own.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.pair import verify_pair
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import UnsupportedError
from marlin_convert.options import Format, Options
from tests.support import format_reader, source_definitions
from tests.support.plans import plan_of

DATA = Path(__file__).parents[1] / "data" / "sources"
NAMES = (
    "autoround-8bit-gptqmodel",
    "autoround-auto_awq-g64",
    "autoround-auto_gptq-g64",
    "autoround-llm_compressor",
    "autoround-plain-g32",
    "awq-g128",
    "awq-g32",
    "awq-g64",
    "awq-gemv-g128",
    "awq-gemv-g32",
    "awq-gemv-g64",
    "ct-8bit-channel-asym-int8",
    "ct-8bit-g64-asym",
    "ct-8bit-g64-asym-act-order",
    "ct-channel",
    "ct-channel-asym-bf16",
    "ct-g128",
    "ct-g32-act-order",
    "ct-g32-asym",
    "ct-g32-asym-int8",
    "ct-mixed-bf16",
    "ct-stacked-8bit-channel-bf16",
    "ct-stacked-g32-asym",
    "gptq_p-8bit-g64-asym",
    "gptq_p-g32-asym",
)
CPU = Options(device="cpu", verify=True)


def rounded(weight: npt.NDArray[np.float64], dtype: torch.dtype) -> torch.Tensor:
    """Rounded once to the type of the scales; exact in float32 before: a number of 9 bits times one of 11."""
    return torch.from_numpy(weight).float().to(dtype) + 0.0


def assert_as_the_tool_says(name: str, layer: str, weight: npt.NDArray[np.float64]) -> None:
    """`weight` [K, N] equals the reference: by values in some columns, by hash in all."""
    about = json.loads((DATA / name / "reference.json").read_text(encoding="utf-8"))
    kept = load_file(DATA / name / "reference.safetensors")[layer]
    own = rounded(weight, kept.dtype)
    assert list(own.shape) == about["layers"][layer]["shape"]
    assert torch.equal(own[:, :8], kept)
    digest = hashlib.sha256(own.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()).hexdigest()
    assert digest == about["layers"][layer]["sha256"]


def raw(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """All tensors of a checkpoint, bit for bit."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for key, tensor in load_file(file).items():
            found[key] = (tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found


def test_all_of_the_data_is_tested() -> None:
    assert tuple(sorted(path.name for path in DATA.iterdir())) == NAMES
    for name in NAMES:
        about = json.loads((DATA / name / "reference.json").read_text(encoding="utf-8"))
        assert about["layers"].keys() == source_definitions.read(DATA / name).keys() != set()


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_is_what_the_tool_means(name: str) -> None:
    for layer, weight in source_definitions.read(DATA / name).items():
        assert_as_the_tool_says(name, layer, weight)


def test_act_order_is_in_the_data() -> None:
    for name in NAMES:
        if "act-order" in name:
            tensors = load_file(DATA / name / "model.safetensors")
            orders = [tensor for key, tensor in tensors.items() if key.endswith("g_idx")]
            assert orders
            assert any((order.diff() < 0).any() for order in orders)


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Each checkpoint's name, and where its conversion, verified, lies."""
    name: str = request.param
    out = tmp_path_factory.mktemp(name) / "out"
    report = convert(DATA / name, out, CPU)
    assert report.verification is not None
    assert report.verification.ok
    assert {x.name for x in report.verification.layers} == source_definitions.read(DATA / name).keys()
    return name, out


def test_the_converted_weights_are_the_source_s(converted: tuple[str, Path]) -> None:
    """Read from docs/concepts/format.md, without any code of the package."""
    name, out = converted
    expected, found = source_definitions.read(DATA / name), format_reader.read(out)
    assert found.keys() == expected.keys()
    for layer, weight in found.items():
        np.testing.assert_array_equal(weight, expected[layer])


def test_everything_else_is_as_in_the_source(converted: tuple[str, Path]) -> None:
    name, out = converted
    source, result = raw(DATA / name), raw(out)
    parts = (".qweight", ".qzeros", ".scales", ".g_idx", "_packed", "_scale", "_shape", "_zero_point", "_g_idx")
    plain = {key: value for key, value in source.items() if not key.endswith(parts)}
    assert {key: value for key, value in result.items() if ".marlin_" not in key} == plain


def test_the_card_and_the_plan_call_the_source_by_its_name(converted: tuple[str, Path]) -> None:
    name, out = converted
    method = json.loads((DATA / name / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "quant_method"
    ]
    title = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound"}.get(method, method)
    assert re.search(rf"a [48 and]+-bit {title} checkpoint", (out / "README.md").read_text(encoding="utf-8"))
    assert plan_of(DATA / name).source_title == title


def test_restored_bit_for_bit(converted: tuple[str, Path], tmp_path: Path) -> None:
    name, out = converted
    report = restore(out, tmp_path / "again", original=True)
    assert raw(tmp_path / "again") == raw(DATA / name)
    assert source_definitions.config(tmp_path / "again") == source_definitions.config(DATA / name)
    assert report.settings_known
    assert verify_pair(tmp_path / "again", out, "cpu").ok


def test_as_gptq_and_back_it_is_the_same(converted: tuple[str, Path], tmp_path: Path) -> None:
    _, out = converted
    report = restore(out, tmp_path / "gptq", v2=True)
    assert report.restored_format == "gptq_v2"
    config = source_definitions.config(tmp_path / "gptq")
    if config["quant_method"] == "auto-round":
        assert config["packing_format"] in ("auto_round", "auto_round:gptqmodel")
    else:
        assert (config["quant_method"], config["checkpoint_format"]) in (("gptq", "gptq_v2"), ("gptq", "gptq_p"))
    name, found = converted[0], source_definitions.read(tmp_path / "gptq")
    expected = source_definitions.read(DATA / name)
    assert found.keys() == expected.keys()
    for layer, weight in found.items():
        np.testing.assert_array_equal(weight, expected[layer])
    convert(tmp_path / "gptq", tmp_path / "again", Options(device="cpu", format=Format.MARLIN_EXT))
    assert raw(tmp_path / "again") == raw(out)


def test_as_gptq_with_zero_points_less_one(converted: tuple[str, Path], tmp_path: Path) -> None:
    """Where a zero point is 0, readers of such files do not agree: it is refused, and says what to do."""
    name, out = converted
    expected = source_definitions.read(DATA / name)
    try:
        restore(out, tmp_path / "gptq")
    except UnsupportedError as error:
        refused = str(error)
    else:
        refused = ""
        found = source_definitions.read(tmp_path / "gptq")
        assert found.keys() == expected.keys()
        for layer, weight in found.items():
            np.testing.assert_array_equal(weight, expected[layer])
    asymmetric = "asym" in name or name.startswith("awq") or name in ("autoround-auto_awq-g64", "autoround-plain-g32")
    assert ("--v2" in refused) == (asymmetric and name != "ct-stacked-g32-asym")  # which has no zero point of 0
