"""Sources in formats beside GPTQ, straight from the Hub: planned from what few bytes tell, streamed, restored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import format_reader, source_definitions
from tests.support.awq_checkpoints import AWQLayer, write_awq
from tests.support.cli import Run
from tests.support.ct_checkpoints import CTLayer, write_ct
from tests.support.gptq_checkpoints import shuffled, tensors_of
from tests.support.hub_server import Hub, Request

REPO = "quantizers/packed"
DATA = Path(__file__).parents[1] / "data" / "sources"


def packed(folder: Path) -> tuple[Path, dict[str, CTLayer]]:
    """Layers of each kind, 100 times what a plan reads of them."""
    rng = np.random.default_rng(0)
    layers = {
        "model.layers.0.a": CTLayer(K=1024, N=1536, zeros=rng.integers(0, 16, (8, 1536)), scale_dtype=torch.bfloat16),
        "model.layers.0.b": CTLayer(K=1024, N=1536, seed=1, g_idx=shuffled(1024, 128)),
        "model.layers.0.c": CTLayer(K=1024, N=1536, seed=2, bits=8, group_size=-1),
    }
    return write_ct(folder, layers, shards=3), layers


@pytest.mark.parametrize("low_disk", [[], ["--low-disk"]], ids=["", "low disk"])
def test_streamed(hub: Hub, online: Callable[..., Run], tmp_path: Path, low_disk: list[str]) -> None:
    source, layers = packed(tmp_path / "upload")
    hub.add(REPO, source)
    whole: list[str] = []

    def look(request: Request) -> None:
        weights = request.method == "GET" and request.path.endswith(".safetensors")
        if weights and (request.range is None or request.range.endswith("-")):
            whole.append(request.path)

    hub.fault = look
    planned = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--dry-run", "--json")
    assert planned.code == 0, planned.out
    assert not whole
    found = {x["name"]: (x["sym"], x["desc_act"], x["bits"]) for x in planned.json()["layers"]}
    assert found == {
        "model.layers.0.a": (False, False, 4),
        "model.layers.0.b": (True, True, 4),
        "model.layers.0.c": (True, False, 8),
    }
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--verify", "--json", *low_disk)
    assert result.code == 0, result.out
    assert result.json()["verification"]["ok"]
    assert result.json()["source_quantization"]["source_format"] == "compressed-tensors"
    assert len(whole) == 3
    for name, weight in format_reader.read(tmp_path / "out").items():
        np.testing.assert_array_equal(weight, layers[name].weight)
    restored = online("restore", tmp_path / "out", tmp_path / "again", "--json")
    assert restored.code == 0, restored.err
    assert restored.json()["format"] == "compressed-tensors"
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_awq_streamed(hub: Hub, online: Callable[..., Run], tmp_path: Path) -> None:
    """gemm and gemv side by side, which only the shapes tell apart."""
    zeros = np.random.default_rng(0).integers(0, 16, (8, 512))
    layers = {
        "model.layers.0.a": AWQLayer(K=1024, N=512, zeros=zeros),
        "model.layers.0.b": AWQLayer(K=1024, N=512, zeros=zeros, seed=1, layout="gemv"),
    }
    source = write_awq(tmp_path / "upload", layers)
    hub.add(REPO, source)
    result = online(REPO, tmp_path / "out", "--cache-dir", tmp_path / "cache", "--verify", "--low-disk", "--json")
    assert result.code == 0, result.out
    assert result.json()["source_quantization"]["source_format"] == "awq"
    for name, weight in format_reader.read(tmp_path / "out").items():
        np.testing.assert_array_equal(weight, layers[name].weight)
    restored = online("restore", tmp_path / "out", tmp_path / "again", "--json")
    assert restored.code == 0, restored.out
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "name",
    [
        "autoround-auto_awq-g64",
        "autoround-llm_compressor",
        "autoround-plain-g32",
        "awq-gemv-g64",
        "ct-8bit-g64-asym-act-order",
        "ct-g32-asym-int8",
        "ct-stacked-g32-asym",
        "gptq_p-g32-asym",
    ],
)
def test_what_real_tools_write_streamed(hub: Hub, online: Callable[..., Run], tmp_path: Path, name: str) -> None:
    """Each kind of source, converted as it comes and let go of; proved, twice; restored bit for bit."""
    source = tmp_path / "upload"
    source.mkdir()
    for file in ("config.json", "model.safetensors"):
        (source / file).write_bytes((DATA / name / file).read_bytes())
    hub.add(REPO, source)
    out = tmp_path / "out"
    result = online(REPO, out, "--cache-dir", tmp_path / "cache", "--verify", "--low-disk", "--json")
    assert result.code == 0, result.out
    assert result.json()["verification"]["ok"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    expected, found = source_definitions.read(source), format_reader.read(out)
    assert found.keys() == expected.keys()
    for layer, weight in found.items():
        np.testing.assert_array_equal(weight, expected[layer])
    proved = online("verify", out, "--json", "--cache-dir", tmp_path / "cache")
    assert proved.code == 0, proved.out
    restored = online("restore", out, tmp_path / "again", "--json")
    assert restored.code == 0, restored.out
    ours, theirs = tensors_of(tmp_path / "again"), tensors_of(source)
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)
