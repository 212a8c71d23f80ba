"""What cannot be restored: nothing of it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_convert.conversion.convert import convert
from marlin_convert.conversion.restore import restore
from marlin_convert.errors import OutputError, SourceError, UnsupportedError
from marlin_convert.options import Options
from tests.support.gptq_checkpoints import GPTQLayer, Source, shuffled, write_source
from tests.support.marlin_checkpoints import marlin_ext

NAME = "model.layers.0.mlp.down_proj"


def test_nothing_to_restore(tmp_path: Path, source: Source) -> None:
    with pytest.raises(UnsupportedError, match="not a Marlin checkpoint"):
        restore(source.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s: t.pop(f"{NAME}.marlin_perm"), "marlin_perm is missing"),
        (lambda t, s: t[f"{NAME}.marlin_perm"].fill_(3), "marlin_perm is not an order of the 256 rows"),
        (lambda t, s: t[f"{NAME}.marlin_scales"].view(torch.int16)[1].add_(1), "scales differ within a group of 256"),
        (lambda t, s: s["layers"][NAME].update(sym=False), "marlin_qzeros is missing"),
        (lambda t, s: s["layers"][NAME].update(in_features=100), "do not fit its settings"),
        (lambda t, s: s.update(checkpoint_format="marlin"), "the settings say marlin, and .* is a layer of marlin_ext"),
        (lambda t, s: t.update({"x.B": torch.zeros(1).int(), "x.s": torch.zeros(1)}), "both Marlin"),
        (lambda t, s: t.update({"x.marlin_perm": torch.zeros(1)}), "it holds x.marlin_perm, of no layer"),
        (lambda t, s: t.update({"x.qzeros": torch.zeros(1)}), "it holds x.qzeros, of no layer"),
        (lambda t, s: t.update({"x.qweight": torch.zeros(1)}), "it holds x.qweight, of no layer"),
        (lambda t, s: t.update({f"{NAME}.scales": torch.zeros(1)}), "scales beside that layer's Marlin tensors"),
        (lambda t, s: t.update({f"{NAME}.g_idx": torch.zeros(256).int()}), "g_idx beside that layer's Marlin tensors"),
        (lambda t, s: t.update({f"{NAME}.s": torch.zeros(1)}), "s beside that layer's Marlin tensors"),
        (lambda t, s: t.update({f"{NAME}.qweight": torch.zeros(1)}), "qweight beside that layer's Marlin tensors"),
    ],
)
def test_damaged_checkpoints_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], message: str
) -> None:
    layer = GPTQLayer(K=256, N=64, group_size=256 // 2, g_idx=shuffled(256, 128))
    if "group of 256" in message:
        layer = GPTQLayer(K=512, N=64, group_size=256, g_idx=shuffled(512, 256))
    folder = tmp_path / "marlin"
    marlin_ext(folder, {NAME: layer})
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config["quantization_config"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        restore(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    marlin_ext(tmp_path / "marlin", {NAME: GPTQLayer()}, marlin_ext_version=2)
    with pytest.raises(UnsupportedError, match="marlin_ext_version is 2"):
        restore(tmp_path / "marlin", tmp_path / "out")


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    marlin_ext(tmp_path / "marlin", {NAME: GPTQLayer()})
    with pytest.raises(OutputError, match="overlaps the source"):
        restore(tmp_path / "marlin", tmp_path / "marlin" / "gptq")


def test_a_g_idx_that_the_restored_layer_would_not_have(tmp_path: Path) -> None:
    """The source had none: a foreign one beside the layer would become its order."""
    write_source(tmp_path / "source", {NAME: GPTQLayer(g_idx=None)})
    convert(tmp_path / "source", tmp_path / "out", Options(device="cpu"))
    file = tmp_path / "out" / "model.safetensors"
    tensors = {**load_file(file), f"{NAME}.g_idx": torch.from_numpy(shuffled(256, 128).astype(np.int32))}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"it holds .*g_idx beside that layer's Marlin tensors"):
        restore(tmp_path / "out", tmp_path / "back")
