"""Zero points through a whole conversion: as v2 stores them, and those of zero, which writers store in two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.restore import restore
from marlin_convert.options import Options, ZeroPointReading
from tests.support.gptq_checkpoints import GPTQLayer, pack_columns, quantization_config, write_source
from tests.support.results import assert_exact, assert_restored, weights_of

NAME = "model.layers.0.mlp.down_proj"
CPU = Options(device="cpu", verify=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_of_v2(tmp_path: Path, bits: int) -> None:
    stored = np.random.default_rng(0).integers(0, 2**bits, (2, 256))
    quantization = quantization_config(bits=bits, sym=False, checkpoint_format="gptq_v2")
    source = write_source(
        tmp_path / "source", {NAME: GPTQLayer(bits=bits, stored_zero=stored, v2=True)}, quantization=quantization
    )
    convert(source.folder, tmp_path / "out", CPU)
    assert_exact(source, tmp_path / "out")
    restore(tmp_path / "out", tmp_path / "back", v2=True)
    assert_restored(source, tmp_path / "back")


def zero_of_zero(bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Zero points with a 0 among them [2, 256], and what a writer that subtracts word by word stores."""
    zeros = np.random.default_rng(1).integers(0, 2**bits, (2, 256))
    zeros[0, 3] = 0
    words = pack_columns(zeros, bits).view(np.uint32) - np.uint32(sum(1 << i for i in range(0, 32, bits)))
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    stored = ((words[:, :, None] >> shifts) & np.uint32(2**bits - 1)).reshape(2, 256)
    return zeros, stored.astype(np.int64)


@pytest.mark.parametrize(
    ("meta", "option", "by_word"),
    [
        ({"quantizer": ["gptqmodel:7.7.0"]}, None, True),
        ({"quantizer": "auto-round:0.16"}, None, False),
        (None, "word", True),
        (None, "nibble", False),
        ({"quantizer": ["auto_gptq:0.7"]}, "nibble", False),
    ],
)
def test_a_zero_point_of_zero(tmp_path: Path, meta: Any, option: str | None, by_word: bool) -> None:
    zeros, by_words = zero_of_zero()
    stored = by_words if by_word else (zeros - 1) % 16
    layer = GPTQLayer(stored_zero=stored)
    source = write_source(tmp_path / "source", {NAME: layer}, quantization=quantization_config(sym=False, meta=meta))
    reading = None if option is None else ZeroPointReading(option)
    convert(source.folder, tmp_path / "out", Options(device="cpu", verify=True, zero_points=reading))
    expected = (layer.codes - zeros[layer.groups]) * layer.scale_tensor.double().numpy()[layer.groups]
    np.testing.assert_array_equal(weights_of(tmp_path / "out")[NAME].double().numpy(), expected)
    restore(tmp_path / "out", tmp_path / "back")
    assert_restored(source, tmp_path / "back")
